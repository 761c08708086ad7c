"""replace_sdpa: fastattn behind torch.nn.functional.scaled_dot_product_attention, for a block of code."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from fastattn import transforms
from fastattn.functional import scaled_dot_product_attention

_lock = threading.Lock()
_blocks = 0  # how many are open, in all threads
_torch: Any = torch.nn.functional.scaled_dot_product_attention  # what the outermost block replaced
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


@contextmanager
def replace_sdpa() -> Iterator[None]:
    """Within the block, ``torch.nn.functional.scaled_dot_product_attention`` is fastattn's; afterwards torch's own.

        with fastattn.replace_sdpa():
            loss = model(batch).sum()
        loss.backward()  # may stand outside: what was computed remembers how

    It takes exactly torch's arguments. What fastattn cannot serve goes to torch's function, which answers or raises
    as ever: tensor subclasses (nested, distributed), torch.func's transforms, forward-mode differentiation,
    ``attn_mask`` beside ``is_causal``, shapes and dtypes that only torch takes. Two things are fastattn's: a query
    whose keys are all masked gives 0, and dropout draws from a generator of its own (``torch.manual_seed`` reproduces
    it).

    Blocks may be nested, also ended by an exception; the function can serve as a decorator too.

    The name is rebound for the whole process, so other threads use fastattn as long as any block is open; blocks in
    several threads may overlap in any order, the last one to end gives torch's function back.

    Not reached:
        - a module that did ``from torch.nn.functional import scaled_dot_product_attention`` before the block: it
          holds torch's function under its own name; ``torch._C._nn.scaled_dot_product_attention`` likewise;
        - C++ that calls torch's kernels: the inference fast path of nn.MultiheadAttention and
          nn.TransformerEncoderLayer (their Python path is reached; ``fastattn.patch`` replaces both), and TorchScript;
        - graphs that torch.compile, torch.export or torch.jit made outside the block.
    """
    global _blocks, _torch
    functional: Any = torch.nn.functional
    with _lock:
        if functional.scaled_dot_product_attention is not _replacement:
            _torch = functional.scaled_dot_product_attention
            functional.scaled_dot_product_attention = _replacement
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            # Someone who rebound the name inside the block, and has not given it back, keeps it: behind theirs ours
            # then calls torch's.
            if _blocks == 0 and functional.scaled_dot_product_attention is _replacement:
                functional.scaled_dot_product_attention = _torch


def _replacement(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch's function by torch's arguments, served by fastattn where it can."""
    arguments = query, key, value, attn_mask, dropout_p, is_causal
    if isinstance(attn_mask, CausalBias):
        # It compares the function it is called through with the name in torch.nn.functional, and computes on
        # uninitialised memory where they differ. Under the name it comes back here in plain tensors.
        name: Any = torch.nn.functional.scaled_dot_product_attention
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return CausalBias.__torch_function__(name, (CausalBias,), arguments, options)
    if _blocks > 0 and _ours(query, key, value, attn_mask, is_causal):
        try:
            return scaled_dot_product_attention(*arguments, scale=scale, enable_gqa=enable_gqa)
        except (TypeError, ValueError):
            pass  # refused before anything was computed; torch's function answers, or raises its own error
    return _torch(*arguments, scale=scale, enable_gqa=enable_gqa)


def _ours(query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool) -> bool:
    """Whether the call means the same to us as to torch."""
    if is_causal and attn_mask is not None:  # combined or refused, depending on torch's version
        return False
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if not all(type(tensor) in _PLAIN for tensor in tensors):
        return False
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):  # torch refuses the mixture
        return False
    if len({tensor.dtype for tensor in tensors[:3]}) > 1 or len({tensor.device for tensor in tensors}) > 1:
        return False
    return query.layout is torch.strided and not transforms.transformed()
