"""The gradient of an additive mask, summed over the axes the mask broadcasts, without a (B, H, L, S) tensor.

    dM = sum over the broadcast axes of dS,   dS as in ``backward``

One program owns one tile of the mask and recomputes dS for every batch, head and, where the mask has a single row or
column, every tile of rows or columns that shares it. Storing dS instead would move B H L S numbers out and back.
"""

import triton
import triton.language as tl

from fastattn.kernels.attention.arguments import LENGTHS, Rows, Shape
from fastattn.kernels.attention.primitives import dscore_tile, load_pivot, load_rows, product_tile, score_tile


@triton.jit(do_not_specialize=LENGTHS)
def attention_dmask(
    query, key, value, dout, dweights, logsumexp, delta, dmask, dmask_batches, dmask_heads, scale, masks,
    dropout, batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch,
    GRAD_ROWS: tl.constexpr, GRAD_COLUMNS: tl.constexpr, F: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dmask (dmask_batches, dmask_heads, L or 1, S or 1), each of the first two 1 or full."""
    shape = Shape(batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch)
    row_tiles = tl.cdiv(shape.rows, BLOCK_M) if GRAD_ROWS else 1
    column_tiles = tl.cdiv(shape.columns, BLOCK_N) if GRAD_COLUMNS else 1
    program = tl.program_id(0)
    own_row = program // column_tiles % row_tiles * BLOCK_M
    own_column = program % column_tiles * BLOCK_N
    slice_index = program // column_tiles // row_tiles
    own_batch = slice_index // dmask_heads
    own_head = slice_index % dmask_heads

    begin_row = own_row if GRAD_ROWS else 0
    end_row = tl.minimum(own_row + BLOCK_M, shape.rows) if GRAD_ROWS else shape.rows
    begin_column = own_column if GRAD_COLUMNS else 0
    end_column = tl.minimum(own_column + BLOCK_N, shape.columns) if GRAD_COLUMNS else shape.columns
    end_batch = tl.where(dmask_batches == 1, shape.batches, own_batch + 1)
    end_head = tl.where(dmask_heads == 1, shape.heads, own_head + 1)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in tl.range(own_batch, end_batch):
        b = tl.cast(batch, tl.int64)
        for head in tl.range(own_head, end_head):
            h = tl.cast(head, tl.int64)
            for first_row in tl.range(begin_row, end_row, BLOCK_M):
                row = first_row + tl.arange(0, BLOCK_M)
                inside = row < shape.rows
                place = (b * shape.heads + h) * shape.rows + row
                query_rows = Rows(query, b, h, first_row, shape.rows)
                queries = load_rows(query_rows, DIM, BLOCK_M, BLOCK_D)
                dout_rows = Rows(dout, b, h, first_row, shape.rows)
                douts = queries
                deltas = tl.zeros([BLOCK_M], tl.float32)
                if dweights.pointer is None:
                    douts = load_rows(dout_rows, DIM, BLOCK_M, BLOCK_D)
                    deltas = tl.load(delta + place, mask=inside, other=0.0)
                pivot, rest = load_pivot(logsumexp, b, h, first_row, shape, F, BLOCK_M)
                for first_column in tl.range(begin_column, end_column, BLOCK_N):
                    key_rows = Rows(key, b, h // shape.group, first_column, shape.columns)
                    keys = load_rows(key_rows, DIM, BLOCK_N, BLOCK_D)
                    product = product_tile(queries, query_rows, keys, key_rows, F, DIM, BLOCK_M, BLOCK_N)
                    dproduct = product
                    if dweights.pointer is None:
                        value_rows = Rows(value, b, h // shape.group, first_column, shape.columns)
                        values = load_rows(value_rows, DIM, BLOCK_N, BLOCK_D)
                        dproduct = product_tile(douts, dout_rows, values, value_rows, F, DIM, BLOCK_M, BLOCK_N)
                    score, _ = score_tile(
                        product, b, h, first_row, first_column, scale, masks, shape, F, True, BLOCK_M, BLOCK_N, False
                    )
                    dscore, _ = dscore_tile(
                        score, pivot[:, None], rest[:, None], deltas[:, None], dproduct, dweights, b, h, first_row,
                        first_column, shape, dropout, F, BLOCK_M, BLOCK_N, False,
                    )  # fmt: skip
                    total += dscore

    start = dmask.pointer + own_batch.to(tl.int64) * dmask.batch + own_head.to(tl.int64) * dmask.head
    row = own_row + tl.arange(0, BLOCK_M)
    column = own_column + tl.arange(0, BLOCK_N)
    dtype = dmask.pointer.dtype.element_ty
    if GRAD_ROWS and GRAD_COLUMNS:
        address = start + row.to(tl.int64)[:, None] * dmask.row + column[None, :] * dmask.column
        inside = (row < shape.rows)[:, None] & (column < shape.columns)[None, :]
        tl.store(address, total.to(dtype), mask=inside)
    elif GRAD_ROWS:
        tl.store(start + row.to(tl.int64) * dmask.row, tl.sum(total, 1).to(dtype), mask=row < shape.rows)
    elif GRAD_COLUMNS:
        tl.store(start + column * dmask.column, tl.sum(total, 0).to(dtype), mask=column < shape.columns)
    else:
        tl.store(start, tl.sum(tl.sum(total, 1), 0).to(dtype))
