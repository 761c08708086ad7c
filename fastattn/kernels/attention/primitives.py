"""What every attention kernel shares: its arguments, which entries take part, their scores, and the dropout mask.

A tile is BLOCK_M queries from ``first_row`` by BLOCK_N keys from ``first_column``; TRANSPOSED ones are keys by queries.
A feature whose pointer is None is absent from the compiled kernel.

Addresses are a 64-bit start of the tile plus 32-bit offsets inside it: one (batch, head) slice may span more than 2**31
elements, and 32-bit offsets cost half the registers. ``launch`` copies a tensor whose strides are too large for that.
"""

import triton
import triton.language as tl

from fastattn.kernels.attention.packing import number_of_row, rest_of_logsumexp

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x, F: tl.constexpr):
    """e**x of natural scores, 2**x of scores in units of log 2: exp2 is one instruction, exp is exp2 and a product."""
    return tl.exp2(x * LOG2E) if F.natural else tl.exp2(x)


@triton.jit
def hyperbolic_tangent(x):
    """tanh within a few roundings everywhere: near 0, where 1 - e**-2|x| cancels, its series (error 5e-8 at 0.3)."""
    small = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - small) / (1.0 + small)
    square = x * x
    series = square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    series = x + x * square * (-1.0 / 3.0 + square * (2.0 / 15.0) + square * series)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0.0, -large, large))


@triton.jit
def load_pivot(logsumexp, b, h, first_row, shape, F: tl.constexpr, BLOCK_M: tl.constexpr):
    """(pivot, rest) of rows [first_row, first_row + BLOCK_M), to subtract from scores before exponential().

    logsumexp (2, B, H, L) holds the float32 number and the rest it lost, which matters only where a mask adds large
    numbers. Rows without a key (-inf) and rows past the end get pivot +inf: exp(score - inf) = 0, never NaN.
    """
    row = first_row + tl.arange(0, BLOCK_M)
    address = logsumexp + number_of_row(b, h, row, shape)
    high = tl.load(address, mask=row < shape.rows, other=float("-inf"))
    rest = tl.zeros([BLOCK_M], tl.float32)
    if F.natural:
        rest = tl.load(address + rest_of_logsumexp(shape), mask=row < shape.rows, other=0.0)
        pivot = high
    else:
        pivot = high * LOG2E
    return tl.where(high == float("-inf"), float("inf"), pivot), rest


@triton.jit
def probability_tile(score, pivot, rest, F: tl.constexpr):
    """exp(S - LSE)."""
    distance = score - pivot
    if F.natural:
        distance = distance - rest
    return exponential(distance, F)


@triton.jit
def load_rows(rows, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, first_feature=0):
    """BLOCK rows from ``rows.first`` on as (BLOCK, BLOCK_D); past the length and DIM reads 0.

    ``first_feature``: where its BLOCK_D features start. A descriptor's tiles have one size, and its tensor one length.
    """
    if isinstance(rows.tensor, tl.tensor_descriptor):
        place = [tl.cast(rows.batch, tl.int32), tl.cast(rows.head, tl.int32), rows.first, 0]
        result = tl.reshape(rows.tensor.load(place), [BLOCK, BLOCK_D])
    else:
        local = tl.arange(0, BLOCK)[:, None]
        offset = first_feature + tl.arange(0, BLOCK_D)[None, :]
        inside = rows.first + local < rows.length
        if DIM % BLOCK_D != 0:
            inside = inside & (offset < DIM)
        result = tl.load(_start(rows) + (local * rows.tensor.row + offset), mask=inside, other=0.0)
    return result


@triton.jit
def store_rows(rows, value, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write (BLOCK, BLOCK_D) to BLOCK rows from ``rows.first`` on, in the tensor's own dtype."""
    local = tl.arange(0, BLOCK)[:, None]
    offset = tl.arange(0, BLOCK_D)[None, :]
    inside = rows.first + local < rows.length
    if DIM != BLOCK_D:
        inside = inside & (offset < DIM)
    value = value.to(rows.tensor.pointer.dtype.element_ty)
    tl.store(_start(rows) + (local * rows.tensor.row + offset), value, mask=inside)


@triton.jit
def _start(rows):
    tensor = rows.tensor
    first = tl.cast(rows.first, tl.int64) * tensor.row
    return tensor.pointer + rows.batch * tensor.batch + rows.head * tensor.head + first


@triton.jit
def product_tile(
    left_tile, left, right_tile, right, F: tl.constexpr, DIM: tl.constexpr, BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr,
):  # fmt: skip
    """<left_i, right_j> (BLOCK_LEFT, BLOCK_RIGHT) of two tiles of rows, given as loaded and as where they stand.

    Without tensor cores a product keeps the features of its rows in registers. Two times 256 of them spill, so with
    F.piece > 0 the tiles are read again in pieces of that many features.
    """
    if F.piece == 0:
        product = tl.dot(left_tile, tl.trans(right_tile), input_precision=F.precision)
    else:
        product = tl.zeros([BLOCK_LEFT, BLOCK_RIGHT], tl.float32)
        for feature in tl.range(0, DIM, F.piece):
            left_piece = load_rows(left, DIM, BLOCK_LEFT, F.piece, feature)
            right_piece = load_rows(right, DIM, BLOCK_RIGHT, F.piece, feature)
            product = tl.dot(left_piece, tl.trans(right_piece), product, input_precision=F.precision)
    return product


@triton.jit
def tile_positions(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Row and column of each entry from the start of the tile, shaped to broadcast against it."""
    row = tl.arange(0, BLOCK_M)[None, :] if TRANSPOSED else tl.arange(0, BLOCK_M)[:, None]
    column = tl.arange(0, BLOCK_N)[:, None] if TRANSPOSED else tl.arange(0, BLOCK_N)[None, :]
    return row, column


@triton.jit
def key_range(
    batch, first_row, last_row, masks, shape, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(begin, end) of the keys that queries first_row..last_row can see; begin is a multiple of BLOCK_N.

    Padding gives the first and one past the last key that is not padding, segments the same of their keys; the band
    cuts further.
    """
    begin = 0
    end = shape.columns
    if masks.start is not None:
        begin = tl.load(masks.start + batch)
        end = tl.load(masks.end + batch)
    if masks.segment_query is not None:
        first, last = _of_blocks(masks.key_start, masks.key_end, batch, first_row, shape.rows, shape.columns, BLOCK_M)
        begin = tl.maximum(begin, first)
        end = tl.minimum(end, last)
    if F.has_lower:
        begin = tl.maximum(begin, first_row + shape.lower)
    if F.has_upper:
        end = tl.minimum(end, last_row + shape.upper + 1)
    begin = tl.maximum(begin, 0) // BLOCK_N * BLOCK_N
    return begin, end


@triton.jit
def last_full_key(begin, end, first_row, shape, F: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the tiles from ``begin`` stop being whole: the upper bound of the band or the end cuts the next one."""
    stop = end
    if F.has_upper:
        stop = tl.minimum(stop, first_row + shape.upper + 1)
    return tl.maximum(tl.maximum(stop, 0) // BLOCK_N * BLOCK_N, begin)


@triton.jit
def query_range(
    batch, first_column, last_column, masks, shape, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(begin, end) of the queries that see any of the keys first_column..last_column; begin a multiple of BLOCK_M."""
    begin = 0
    end = shape.rows
    if F.has_upper:
        begin = tl.maximum(first_column - shape.upper, 0)
    if F.has_lower:
        end = tl.minimum(end, last_column - shape.lower + 1)
    if masks.segment_query is not None:
        first, last = _of_blocks(
            masks.query_start, masks.query_end, batch, first_column, shape.columns, shape.rows, BLOCK_N
        )
        begin = tl.maximum(begin, first)
        end = tl.minimum(end, last)
    begin = begin // BLOCK_M * BLOCK_M
    if masks.start is not None:
        # Nobody sees a tile of nothing but padding.
        padded = (tl.load(masks.start + batch) > last_column) | (tl.load(masks.end + batch) <= first_column)
        end = tl.where(padded, begin, end)
    return begin, end


@triton.jit
def _of_blocks(starts, ends, batch, first, length, others, BLOCK: tl.constexpr):
    """(start, end) over the blocks of 16 of the tile that starts at ``first``; bounds beyond ``length`` are empty."""
    blocks = tl.cdiv(length, 16)
    block = first // 16 + tl.arange(0, BLOCK // 16)
    start = tl.load(starts + batch * blocks + block, mask=block < blocks, other=2147483647)
    end = tl.load(ends + batch * blocks + block, mask=block < blocks, other=0)
    return tl.minimum(tl.min(start, 0), others), tl.max(end, 0)


@triton.jit
def first_full_query(begin, end, last_column, shape, F: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where the tiles from ``begin`` start being whole: the upper bound of the band cuts those before."""
    start = begin
    if F.has_upper:
        start = tl.maximum(last_column - shape.upper + BLOCK_M - 1, 0) // BLOCK_M * BLOCK_M
    return tl.minimum(tl.maximum(start, begin), tl.maximum(end, begin))


@triton.jit
def capped(score, cap, F: tl.constexpr):
    """(cap * tanh(score), its slope) of scores that are divided by the cap, or what was given where there is no cap."""
    slope = score
    if F.softcap:
        tangent = hyperbolic_tangent(score)
        slope = 1.0 - tangent * tangent
        score = tangent * cap
    return score, slope


@triton.jit
def score_tile(
    product, b, h, first_row, first_column, scale, masks, shape, F: tl.constexpr, EDGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(scores, slope) of a tile from its products <q, k>: scale, cap, masks, -inf where the entry takes no part.

    The slope is the derivative of the capped score by the score; without a cap it is 1 and must not be used.
    ``scale`` carries log2(e) unless natural; with a cap, ``cap`` carries it, and scale is divided by the cap. A float
    mask needs natural units: the lowest float times log2(e) would become -inf and turn "very unlikely" into "masked".

    EDGE: the tile may cross the band or the last key. Rows past the end need no mask here: they are not stored, and
    the gradients load their logsumexp as -inf.
    """
    row, column = tile_positions(BLOCK_M, BLOCK_N, TRANSPOSED)
    inside_column = column < shape.columns - first_column
    score, slope = capped(product * scale, masks.cap, F)
    if masks.mask is not None:
        start = masks.mask + b * masks.mask_batch + h * masks.mask_head
        offset = tl.zeros([1, 1], tl.int32)
        inside = tl.full([1, 1], True, tl.int1)
        if F.mask_rows:
            start += tl.cast(first_row, tl.int64) * masks.mask_row
            offset = offset + row * masks.mask_row
            inside = inside & (first_row + row < shape.rows)
        if F.mask_columns:
            start += tl.cast(first_column, tl.int64) * masks.mask_column
            offset = offset + column * masks.mask_column
            inside = inside & inside_column
        value = tl.load(start + offset, mask=inside, other=0)
        score = tl.where(value != 0, score, float("-inf")) if F.mask_bool else score + value.to(tl.float32)
    if masks.padding is not None:
        start = masks.padding + b * masks.padding_batch + tl.cast(first_column, tl.int64) * masks.padding_column
        value = tl.load(start + column * masks.padding_column, mask=inside_column, other=0)
        score = tl.where(value != 0, score, float("-inf")) if F.padding_bool else score + value.to(tl.float32)
    if masks.slopes is not None:
        steepness = tl.load(masks.slopes + b * masks.slopes_batch + h)
        if not F.natural:
            steepness *= LOG2E
        distance = (row + first_row + shape.shift) - (column + first_column)
        score -= steepness * tl.abs(distance).to(tl.float32)
    if masks.segment_query is not None:
        inside_row = first_row + row < shape.rows
        of_query = tl.load(masks.segment_query + b * shape.rows + first_row + row, mask=inside_row, other=0)
        of_key = tl.load(masks.segment_key + b * shape.columns + first_column + column, mask=inside_column, other=0)
        score = tl.where(of_query == of_key, score, float("-inf"))
    if EDGE:
        score = _within_tile(score, row, column, first_row, first_column, shape, F, TRANSPOSED)
    return score, slope


@triton.jit
def _within_tile(
    score, row, column, first_row, first_column, shape, F: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """-inf where there is no key or the band excludes it.

    What a thread holds few of, rows or, TRANSPOSED, columns, gives the bounds of the others: a tile of differences
    would take a register for each entry.
    """
    offset = first_row - first_column
    past = shape.columns - first_column
    if TRANSPOSED:
        first = tl.zeros_like(column)
        if F.has_upper:
            first = column - (shape.upper + offset)
        first = tl.where(column < past, first, 2147483647)
        score = tl.where(row >= first, score, float("-inf"))
        if F.has_lower:
            score = tl.where(row <= column - (shape.lower + offset), score, float("-inf"))
    else:
        last = tl.zeros_like(row) + (past - 1)
        if F.has_upper:
            last = tl.minimum(last, row + (shape.upper + offset))
        score = tl.where(column <= last, score, float("-inf"))
        if F.has_lower:
            score = tl.where(column >= row + (shape.lower + offset), score, float("-inf"))
    return score


@triton.jit
def dscore_tile(
    score, pivot, rest, delta, dproduct, dweights, b, h, first_row, first_column, shape, dropout,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(dS, weight) of a tile of either orientation; pivot, rest and delta are shaped like its rows.

        P = exp(S - LSE),   dS = P (keep dP / (1 - dropout_p) - delta),   weight = keep P / (1 - dropout_p)

    dP is ``dproduct`` = <dO, v>, or read from ``dweights`` where that is given.
    """
    probability = probability_tile(score, pivot, rest, F)
    dprobability = dproduct
    if dweights.pointer is not None:
        row, column = tile_positions(BLOCK_M, BLOCK_N, TRANSPOSED)
        start = dweights.pointer + b * dweights.batch + h * dweights.head
        start += tl.cast(first_row, tl.int64) * dweights.row + tl.cast(first_column, tl.int64) * dweights.column
        inside = (first_row + row < shape.rows) & (first_column + column < shape.columns)
        address = start + (row * dweights.row + column * dweights.column)
        dprobability = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    weight = probability
    if dropout.seed is not None:
        keep = dropout_keep(dropout, b * shape.heads + h, first_row, first_column, BLOCK_M, BLOCK_N, TRANSPOSED)
        dprobability = tl.where(keep, dprobability * dropout.keep_scale, 0.0)
        weight = tl.where(keep, probability * dropout.keep_scale, 0.0)
    elif dweights.pointer is not None:
        dprobability *= dropout.keep_scale
    return probability * (dprobability - delta), weight


@triton.jit
def dropout_keep(
    dropout, batch_head, first_row, first_column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which entries of a tile dropout keeps, (BM, BN), or (BN, BM) if TRANSPOSED; ``fastattn.philox`` defines it.

    One Philox call serves the four entries whose positions differ in bit 3 of row and column: an accumulator of the
    tensor cores holds them in one thread, so no word has to move. first_row and first_column are multiples of 16.
    """
    half_row = tl.arange(0, BLOCK_M // 2)
    half_column = tl.arange(0, BLOCK_N // 2)
    row = first_row + half_row // 8 * 16 + half_row % 8
    column = first_column + half_column // 8 * 16 + half_column % 8
    if TRANSPOSED:
        zero = tl.zeros([BLOCK_N // 2, BLOCK_M // 2], tl.uint32)
        column = column[:, None].to(tl.uint32) + zero
        row = row[None, :].to(tl.uint32) + zero
    else:
        zero = tl.zeros([BLOCK_M // 2, BLOCK_N // 2], tl.uint32)
        column = column[None, :].to(tl.uint32) + zero
        row = row[:, None].to(tl.uint32) + zero
    slices = batch_head.to(tl.uint32) + zero
    word0, word1, word2, word3 = tl.philox(tl.load(dropout.seed), column, row, slices, zero)
    # word = 2 * (bit 3 of row) + (bit 3 of column): the first join makes the row bit the last axis, the second the
    # column bit.
    word = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    if TRANSPOSED:
        word = tl.reshape(word, [BLOCK_N // 16, 8, BLOCK_M // 16, 8, 2, 2])
        word = tl.reshape(tl.permute(word, (0, 5, 1, 2, 4, 3)), [BLOCK_N, BLOCK_M])
    else:
        word = tl.reshape(word, [BLOCK_M // 16, 8, BLOCK_N // 16, 8, 2, 2])
        word = tl.reshape(tl.permute(word, (0, 4, 1, 2, 5, 3)), [BLOCK_M, BLOCK_N])
    return (word >> 8).to(tl.int32) >= dropout.threshold
