"""Derivatives and transforms that our operators have no rule for; without a check some would silently be 0."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

REASON = "inside a transform of torch.func or forward-mode differentiation; only plain PyTorch follows every one"


def transformed() -> bool:
    """Whether the call is inside ``torch.func``'s grad, jvp, vmap, ..., or ``torch.autograd.forward_ad``."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0
