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

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from fastattn.kernels.attention.arguments import LENGTHS, Shape
from fastattn.kernels.attention.primitives import LN2, LOG2E
from fastattn.kernels.attention.specialized.primitives import (
    CONSUMERS,
    ROWS,
    accumulator,
    by_row,
    fetch,
    load_owned,
    new_barriers,
    new_ring,
    operand,
    place_of,
    start_product,
    start_sum,
    store_owned,
    taking_part,
    work_of_program,
)


@gluon.jit
def _produce(
    query, key, value, queries, arrived, keys, values, masks, shape,
    F: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    work = work_of_program(masks, shape, F, BLOCK_N)
    mbarrier.expect(arrived, 2 * CONSUMERS * ROWS * BLOCK_D)
    load_owned(query, queries, arrived, work.b, work.h, work.first_row)
    head = work.h // shape.group
    last_column = work.begin + (work.tiles - 1) * BLOCK_N
    fetch(key, keys, 0, work.b, head, last_column, STAGES, 2 * BLOCK_N * BLOCK_D)
    for tile in range(work.tiles):
        column = last_column - tile * BLOCK_N
        # The keys of a tile are read a pass before its values.
        if tile + 1 < work.tiles:
            fetch(key, keys, tile + 1, work.b, head, column - BLOCK_N, STAGES, 2 * BLOCK_N * BLOCK_D)
        fetch(value, values, tile, work.b, head, column, STAGES, 2 * BLOCK_N * BLOCK_D)


@gluon.jit
def _softmax(score, maximum, scale):
    """(probability, its sums over rows, new maximum, decay of what went before); maxima are of unscaled scores.

    The decay is of the difference of the maxima, exactly 1 where they are the same: of products that the assembler may
    fuse or not it would be off by a rounding, once more at each tile.
    """
    new_maximum = gl.maximum(maximum, gl.max(score, 1))
    # A row that has seen no key yet has maximum -inf: a finite pivot keeps exp(-inf - pivot) = 0 from being NaN.
    pivot = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    decay = gl.exp2((maximum - pivot) * scale)
    probability = gl.exp2(score * scale - (pivot * scale)[:, None])
    return probability, gl.sum(probability, 1), new_maximum, decay


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
        place, _ = place_of(tile, STAGES)
        place_before, phase_before = place_of(tile - 1, STAGES)
        next_place, next_phase = place_of(tile + 1, STAGES)
        score = start_product(queries, keys.tiles.index(place), BLOCK_D, BLOCK_N)
        mbarrier.wait(values.filled.index(place_before), phase_before)
        output = start_sum(output, probability, values.tiles.index(place_before), BLOCK_D, BLOCK_N)
        score = hopper.warpgroup_mma_wait(1, deps=[score])
        mbarrier.arrive(keys.read.index(place))
        score = taking_part(score, row, work, tile, masks, shape, F, HOLES, UPPER, LOWER, BLOCK_N)
        weight, added, maximum, decay = _softmax(score, maximum, scale)
        total = total * decay + added
        # Here, not at the start of the next pass: otherwise the assembler waits for the output before the exponentials.
        mbarrier.wait(keys.filled.index(next_place), next_phase, pred=tile + 1 < work.tiles)
        output = hopper.warpgroup_mma_wait(0, deps=[output])
        mbarrier.arrive(values.read.index(place_before))
        probability = operand(weight, keys.tiles, BLOCK_D)
        output = output * by_row(decay, BLOCK_D)
    return output, probability, total, maximum


@gluon.jit
def _consume(
    out, logsumexp, sinks, all_queries, arrived, keys, values, scale, masks, shape, consumer: gl.constexpr,
    F: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    work = work_of_program(masks, shape, F, BLOCK_N)
    rows: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_N))
    queries = all_queries.index(consumer)
    row = work.first_row + consumer * ROWS + gl.arange(0, ROWS, rows)
    output = gl.zeros([ROWS, BLOCK_D], gl.float32, accumulator(BLOCK_D))
    maximum = gl.full([ROWS], float("-inf"), gl.float32, rows)

    # The last tile of keys: its output is started with the scores of the next.
    mbarrier.wait(arrived, 0)
    mbarrier.wait(keys.filled.index(0), 0)
    score = start_product(queries, keys.tiles.index(0), BLOCK_D, BLOCK_N)
    score = hopper.warpgroup_mma_wait(0, deps=[score])
    mbarrier.arrive(keys.read.index(0))
    score = taking_part(score, row, work, 0, masks, shape, F, True, True, True, BLOCK_N)
    weight, total, maximum, _ = _softmax(score, maximum, scale)
    probability = operand(weight, keys.tiles, BLOCK_D)
    place, phase = place_of(1, STAGES)
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
    place, phase = place_of(work.tiles - 1, STAGES)
    mbarrier.wait(values.filled.index(place), phase)
    output = start_sum(output, probability, values.tiles.index(place), BLOCK_D, BLOCK_N)
    output = hopper.warpgroup_mma_wait(0, deps=[output])

    maximum = maximum * scale
    factor = 1.0
    if sinks is not None:
        # A sink is one more key, of value 0, that every row sees.
        sink = gl.load(sinks + work.h).to(gl.float32) * LOG2E
        last_maximum = gl.maximum(maximum, sink)
        pivot = gl.where(last_maximum == float("-inf"), 0.0, last_maximum)
        factor = gl.exp2(maximum - pivot)
        total = total * factor + gl.exp2(sink - pivot)
        maximum = last_maximum
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    factor = by_row(gl.where(empty, 0.0, factor / total), BLOCK_D)
    # Values that nobody sees may be anything: 0 times them is not always 0.
    output = gl.where(factor == 0.0, 0.0, output * factor)
    store_owned(out, output, queries, work.b, work.h, work.first_row + consumer * ROWS, BLOCK_D)
    number = (gl.cast(work.b, gl.int64) * shape.heads + work.h) * shape.rows + row
    rest = gl.cast(shape.batches, gl.int64) * shape.heads * shape.rows
    high = gl.where(empty, float("-inf"), maximum * LN2 + gl.log2(total) * LN2)
    gl.store(logsumexp + number, high, mask=row < shape.rows)
    gl.store(logsumexp + (rest + number), gl.zeros([ROWS], gl.float32, rows), mask=row < shape.rows)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=LENGTHS)
def attention_forward_specialized(
    query, key, value, sinks, out, logsumexp, scale, masks,
    batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch,
    F: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """query (B, H, L, D), key and value (B, H / group, S, D) -> out (B, H, L, D), logsumexp (2, B, H, L) float32.

    These four but for the logsumexp are descriptors, of tiles of ROWS queries and BLOCK_N keys; ``scale`` > 0 carries
    log2(e). Launched with the 4 warps of the first consumer, one program for each BLOCK_M queries of a head.
    """
    shape = Shape(batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch)
    gl.static_assert(BLOCK_M == CONSUMERS * ROWS)
    # A consumer waits for K_(i+1) before it hands back the place of V_(i-1); the producer fetches V_i before K_(i+2).
    gl.static_assert(STAGES >= 2)
    queries = gl.allocate_shared_memory(query.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], query.layout)
    arrived = new_barriers(1, 1).index(0)
    keys = new_ring(key, BLOCK_D, BLOCK_N, STAGES)
    values = new_ring(value, BLOCK_D, BLOCK_N, STAGES)
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
