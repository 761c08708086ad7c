"""The shortest way from a call of attention to its kernel, for the calls that ask for nothing special.

An eager call without masks, dropout, weights or gradients needs neither a graph nor the dispatcher, and few checks:
4 us of Python on an EPYC of Zen 5, where the long way of ``fastattn.functional`` takes 19. That one serves whatever is
out of the ordinary, and raises the errors of the arguments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn import sdpa, transforms
from fastattn.dispatch import Backend, Request, choose, forced_backend
from fastattn.kernels import onlookers
from fastattn.kernels.attention import extension, launch, prepared
from fastattn.validation import FLOATING

_SCALES = (float, type(None))


def attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: Any, scale: Any, enable_gqa: Any, alignment: Any
) -> Tensor | None:
    """The output of a call with these arguments of ``scaled_dot_product_attention`` alone; None for the long way.

    Nothing is checked yet; a keyword of another type than the usual goes the long way.
    """
    if not onlookers.absent(query, key, value) or transforms.transformed():
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if (type(is_causal), type(enable_gqa), type(alignment)) != (bool, bool, str) or type(scale) not in _SCALES:
        return None
    if query.dtype not in FLOATING:
        return None
    device_type, forced, kind = query.device.type, forced_backend(), None
    if torch.is_autocast_enabled(device_type):
        return None
    if forced is Backend.TRITON or (forced is None and device_type == "cuda" and launch.VERIFIED):
        kind = prepared.kind_of(query, key, value, is_causal, scale, enable_gqa, alignment)
        found = prepared.again(kind, query, key, value)
        if found is not None:
            return found
    shape, of_keys = query.shape, key.shape
    if len(shape) != 4 or of_keys != value.shape or len(of_keys) != 4 or 0 in shape or 0 in of_keys:
        return None
    (batch, heads, rows, dim), (key_batch, key_heads, columns, key_dim) = shape, of_keys
    if key_batch != batch or key_dim != dim or (key_heads != heads and not (enable_gqa and heads % key_heads == 0)):
        return None
    top_left = alignment == "top-left"
    if not (top_left or alignment == "bottom-right"):
        return None
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    if not math.isfinite(scale):
        return None
    shift = 0 if top_left else columns - rows
    upper = shift if is_causal else None
    backend = choose(Request(device_type, query.dtype, dim, dim, band=is_causal and not top_left))
    if backend is Backend.SDPA:
        return sdpa.attention(query, key, value, scale=scale, upper=upper)
    if backend is Backend.CPU:
        out, _ = extension.attention(query, key, value, None, *(None,) * 6, 0.0, scale, 0.0, shift, None, upper)
        return out
    if backend is Backend.TRITON and kind is not None:
        return prepared.first(kind, query, key, value, scale, shift, upper)
    return None
