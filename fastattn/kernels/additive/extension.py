"""The C++ additive attention of ``csrc`` behind the operators: float32, float16 and bfloat16 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.built import UNAVAILABLE
from fastattn.kernels.built import extension as _extension

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """The reason the kernels cannot serve tensors of this device and dtype; None when they can."""
    if device_type != "cpu":
        return f"device {device_type}; the C++ kernels run on the CPU"
    if dtype not in _DTYPES:
        return f"dtype {dtype}; our kernels take float16, bfloat16 and float32"
    return UNAVAILABLE


def scores(*inputs: Any) -> Tensor:
    """See ``op``; -inf where the mask is False."""
    result: Tensor = _extension.additive_scores(*inputs)
    return result


def scores_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """See ``op``; ``dscores`` does not count where the mask is False."""
    result: tuple[Tensor, Tensor, Tensor, list[Tensor]] = _extension.additive_scores_backward(*arguments)
    return result
