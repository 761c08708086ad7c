"""What the operators allocate and in which dtype they compute: one definition for the kernels and the shape rules."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_scores(query: Tensor, key: Tensor) -> Tensor:
    """The scores (B, Tq, Tk), in the dtype of the arithmetic: float32, or float64 for float64 inputs."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((query.shape[0], query.shape[1], key.shape[1]), dtype=dtype)
