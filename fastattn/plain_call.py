"""The shortest way from a call of attention to its kernel, for the calls that ask for nothing special.

An eager call without masks, dropout, weights or gradients needs neither a graph nor the dispatcher, and few checks:
4 us of Python on an EPYC of Zen 5, where the long way of ``fastattn.functional`` takes 14. That one serves whatever is
out of the ordinary, and raises the errors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn import sdpa, transforms
from fastattn.dispatch import Backend, Request, choose
from fastattn.kernels import onlookers
from fastattn.kernels.attention import extension, launch

_KERNELS = {Backend.CPU: extension.attention, Backend.TRITON: launch.attention}
# attn_mask, key_padding_mask, alibi_slopes, segments of queries and keys, seed: see ``kernels.attention.op``.
_NOTHING = (None,) * 6


def attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: Any, scale: Any, enable_gqa: Any, alignment: Any
) -> Tensor | None:
    """The output of a call with these arguments of ``scaled_dot_product_attention`` alone; None for the long way.

    Nothing is checked yet; a keyword of another type than the usual goes the long way.
    """
    if not onlookers.absent(query, key, value) or transforms.transformed() or torch._C._autograd._profiler_enabled():
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    shape, of_keys, device_type = query.shape, key.shape, query.device.type
    if len(shape) != 4 or of_keys != value.shape or len(of_keys) != 4 or 0 in shape or 0 in of_keys:
        return None
    (batch, heads, rows, dim), (key_batch, key_heads, columns, key_dim) = shape, of_keys
    if key_batch != batch or key_dim != dim or torch.is_autocast_enabled(device_type):
        return None
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        return None
    if key_heads != heads and not (enable_gqa and heads % key_heads == 0):
        return None
    top_left = alignment == "top-left"
    if not (top_left or alignment == "bottom-right"):
        return None
    if scale is None:
        scale = 1.0 / math.sqrt(dim)
    elif type(scale) is not float or not math.isfinite(scale):
        return None
    backend = choose(Request(device_type, query.dtype, dim, dim, band=is_causal and not top_left))
    shift = 0 if top_left else columns - rows
    upper = shift if is_causal else None
    if backend is Backend.SDPA:
        return sdpa.attention(query, key, value, scale=scale, upper=upper)
    kernel = _KERNELS.get(backend)
    if kernel is None:
        return None
    return kernel(query, key, value, None, *_NOTHING, 0.0, scale, 0.0, shift, None, upper)[0]
