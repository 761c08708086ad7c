"""Whether an eager call may go to the extension itself, past the dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def present(*tensors: Tensor) -> bool:
    """Whether somebody looks on: a compiler, a tracer, a mode, or a tensor that is more or other than its numbers."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return True
    return any(type(tensor) not in _PLAIN or tensor.is_neg() or tensor._is_zerotensor() for tensor in tensors)
