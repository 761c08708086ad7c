"""The keys worth visiting under a padding mask, from the first to the last that is not padding, and whether all are."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("columns",))
def key_bounds(
    padding_ptr, start_ptr, end_ptr, holes_ptr, padding_stride_b, padding_stride, columns,
    PADDING_BOOL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """start, end (B,) int32 of a mask (B, S): first key that takes part, one past the last; S and 0 if none does.

    holes (B,) int32: 1 where padding lies between the two.
    """
    batch = tl.program_id(0)
    padding_ptr += batch.to(tl.int64) * padding_stride_b
    start = tl.full([BLOCK_N], 2147483647, tl.int32)
    end = tl.zeros([BLOCK_N], tl.int32)
    number = tl.zeros([BLOCK_N], tl.int32)
    for first_column in tl.range(0, columns, BLOCK_N):
        column = first_column + tl.arange(0, BLOCK_N)
        value = tl.load(padding_ptr + column.to(tl.int64) * padding_stride, mask=column < columns, other=0)
        takes_part = (value != 0) if PADDING_BOOL else (value != float("-inf"))
        takes_part = takes_part & (column < columns)
        start = tl.minimum(start, tl.where(takes_part, column, 2147483647))
        end = tl.maximum(end, tl.where(takes_part, column + 1, 0))
        number += takes_part.to(tl.int32)
    first = tl.minimum(tl.min(start, 0), columns)
    last = tl.max(end, 0)
    tl.store(start_ptr + batch, first)
    tl.store(end_ptr + batch, last)
    tl.store(holes_ptr + batch, (tl.sum(number, 0) < last - first).to(tl.int32))
