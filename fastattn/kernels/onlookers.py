"""Whether an eager call may go to the extension itself, past the dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.built import extension

_PLAIN = (Tensor, torch.nn.Parameter)
# Whether all of these are plain tensors of one dtype on one device, in a third of the time that Python takes to say so.
_plain: Any = getattr(extension, "plain", lambda *_: False)


def present(*tensors: Tensor) -> bool:
    """Whether somebody looks on: a compiler, tracer, mode or profiler, or a tensor that is more than its numbers."""
    if _watching():
        return True
    if _plain(*tensors):
        return False
    return any(type(tensor) not in _PLAIN or tensor.is_neg() or tensor._is_zerotensor() for tensor in tensors)


def absent(*tensors: Tensor) -> bool:
    """True only if nobody looks on, and the tensors have one dtype and one device; False asks for a closer look."""
    return not _watching() and bool(_plain(*tensors))


def alike(*tensors: Tensor) -> bool:
    """True only if the tensors have one dtype and one device; False also says that a closer look is needed."""
    return not torch.compiler.is_compiling() and bool(_plain(*tensors))


def _watching() -> bool:
    """Whether a compiler, a tracer, a mode or a profiler sees every operator."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._autograd._profiler_enabled():
        return True
    return torch._C._get_tracing_state() is not None
