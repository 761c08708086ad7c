"""The gradients of keys and values by specialised warps: the maths of ``backward.attention_dkey_dvalue``.

A program owns a block of keys of one key head. Its producer fetches tiles of queries and of the output's gradient, of
all query heads one after another; each consumer, with 64 keys, walks over them with transposed tiles, keys by queries:

    start S_i = K Q_i^T and dP_i = V dO_i^T;  wait for S_i;  P_i = exp(S_i - LSE);  start dV += P_i dO_i;
    wait for dP_i;  dS_i = P_i (dP_i - delta);  start dK += dS_i Q_i;  wait for both

The exponentials are computed while dP_i, their products with it while dV, and all while the other group's products run.
"""

from typing import Any, NamedTuple

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
)


class Work(NamedTuple):
    """Keys from ``first_column`` on of key head h of batch b; of each query head ``tiles`` of queries from ``begin``.

    The upper bound cuts tiles before ``whole``, the lower bound from ``cut`` on; both are numbers of tiles.
    """

    b: Any
    h: Any
    first_column: Any
    begin: Any
    tiles: Any
    whole: Any
    cut: Any


@gluon.jit
def _work_of_program(masks, shape, F: gl.constexpr, BLOCK_M: gl.constexpr):
    BLOCK_N: gl.constexpr = CONSUMERS * ROWS
    blocks = gl.cdiv(shape.columns, BLOCK_N)
    program = gl.program_id(0)
    first_column = program % blocks * BLOCK_N
    last_column = gl.minimum(first_column + BLOCK_N, shape.columns) - 1
    key_heads = shape.heads // shape.group
    batch_head = program // blocks
    b = batch_head // key_heads
    begin = 0
    end = shape.rows
    whole_begin = 0
    whole_end = shape.rows
    if F.has_upper:
        begin = gl.maximum(first_column - shape.upper, 0)
        whole_begin = gl.maximum(last_column - shape.upper, 0)
    if F.has_lower:
        end = gl.minimum(end, last_column - shape.lower + 1)
        whole_end = gl.minimum(end, first_column - shape.lower + 1)
    begin = begin // BLOCK_M * BLOCK_M
    tiles = gl.cdiv(gl.maximum(end - begin, 0), BLOCK_M)
    if masks.padding is not None:
        # Nobody sees a block of nothing but padding.
        seen = (gl.load(masks.start + b) <= last_column) & (gl.load(masks.end + b) > first_column)
        tiles = gl.where(seen, tiles, 0)
    whole = gl.minimum(gl.cdiv(gl.maximum(whole_begin - begin, 0), BLOCK_M), tiles)
    cut = tiles
    if F.has_lower:
        cut = gl.minimum(gl.maximum(gl.maximum(whole_end - begin, 0) // BLOCK_M, whole), tiles)
    return Work(b, batch_head % key_heads, first_column, begin, tiles, whole, cut)


@gluon.jit
def _produce(
    query, key, value, dout, all_keys, all_values, arrived, queries, douts, masks, shape,
    F: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    work = _work_of_program(masks, shape, F, BLOCK_M)
    mbarrier.expect(arrived, 4 * CONSUMERS * ROWS * BLOCK_D)
    load_owned(key, all_keys, arrived, work.b, work.h, work.first_column)
    load_owned(value, all_values, arrived, work.b, work.h, work.first_column)
    for tile in range(work.tiles * shape.group):
        head = work.h * shape.group + tile // work.tiles
        row = work.begin + tile % work.tiles * BLOCK_M
        fetch(query, queries, tile, work.b, head, row, STAGES, 2 * BLOCK_M * BLOCK_D)
        fetch(dout, douts, tile, work.b, head, row, STAGES, 2 * BLOCK_M * BLOCK_D)


@gluon.jit
def _within(score, column, row, shape, F: gl.constexpr, UPPER: gl.constexpr, LOWER: gl.constexpr):
    """-inf where the band excludes the entry, by the bounds that may cut this tile; each key has bounds of its own."""
    if UPPER and F.has_upper:
        score = gl.where(row[None, :] >= (column - shape.upper)[:, None], score, float("-inf"))
    if LOWER and F.has_lower:
        score = gl.where(row[None, :] <= (column - shape.lower)[:, None], score, float("-inf"))
    return score


@gluon.jit
def _walk(
    dkeys, dvalues, keys, values, queries, douts, begin, end, tiles_before, work, column, logsumexp, deltas, scale,
    shape, F: gl.constexpr, UPPER: gl.constexpr, LOWER: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Add the tiles [begin, end) of a query head, before which there were ``tiles_before`` of others."""
    for number in range(begin, end):
        tile = tiles_before + number
        place, phase = place_of(tile, STAGES)
        first_row = work.begin + number * BLOCK_M
        row = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, accumulator(BLOCK_M)))
        pivot = load_pivot(logsumexp, row, shape)
        mbarrier.wait(queries.filled.index(place), phase)
        score = start_product(keys, queries.tiles.index(place), BLOCK_D, BLOCK_M)
        mbarrier.wait(douts.filled.index(place), phase)
        dprobability = start_product(values, douts.tiles.index(place), BLOCK_D, BLOCK_M)
        score = hopper.warpgroup_mma_wait(1, deps=[score])
        score = _within(score, column, row, shape, F, UPPER, LOWER)
        probability = gl.exp2(score * scale - pivot[None, :])
        weight = operand(probability, douts.tiles, BLOCK_D)
        dvalues = start_sum(dvalues, weight, douts.tiles.index(place), BLOCK_D, BLOCK_M)
        delta = gl.load(deltas + row, mask=row < shape.rows, other=0.0)
        dprobability = hopper.warpgroup_mma_wait(1, deps=[dprobability])
        dscore = operand(probability * (dprobability - delta[None, :]), queries.tiles, BLOCK_D)
        dkeys = start_sum(dkeys, dscore, queries.tiles.index(place), BLOCK_D, BLOCK_M)
        dkeys, dvalues = hopper.warpgroup_mma_wait(0, deps=[dkeys, dvalues])
        mbarrier.arrive(queries.read.index(place))
        mbarrier.arrive(douts.read.index(place))
    return dkeys, dvalues


@gluon.jit
def _consume(
    dkey, dvalue, logsumexp, deltas, all_keys, all_values, arrived, queries, douts, scale, score_scale, masks, shape,
    consumer: gl.constexpr, F: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    work = _work_of_program(masks, shape, F, BLOCK_M)
    keys, values = all_keys.index(consumer), all_values.index(consumer)
    column = work.first_column + consumer * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(BLOCK_M)))
    dkeys = gl.zeros([ROWS, BLOCK_D], gl.float32, accumulator(BLOCK_D))
    dvalues = gl.zeros([ROWS, BLOCK_D], gl.float32, accumulator(BLOCK_D))
    mbarrier.wait(arrived, 0)
    for member in range(shape.group):
        first = (gl.cast(work.b, gl.int64) * shape.heads + work.h * shape.group + member) * shape.rows
        before = member * work.tiles
        if F.has_upper:
            dkeys, dvalues = _walk(
                dkeys, dvalues, keys, values, queries, douts, 0, work.whole, before, work, column, logsumexp + first,
                deltas + first, score_scale, shape, F, True, True, BLOCK_D, BLOCK_M, STAGES,
            )  # fmt: skip
        dkeys, dvalues = _walk(
            dkeys, dvalues, keys, values, queries, douts, work.whole, work.cut, before, work, column, logsumexp + first,
            deltas + first, score_scale, shape, F, False, False, BLOCK_D, BLOCK_M, STAGES,
        )  # fmt: skip
        if F.has_lower:
            dkeys, dvalues = _walk(
                dkeys, dvalues, keys, values, queries, douts, work.cut, work.tiles, before, work, column,
                logsumexp + first, deltas + first, score_scale, shape, F, False, True, BLOCK_D, BLOCK_M, STAGES,
            )  # fmt: skip

    dkeys = dkeys * scale
    if masks.padding is not None:
        # A key's own row is all that it decides: what padding added up, finite or not, is dropped here.
        place = masks.padding + gl.cast(work.b, gl.int64) * masks.padding_batch
        place += gl.cast(work.first_column, gl.int64) * masks.padding_column
        inside = column < shape.columns
        takes_part = gl.load(place + (column - work.first_column) * masks.padding_column, mask=inside, other=0) != 0
        takes_part = by_row(takes_part, BLOCK_D)
        dkeys = gl.where(takes_part, dkeys, 0.0)
        dvalues = gl.where(takes_part, dvalues, 0.0)
    first_own = work.first_column + consumer * ROWS
    store_owned(dkey, dkeys, keys, work.b, work.h, first_own, BLOCK_D)
    store_owned(dvalue, dvalues, values, work.b, work.h, first_own, BLOCK_D)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=LENGTHS)
def attention_dkey_dvalue_specialized(
    query, key, value, dout, logsumexp, delta, dkey, dvalue, scale, score_scale, masks,
    batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch,
    F: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dkey, dvalue (B, H / group, S, D); arguments as of ``attention_dquery_specialized``, descriptors of tiles of
    BLOCK_M queries and ROWS keys. One program for each BLOCK_N keys of a key head.
    """
    shape = Shape(batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch)
    gl.static_assert(BLOCK_N == CONSUMERS * ROWS)
    gl.static_assert(STAGES >= 2)
    keys = gl.allocate_shared_memory(key.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], key.layout)
    values = gl.allocate_shared_memory(value.dtype, [CONSUMERS, 1, 1, ROWS, BLOCK_D], value.layout)
    arrived = new_barriers(1, 1).index(0)
    queries = new_ring(query, BLOCK_D, BLOCK_M, STAGES)
    douts = new_ring(dout, BLOCK_D, BLOCK_M, STAGES)
    gl.warp_specialize(
        [
            (
                _consume,
                (dkey, dvalue, logsumexp, delta, keys, values, arrived, queries, douts, scale, score_scale, masks,
                 shape, 0, F, BLOCK_D, BLOCK_M, STAGES),
            ),
            (
                _consume,
                (dkey, dvalue, logsumexp, delta, keys, values, arrived, queries, douts, scale, score_scale, masks,
                 shape, 1, F, BLOCK_D, BLOCK_M, STAGES),
            ),
            (
                _produce,
                (query, key, value, dout, keys, values, arrived, queries, douts, masks, shape, F, BLOCK_D, BLOCK_M,
                 STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
