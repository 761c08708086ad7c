"""What the tests of bad input share: tensors of a good call, and what makes a result right."""

from __future__ import annotations

import torch
from backends import DEVICE
from torch import Tensor

BACKENDS = ("auto", "cpu", "triton")
BATCH, HEADS, ROWS, COLUMNS, DIM, EMBED = 2, 4, 3, 5, 8, 8
INF = float("inf")
I64, C64, F16, BF16, F32, F64 = (
    torch.int64, torch.complex64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
TE, VE, RE, AE = TypeError, ValueError, RuntimeError, AssertionError
RIGHT = None  # in the place of an exception: the call is right


def t(*shape: int, dtype: torch.dtype = F32, device: str = DEVICE) -> Tensor:
    """A random tensor."""
    return torch.randn(shape, device=device).to(dtype)


def bools(*shape: int, last: bool | None = None) -> Tensor:
    """A random mask whose first column is True; or whose last row is ``last``."""
    mask = torch.rand(shape, device=DEVICE) > 0.5
    mask[..., :1] = True
    if last is not None:
        mask[..., -1, :] = last
    return mask


def dims(dim: int, value: int | None = None, dtype: torch.dtype = F32) -> dict[str, Tensor]:
    sizes = {"query": (ROWS, dim), "key": (COLUMNS, dim), "value": (COLUMNS, dim if value is None else value)}
    return {name: t(BATCH, HEADS, *size, dtype=dtype) for name, size in sizes.items()}


def sized(batch: int = BATCH, heads: int = HEADS, rows: int = ROWS, columns: int = COLUMNS) -> dict[str, Tensor]:
    return {"query": t(batch, heads, rows, DIM), **{k: t(batch, heads, columns, DIM) for k in ("key", "value")}}


def assert_close(out: Tensor, wanted: Tensor) -> None:
    """Equal within some roundings of out's dtype."""
    roundings = 8 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), wanted.double(), rtol=roundings, atol=roundings)


def assert_right(out: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    """The answer within some roundings of its dtype, and finite gradients."""
    assert out.shape == wanted.shape
    assert_close(out, wanted)
    for name, grad in enumerate(torch.autograd.grad(out.sum(), leaves, allow_unused=True)):
        assert grad is None or grad.isfinite().all(), f"gradient {name}"
