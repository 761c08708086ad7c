"""The gradient of the queries by specialised warps: the maths of ``backward.attention_dquery``.

A program owns a block of queries of one head. Its producer fetches tiles of keys and values as in ``forward``; each
consumer, with 64 queries, walks over them:

    start S_i = Q K_i^T, dP_i = dO V_i^T and dQ += dS_(i-1) K_(i-1);  wait for S_i;  P_i = exp(S_i - LSE);
    wait for dP_i;  dS_i = P_i (dP_i - delta);  wait for dQ

A tile of keys is read twice, one pass apart: with three places the next one is fetched meanwhile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from fastattn.kernels.attention.arguments import LENGTHS, Shape
from fastattn.kernels.attention.specialized.primitives import (
    CONSUMERS,
    ROWS,
    accumulator,
    by_row,
    fetch,
    load_owned,
    load_pivot,
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
    query, key, value, dout, queries, douts, arrived, keys, values, masks, shape,
    F: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    work = work_of_program(masks, shape, F, BLOCK_N)
    mbarrier.expect(arrived, 4 * CONSUMERS * ROWS * BLOCK_D)
    load_owned(query, queries, arrived, work.b, work.h, work.first_row)
    load_owned(dout, douts, arrived, work.b, work.h, work.first_row)
    head = work.h // shape.group
    for tile in range(work.tiles):
        column = work.begin + (work.tiles - 1 - tile) * BLOCK_N
        fetch(key, keys, tile, work.b, head, column, STAGES, 2 * BLOCK_N * BLOCK_D)
        fetch(value, values, tile, work.b, head, column, STAGES, 2 * BLOCK_N * BLOCK_D)


@gluon.jit
def _walk(
    dqueries, dscore, queries, douts, keys, values, begin, end, work, row, pivot, delta, scale, masks, shape,
    F: gl.constexpr, HOLES: gl.constexpr, UPPER: gl.constexpr, LOWER: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add to dqueries the tiles before those of [begin, end); the keys of ``begin`` have arrived."""
    for tile in range(begin, end):
        place, phase = place_of(tile, STAGES)
        place_before, _ = place_of(tile - 1, STAGES)
        next_place, next_phase = place_of(tile + 1, STAGES)
        score = start_product(queries, keys.tiles.index(place), BLOCK_D, BLOCK_N)
        mbarrier.wait(values.filled.index(place), phase)
        dprobability = start_product(douts, values.tiles.index(place), BLOCK_D, BLOCK_N)
        dqueries = start_sum(dqueries, dscore, keys.tiles.index(place_before), BLOCK_D, BLOCK_N)
        score = hopper.warpgroup_mma_wait(2, deps=[score])
        score = taking_part(score, row, work, tile, masks, shape, F, HOLES, UPPER, LOWER, BLOCK_N)
        probability = gl.exp2(score * scale - pivot[:, None])
        dprobability = hopper.warpgroup_mma_wait(1, deps=[dprobability])
        mbarrier.arrive(values.read.index(place))
        weight = probability * (dprobability - delta[:, None])
        mbarrier.wait(keys.filled.index(next_place), next_phase, pred=tile + 1 < work.tiles)
        dqueries = hopper.warpgroup_mma_wait(0, deps=[dqueries])
        mbarrier.arrive(keys.read.index(place_before))
        dscore = operand(weight, keys.tiles, BLOCK_D)
    return dqueries, dscore


@gluon.jit
def _consume(
    dquery, logsumexp, deltas, all_queries, all_douts, arrived, keys, values, scale, score_scale, masks, shape,
    consumer: gl.constexpr, F: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    work = work_of_program(masks, shape, F, BLOCK_N)
    rows: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_N))
    queries, douts = all_queries.index(consumer), all_douts.index(consumer)
    row = work.first_row + consumer * ROWS + gl.arange(0, ROWS, rows)
    first = (gl.cast(work.b, gl.int64) * shape.heads + work.h) * shape.rows
    pivot = load_pivot(logsumexp + first, row, shape)
    delta = gl.load(deltas + first + row, mask=row < shape.rows, other=0.0)
    dqueries = gl.zeros([ROWS, BLOCK_D], gl.float32, accumulator(BLOCK_D))

    # The last tile of keys: its part of dqueries is started with the scores of the next.
    mbarrier.wait(arrived, 0)
    mbarrier.wait(keys.filled.index(0), 0)
    score = start_product(queries, keys.tiles.index(0), BLOCK_D, BLOCK_N)
    mbarrier.wait(values.filled.index(0), 0)
    dprobability = start_product(douts, values.tiles.index(0), BLOCK_D, BLOCK_N)
    score = hopper.warpgroup_mma_wait(1, deps=[score])
    score = taking_part(score, row, work, 0, masks, shape, F, True, True, True, BLOCK_N)
    probability = gl.exp2(score * score_scale - pivot[:, None])
    dprobability = hopper.warpgroup_mma_wait(0, deps=[dprobability])
    mbarrier.arrive(values.read.index(0))
    dscore = operand(probability * (dprobability - delta[:, None]), keys.tiles, BLOCK_D)
    place, phase = place_of(1, STAGES)
    mbarrier.wait(keys.filled.index(place), phase, pred=work.tiles > 1)

    if masks.padding is not None:
        dqueries, dscore = _walk(
            dqueries, dscore, queries, douts, keys, values, 1, work.solid, work, row, pivot, delta, score_scale, masks,
            shape, F, True, True, True, BLOCK_D, BLOCK_N, STAGES,
        )  # fmt: skip
    dqueries, dscore = _walk(
        dqueries, dscore, queries, douts, keys, values, work.solid, work.whole, work, row, pivot, delta, score_scale,
        masks, shape, F, False, True, True, BLOCK_D, BLOCK_N, STAGES,
    )  # fmt: skip
    dqueries, dscore = _walk(
        dqueries, dscore, queries, douts, keys, values, work.whole, work.cut, work, row, pivot, delta, score_scale,
        masks, shape, F, False, False, False, BLOCK_D, BLOCK_N, STAGES,
    )  # fmt: skip
    if F.has_lower or masks.padding is not None:
        dqueries, dscore = _walk(
            dqueries, dscore, queries, douts, keys, values, work.cut, work.tiles, work, row, pivot, delta, score_scale,
            masks, shape, F, False, False, True, BLOCK_D, BLOCK_N, STAGES,
        )  # fmt: skip
    place, _ = place_of(work.tiles - 1, STAGES)
    dqueries = start_sum(dqueries, dscore, keys.tiles.index(place), BLOCK_D, BLOCK_N)
    dqueries = hopper.warpgroup_mma_wait(0, deps=[dqueries])

    # Of rows without keys, whatever stands in keys and values that nobody sees: 0 times it is not always 0.
    dqueries = gl.where(by_row(pivot, BLOCK_D) == float("inf"), 0.0, dqueries * scale)
    store_owned(dquery, dqueries, queries, work.b, work.h, work.first_row + consumer * ROWS, BLOCK_D)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=LENGTHS)
def attention_dquery_specialized(
    query, key, value, dout, logsumexp, delta, dquery, scale, score_scale, masks,
    batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch,
    F: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dquery (B, H, L, D) from query, dout (B, H, L, D), key, value (B, H / group, S, D), all of them descriptors of
    tiles of ROWS queries and BLOCK_N keys, and logsumexp (2, B, H, L), delta (B, H, L); ``score_scale`` > 0 carries
    log2(e). Launched as ``attention_forward_specialized``.
    """
    shape = Shape(batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch)
    gl.static_assert(BLOCK_M == CONSUMERS * ROWS)
    # K_(i+1) is waited for before the place of K_(i-1) is handed back.
    gl.static_assert(STAGES >= 3)
    queries = gl.allocate_shared_memory(query.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], query.layout)
    douts = gl.allocate_shared_memory(dout.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], dout.layout)
    arrived = new_barriers(1, 1).index(0)
    keys = new_ring(key, BLOCK_D, BLOCK_N, STAGES)
    values = new_ring(value, BLOCK_D, BLOCK_N, STAGES)
    gl.warp_specialize(
        [
            (
                _consume,
                (dquery, logsumexp, delta, queries, douts, arrived, keys, values, scale, score_scale, masks, shape, 0,
                 F, BLOCK_D, BLOCK_N, STAGES),
            ),
            (
                _consume,
                (dquery, logsumexp, delta, queries, douts, arrived, keys, values, scale, score_scale, masks, shape, 1,
                 F, BLOCK_D, BLOCK_N, STAGES),
            ),
            (
                _produce,
                (query, key, value, dout, queries, douts, arrived, keys, values, masks, shape, F, BLOCK_D, BLOCK_N,
                 STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
