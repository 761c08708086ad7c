"""The kernel that walks over the features: scores, or the gradient of the coverage.

    S_ij  = sum_d w_d tanh(x_ijd),   x_ijd = q_id + k_jd + c_ij wc_d
    dc_ij = dS_ij sum_d w_d wc_d (1 - tanh(x_ijd)^2)

One program owns a tile of queries by keys and takes one feature after the other: nothing is summed across threads,
and no more than a tile is held.
"""

# Compiled from their source by Triton: Python's types say nothing about these functions.
import triton
import triton.language as tl

from fastattn.kernels.additive.primitives import start, tanh_slope


@triton.jit
def additive_scores(
    query, key, weight, coverage, coverage_weight, dscores, end, result, rows, columns, features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """query (B, Tq, D), key (B, Tk, D), weight and coverage_weight (D), coverage and dscores (B, Tq, Tk) or absent.

    result (B, Tq, Tk) float32: the scores, or the gradient of the coverage where dscores is given. Tiles from
    ``end`` (B) on, where given, are written as 0.
    """
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    first_column = program % column_tiles * BLOCK_N
    first_row = program // column_tiles % row_tiles * BLOCK_M
    batch = program // column_tiles // row_tiles
    b = batch.to(tl.int64)
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    inside_rows = row < rows
    inside_columns = column < columns
    inside = inside_rows[:, None] & inside_columns[None, :]

    covered = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if coverage.pointer is not None:
        address = start(coverage, b, row[:, None], column[None, :])
        covered = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    last = features
    if end is not None:
        last = tl.where(first_column < tl.load(end + batch), features, 0)
    query_address = start(query, b, row, 0)
    key_address = start(key, b, column, 0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for d in tl.range(0, last):
        feature = tl.cast(d, tl.int64)
        queries = tl.load(query_address + feature * query.column, mask=inside_rows, other=0.0).to(tl.float32)
        keys = tl.load(key_address + feature * key.column, mask=inside_columns, other=0.0).to(tl.float32)
        factor = tl.load(weight + feature).to(tl.float32)
        argument = queries[:, None] + keys[None, :]  # [BM, BN]
        if coverage.pointer is not None:
            share = tl.load(coverage_weight + feature).to(tl.float32)
            argument += covered * share
        tanh, slope = tanh_slope(argument)
        if dscores.pointer is not None:
            total += factor * share * slope
        else:
            total += factor * tanh
    if dscores.pointer is not None:
        address = start(dscores, b, row[:, None], column[None, :])
        total *= tl.load(address, mask=inside, other=0.0)
    tl.store(start(result, b, row[:, None], column[None, :]), total, mask=inside)
