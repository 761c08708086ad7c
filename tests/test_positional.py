"""SinusoidalPositionalEncoding against the formula of Vaswani et al. 2017, section 3.5, term by term."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn import SinusoidalPositionalEncoding


def term(position: int, channel: int, dim: int, base: float = 10000.0) -> float:
    angle = position / base ** (channel // 2 * 2 / dim)
    return math.cos(angle) if channel % 2 else math.sin(angle)


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("base", [10000.0, 500])
def test_every_term_is_the_formula(dim: int, base: float) -> None:
    codes = SinusoidalPositionalEncoding(dim, base).encode(torch.arange(7))
    wanted = torch.tensor([[term(p, c, dim, base) for c in range(dim)] for p in range(7)], dtype=torch.float64)
    torch.testing.assert_close(codes, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_is_added_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    encoding, x = SinusoidalPositionalEncoding(6), torch.randn(2, 3, 6).to(dtype)
    out = encoding(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, x + encoding.encode(torch.arange(3)).to(dtype), rtol=0, atol=0)


def test_positions_may_be_given_for_each_sequence() -> None:
    encoding, x = SinusoidalPositionalEncoding(4), torch.randn(2, 3, 4)
    positions = torch.tensor([[0, 1, 2], [7, 0, 7]], dtype=torch.int32)
    out = encoding(x, positions)
    for row, numbers in enumerate(positions.tolist()):
        for place, number in enumerate(numbers):
            wanted = x[row, place] + torch.tensor([term(number, c, 4) for c in range(4)])
            torch.testing.assert_close(out[row, place], wanted)


def test_no_sequence_is_too_long_and_late_positions_are_exact() -> None:
    late = 10**6 + 7
    code = SinusoidalPositionalEncoding(6)(torch.zeros(1, 6), torch.tensor([late]))[0]
    torch.testing.assert_close(code, torch.tensor([term(late, c, 6) for c in range(6)]), rtol=0, atol=1e-7)


def test_it_has_no_state_and_passes_the_gradient() -> None:
    encoding, x = SinusoidalPositionalEncoding(4), torch.randn(3, 4, requires_grad=True)
    encoding(x).sum().backward()
    assert x.grad is not None
    assert x.grad.eq(1).all()
    assert not encoding.state_dict()
    assert repr(encoding) == "SinusoidalPositionalEncoding(4, base=10000)"


BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("dim 0", lambda: SinusoidalPositionalEncoding(0), ValueError, "dim: got 0, expected at least 1"),
    ("dim float", lambda: SinusoidalPositionalEncoding(4.0), TypeError, "dim: got float"),  # type: ignore[arg-type]
    ("base 1", lambda: SinusoidalPositionalEncoding(4, 1.0), ValueError, "base: got 1.0"),
    ("base NaN", lambda: SinusoidalPositionalEncoding(4, math.nan), ValueError, "base: got nan"),
    ("base str", lambda: SinusoidalPositionalEncoding(4, "x"), TypeError, "base: got str"),  # type: ignore[arg-type]
    ("x list", lambda: SinusoidalPositionalEncoding(4)([1]), TypeError, "x: got list"),
    ("x features", lambda: SinusoidalPositionalEncoding(4)(torch.ones(2, 3)), ValueError, r"x: got shape \(2, 3\)"),
    ("x 1-D", lambda: SinusoidalPositionalEncoding(4)(torch.ones(4)), ValueError, r"x: got shape \(4,\)"),
    ("x int", lambda: SinusoidalPositionalEncoding(4)(torch.ones(2, 4).int()), ValueError, "x: got dtype torch.int32"),
    (
        "positions' length", lambda: SinusoidalPositionalEncoding(4)(torch.ones(3, 4), torch.arange(2)), ValueError,
        r"positions: got shape \(2,\)",
    ),
    (
        "positions' dtype", lambda: SinusoidalPositionalEncoding(4)(torch.ones(2, 4), torch.ones(2)), ValueError,
        "positions: got dtype torch.float32",
    ),
    (
        "positions list", lambda: SinusoidalPositionalEncoding(4)(torch.ones(2, 4), [0, 1]), TypeError,
        "positions: got list",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
