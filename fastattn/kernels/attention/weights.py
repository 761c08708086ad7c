"""Attention weights from the logsumexp, tile by tile: per head, or averaged without a (B, H, L, S) tensor.

    W_ij = keep_ij / (1 - dropout_p) exp(S_ij - LSE_i),   average: mean over the heads of W
"""

import triton
import triton.language as tl

from fastattn.kernels.attention.primitives import (
    dropout_keep,
    exponential,
    key_range,
    probability_pivot,
    score_tile,
    tile_rows,
)


@triton.jit
def attention_weights(
    query_ptr, key_ptr, logsumexp_ptr, weights_ptr, mask_ptr, padding_ptr, start_ptr, end_ptr, seed_ptr,
    query_stride_b, query_stride_h, query_stride_l, key_stride_b, key_stride_h, key_stride_s,
    weights_stride_b, weights_stride_h, weights_stride_row,
    mask_stride_b, mask_stride_h, mask_stride_row, mask_stride_column, padding_stride_b, padding_stride,
    heads, group, averaged, rows, columns, scale, lower, upper, threshold, keep_scale,
    MASK_BOOL: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, PADDING_BOOL: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, NATURAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights (B, H / averaged, L, S): one program owns a tile and sums over ``averaged`` heads, all or 1."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    first_column = program % column_tiles * BLOCK_N
    first_row = program // column_tiles % row_tiles * BLOCK_M
    slice_index = program // column_tiles // row_tiles
    slices = heads // averaged
    batch = slice_index // slices
    first_head = slice_index % slices * averaged
    b = batch.to(tl.int64)
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    offset = tl.arange(0, BLOCK_D)
    inside_rows = row < rows
    inside_columns = column < columns
    if padding_ptr is not None:
        padding_ptr += b * padding_stride_b

    last_row = tl.minimum(first_row + BLOCK_M, rows) - 1
    begin, end = key_range(
        start_ptr, end_ptr, batch, first_row, last_row, columns, lower, upper, HAS_LOWER, HAS_UPPER, BLOCK_N
    )
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # A tile that no key of takes part writes its zeros without a product.
    last_head = tl.where((first_column >= begin) & (first_column < end), first_head + averaged, first_head)
    for head in tl.range(first_head, last_head):
        h = tl.cast(head, tl.int64)
        batch_head = batch * heads + head
        query = tile_rows(
            query_ptr + b * query_stride_b + h * query_stride_h, row, query_stride_l, offset, inside_rows, DIM, BLOCK_D
        )
        key = tile_rows(
            key_ptr + b * key_stride_b + (h // group) * key_stride_h, column, key_stride_s, offset, inside_columns,
            DIM, BLOCK_D,
        )  # fmt: skip
        logsumexp = tl.load(
            logsumexp_ptr + batch_head.to(tl.int64) * rows + row, mask=inside_rows, other=float("-inf")
        )
        head_mask_ptr = mask_ptr
        if mask_ptr is not None:
            head_mask_ptr = mask_ptr + b * mask_stride_b + h * mask_stride_h
        score = score_tile(
            tl.dot(query, tl.trans(key), input_precision=PRECISION), row[:, None], column[None, :], rows, columns,
            scale, lower, upper, head_mask_ptr, mask_stride_row, mask_stride_column, padding_ptr, padding_stride,
            MASK_BOOL, MASK_ROWS, MASK_COLUMNS, PADDING_BOOL, HAS_LOWER, HAS_UPPER, True, NATURAL,
        )  # fmt: skip
        weight = exponential(score - probability_pivot(logsumexp, NATURAL)[:, None], NATURAL)
        if seed_ptr is not None:
            keep = dropout_keep(seed_ptr, batch_head, first_row, first_column, threshold, BLOCK_M, BLOCK_N, False)
            weight = tl.where(keep, weight, 0.0)
        total += weight

    total *= keep_scale / averaged
    weights_ptr += b * weights_stride_b + (first_head // averaged).to(tl.int64) * weights_stride_h
    address = weights_ptr + row.to(tl.int64)[:, None] * weights_stride_row + column[None, :]
    tl.store(
        address, total.to(weights_ptr.dtype.element_ty), mask=inside_rows[:, None] & inside_columns[None, :]
    )
