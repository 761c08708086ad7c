"""Which backend serves a request, and for each other one the reason why it does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import transforms
from fastattn.kernels.attention import extension, launch


class Backend(StrEnum):
    """Where the arithmetic runs."""

    TRITON = "triton"  # our Triton kernels: CUDA, or the CPU under TRITON_INTERPRET=1
    CPU = "cpu"  # our C++ kernels
    SDPA = "sdpa"  # torch.nn.functional.scaled_dot_product_attention
    CUDA = "cuda"  # our CUDA kernels of the LSTM
    TORCH = "torch"  # torch's own LSTM
    REFERENCE = "reference"  # plain PyTorch; attention holds the (B, H, L, S) scores, an LSTM walks the steps


ATTENTION_BACKENDS = (Backend.TRITON, Backend.CPU, Backend.SDPA, Backend.REFERENCE)
LSTM_BACKENDS = (Backend.CUDA, Backend.CPU, Backend.TORCH, Backend.REFERENCE)


class Request(NamedTuple):
    """What a call asks for, without the sequence lengths: a compiled choice must not change from length to length."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    need_weights: bool = False
    return_lse: bool = False
    dropout: bool = False
    band: bool = False  # a window or alignment other than the plain top-left triangle
    attn_mask: torch.dtype | None = None
    padding: torch.dtype | None = None
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    segments: bool = False
    compiling: bool = False
    tiny: bool = False  # a call with gradients whose overhead decides; never while compiling


@dataclass(frozen=True)
class Explanation:
    """The chosen backend and, for each other one, the reason it was not taken."""

    backend: Backend
    because: str
    why_not: dict[Backend, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.because}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.why_not.items()]
        return "\n".join(lines)


MAX_HEAD_DIM = 256
# Multiplications of Q K^T below which torch's function, whose graph is made in C++, returns before ours has been
# reached through Python. Near these both took the same time on one thread of an EPYC of Zen 5; with a tenth ours took
# 1.3 times torch's, with ten times as many 0.5 to 0.8. Torch's kernels for half precision are slower, for one query up
# to 20 times. Without gradients the way is short (``plain_call``), and ours took less time than the way to torch's
# function at all sizes: 0.94 with (2, 4, 16, 64), 0.77 with (1, 1, 1, 16), 0.46 to 0.71 from 2^18 on.
_TINY, _TINY_HALF = 1 << 21, 1 << 16
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# A plain global: torch.compile guards on it, and recompiles when it changes; it cannot trace a ContextVar.
_forced: Backend | None = None


@contextlib.contextmanager
def backend(name: str | Backend) -> Iterator[None]:
    """Force one backend inside the block, in all threads; a call it cannot serve raises instead of falling back.

    ``name`` is "triton", "cpu", "sdpa" or "reference" for attention, "cuda", "cpu", "torch" or "reference" for an LSTM,
    or "auto" for the usual choice.

    Raises ValueError for another name.
    """
    allowed = [member.value for member in Backend]
    if name != "auto" and name not in allowed:
        raise ValueError(f"backend: got {name!r}, allowed are 'auto', {', '.join(map(repr, allowed))}")
    global _forced
    previous, _forced = _forced, None if name == "auto" else Backend(name)
    try:
        yield
    finally:
        _forced = previous


def forced_backend() -> Backend | None:
    """The backend of the innermost ``with fastattn.backend(...)`` block, or None."""
    return _forced


def tiny(query: Tensor, key: Tensor) -> bool:
    """Whether a call of (B, H, L, D), (B, Hkv, S, D) with gradients costs the CPU little more than its graph does."""
    return query.numel() * key.shape[2] < (_TINY if query.dtype == torch.float32 else _TINY_HALF)


def why_not(name: Backend, request: Request) -> str | None:
    """The reason ``name`` cannot give the right answer to ``request``; None when it can."""
    if name is Backend.REFERENCE:
        return None
    if name not in ATTENTION_BACKENDS:
        return f"it serves an LSTM; attention runs on {', '.join(ATTENTION_BACKENDS)}"
    if transforms.transformed():
        return transforms.REASON
    if name is Backend.SDPA:
        return _why_not_sdpa(request)
    if request.dtype not in _KERNEL_DTYPES:
        return f"dtype {request.dtype}; our kernels take float16, bfloat16 and float32"
    if request.head_dim > MAX_HEAD_DIM:
        return f"head dimension {request.head_dim} > {MAX_HEAD_DIM}"
    if request.head_dim != request.value_dim:
        return f"value's head dimension {request.value_dim} differs from query's {request.head_dim}"
    if name is Backend.CPU:
        if request.device_type != "cpu":
            return f"device {request.device_type}; the C++ kernels run on the CPU"
        return extension.UNAVAILABLE
    return launch.why_unavailable(request.device_type)


def _why_not_sdpa(request: Request) -> str | None:
    if request.need_weights:
        return "torch's fused kernels do not return the weights"
    if request.return_lse:
        return "torch's public function does not return the logsumexp"
    if request.dropout and request.device_type == "cpu":
        return "torch has no fused dropout on the CPU"
    for feature in ("softcap", "alibi", "sinks", "segments"):
        if getattr(request, feature):
            return f"torch's function has no {feature}"
    for mask in (request.attn_mask, request.padding):
        if mask is not None and mask not in (torch.bool, request.dtype):
            return f"torch would round a {mask} mask to {request.dtype}"
    return None


def _order(request: Request) -> tuple[tuple[Backend, str], ...]:
    """Backends by preference, with the reason for the place."""
    slow = (Backend.REFERENCE, "plain PyTorch serves every request")
    sdpa = (Backend.SDPA, "torch's fused kernel, with fully masked rows made 0")
    if request.device_type == "cpu":
        ours = (Backend.CPU, "our C++ kernel: no (B, H, L, S) tensor, padding skipped, weights in the same pass")
        plain = request.attn_mask is None and request.padding is None and not request.band
        return (sdpa, ours, slow) if plain and request.tiny else (ours, sdpa, slow)
    if launch.verified(request.device_type):
        return ((Backend.TRITON, "our fused kernel, verified on this device"), sdpa, slow)
    return (sdpa, slow)


def choose(request: Request) -> Backend:
    """The forced backend if there is one, else the first in the order of preference that can serve ``request``.

    Raises RuntimeError when a forced backend cannot serve it.
    """
    forced = forced_backend()
    if forced is None:
        return next(name for name, _ in _order(request) if why_not(name, request) is None)
    reason = why_not(forced, request)
    if reason is not None:
        raise RuntimeError(f'fastattn.backend("{forced}") cannot serve this call: {reason}')
    return forced


def explain(request: Request) -> Explanation:
    """What ``choose`` takes, with the reasons; raises its errors."""
    chosen, forced = choose(request), forced_backend()
    because = dict(_order(request))[chosen] if forced is None else f'forced by fastattn.backend("{forced}")'
    others = (name for name in ATTENTION_BACKENDS if name is not chosen)
    skipped = {name: why_not(name, request) or _not_preferred(name, request, chosen) for name in others}
    return Explanation(chosen, because, skipped)


def _not_preferred(name: Backend, request: Request, chosen: Backend) -> str:
    if name is Backend.TRITON:
        if request.device_type == "cpu":
            return 'the interpreter proves the maths, slowly; force it with fastattn.backend("triton")'
        return launch.why_not_verified(request.device_type)
    return f"can serve it; {chosen} is preferred"
