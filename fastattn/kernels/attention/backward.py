"""The gradient kernels of attention and of its weights.

    P_ij  = exp(S_ij - LSE_i),   delta_i = <dO_i, O_i> - dLSE_i
    dP_ij = <dO_i, v_j>                                   attention
    dP_ij = dW_ij                                         weights: delta = 0, and dLSE_i = -sum_j dS_ij
    dS_ij = P_ij (keep_ij dP_ij / (1 - dropout_p) - delta_i)
    dQ_i  = scale sum_j dS_ij c'_ij k_j,   dK_j = scale sum_i dS_ij c'_ij q_i,   c' the slope of the cap, 1 without one
    dV_j = sum_i keep_ij P_ij / (1 - dropout_p) dO_i

No kernel adds to memory another one writes, so the result is the same bits at every run. ``dout.pointer`` is None for
the gradient of the weights, ``dweights.pointer`` for that of the output. dK and dV use transposed tiles, keys by
queries: P and dS then feed the products from the accumulator's registers.
"""

import triton
import triton.language as tl

from fastattn.kernels.attention.arguments import LENGTHS, Rows, Shape
from fastattn.kernels.attention.packing import from_row, number_of_row, sequence
from fastattn.kernels.attention.primitives import (
    dscore_tile,
    first_full_query,
    key_range,
    last_full_key,
    load_pivot,
    load_rows,
    product_tile,
    query_range,
    score_tile,
    store_rows,
)


@triton.jit(do_not_specialize=LENGTHS)
def attention_delta(
    out, dout, dlogsumexp, delta, batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (B, H, L) float32 from out and its gradient (B, H, L, D) and, where there is one, the logsumexp's."""
    shape = Shape(batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch)
    tiles = tl.cdiv(shape.rows, BLOCK_M)
    program = tl.program_id(0)
    batch_head = program // tiles
    b = (batch_head // shape.heads).to(tl.int64)
    h = (batch_head % shape.heads).to(tl.int64)
    first_row = program % tiles * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < shape.rows
    outs = load_rows(Rows(out, b, h, first_row, shape.rows), DIM, BLOCK_M, BLOCK_D).to(tl.float32)
    douts = load_rows(Rows(dout, b, h, first_row, shape.rows), DIM, BLOCK_M, BLOCK_D).to(tl.float32)
    result = tl.sum(outs * douts, 1)
    if dlogsumexp.pointer is not None:
        address = dlogsumexp.pointer + b * dlogsumexp.batch + h * dlogsumexp.head
        result -= tl.load(address + row.to(tl.int64) * dlogsumexp.row, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + number_of_row(b, h, row, shape), result, mask=inside)


@triton.jit
def _walk_keys(
    dqueries, row_sum, queries, query_rows, douts, dout_rows, pivot, rest, deltas, begin, end, b, h, first_row, key,
    value, dweights, scale, masks, dropout, shape, F: tl.constexpr, EDGE: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the keys [begin, end) to (dqueries, row_sum)."""
    for first_column in tl.range(begin, end, BLOCK_N):
        key_rows = Rows(key, b, h // shape.group, first_column, shape.columns)
        keys = load_rows(key_rows, DIM, BLOCK_N, BLOCK_D)  # [BN, BD]
        product = product_tile(queries, query_rows, keys, key_rows, F, DIM, BLOCK_M, BLOCK_N)  # [BM, BN]
        dproduct = product
        if dweights.pointer is None:
            value_rows = Rows(value, b, h // shape.group, first_column, shape.columns)
            values = load_rows(value_rows, DIM, BLOCK_N, BLOCK_D)
            dproduct = product_tile(douts, dout_rows, values, value_rows, F, DIM, BLOCK_M, BLOCK_N)
        score, slope = score_tile(
            product, b, h, first_row, first_column, scale, masks, shape, F, EDGE, BLOCK_M, BLOCK_N, False
        )
        dscore, _ = dscore_tile(
            score, pivot[:, None], rest[:, None], deltas[:, None], dproduct, dweights, b, h, first_row, first_column,
            shape, dropout, F, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
        if dweights.pointer is not None:
            row_sum += tl.sum(dscore, 1)
        if F.softcap:
            dscore *= slope
        dqueries = tl.dot(dscore.to(keys.dtype), keys, dqueries, input_precision=F.precision)
    return dqueries, row_sum


@triton.jit(do_not_specialize=LENGTHS)
def attention_dquery(
    query, key, value, dout, dweights, logsumexp, delta, dquery, dlogsumexp, scale, score_scale, masks, dropout,
    batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch, packed,
    F: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dquery (B, H, L, D) and, for the weights, dlogsumexp (B, H, L): one program owns BLOCK_M queries of one head."""
    shape = Shape(batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch)
    tiles = tl.cdiv(shape.rows, BLOCK_M)
    program = tl.program_id(0)
    first_row = (tiles - 1 - program % tiles) * BLOCK_M
    batch_head = program // tiles
    batch = batch_head // shape.heads
    h = (batch_head % shape.heads).to(tl.int64)
    b, shape, first_query, first_key = sequence(batch, shape, packed)
    if packed.query is not None:
        if first_row >= shape.rows:
            return
        query, dquery = from_row(query, first_query), from_row(dquery, first_query)
        dout, logsumexp, delta = from_row(dout, first_query), logsumexp + first_query, delta + first_query
        key, value = from_row(key, first_key), from_row(value, first_key)
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < shape.rows
    place = number_of_row(b, h, row, shape)

    query_rows = Rows(query, b, h, first_row, shape.rows)
    queries = load_rows(query_rows, DIM, BLOCK_M, BLOCK_D)
    dout_rows = Rows(dout, b, h, first_row, shape.rows)
    douts = queries
    deltas = tl.zeros([BLOCK_M], tl.float32)
    if dweights.pointer is None:
        douts = load_rows(dout_rows, DIM, BLOCK_M, BLOCK_D)
        deltas = tl.load(delta + place, mask=inside, other=0.0)
    pivot, rest = load_pivot(logsumexp, b, h, first_row, shape, F, BLOCK_M)
    dqueries = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    last_row = tl.minimum(first_row + BLOCK_M, shape.rows) - 1
    begin, end = key_range(batch, first_row, last_row, masks, shape, F, BLOCK_M, BLOCK_N)
    edge = begin
    if F.split:
        edge = last_full_key(begin, end, first_row, shape, F, BLOCK_N)
        dqueries, row_sum = _walk_keys(
            dqueries, row_sum, queries, query_rows, douts, dout_rows, pivot, rest, deltas, begin, edge, b, h, first_row,
            key, value, dweights, score_scale, masks, dropout, shape, F, False, DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    dqueries, row_sum = _walk_keys(
        dqueries, row_sum, queries, query_rows, douts, dout_rows, pivot, rest, deltas, edge, end, b, h, first_row,
        key, value, dweights, score_scale, masks, dropout, shape, F, True, DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    store_rows(Rows(dquery, b, h, first_row, shape.rows), dqueries * scale, DIM, BLOCK_M, BLOCK_D)
    if dweights.pointer is not None:
        tl.store(dlogsumexp + place, -row_sum, mask=inside)


@triton.jit
def _walk_queries(
    dkeys, dvalues, keys, key_rows, values, value_rows, begin, end, b, h, first_column, query, dout, logsumexp, delta,
    dweights, scale, masks, dropout, shape, F: tl.constexpr, EDGE: tl.constexpr, OF_KEY: tl.constexpr,
    OF_VALUE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the queries [begin, end) of one head to dkeys if OF_KEY, and to dvalues if OF_VALUE."""
    first_place = number_of_row(b, h, 0, shape)
    for first_row in tl.range(begin, end, BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        inside = row < shape.rows
        query_rows = Rows(query, b, h, first_row, shape.rows)
        queries = load_rows(query_rows, DIM, BLOCK_M, BLOCK_D)  # [BM, BD]
        # Before the products: of 32 exponentials 24 to all are then computed while the second one runs (sm_90, D = 64),
        # and none where this is loaded behind them.
        pivot, rest = load_pivot(logsumexp, b, h, first_row, shape, F, BLOCK_M)
        product = product_tile(keys, key_rows, queries, query_rows, F, DIM, BLOCK_N, BLOCK_M)  # [BN, BM]
        dproduct = product
        douts = queries
        deltas = tl.zeros([BLOCK_M], tl.float32)
        if dweights.pointer is None:
            dout_rows = Rows(dout, b, h, first_row, shape.rows)
            douts = load_rows(dout_rows, DIM, BLOCK_M, BLOCK_D)
            if OF_KEY:
                dproduct = product_tile(values, value_rows, douts, dout_rows, F, DIM, BLOCK_N, BLOCK_M)
                deltas = tl.load(delta + first_place + row, mask=inside, other=0.0)
        score, slope = score_tile(
            product, b, h, first_row, first_column, scale, masks, shape, F, EDGE, BLOCK_M, BLOCK_N, True
        )
        dscore, weight = dscore_tile(
            score, pivot[None, :], rest[None, :], deltas[None, :], dproduct, dweights, b, h, first_row, first_column,
            shape, dropout, F, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
        if OF_VALUE:
            dvalues = tl.dot(weight.to(douts.dtype), douts, dvalues, input_precision=F.precision)
        if OF_KEY:
            if F.softcap:
                dscore *= slope
            dkeys = tl.dot(dscore.to(queries.dtype), queries, dkeys, input_precision=F.precision)
    return dkeys, dvalues


@triton.jit(do_not_specialize=LENGTHS)
def attention_dkey_dvalue(
    query, key, value, dout, dweights, logsumexp, delta, dkey, dvalue, scale, score_scale, masks, dropout,
    batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch, packed,
    F: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dkey, dvalue (B, H / group, S, D): one program owns BLOCK_N keys of one key head and all its query heads.

    Either may be absent, its pointer None; without dkey, value and delta are not read.
    """
    shape = Shape(batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch)
    tiles = tl.cdiv(shape.columns, BLOCK_N)
    key_heads = shape.heads // shape.group
    program = tl.program_id(0)
    first_column = program % tiles * BLOCK_N
    batch = program // tiles // key_heads
    key_head = program // tiles % key_heads
    kh = key_head.to(tl.int64)
    b, shape, first_query, first_key = sequence(batch, shape, packed)
    if packed.query is not None:
        if first_column >= shape.columns:
            return
        query, dout = from_row(query, first_query), from_row(dout, first_query)
        logsumexp, delta = logsumexp + first_query, delta + first_query
        key, value = from_row(key, first_key), from_row(value, first_key)
        if dkey.pointer is not None:
            dkey = from_row(dkey, first_key)
        if dvalue.pointer is not None:
            dvalue = from_row(dvalue, first_key)

    key_rows = Rows(key, b, kh, first_column, shape.columns)
    keys = load_rows(key_rows, DIM, BLOCK_N, BLOCK_D)
    value_rows = Rows(value, b, kh, first_column, shape.columns)
    values = keys
    of_key: tl.constexpr = dkey.pointer is not None
    of_value: tl.constexpr = dvalue.pointer is not None
    if of_key and dweights.pointer is None:
        values = load_rows(value_rows, DIM, BLOCK_N, BLOCK_D)
    dkeys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvalues = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    last_column = tl.minimum(first_column + BLOCK_N, shape.columns) - 1
    begin, end = query_range(batch, first_column, last_column, masks, shape, F, BLOCK_M, BLOCK_N)
    whole = end
    if F.split:
        whole = first_full_query(begin, end, last_column, shape, F, BLOCK_M)
    for member in tl.range(0, shape.group):
        h = (key_head * shape.group + member).to(tl.int64)
        # Whole tiles first: the other way round the assembler serialises every wgmma of a causal call on sm_90 (C7515).
        if F.split:
            dkeys, dvalues = _walk_queries(
                dkeys, dvalues, keys, key_rows, values, value_rows, whole, end, b, h, first_column, query, dout,
                logsumexp, delta, dweights, score_scale, masks, dropout, shape, F, False, of_key, of_value, DIM,
                BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if F.has_lower or F.has_upper or not F.split:
            dkeys, dvalues = _walk_queries(
                dkeys, dvalues, keys, key_rows, values, value_rows, begin, whole, b, h, first_column, query, dout,
                logsumexp, delta, dweights, score_scale, masks, dropout, shape, F, True, of_key, of_value, DIM,
                BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip

    if of_key:
        store_rows(Rows(dkey, b, kh, first_column, shape.columns), dkeys * scale, DIM, BLOCK_N, BLOCK_D)
    if of_value:
        store_rows(Rows(dvalue, b, kh, first_column, shape.columns), dvalues, DIM, BLOCK_N, BLOCK_D)
