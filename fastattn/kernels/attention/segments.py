"""What a tile may skip where rows are packed from several documents: the stretch that holds its own segments."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("length", "other_length"))
def segment_bounds(own, other, start, end, length, other_length, BLOCK: tl.constexpr):
    """start, end (B, length / 16) int32 of own (B, length) and other (B, other_length), contiguous integers.

    For each 16 of ``own`` the first of ``other`` that is in a segment of theirs, and one past the last; other_length
    and 0 if none is. Segments need not be sorted. Comparing all with all is 1 / D of the work of the scores.
    """
    blocks = tl.cdiv(length, 16)
    program = tl.program_id(0)
    batch = (program // blocks).to(tl.int64)
    position = program % blocks * 16 + tl.arange(0, 16)
    ids = tl.load(own + batch * length + position, mask=position < length, other=0)
    first = tl.full([BLOCK], 2147483647, tl.int32)
    last = tl.zeros([BLOCK], tl.int32)
    for begin in tl.range(0, other_length, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        others = tl.load(other + batch * other_length + place, mask=place < other_length, other=0)
        same = (ids[:, None] == others[None, :]) & (position < length)[:, None]
        seen = (tl.max(same.to(tl.int32), 0) > 0) & (place < other_length)
        first = tl.minimum(first, tl.where(seen, place, 2147483647))
        last = tl.maximum(last, tl.where(seen, place + 1, 0))
    tl.store(start + program, tl.minimum(tl.min(first, 0), other_length))
    tl.store(end + program, tl.max(last, 0))
