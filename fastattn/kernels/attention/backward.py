"""The gradient kernels of attention and of its weights.

    P_ij  = exp(S_ij - LSE_i),   delta_i = <dO_i, O_i> - dLSE_i
    dP_ij = keep_ij <dO_i, v_j> / (1 - dropout_p)         attention
    dP_ij = keep_ij dW_ij / (1 - dropout_p)               weights (keep_scale then carries the 1 / H of an average)
    dS_ij = P_ij (dP_ij - delta_i)                        weights: delta = 0, and dLSE_i = -sum_j dS_ij
    dQ_i  = scale sum_j dS_ij k_j,   dK_j = scale sum_i dS_ij q_i,   dV_j = sum_i keep_ij P_ij / (1 - dropout_p) dO_i
    dM    = dS summed over the axes that the mask M broadcasts

No kernel adds to memory another one writes, so the result is the same bits at every run. ``do_ptr`` is None for the
gradient of the weights, ``dweights_ptr`` for that of the output. dK and dV use transposed tiles, keys by queries: P and
dS then feed the products from the accumulator's registers.
"""

import triton
import triton.language as tl

from fastattn.kernels.attention.primitives import (
    dropout_keep,
    exponential,
    full_range,
    full_row_range,
    key_range,
    probability_pivot,
    row_range,
    score_tile,
    store_rows,
    tile_rows,
)


@triton.jit
def attention_delta(
    out_ptr, do_ptr, dlogsumexp_ptr, delta_ptr, out_stride_b, out_stride_h, out_stride_l, do_stride_b, do_stride_h,
    do_stride_l, dlogsumexp_stride_b, dlogsumexp_stride_h, dlogsumexp_stride_l, heads, rows,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (B, H, L) float32 from out and its gradient (B, H, L, D) and, where there is one, the logsumexp's."""
    tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    batch_head = program // tiles
    b = (batch_head // heads).to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    row = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    delta = tl.zeros([BLOCK_M], tl.float32)
    if do_ptr is not None:
        offset = tl.arange(0, BLOCK_D)
        out = tile_rows(
            out_ptr + b * out_stride_b + h * out_stride_h, row, out_stride_l, offset, inside, DIM, BLOCK_D
        )
        do = tile_rows(do_ptr + b * do_stride_b + h * do_stride_h, row, do_stride_l, offset, inside, DIM, BLOCK_D)
        delta += tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if dlogsumexp_ptr is not None:
        address = dlogsumexp_ptr + b * dlogsumexp_stride_b + h * dlogsumexp_stride_h
        delta -= tl.load(address + row.to(tl.int64) * dlogsumexp_stride_l, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta_ptr + batch_head.to(tl.int64) * rows + row, delta, mask=inside)


@triton.jit
def _dscore_tile(
    score, pivot, delta, dvalue_product, dweights_ptr, dweights_stride_row, dweights_stride_column, row, column, rows,
    columns, seed_ptr, batch_head, first_row, first_column, threshold, keep_scale,
    HAS_DO: tl.constexpr, NATURAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(dS, keep P / (1 - dropout_p)) of a tile of either orientation; pivot and delta are shaped like ``row``."""
    probability = exponential(score - pivot, NATURAL)
    dprobability = dvalue_product
    if not HAS_DO:
        address = dweights_ptr + row.to(tl.int64) * dweights_stride_row + column.to(tl.int64) * dweights_stride_column
        inside = (row < rows) & (column < columns)
        dprobability = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    weight = probability
    if seed_ptr is not None:
        keep = dropout_keep(seed_ptr, batch_head, first_row, first_column, threshold, BLOCK_M, BLOCK_N, TRANSPOSED)
        dprobability = tl.where(keep, dprobability * keep_scale, 0.0)
        weight = tl.where(keep, probability * keep_scale, 0.0)
    elif not HAS_DO:
        dprobability *= keep_scale
    return probability * (dprobability - delta), weight


@triton.jit
def _walk_keys(
    dquery, row_sum, query, do, pivot, delta, row, first_row, batch_head, begin, end, rows, columns, scale, lower,
    upper, key_ptr, key_stride, value_ptr, value_stride, dweights_ptr, dweights_stride_row, dweights_stride_column,
    mask_ptr, mask_stride_row, mask_stride_column, padding_ptr, padding_stride, seed_ptr, threshold, keep_scale,
    HAS_DO: tl.constexpr, MASK_BOOL: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr,
    PADDING_BOOL: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, EDGE: tl.constexpr,
    NATURAL: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys [begin, end) to (dquery, row_sum)."""
    offset = tl.arange(0, BLOCK_D)
    for first_column in tl.range(begin, end, BLOCK_N):
        column = first_column + tl.arange(0, BLOCK_N)
        inside = column < columns
        key = tile_rows(key_ptr, column, key_stride, offset, inside, DIM, BLOCK_D)  # [BN, BD]
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BM, BN]
        dproduct = product
        if HAS_DO:
            value = tile_rows(value_ptr, column, value_stride, offset, inside, DIM, BLOCK_D)
            dproduct = tl.dot(do, tl.trans(value), input_precision=PRECISION)
        score = score_tile(
            product, row[:, None], column[None, :], rows, columns, scale, lower, upper, mask_ptr, mask_stride_row,
            mask_stride_column, padding_ptr, padding_stride, MASK_BOOL, MASK_ROWS, MASK_COLUMNS, PADDING_BOOL,
            HAS_LOWER, HAS_UPPER, EDGE, NATURAL,
        )  # fmt: skip
        dscore, _ = _dscore_tile(
            score, pivot[:, None], delta[:, None], dproduct, dweights_ptr, dweights_stride_row, dweights_stride_column,
            row[:, None], column[None, :], rows, columns, seed_ptr, batch_head, first_row, first_column, threshold,
            keep_scale, HAS_DO, NATURAL, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
        if not HAS_DO:
            row_sum += tl.sum(dscore, 1)
        dquery = tl.dot(dscore.to(key.dtype), key, dquery, input_precision=PRECISION)
    return dquery, row_sum


@triton.jit
def attention_dquery(
    query_ptr, key_ptr, value_ptr, do_ptr, dweights_ptr, logsumexp_ptr, delta_ptr, dquery_ptr, dlogsumexp_ptr,
    mask_ptr, padding_ptr, start_ptr, end_ptr, seed_ptr,
    query_stride_b, query_stride_h, query_stride_l, key_stride_b, key_stride_h, key_stride_s,
    value_stride_b, value_stride_h, value_stride_s, do_stride_b, do_stride_h, do_stride_l,
    dweights_stride_b, dweights_stride_h, dweights_stride_row, dweights_stride_column,
    dquery_stride_b, dquery_stride_h, dquery_stride_l,
    mask_stride_b, mask_stride_h, mask_stride_row, mask_stride_column, padding_stride_b, padding_stride,
    heads, group, rows, columns, scale, score_scale, lower, upper, threshold, keep_scale,
    HAS_DO: tl.constexpr, MASK_BOOL: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr,
    PADDING_BOOL: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, NATURAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dquery (B, H, L, D) and, for the weights, dlogsumexp (B, H, L): one program owns BLOCK_M queries of one head."""
    tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    first_row = (tiles - 1 - program % tiles) * BLOCK_M
    batch_head = program // tiles
    batch = batch_head // heads
    b = batch.to(tl.int64)
    h = (batch_head % heads).to(tl.int64)
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < rows
    offset = tl.arange(0, BLOCK_D)

    key_ptr += b * key_stride_b + (h // group) * key_stride_h
    query = tile_rows(
        query_ptr + b * query_stride_b + h * query_stride_h, row, query_stride_l, offset, inside, DIM, BLOCK_D
    )
    do = query
    delta = tl.zeros([BLOCK_M], tl.float32)
    if HAS_DO:
        value_ptr += b * value_stride_b + (h // group) * value_stride_h
        do = tile_rows(do_ptr + b * do_stride_b + h * do_stride_h, row, do_stride_l, offset, inside, DIM, BLOCK_D)
        delta = tl.load(delta_ptr + batch_head.to(tl.int64) * rows + row, mask=inside, other=0.0)
    else:
        dweights_ptr += b * dweights_stride_b + h * dweights_stride_h
    if mask_ptr is not None:
        mask_ptr += b * mask_stride_b + h * mask_stride_h
    if padding_ptr is not None:
        padding_ptr += b * padding_stride_b
    logsumexp = tl.load(
        logsumexp_ptr + batch_head.to(tl.int64) * rows + row, mask=inside, other=float("-inf")
    )
    pivot = probability_pivot(logsumexp, NATURAL)
    dquery = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    last_row = tl.minimum(first_row + BLOCK_M, rows) - 1
    begin, end = key_range(
        start_ptr, end_ptr, batch, first_row, last_row, columns, lower, upper, HAS_LOWER, HAS_UPPER, BLOCK_N
    )
    full_begin, full_end = full_range(
        begin, end, first_row, last_row, lower, upper, HAS_LOWER, HAS_UPPER, BLOCK_N
    )
    if HAS_LOWER:
        dquery, row_sum = _walk_keys(
            dquery, row_sum, query, do, pivot, delta, row, first_row, batch_head, begin, tl.minimum(full_begin, end),
            rows, columns, score_scale, lower, upper, key_ptr, key_stride_s, value_ptr, value_stride_s, dweights_ptr,
            dweights_stride_row, dweights_stride_column, mask_ptr, mask_stride_row, mask_stride_column, padding_ptr,
            padding_stride, seed_ptr, threshold, keep_scale, HAS_DO, MASK_BOOL, MASK_ROWS, MASK_COLUMNS, PADDING_BOOL,
            HAS_LOWER, HAS_UPPER, True, NATURAL, DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    dquery, row_sum = _walk_keys(
        dquery, row_sum, query, do, pivot, delta, row, first_row, batch_head, full_begin, full_end,
        rows, columns, score_scale, lower, upper, key_ptr, key_stride_s, value_ptr, value_stride_s, dweights_ptr,
        dweights_stride_row, dweights_stride_column, mask_ptr, mask_stride_row, mask_stride_column, padding_ptr,
        padding_stride, seed_ptr, threshold, keep_scale, HAS_DO, MASK_BOOL, MASK_ROWS, MASK_COLUMNS, PADDING_BOOL,
        HAS_LOWER, HAS_UPPER, False, NATURAL, DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    dquery, row_sum = _walk_keys(
        dquery, row_sum, query, do, pivot, delta, row, first_row, batch_head, full_end, end,
        rows, columns, score_scale, lower, upper, key_ptr, key_stride_s, value_ptr, value_stride_s, dweights_ptr,
        dweights_stride_row, dweights_stride_column, mask_ptr, mask_stride_row, mask_stride_column, padding_ptr,
        padding_stride, seed_ptr, threshold, keep_scale, HAS_DO, MASK_BOOL, MASK_ROWS, MASK_COLUMNS, PADDING_BOOL,
        HAS_LOWER, HAS_UPPER, True, NATURAL, DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip

    dquery_ptr += b * dquery_stride_b + h * dquery_stride_h
    store_rows(dquery_ptr, dquery * scale, row, dquery_stride_l, offset, inside, DIM, BLOCK_D)
    if not HAS_DO:
        tl.store(dlogsumexp_ptr + batch_head.to(tl.int64) * rows + row, -row_sum, mask=inside)


@triton.jit
def _walk_queries(
    dkey, dvalue, key, value, column, first_column, batch_head, begin, end, rows, columns, scale, lower, upper,
    query_ptr, query_stride, do_ptr, do_stride, logsumexp_ptr, delta_ptr, dweights_ptr, dweights_stride_row,
    dweights_stride_column, mask_ptr, mask_stride_row, mask_stride_column, padding_ptr, padding_stride, seed_ptr,
    threshold, keep_scale,
    HAS_DO: tl.constexpr, MASK_BOOL: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr,
    PADDING_BOOL: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, EDGE: tl.constexpr,
    NATURAL: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the queries [begin, end) of one head to (dkey, dvalue)."""
    offset = tl.arange(0, BLOCK_D)
    for first_row in tl.range(begin, end, BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        inside = row < rows
        query = tile_rows(query_ptr, row, query_stride, offset, inside, DIM, BLOCK_D)  # [BM, BD]
        product = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [BN, BM]
        dproduct = product
        delta = tl.zeros([BLOCK_M], tl.float32)
        do = query
        if HAS_DO:
            do = tile_rows(do_ptr, row, do_stride, offset, inside, DIM, BLOCK_D)
            dproduct = tl.dot(value, tl.trans(do), input_precision=PRECISION)
            delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        pivot = probability_pivot(tl.load(logsumexp_ptr + row, mask=inside, other=float("-inf")), NATURAL)
        score = score_tile(
            product, row[None, :], column[:, None], rows, columns, scale, lower, upper, mask_ptr, mask_stride_row,
            mask_stride_column, padding_ptr, padding_stride, MASK_BOOL, MASK_ROWS, MASK_COLUMNS, PADDING_BOOL,
            HAS_LOWER, HAS_UPPER, EDGE, NATURAL,
        )  # fmt: skip
        dscore, weight = _dscore_tile(
            score, pivot[None, :], delta[None, :], dproduct, dweights_ptr, dweights_stride_row, dweights_stride_column,
            row[None, :], column[:, None], rows, columns, seed_ptr, batch_head, first_row, first_column, threshold,
            keep_scale, HAS_DO, NATURAL, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
        if HAS_DO:
            dvalue = tl.dot(weight.to(do.dtype), do, dvalue, input_precision=PRECISION)
        dkey = tl.dot(dscore.to(query.dtype), query, dkey, input_precision=PRECISION)
    return dkey, dvalue


@triton.jit
def attention_dkey_dvalue(
    query_ptr, key_ptr, value_ptr, do_ptr, dweights_ptr, logsumexp_ptr, delta_ptr, dkey_ptr, dvalue_ptr,
    mask_ptr, padding_ptr, start_ptr, end_ptr, seed_ptr,
    query_stride_b, query_stride_h, query_stride_l, key_stride_b, key_stride_h, key_stride_s,
    value_stride_b, value_stride_h, value_stride_s, do_stride_b, do_stride_h, do_stride_l,
    dweights_stride_b, dweights_stride_h, dweights_stride_row, dweights_stride_column,
    dkey_stride_b, dkey_stride_h, dkey_stride_s, dvalue_stride_b, dvalue_stride_h, dvalue_stride_s,
    mask_stride_b, mask_stride_h, mask_stride_row, mask_stride_column, padding_stride_b, padding_stride,
    key_heads, group, rows, columns, scale, score_scale, lower, upper, threshold, keep_scale,
    HAS_DO: tl.constexpr, MASK_BOOL: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr,
    PADDING_BOOL: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, NATURAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dkey, dvalue (B, H / group, S, D): one program owns BLOCK_N keys of one key head and all its query heads."""
    tiles = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    first_column = program % tiles * BLOCK_N
    batch = program // tiles // key_heads
    key_head = program // tiles % key_heads
    b = batch.to(tl.int64)
    kh = key_head.to(tl.int64)
    column = first_column + tl.arange(0, BLOCK_N)
    inside = column < columns
    offset = tl.arange(0, BLOCK_D)

    key = tile_rows(
        key_ptr + b * key_stride_b + kh * key_stride_h, column, key_stride_s, offset, inside, DIM, BLOCK_D
    )
    value = key
    if HAS_DO:
        value_ptr += b * value_stride_b + kh * value_stride_h
        value = tile_rows(value_ptr, column, value_stride_s, offset, inside, DIM, BLOCK_D)
    if padding_ptr is not None:
        padding_ptr += b * padding_stride_b
    dkey = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    last_column = tl.minimum(first_column + BLOCK_N, columns) - 1
    begin, end = row_range(first_column, last_column, rows, lower, upper, HAS_LOWER, HAS_UPPER, BLOCK_M)
    if start_ptr is not None:
        # A tile of nothing but padding has no gradient.
        padded = (tl.load(start_ptr + batch) > last_column) | (tl.load(end_ptr + batch) <= first_column)
        end = tl.where(padded, begin, end)
    full_begin, full_end = full_row_range(
        begin, end, first_column, last_column, lower, upper, HAS_LOWER, HAS_UPPER, BLOCK_M
    )
    for member in tl.range(0, group):
        head = key_head * group + member
        batch_head = batch * key_heads * group + head
        h = tl.cast(head, tl.int64)
        head_query_ptr = query_ptr + b * query_stride_b + h * query_stride_h
        head_logsumexp_ptr = logsumexp_ptr + batch_head.to(tl.int64) * rows
        head_do_ptr = head_query_ptr
        head_delta_ptr = head_logsumexp_ptr
        head_dweights_ptr = dweights_ptr
        head_mask_ptr = mask_ptr
        if HAS_DO:
            head_do_ptr = do_ptr + b * do_stride_b + h * do_stride_h
            head_delta_ptr = delta_ptr + batch_head.to(tl.int64) * rows
        else:
            head_dweights_ptr = dweights_ptr + b * dweights_stride_b + h * dweights_stride_h
        if mask_ptr is not None:
            head_mask_ptr = mask_ptr + b * mask_stride_b + h * mask_stride_h
        if HAS_UPPER:
            dkey, dvalue = _walk_queries(
                dkey, dvalue, key, value, column, first_column, batch_head, begin, tl.minimum(full_begin, end), rows,
                columns, score_scale, lower, upper, head_query_ptr, query_stride_l, head_do_ptr, do_stride_l,
                head_logsumexp_ptr, head_delta_ptr, head_dweights_ptr, dweights_stride_row, dweights_stride_column,
                head_mask_ptr, mask_stride_row, mask_stride_column, padding_ptr, padding_stride, seed_ptr, threshold,
                keep_scale, HAS_DO, MASK_BOOL, MASK_ROWS, MASK_COLUMNS, PADDING_BOOL, HAS_LOWER, HAS_UPPER, True,
                NATURAL, DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
        dkey, dvalue = _walk_queries(
            dkey, dvalue, key, value, column, first_column, batch_head, full_begin, full_end, rows,
            columns, score_scale, lower, upper, head_query_ptr, query_stride_l, head_do_ptr, do_stride_l,
            head_logsumexp_ptr, head_delta_ptr, head_dweights_ptr, dweights_stride_row, dweights_stride_column,
            head_mask_ptr, mask_stride_row, mask_stride_column, padding_ptr, padding_stride, seed_ptr, threshold,
            keep_scale, HAS_DO, MASK_BOOL, MASK_ROWS, MASK_COLUMNS, PADDING_BOOL, HAS_LOWER, HAS_UPPER, False,
            NATURAL, DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        if HAS_LOWER:
            dkey, dvalue = _walk_queries(
                dkey, dvalue, key, value, column, first_column, batch_head, full_end, end, rows,
                columns, score_scale, lower, upper, head_query_ptr, query_stride_l, head_do_ptr, do_stride_l,
                head_logsumexp_ptr, head_delta_ptr, head_dweights_ptr, dweights_stride_row, dweights_stride_column,
                head_mask_ptr, mask_stride_row, mask_stride_column, padding_ptr, padding_stride, seed_ptr, threshold,
                keep_scale, HAS_DO, MASK_BOOL, MASK_ROWS, MASK_COLUMNS, PADDING_BOOL, HAS_LOWER, HAS_UPPER, True,
                NATURAL, DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip

    store_rows(
        dkey_ptr + b * dkey_stride_b + kh * dkey_stride_h, dkey * scale, column, dkey_stride_s, offset, inside, DIM,
        BLOCK_D,
    )  # fmt: skip
    if HAS_DO:
        dvalue_ptr += b * dvalue_stride_b + kh * dvalue_stride_h
        store_rows(dvalue_ptr, dvalue, column, dvalue_stride_s, offset, inside, DIM, BLOCK_D)
