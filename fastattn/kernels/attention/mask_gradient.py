"""The gradient of an additive mask, summed over the axes the mask broadcasts, without a (B, H, L, S) tensor.

    dM = sum over the broadcast axes of dS,   dS as in ``backward``

One program owns one tile of the mask and recomputes dS for every batch, head and, where the mask has a single row or
column, every tile of rows or columns that shares it. Storing dS instead would move B H L S numbers out and back.
"""

import triton
import triton.language as tl

from fastattn.kernels.attention.backward import _dscore_tile
from fastattn.kernels.attention.primitives import probability_pivot, score_tile, tile_rows


@triton.jit
def attention_dmask(
    query_ptr, key_ptr, value_ptr, do_ptr, dweights_ptr, logsumexp_ptr, delta_ptr, dmask_ptr,
    mask_ptr, padding_ptr, start_ptr, end_ptr, seed_ptr,
    query_stride_b, query_stride_h, query_stride_l, key_stride_b, key_stride_h, key_stride_s,
    value_stride_b, value_stride_h, value_stride_s, do_stride_b, do_stride_h, do_stride_l,
    dweights_stride_b, dweights_stride_h, dweights_stride_row, dweights_stride_column,
    dmask_batches, dmask_heads, dmask_stride_b, dmask_stride_h, dmask_stride_row,
    mask_stride_b, mask_stride_h, mask_stride_row, mask_stride_column, padding_stride_b, padding_stride,
    batches, heads, group, rows, columns, scale, lower, upper, threshold, keep_scale,
    GRAD_ROWS: tl.constexpr, GRAD_COLUMNS: tl.constexpr,
    HAS_DO: tl.constexpr, MASK_BOOL: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr,
    PADDING_BOOL: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, NATURAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dmask (dmask_batches, dmask_heads, L or 1, S or 1), each of the first two 1 or full; contiguous columns."""
    row_tiles = tl.cdiv(rows, BLOCK_M) if GRAD_ROWS else 1
    column_tiles = tl.cdiv(columns, BLOCK_N) if GRAD_COLUMNS else 1
    program = tl.program_id(0)
    own_row = program // column_tiles % row_tiles * BLOCK_M
    own_column = program % column_tiles * BLOCK_N
    slice_index = program // column_tiles // row_tiles
    own_batch = slice_index // dmask_heads
    own_head = slice_index % dmask_heads

    begin_row = own_row if GRAD_ROWS else 0
    end_row = tl.minimum(own_row + BLOCK_M, rows) if GRAD_ROWS else rows
    begin_column = own_column if GRAD_COLUMNS else 0
    end_column = tl.minimum(own_column + BLOCK_N, columns) if GRAD_COLUMNS else columns
    end_batch = tl.where(dmask_batches == 1, batches, own_batch + 1)
    end_head = tl.where(dmask_heads == 1, heads, own_head + 1)
    offset = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in tl.range(own_batch, end_batch):
        b = tl.cast(batch, tl.int64)
        for head in tl.range(own_head, end_head):
            h = tl.cast(head, tl.int64)
            batch_head = batch * heads + head
            head_mask_ptr = mask_ptr
            if mask_ptr is not None:
                head_mask_ptr = mask_ptr + b * mask_stride_b + h * mask_stride_h
            batch_padding_ptr = padding_ptr
            if padding_ptr is not None:
                batch_padding_ptr = padding_ptr + b * padding_stride_b
            for first_row in tl.range(begin_row, end_row, BLOCK_M):
                row = first_row + tl.arange(0, BLOCK_M)
                inside = row < rows
                query = tile_rows(
                    query_ptr + b * query_stride_b + h * query_stride_h, row, query_stride_l, offset, inside, DIM,
                    BLOCK_D,
                )  # fmt: skip
                do = query
                delta = tl.zeros([BLOCK_M], tl.float32)
                head_dweights_ptr = dweights_ptr
                if HAS_DO:
                    do = tile_rows(
                        do_ptr + b * do_stride_b + h * do_stride_h, row, do_stride_l, offset, inside, DIM, BLOCK_D
                    )
                    delta = tl.load(delta_ptr + batch_head.to(tl.int64) * rows + row, mask=inside, other=0.0)
                else:
                    head_dweights_ptr = dweights_ptr + b * dweights_stride_b + h * dweights_stride_h
                logsumexp = tl.load(
                    logsumexp_ptr + batch_head.to(tl.int64) * rows + row, mask=inside, other=float("-inf")
                )
                pivot = probability_pivot(logsumexp, NATURAL)
                for first_column in tl.range(begin_column, end_column, BLOCK_N):
                    column = first_column + tl.arange(0, BLOCK_N)
                    key = tile_rows(
                        key_ptr + b * key_stride_b + (h // group) * key_stride_h, column, key_stride_s, offset,
                        column < columns, DIM, BLOCK_D,
                    )  # fmt: skip
                    product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
                    dproduct = product
                    if HAS_DO:
                        value = tile_rows(
                            value_ptr + b * value_stride_b + (h // group) * value_stride_h, column, value_stride_s,
                            offset, column < columns, DIM, BLOCK_D,
                        )  # fmt: skip
                        dproduct = tl.dot(do, tl.trans(value), input_precision=PRECISION)
                    score = score_tile(
                        product, row[:, None], column[None, :], rows, columns, scale, lower, upper, head_mask_ptr,
                        mask_stride_row, mask_stride_column, batch_padding_ptr, padding_stride, MASK_BOOL, MASK_ROWS,
                        MASK_COLUMNS, PADDING_BOOL, HAS_LOWER, HAS_UPPER, True, NATURAL,
                    )  # fmt: skip
                    dscore, _ = _dscore_tile(
                        score, pivot[:, None], delta[:, None], dproduct, head_dweights_ptr, dweights_stride_row,
                        dweights_stride_column, row[:, None], column[None, :], rows, columns, seed_ptr, batch_head,
                        first_row, first_column, threshold, keep_scale, HAS_DO, NATURAL, BLOCK_M, BLOCK_N, False,
                    )  # fmt: skip
                    total += dscore

    dmask_ptr += own_batch.to(tl.int64) * dmask_stride_b + own_head.to(tl.int64) * dmask_stride_h
    out_row = own_row + tl.arange(0, BLOCK_M)
    out_column = own_column + tl.arange(0, BLOCK_N)
    if GRAD_ROWS and GRAD_COLUMNS:
        address = dmask_ptr + out_row.to(tl.int64)[:, None] * dmask_stride_row + out_column[None, :]
        tl.store(
            address, total.to(dmask_ptr.dtype.element_ty), mask=(out_row < rows)[:, None] & (out_column < columns)[None]
        )
    elif GRAD_ROWS:
        address = dmask_ptr + out_row.to(tl.int64) * dmask_stride_row
        tl.store(address, tl.sum(total, 1).to(dmask_ptr.dtype.element_ty), mask=out_row < rows)
    elif GRAD_COLUMNS:
        tl.store(dmask_ptr + out_column, tl.sum(total, 0).to(dmask_ptr.dtype.element_ty), mask=out_column < columns)
    else:
        tl.store(dmask_ptr, tl.sum(tl.sum(total, 1), 0).to(dmask_ptr.dtype.element_ty))
