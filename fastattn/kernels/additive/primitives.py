"""What the kernels of additive attention share: tensors with their strides, and tanh with its slope."""

# Compiled from their source by Triton: Python's types say nothing about these functions.
from typing import Any, NamedTuple

import triton
import triton.language as tl

_TWO_LOG2E = tl.constexpr(2.8853900817779268)
# tanh x = x + x^3 p(x^2) below this: Moshier, Cephes, single/tanhf.c (1989), 1.3e-7 relative.
_SMALL = tl.constexpr(0.625)


class Strided(NamedTuple):
    """A (B, rows, columns) tensor of any strides, 0 where it broadcasts; pointer None where there is none."""

    pointer: Any
    batch: Any
    row: Any
    column: Any


@triton.jit
def tanh_slope(x):
    """(tanh x, 1 - tanh^2 x), both within some roundings of their own size.

    With r = 2 / (e^2|x| + 1): tanh |x| = 1 - r and the slope is r (2 - r), which keeps its digits where tanh has
    become 1. Near 0 it is 1 - r that loses them: a polynomial. e^2|x| may overflow: r is then 0.
    """
    magnitude = tl.abs(x)
    rest = 2.0 / (tl.exp2(magnitude * _TWO_LOG2E) + 1.0)
    large = tl.where(x < 0.0, rest - 1.0, 1.0 - rest)
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    tanh = tl.where(magnitude < _SMALL, x + x * square * series, large)
    slope = tl.where(magnitude < _SMALL, 1.0 - tanh * tanh, rest * (2.0 - rest))
    return tanh, slope


@triton.jit
def start(tensor, b, row, column):
    """Addresses of rows and columns of batch b (int64), given as anything that broadcasts."""
    rows = tl.cast(row, tl.int64) * tensor.row
    return tensor.pointer + b * tensor.batch + (rows + tl.cast(column, tl.int64) * tensor.column)
