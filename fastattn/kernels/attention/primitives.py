"""What every attention kernel shares: which entries take part, their scores, and the dropout mask.

A tile is given by ``row`` and ``column``, the absolute positions of its queries and keys, shaped to broadcast against
it: (BM, 1) and (1, BN) in the forward formulation, (1, BM) and (BN, 1) in the transposed one. The helpers do not care
which. A feature whose pointer is None is absent from the compiled kernel.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x, NATURAL: tl.constexpr):
    """e**x of natural scores, 2**x of scores in units of log 2: exp2 is one instruction, exp is exp2 and a product."""
    return tl.exp2(x * LOG2E) if NATURAL else tl.exp2(x)


@triton.jit
def to_natural(x, NATURAL: tl.constexpr):
    """Scores or their logarithm of a sum, in natural units."""
    return x if NATURAL else x * LN2


@triton.jit
def probability_pivot(logsumexp, NATURAL: tl.constexpr):
    """The number to subtract from scores so that exponential() gives probabilities.

    Rows without a key (-inf) and rows past the end (loaded as -inf) get +inf: exp(score - inf) = 0, never NaN.
    """
    pivot = logsumexp if NATURAL else logsumexp * LOG2E
    return tl.where(logsumexp == float("-inf"), float("inf"), pivot)


@triton.jit
def tile_rows(pointer, position, stride, offset, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows ``position`` (BLOCK,) of a (length, DIM) matrix as (BLOCK, BLOCK_D); what is not ``inside`` reads 0.

    Row offsets are 64-bit: one (batch, head) slice may span more than 2**31 elements.
    """
    address = pointer + position.to(tl.int64)[:, None] * stride + offset[None, :]
    if DIM == BLOCK_D:
        return tl.load(address, mask=inside[:, None], other=0.0)
    return tl.load(address, mask=inside[:, None] & (offset[None, :] < DIM), other=0.0)


@triton.jit
def store_rows(pointer, value, position, stride, offset, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write (BLOCK, BLOCK_D) to rows ``position`` of a (length, DIM) matrix, in the matrix's own dtype."""
    address = pointer + position.to(tl.int64)[:, None] * stride + offset[None, :]
    mask = inside[:, None]
    if DIM != BLOCK_D:
        mask = mask & (offset[None, :] < DIM)
    tl.store(address, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def key_range(
    start_ptr, end_ptr, batch, first_row, last_row, columns, lower, upper,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(begin, end) of the keys that queries first_row..last_row can see; begin is a multiple of BLOCK_N.

    Padding gives the first and one past the last key that is not padding; the band cuts further.
    """
    begin = 0
    end = columns
    if start_ptr is not None:
        begin = tl.load(start_ptr + batch)
        end = tl.load(end_ptr + batch)
    if HAS_LOWER:
        begin = tl.maximum(begin, first_row + lower)
    if HAS_UPPER:
        end = tl.minimum(end, last_row + upper + 1)
    begin = tl.maximum(begin, 0) // BLOCK_N * BLOCK_N
    return begin, end


@triton.jit
def full_range(
    begin, end, first_row, last_row, lower, upper,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(begin, end) of the whole tiles in [begin, end) that the band and the end do not cut; multiples of BLOCK_N."""
    full_begin = begin
    full_end = end
    if HAS_LOWER:
        first = tl.maximum(last_row + lower, 0)
        full_begin = tl.maximum(begin, (first + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
    if HAS_UPPER:
        full_end = tl.minimum(end, first_row + upper + 1)
    full_end = tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N
    full_end = tl.maximum(full_end, full_begin)
    return full_begin, full_end


@triton.jit
def row_range(
    first_column, last_column, rows, lower, upper,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(begin, end) of the queries that see any of the keys first_column..last_column; begin a multiple of BLOCK_M."""
    begin = 0
    end = rows
    if HAS_UPPER:
        begin = tl.maximum(first_column - upper, 0)
    if HAS_LOWER:
        end = tl.minimum(rows, last_column - lower + 1)
    return begin // BLOCK_M * BLOCK_M, end


@triton.jit
def full_row_range(
    begin, end, first_column, last_column, lower, upper,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(begin, end) of the tiles of queries in [begin, end) that the band does not cut; begin a multiple of BLOCK_M."""
    full_begin = begin
    full_end = end
    if HAS_UPPER:
        first = tl.maximum(last_column - upper, 0)
        full_begin = tl.maximum(begin, (first + BLOCK_M - 1) // BLOCK_M * BLOCK_M)
    if HAS_LOWER:
        full_end = tl.minimum(end, tl.maximum(first_column - lower + 1, 0) // BLOCK_M * BLOCK_M)
    full_end = tl.maximum(full_end, full_begin)
    return full_begin, full_end


@triton.jit
def score_tile(
    product, row, column, rows, columns, scale, lower, upper, mask_ptr, mask_stride_row, mask_stride_column,
    padding_ptr, padding_stride,
    MASK_BOOL: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, PADDING_BOOL: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, EDGE: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Scores of a tile from its products <q, k>: scale, additive masks, -inf where the entry takes no part.

    ``scale`` carries log2(e) unless NATURAL. A float mask needs natural units: the lowest float times log2(e) would
    become -inf and turn "very unlikely" into "masked".

    EDGE: the tile may cross the band or the last key. Rows past the end need no mask here: they are not stored, and
    the gradients load their logsumexp as -inf.
    """
    score = product * scale
    if mask_ptr is not None:
        offset = tl.zeros([1, 1], tl.int64)
        inside = offset == 0
        if MASK_ROWS:
            offset = offset + row.to(tl.int64) * mask_stride_row
            inside = inside & (row < rows)
        if MASK_COLUMNS:
            offset = offset + column.to(tl.int64) * mask_stride_column
            inside = inside & (column < columns)
        if MASK_BOOL:
            score = tl.where(tl.load(mask_ptr + offset, mask=inside, other=0) != 0, score, float("-inf"))
        else:
            score = score + tl.load(mask_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if padding_ptr is not None:
        offset = column.to(tl.int64) * padding_stride
        if PADDING_BOOL:
            score = tl.where(tl.load(padding_ptr + offset, mask=column < columns, other=0) != 0, score, float("-inf"))
        else:
            score = score + tl.load(padding_ptr + offset, mask=column < columns, other=0.0).to(tl.float32)
    if EDGE:
        score = tl.where(column < columns, score, float("-inf"))
        if HAS_LOWER:
            score = tl.where(column - row >= lower, score, float("-inf"))
        if HAS_UPPER:
            score = tl.where(column - row <= upper, score, float("-inf"))
    return score


@triton.jit
def dropout_keep(
    seed_ptr, batch_head, first_row, first_column, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which entries of a tile dropout keeps, (BM, BN), or (BN, BM) if TRANSPOSED; ``fastattn.philox`` is its definition.

    One Philox call serves the four entries whose positions differ in bit 3 of row and column: an accumulator of the
    tensor cores holds them in one thread, so no word has to move. first_row and first_column are multiples of 16.
    """
    half_row = tl.arange(0, BLOCK_M // 2)
    half_column = tl.arange(0, BLOCK_N // 2)
    row = first_row + half_row // 8 * 16 + half_row % 8
    column = first_column + half_column // 8 * 16 + half_column % 8
    seed = tl.load(seed_ptr)
    if TRANSPOSED:
        zero = tl.zeros([BLOCK_N // 2, BLOCK_M // 2], tl.uint32)
        column = column[:, None].to(tl.uint32) + zero
        row = row[None, :].to(tl.uint32) + zero
    else:
        zero = tl.zeros([BLOCK_M // 2, BLOCK_N // 2], tl.uint32)
        column = column[None, :].to(tl.uint32) + zero
        row = row[:, None].to(tl.uint32) + zero
    word0, word1, word2, word3 = tl.philox(seed, column, row, batch_head.to(tl.uint32) + zero, zero)
    # word = 2 * (bit 3 of row) + (bit 3 of column): the first join makes the row bit the last axis, the second the
    # column bit.
    word = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    if TRANSPOSED:
        word = tl.reshape(word, [BLOCK_N // 16, 8, BLOCK_M // 16, 8, 2, 2])
        word = tl.reshape(tl.permute(word, (0, 5, 1, 2, 4, 3)), [BLOCK_N, BLOCK_M])
    else:
        word = tl.reshape(word, [BLOCK_M // 16, 8, BLOCK_N // 16, 8, 2, 2])
        word = tl.reshape(tl.permute(word, (0, 4, 1, 2, 5, 3)), [BLOCK_M, BLOCK_N])
    return (word >> 8).to(tl.int32) >= threshold
