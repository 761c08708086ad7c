"""Sinusoidal positions (Vaswani et al. 2017, section 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.modules import memory

_INTEGERS = (torch.int32, torch.int64)


class SinusoidalPositionalEncoding(nn.Module):
    """Adds to each token a fixed code of its position (Vaswani et al. 2017, section 3.5).

        PE(p, 2i) = sin(p / base^(2i / dim)),   PE(p, 2i + 1) = cos(p / base^(2i / dim))

    An odd ``dim`` ends in a sine without its cosine. There is no table and so no longest sequence, no parameter and
    nothing in the state_dict. Angles are computed in float64: a float32 angle at position 100,000 would be wrong in
    the third digit of its sine.

    Args:
        dim: features of a token.
        base: the longest wavelength is 2 pi base positions.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        memory.check_sizes(dim=dim)
        if isinstance(base, bool) or not isinstance(base, (int, float)):
            raise TypeError(f"base: got {type(base).__name__}, expected a number")
        if not 1.0 < base < float("inf"):
            raise ValueError(f"base: got {base}, expected a finite number above 1")
        self.dim, self.base = dim, float(base)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """``x`` plus the code of each of its positions.

        Args:
            x: (..., L, dim), float16, bfloat16, float32 or float64.
            positions: (..., L), int32 or int64, broadcastable to x's; None is 0 to L - 1.

        Returns:
            A tensor of x's shape, or of the shape it is broadcast to, in x's dtype.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, expected a torch.Tensor")
        if x.dim() < 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (..., L, dim) with dim = {self.dim}")
        if not x.is_floating_point():
            raise ValueError(f"x: got dtype {x.dtype}, expected a floating one")
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)
        elif isinstance(positions, Tensor) and (positions.dim() == 0 or positions.shape[-1] != x.shape[-2]):
            raise ValueError(
                f"positions: got shape {tuple(positions.shape)}, expected (..., L) with x's L = {x.shape[-2]}"
            )
        return x + self.encode(positions).to(x.dtype)

    def encode(self, positions: Tensor) -> Tensor:
        """The codes (..., dim), float64, of positions (...), int32 or int64.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        if not isinstance(positions, Tensor):
            raise TypeError(f"positions: got {type(positions).__name__}, expected a torch.Tensor")
        if positions.dtype not in _INTEGERS:
            raise ValueError(f"positions: got dtype {positions.dtype}, allowed are int32 and int64")
        even = torch.arange(0, self.dim, 2, dtype=torch.float64, device=positions.device)
        angles = positions.unsqueeze(-1) * self.base ** (-even / self.dim)  # (..., ceil(dim / 2))
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., : self.dim]

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}"
