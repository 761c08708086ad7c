"""The judgement of a self-check: a backend's results held against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.dispatch import Backend

# A fused backend may be this many times less exact than plain PyTorch in the same dtype, and some roundings more.
_TIMES_PLAIN, _TIMES_PLAIN_GRADIENT = 2.0, 3.0
_ROUNDINGS = 4.0

Results = dict[str, Tensor]  # of one case by name; those of gradients begin with "gradient"


@dataclass(frozen=True)
class Verdict:
    """The worst error of one backend and dtype, as a share of what is allowed; above 1 it fails."""

    backend: Backend
    dtype: torch.dtype
    share: float
    where: str

    @property
    def passed(self) -> bool:
        """False for an error beyond the budget, NaN included."""
        return self.share <= 1.0

    def __str__(self) -> str:
        state = "ok    " if self.passed else "WRONG "
        return f"{state} {self.backend:<10} {str(self.dtype)[6:]:<9} {self.share:.2f} ({self.where})"


def judge(backend: Backend, dtype: torch.dtype, answers: Iterable[tuple[str, Results, Results, Results]]) -> Verdict:
    """The verdict on answers: per case its name and the results in float64, of plain PyTorch, and of the backend.

    ``answers`` computes them one after another; a backend that raises there is wrong.
    """
    try:
        return _judge(backend, dtype, answers)
    except Exception as error:
        return Verdict(backend, dtype, math.inf, f"raised {type(error).__name__}: {error}")


def _judge(backend: Backend, dtype: torch.dtype, answers: Iterable[tuple[str, Results, Results, Results]]) -> Verdict:
    worst, where = 0.0, "output"
    for case, exact, plain, found in answers:
        for what, wanted in exact.items():
            times = _TIMES_PLAIN_GRADIENT if what.startswith("gradient") else _TIMES_PLAIN
            rounding = _ROUNDINGS * torch.finfo(dtype).eps * float(wanted.abs().max())
            share = _error(found[what], wanted) / (times * _error(plain[what], wanted) + rounding)
            if math.isnan(share):
                return Verdict(backend, dtype, share, f"{what}, {case}")
            if share > worst:
                worst, where = share, f"{what}, {case}"
    return Verdict(backend, dtype, worst, where)


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max())
