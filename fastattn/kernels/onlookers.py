"""Whether an eager call may go to the extension itself, past the dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.built import extension

_PLAIN = (Tensor, torch.nn.Parameter)
# Whether all of these are plain tensors of one dtype on one device, in a third of the time that Python takes to say so.
_plain: Any = getattr(extension, "plain", lambda *_: False)
_in_a_mode: Any = getattr(extension, "in_a_mode", lambda: torch._C._len_torch_dispatch_stack() > 0)
# Whether something is told of each operator, and would miss one that is left out.
profiled: Any = getattr(extension, "profiled", torch._C._autograd._profiler_enabled)


def present(*tensors: Tensor) -> bool:
    """Whether somebody looks on: a compiler, a tracer, a mode, or a tensor that is more or other than its numbers."""
    if _watching():
        return True
    if _plain(*tensors):
        return False
    return any(type(tensor) not in _PLAIN or tensor.is_neg() or tensor._is_zerotensor() for tensor in tensors)


def absent(*tensors: Tensor) -> bool:
    """True only if nobody looks on, no profiler either, and the tensors have one dtype and one device.

    False asks for a closer look.
    """
    return not _watching() and not profiled() and bool(_plain(*tensors))


def alike(*tensors: Tensor) -> bool:
    """True only if the tensors have one dtype and one device; False asks for a closer look."""
    return not torch.compiler.is_compiling() and bool(_plain(*tensors))


def _watching() -> bool:
    """Whether a compiler, a tracer or a mode takes part in each operator."""
    return torch.compiler.is_compiling() or bool(_in_a_mode()) or torch._C._get_tracing_state() is not None
