"""The forward kernel of Hopper by specialised warps, in Gluon (Shah et al. 2024, "FlashAttention-3", 3.1 and 3.2).

The maths is ``forward``'s: one program owns a block of queries of one head and walks over the keys they can see. Here
its warps share the work out. A producer has the copy engine (TMA) fetch tiles of keys and of values into rings of
STAGES places; each consumer, a warp group of 64 queries, multiplies and exponentiates, and hands a place back when it
has read it:

    start S_i = Q K_i^T and O += P_(i-1) V_(i-1);  wait for S_i;  P_i = exp(S_i - m);  wait for O;  O = O exp(m' - m)

so that a product always runs during the exponentials: of this group the last one, and of the other group any. No
barrier holds all warps of a program together, and the latency of memory is the producer's alone.

Tiles are walked from the last to the first: those that the end and an upper bound cut come first, and what their
comparisons keep in registers is gone before the tiles that nothing cuts.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# triton 3.6 calls them by other names.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_LN2 = gl.constexpr(0.6931471805599453)
_LOG2E = gl.constexpr(1.4426950408889634)
# Queries of a consumer, the rows of a wgmma; and consumers of a program. A third one would leave each 160 registers.
ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)


class Ring(NamedTuple):
    """STAGES tiles of BLOCK_N rows; of each place a barrier that it is filled, and one that all have read it."""

    tiles: Any
    filled: Any
    read: Any


class Work(NamedTuple):
    """Queries from ``first_row`` on of head h of batch b, and ``tiles`` of keys from ``begin`` on.

    Of the keys [``first_key``, ``end_key``) take part. Counted from the last one, padding has holes in tiles before
    ``solid``, the end or the upper bound cuts tiles before ``whole``, the start or the lower bound from ``cut`` on.
    """

    b: Any
    h: Any
    first_row: Any
    first_key: Any
    end_key: Any
    begin: Any
    tiles: Any
    solid: Any
    whole: Any
    cut: Any


@gluon.constexpr_function
def _accumulator(columns):
    """The layout in which a warp group holds a product of 64 rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def _work_of_program(masks, shape, F: gl.constexpr, BLOCK_N: gl.constexpr):
    """What this program computes; for queries that see no key one tile, all of it masked."""
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    blocks = gl.cdiv(shape.rows, BLOCK_M)
    program = gl.program_id(0)
    # The last rows see the most keys under a causal mask: start them first, so that none of them ends alone.
    first_row = (blocks - 1 - program % blocks) * BLOCK_M
    last_row = gl.minimum(first_row + BLOCK_M, shape.rows) - 1
    batch_head = program // blocks
    b = batch_head // shape.heads
    first_key = 0
    end_key = shape.columns
    holes = 0
    if masks.padding is not None:
        first_key = gl.load(masks.start + b)
        end_key = gl.load(masks.end + b)
        holes = gl.load(masks.holes + b)
    begin = first_key  # of the keys that any row sees, then of those that all see
    end = end_key
    whole_begin = first_key
    whole_end = end_key
    if F.has_lower:
        begin = gl.maximum(begin, first_row + shape.lower)
        whole_begin = gl.maximum(whole_begin, last_row + shape.lower)
    if F.has_upper:
        end = gl.minimum(end, last_row + shape.upper + 1)
        whole_end = gl.minimum(end, first_row + shape.upper + 1)
    begin = begin // BLOCK_N * BLOCK_N
    tiles = gl.maximum(gl.cdiv(end - begin, BLOCK_N), 1)
    solid = 1 + holes * (tiles - 1)
    whole = gl.maximum(tiles - gl.maximum(whole_end - begin, 0) // BLOCK_N, solid)
    cut = gl.maximum(tiles - gl.cdiv(gl.maximum(whole_begin - begin, 0), BLOCK_N), whole)
    return Work(b, batch_head % shape.heads, first_row, first_key, end_key, begin, tiles, solid, whole, cut)


@gluon.jit
def _place(tile, STAGES: gl.constexpr):
    """Place in the ring of a tile, by its number, and the parity of its barriers' phase."""
    return tile % STAGES, (tile // STAGES) & 1


@gluon.jit
def _fetch(rows, ring, tile, batch, head, row, STAGES: gl.constexpr, BYTES: gl.constexpr):
    """Have a tile fetched when all consumers have read the one in its place."""
    place, phase = _place(tile, STAGES)
    mbarrier.wait(ring.read.index(place), phase ^ 1)
    mbarrier.expect(ring.filled.index(place), BYTES)
    _load(rows, [batch, head, row, 0], ring.filled.index(place), ring.tiles.index(place))


@gluon.jit
def _produce(
    query, key, value, queries, arrived, keys, values, masks, shape,
    F: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    work = _work_of_program(masks, shape, F, BLOCK_N)
    mbarrier.expect(arrived, 2 * CONSUMERS * ROWS * BLOCK_D)
    for consumer in gl.static_range(CONSUMERS):
        _load(query, [work.b, work.h, work.first_row + consumer * ROWS, 0], arrived, queries.index(consumer))
    head = work.h // shape.group
    for tile in range(work.tiles):
        column = work.begin + (work.tiles - 1 - tile) * BLOCK_N
        _fetch(key, keys, tile, work.b, head, column, STAGES, 2 * BLOCK_N * BLOCK_D)
        _fetch(value, values, tile, work.b, head, column, STAGES, 2 * BLOCK_N * BLOCK_D)


@gluon.jit
def _start_scores(queries, keys, tile, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Q K^T (ROWS, BN) of a tile that has arrived."""
    place, _ = _place(tile, STAGES)
    rows = keys.tiles.index(place).reshape([BLOCK_N, BLOCK_D])
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, _accumulator(BLOCK_N))
    return hopper.warpgroup_mma(queries, rows.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _start_output(
    output, probability, values, tile, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """O + P V (ROWS, BD) of a tile, when it has arrived."""
    place, phase = _place(tile, STAGES)
    mbarrier.wait(values.filled.index(place), phase)
    rows = values.tiles.index(place).reshape([BLOCK_N, BLOCK_D])
    return hopper.warpgroup_mma(probability, rows, output, is_async=True)


@gluon.jit
def _taking_part(
    score, row, work, tile, masks, shape, F: gl.constexpr, HOLES: gl.constexpr, UPPER: gl.constexpr,
    LOWER: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """-inf where there is no key, or padding or the band excludes it: by what may cut this tile.

    A row compares all columns with one bound of its own: differences of rows and columns would take a register each
    (468 bytes spilled at head dimension 128).
    """
    rows: gl.constexpr = gl.SliceLayout(1, _accumulator(BLOCK_N))
    column = work.begin + (work.tiles - 1 - tile) * BLOCK_N
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, _accumulator(BLOCK_N)))
    if HOLES and masks.padding is not None:
        start = masks.padding + gl.cast(work.b, gl.int64) * masks.padding_batch
        start += gl.cast(column, gl.int64) * masks.padding_column
        inside = columns < shape.columns - column
        value = gl.load(start + columns * masks.padding_column, mask=inside, other=0)
        score = gl.where((value != 0)[None, :], score, float("-inf"))
    columns = columns[None, :]
    if UPPER:
        last = gl.zeros([ROWS], gl.int32, rows) + (work.end_key - 1 - column)
        if F.has_upper:
            last = gl.minimum(last, row + (shape.upper - column))
        score = gl.where(columns <= last[:, None], score, float("-inf"))
    if LOWER and (F.has_lower or masks.padding is not None):
        first = gl.zeros([ROWS], gl.int32, rows) + (work.first_key - column)
        if F.has_lower:
            first = gl.maximum(first, row + (shape.lower - column))
        score = gl.where(columns >= first[:, None], score, float("-inf"))
    return score


@gluon.jit
def _softmax(score, maximum, scale):
    """(probability, its sums over rows, new maximum, decay of what went before); maxima are of unscaled scores."""
    new_maximum = gl.maximum(maximum, gl.max(score, 1))
    # A row that has seen no key yet has maximum -inf: a finite pivot keeps exp(-inf - pivot) = 0 from being NaN.
    pivot = gl.where(new_maximum == float("-inf"), 0.0, new_maximum * scale)
    decay = gl.exp2(maximum * scale - pivot)
    probability = gl.exp2(score * scale - pivot[:, None])
    return probability, gl.sum(probability, 1), new_maximum, decay


@gluon.jit
def _operand(probability, like, BLOCK_D: gl.constexpr):
    """Probabilities in the dtype of ``like``, where a wgmma finds its first operand: no number changes its thread."""
    layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=_accumulator(BLOCK_D), k_width=2)
    return gl.convert_layout(probability.to(like.dtype), layout)


@gluon.jit
def _of_output(rows, BLOCK_D: gl.constexpr):
    """One number for each row, to multiply the output with."""
    return gl.convert_layout(rows, gl.SliceLayout(1, _accumulator(BLOCK_D)))[:, None]


@gluon.jit
def _walk(
    output, probability, total, maximum, queries, keys, values, begin, end, work, row, scale, masks, shape,
    F: gl.constexpr, HOLES: gl.constexpr, UPPER: gl.constexpr, LOWER: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fold tiles [begin, end) into (total, maximum), and the ones before them into output.

    The keys of ``begin`` have arrived; ``probability`` is the tile's before it.
    """
    for tile in range(begin, end):
        place, _ = _place(tile, STAGES)
        place_before, _ = _place(tile - 1, STAGES)
        next_place, next_phase = _place(tile + 1, STAGES)
        score = _start_scores(queries, keys, tile, BLOCK_D, BLOCK_N, STAGES)
        output = _start_output(output, probability, values, tile - 1, BLOCK_D, BLOCK_N, STAGES)
        score = hopper.warpgroup_mma_wait(1, deps=[score])
        mbarrier.arrive(keys.read.index(place))
        score = _taking_part(score, row, work, tile, masks, shape, F, HOLES, UPPER, LOWER, BLOCK_N)
        weight, added, maximum, decay = _softmax(score, maximum, scale)
        total = total * decay + added
        # Here, not at the start of the next pass: otherwise the assembler waits for the output before the exponentials.
        mbarrier.wait(keys.filled.index(next_place), next_phase, pred=tile + 1 < work.tiles)
        output = hopper.warpgroup_mma_wait(0, deps=[output])
        mbarrier.arrive(values.read.index(place_before))
        probability = _operand(weight, keys.tiles, BLOCK_D)
        output = output * _of_output(decay, BLOCK_D)
    return output, probability, total, maximum


@gluon.jit
def _consume(
    out, logsumexp, sinks, all_queries, arrived, keys, values, scale, masks, shape, consumer: gl.constexpr,
    F: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    work = _work_of_program(masks, shape, F, BLOCK_N)
    rows: gl.constexpr = gl.SliceLayout(1, _accumulator(BLOCK_N))
    queries = all_queries.index(consumer).reshape([ROWS, BLOCK_D])
    row = work.first_row + consumer * ROWS + gl.arange(0, ROWS, rows)
    output = gl.zeros([ROWS, BLOCK_D], gl.float32, _accumulator(BLOCK_D))
    maximum = gl.full([ROWS], float("-inf"), gl.float32, rows)

    # The last tile of keys: its output is started with the scores of the next.
    mbarrier.wait(arrived, 0)
    mbarrier.wait(keys.filled.index(0), 0)
    score = _start_scores(queries, keys, 0, BLOCK_D, BLOCK_N, STAGES)
    score = hopper.warpgroup_mma_wait(0, deps=[score])
    mbarrier.arrive(keys.read.index(0))
    score = _taking_part(score, row, work, 0, masks, shape, F, True, True, True, BLOCK_N)
    weight, total, maximum, _ = _softmax(score, maximum, scale)
    probability = _operand(weight, keys.tiles, BLOCK_D)
    place, phase = _place(1, STAGES)
    mbarrier.wait(keys.filled.index(place), phase, pred=work.tiles > 1)

    if masks.padding is not None:
        output, probability, total, maximum = _walk(
            output, probability, total, maximum, queries, keys, values, 1, work.solid, work, row, scale, masks, shape,
            F, True, True, True, BLOCK_D, BLOCK_N, STAGES,
        )  # fmt: skip
    output, probability, total, maximum = _walk(
        output, probability, total, maximum, queries, keys, values, work.solid, work.whole, work, row, scale, masks,
        shape, F, False, True, True, BLOCK_D, BLOCK_N, STAGES,
    )  # fmt: skip
    output, probability, total, maximum = _walk(
        output, probability, total, maximum, queries, keys, values, work.whole, work.cut, work, row, scale, masks,
        shape, F, False, False, False, BLOCK_D, BLOCK_N, STAGES,
    )  # fmt: skip
    if F.has_lower or masks.padding is not None:
        output, probability, total, maximum = _walk(
            output, probability, total, maximum, queries, keys, values, work.cut, work.tiles, work, row, scale, masks,
            shape, F, False, False, True, BLOCK_D, BLOCK_N, STAGES,
        )  # fmt: skip
    output = _start_output(output, probability, values, work.tiles - 1, BLOCK_D, BLOCK_N, STAGES)
    output = hopper.warpgroup_mma_wait(0, deps=[output])

    maximum = maximum * scale
    if sinks is not None:
        # A sink is one more key, of value 0, that every row sees.
        sink = gl.load(sinks + work.h).to(gl.float32) * _LOG2E
        last_maximum = gl.maximum(maximum, sink)
        pivot = gl.where(last_maximum == float("-inf"), 0.0, last_maximum)
        decay = gl.exp2(maximum - pivot)
        total = total * decay + gl.exp2(sink - pivot)
        output = output * _of_output(decay, BLOCK_D)
        maximum = last_maximum
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    output = output * _of_output(1.0 / total, BLOCK_D)
    # Through the place of the queries, which nobody reads any more. What lies past the end of ``out`` is not written.
    queries.store(output.to(keys.tiles.dtype))
    hopper.fence_async_shared()
    _store(out, [work.b, work.h, work.first_row + consumer * ROWS, 0], all_queries.index(consumer))
    number = (gl.cast(work.b, gl.int64) * shape.heads + work.h) * shape.rows + row
    rest = gl.cast(shape.batches, gl.int64) * shape.heads * shape.rows
    high = gl.where(empty, float("-inf"), maximum * _LN2 + gl.log2(total) * _LN2)
    gl.store(logsumexp + number, high, mask=row < shape.rows)
    gl.store(logsumexp + (rest + number), gl.zeros([ROWS], gl.float32, rows), mask=row < shape.rows)
    tma.store_wait(0)


@gluon.jit
def _barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """Barriers of STAGES places, each of which waits for COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(barriers.index(place), count=COUNT)
    return barriers


@gluon.jit
def _ring(rows, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    tiles = gl.allocate_shared_memory(rows.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], rows.layout)
    return Ring(tiles, _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS))


@gluon.jit(do_not_specialize=("shape",))
def attention_forward_specialized(
    query, key, value, sinks, out, logsumexp, scale, masks, shape,
    F: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """query (B, H, L, D), key and value (B, H / group, S, D) -> out (B, H, L, D), logsumexp (2, B, H, L) float32.

    These four but for the logsumexp are descriptors, of tiles of ROWS queries and BLOCK_N keys; ``scale`` > 0 carries
    log2(e). Launched with the 4 warps of the first consumer, one program for each BLOCK_M queries of a head.
    """
    gl.static_assert(BLOCK_M == CONSUMERS * ROWS)
    # The producer fetches V_i before K_(i+1), which a consumer waits for before it hands back the place of V_(i-1).
    gl.static_assert(STAGES >= 2)
    queries = gl.allocate_shared_memory(query.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], query.layout)
    arrived = _barriers(1, 1).index(0)
    keys = _ring(key, BLOCK_D, BLOCK_N, STAGES)
    values = _ring(value, BLOCK_D, BLOCK_N, STAGES)
    gl.warp_specialize(
        [
            (
                _consume,
                (out, logsumexp, sinks, queries, arrived, keys, values, scale, masks, shape, 0, F, BLOCK_D, BLOCK_N,
                 STAGES),
            ),
            (
                _consume,
                (out, logsumexp, sinks, queries, arrived, keys, values, scale, masks, shape, 1, F, BLOCK_D, BLOCK_N,
                 STAGES),
            ),
            (_produce, (query, key, value, queries, arrived, keys, values, masks, shape, F, BLOCK_D, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
