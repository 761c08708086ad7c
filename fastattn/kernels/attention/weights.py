"""Attention weights from the logsumexp, tile by tile: per head, or averaged without a (B, H, L, S) tensor.

    W_ij = keep_ij / (1 - dropout_p) exp(S_ij - LSE_i),   average: mean over the heads of W
"""

import triton
import triton.language as tl

from fastattn.kernels.attention.arguments import LENGTHS, Rows, Shape
from fastattn.kernels.attention.primitives import (
    dropout_keep,
    key_range,
    load_pivot,
    load_rows,
    probability_tile,
    product_tile,
    score_tile,
)


@triton.jit(do_not_specialize=LENGTHS)
def attention_weights(
    query, key, logsumexp, weights, averaged, scale, masks, dropout,
    batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch,
    F: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """weights (B, H / averaged, L, S): one program owns a tile and sums over ``averaged`` heads, all or 1."""
    shape = Shape(batches, heads, group, rows, columns, lower, upper, shift, pitch, key_pitch)
    row_tiles = tl.cdiv(shape.rows, BLOCK_M)
    column_tiles = tl.cdiv(shape.columns, BLOCK_N)
    program = tl.program_id(0)
    first_column = program % column_tiles * BLOCK_N
    first_row = program // column_tiles % row_tiles * BLOCK_M
    slice_index = program // column_tiles // row_tiles
    slices = shape.heads // averaged
    batch = slice_index // slices
    first_head = slice_index % slices * averaged
    b = batch.to(tl.int64)
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    inside_rows = row < shape.rows
    inside_columns = column < shape.columns

    last_row = tl.minimum(first_row + BLOCK_M, shape.rows) - 1
    begin, end = key_range(batch, first_row, last_row, masks, shape, F, BLOCK_M, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # A tile none of whose keys takes part writes its zeros without a product.
    last_head = tl.where((first_column >= begin) & (first_column < end), first_head + averaged, first_head)
    for head in tl.range(first_head, last_head):
        h = tl.cast(head, tl.int64)
        query_rows = Rows(query, b, h, first_row, shape.rows)
        queries = load_rows(query_rows, DIM, BLOCK_M, BLOCK_D)
        key_rows = Rows(key, b, h // shape.group, first_column, shape.columns)
        keys = load_rows(key_rows, DIM, BLOCK_N, BLOCK_D)
        pivot, rest = load_pivot(logsumexp, b, h, first_row, shape, F, BLOCK_M)
        product = product_tile(queries, query_rows, keys, key_rows, F, DIM, BLOCK_M, BLOCK_N)
        score, _ = score_tile(
            product, b, h, first_row, first_column, scale, masks, shape, F, True, BLOCK_M, BLOCK_N, False
        )
        weight = probability_tile(score, pivot[:, None], rest[:, None], F)
        if dropout.seed is not None:
            keep = dropout_keep(dropout, b * shape.heads + h, first_row, first_column, BLOCK_M, BLOCK_N, False)
            weight = tl.where(keep, weight, 0.0)
        total += weight

    total *= dropout.keep_scale / averaged
    address = weights.pointer + b * weights.batch + (first_head // averaged).to(tl.int64) * weights.head
    address = address + row.to(tl.int64)[:, None] * weights.row + column[None, :] * weights.column
    inside = inside_rows[:, None] & inside_columns[None, :]
    tl.store(address, total.to(weights.pointer.dtype.element_ty), mask=inside)
