"""Where a batch, or a sequence packed behind others, stands in the tensors of the kernels."""

import triton
import triton.language as tl

from fastattn.kernels.attention.arguments import Heads, Shape


@triton.jit
def sequence(batch, shape, packed):
    """(b, shape, first query, first key) of sequence ``batch``: its index in the tensors, its own lengths and band.

    Where nothing is packed the sequences are the batches, and all alike. Boundaries that lie outside the tensors or
    descend are cut: no address they lead to is outside.
    """
    b = batch.to(tl.int64)
    first_query = 0
    first_key = 0
    if packed.query is not None:
        b = tl.zeros([], tl.int64)
        first_query, rows = _stretch(packed.query, batch, shape.pitch, shape.rows)
        first_key, columns = _stretch(packed.key, batch, shape.key_pitch, shape.columns)
        if packed.used is not None:
            columns = tl.maximum(tl.minimum(tl.load(packed.used + batch).to(tl.int32), columns), 0)
        # The last query stands at the last key.
        shift = columns - rows
        shape = Shape(
            1, shape.heads, shape.group, rows, columns, shape.lower + shift, shape.upper + shift, shape.shift + shift,
            shape.pitch, shape.key_pitch,
        )  # fmt: skip
    return b, shape, first_query, first_key


@triton.jit
def _stretch(bounds, n, total, longest):
    """(first, length) of the n-th of the stretches that ``bounds`` cuts ``total`` into, none over ``longest``."""
    first = tl.minimum(tl.maximum(tl.load(bounds + n), 0), total).to(tl.int32)
    end = tl.minimum(tl.maximum(tl.load(bounds + n + 1), first), total).to(tl.int32)
    return first, tl.minimum(end - first, longest)


@triton.jit
def from_row(tensor, first):
    """A ``Heads`` whose row 0 is row ``first``."""
    return Heads(tensor.pointer + tl.cast(first, tl.int64) * tensor.row, tensor.batch, tensor.head, tensor.row)


@triton.jit
def number_of_row(b, h, row, shape):
    """Where a tensor (B, H, L), or (1, H, tokens) of packed sequences, keeps the number of ``row``."""
    return (b * shape.heads + h) * shape.pitch + row


@triton.jit
def rest_of_logsumexp(shape):
    """How far its second number lies behind its first."""
    return tl.cast(shape.batches, tl.int64) * shape.heads * shape.pitch
