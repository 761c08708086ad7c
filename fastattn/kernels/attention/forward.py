"""The forward kernel: online softmax over tiles of keys (Milakov & Gimelshein 2018; Dao et al. 2022).

One program owns BLOCK_M queries of one head and walks over the keys they can see:

    m' = max(m, max_j S_ij),   a = exp(m - m'),   P_ij = exp(S_ij - m')
    l  = a l + sum_j P_ij,     O_i = a O_i + sum_j keep_ij P_ij v_j
    at the end   O_i / (l (1 - dropout_p)),   LSE_i = m + log l
"""

import triton
import triton.language as tl

from fastattn.kernels.attention.primitives import (
    dropout_keep,
    exponential,
    full_range,
    key_range,
    score_tile,
    store_rows,
    tile_rows,
    to_natural,
)


@triton.jit
def _walk_keys(
    output, total, maximum, query, row, first_row, batch_head, begin, end, rows, columns, scale, lower, upper,
    key_ptr, key_stride, value_ptr, value_stride, mask_ptr, mask_stride_row, mask_stride_column, padding_ptr,
    padding_stride, seed_ptr, threshold,
    MASK_BOOL: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, PADDING_BOOL: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, EDGE: tl.constexpr, NATURAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys [begin, end) into (output, total, maximum)."""
    offset = tl.arange(0, BLOCK_D)
    for first_column in tl.range(begin, end, BLOCK_N):
        column = first_column + tl.arange(0, BLOCK_N)
        inside = column < columns
        key = tile_rows(key_ptr, column, key_stride, offset, inside, DIM, BLOCK_D)  # [BN, BD]
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BM, BN]
        score = score_tile(
            product, row[:, None], column[None, :], rows, columns, scale, lower, upper, mask_ptr, mask_stride_row,
            mask_stride_column, padding_ptr, padding_stride, MASK_BOOL, MASK_ROWS, MASK_COLUMNS, PADDING_BOOL,
            HAS_LOWER, HAS_UPPER, EDGE, NATURAL,
        )  # fmt: skip
        new_maximum = tl.maximum(maximum, tl.max(score, 1))
        # A row that has seen no key yet has maximum -inf: a finite pivot keeps exp(-inf - pivot) = 0 from being NaN.
        pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        decay = exponential(maximum - pivot, NATURAL)
        probability = exponential(score - pivot[:, None], NATURAL)
        total = total * decay + tl.sum(probability, 1)
        if seed_ptr is not None:
            keep = dropout_keep(seed_ptr, batch_head, first_row, first_column, threshold, BLOCK_M, BLOCK_N, False)
            probability = tl.where(keep, probability, 0.0)
        value = tile_rows(value_ptr, column, value_stride, offset, inside, DIM, BLOCK_D)  # [BN, BD]
        output = output * decay[:, None]
        output = tl.dot(probability.to(value.dtype), value, output, input_precision=PRECISION)
        maximum = new_maximum
    return output, total, maximum


@triton.jit
def attention_forward(
    query_ptr, key_ptr, value_ptr, out_ptr, logsumexp_ptr, mask_ptr, padding_ptr, start_ptr, end_ptr, seed_ptr,
    query_stride_b, query_stride_h, query_stride_l, key_stride_b, key_stride_h, key_stride_s,
    value_stride_b, value_stride_h, value_stride_s, out_stride_b, out_stride_h, out_stride_l,
    mask_stride_b, mask_stride_h, mask_stride_row, mask_stride_column, padding_stride_b, padding_stride,
    heads, group, rows, columns, scale, lower, upper, threshold, keep_scale,
    MASK_BOOL: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, PADDING_BOOL: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, NATURAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """query (B, H, L, D), key and value (B, H / group, S, D) -> out (B, H, L, D), logsumexp (B, H, L) float32."""
    tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    # The last rows see the most keys under a causal mask: start them first, so that none of them ends alone.
    first_row = (tiles - 1 - program % tiles) * BLOCK_M
    batch_head = program // tiles
    batch = batch_head // heads
    head = batch_head % heads
    b = batch.to(tl.int64)
    h = head.to(tl.int64)
    row = first_row + tl.arange(0, BLOCK_M)
    offset = tl.arange(0, BLOCK_D)

    query_ptr += b * query_stride_b + h * query_stride_h
    key_ptr += b * key_stride_b + (h // group) * key_stride_h
    value_ptr += b * value_stride_b + (h // group) * value_stride_h
    if mask_ptr is not None:
        mask_ptr += b * mask_stride_b + h * mask_stride_h
    if padding_ptr is not None:
        padding_ptr += b * padding_stride_b

    query = tile_rows(query_ptr, row, query_stride_l, offset, row < rows, DIM, BLOCK_D)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)

    last_row = tl.minimum(first_row + BLOCK_M, rows) - 1
    begin, end = key_range(
        start_ptr, end_ptr, batch, first_row, last_row, columns, lower, upper, HAS_LOWER, HAS_UPPER, BLOCK_N
    )
    full_begin, full_end = full_range(
        begin, end, first_row, last_row, lower, upper, HAS_LOWER, HAS_UPPER, BLOCK_N
    )
    if HAS_LOWER:
        output, total, maximum = _walk_keys(
            output, total, maximum, query, row, first_row, batch_head, begin, tl.minimum(full_begin, end), rows,
            columns, scale, lower, upper, key_ptr, key_stride_s, value_ptr, value_stride_s, mask_ptr, mask_stride_row,
            mask_stride_column, padding_ptr, padding_stride, seed_ptr, threshold, MASK_BOOL, MASK_ROWS, MASK_COLUMNS,
            PADDING_BOOL, HAS_LOWER, HAS_UPPER, True, NATURAL, DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    output, total, maximum = _walk_keys(
        output, total, maximum, query, row, first_row, batch_head, full_begin, full_end, rows, columns, scale, lower,
        upper, key_ptr, key_stride_s, value_ptr, value_stride_s, mask_ptr, mask_stride_row, mask_stride_column,
        padding_ptr, padding_stride, seed_ptr, threshold, MASK_BOOL, MASK_ROWS, MASK_COLUMNS, PADDING_BOOL, HAS_LOWER,
        HAS_UPPER, False, NATURAL, DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    output, total, maximum = _walk_keys(
        output, total, maximum, query, row, first_row, batch_head, full_end, end, rows, columns, scale, lower, upper,
        key_ptr, key_stride_s, value_ptr, value_stride_s, mask_ptr, mask_stride_row, mask_stride_column, padding_ptr,
        padding_stride, seed_ptr, threshold, MASK_BOOL, MASK_ROWS, MASK_COLUMNS, PADDING_BOOL, HAS_LOWER, HAS_UPPER,
        True, NATURAL, DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip

    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    output = output * (keep_scale / safe_total)[:, None]
    logarithm = tl.log(safe_total) if NATURAL else tl.log2(safe_total)
    logsumexp = tl.where(empty, float("-inf"), to_natural(maximum + logarithm, NATURAL))
    out_ptr += b * out_stride_b + h * out_stride_h
    store_rows(out_ptr, output, row, out_stride_l, offset, row < rows, DIM, BLOCK_D)
    tl.store(logsumexp_ptr + batch_head.to(tl.int64) * rows + row, logsumexp, mask=row < rows)
