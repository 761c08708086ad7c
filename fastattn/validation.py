"""Checks of arguments that come before any kernel: each error names the argument, what was given, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Types, dtypes, devices and ranks of the three inputs of attention."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        _check_layout(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected at least 2 dimensions (..., length, head_dim)"
            )
        if tensor.dtype not in FLOATING:
            raise ValueError(
                f"{name}: got dtype {tensor.dtype}, allowed are float16, bfloat16, float32 and float64"
            )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, expected query's {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected query's {query.device}")
        if tensor.dim() != query.dim():
            raise ValueError(f"{name}: got {tensor.dim()} dimensions, expected query's {query.dim()}")
        # Flattened to one batch, (2, 3) and (3, 2) would look the same.
        if query.dim() > 4 and tensor.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name}: got batch dimensions {tuple(tensor.shape[:-3])}, expected query's {tuple(query.shape[:-3])}"
            )


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise ValueError(f"{name}: got a nested tensor, expected a padded one with key_padding_mask")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: got layout {tensor.layout}, allowed is torch.strided (dense)")


def check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Heads, lengths and head dimensions of (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv)."""
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        raise ValueError(f"head_dim: got {query.shape[-1]} (value {value.shape[-1]}), expected at least 1")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: got head_dim {key.shape[-1]}, expected query's {query.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value: got length {value.shape[-2]}, expected key's {key.shape[-2]}")
    if key.shape[0] != query.shape[0] or value.shape[0] != query.shape[0]:
        raise ValueError(
            f"key, value: got batch sizes {key.shape[0]} and {value.shape[0]}, expected query's {query.shape[0]}"
        )
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value: got {value.shape[1]} heads, expected key's {key.shape[1]}")
    if key.shape[1] != query.shape[1]:
        if not enable_gqa:
            raise ValueError(
                f"key: got {key.shape[1]} heads, expected query's {query.shape[1]} (grouped heads need enable_gqa=True)"
            )
        if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
            raise ValueError(
                f"key: got {key.shape[1]} heads, expected a divisor of query's {query.shape[1]} for enable_gqa"
            )


def check_attn_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask with four dimensions; broadcastable to (B, H, L, S)."""
    _check_mask_type("attn_mask", attn_mask, query)
    target = (*query.shape[:3], key.shape[2])
    if attn_mask.dim() > 4:
        raise ValueError(f"attn_mask: got {attn_mask.dim()} dimensions, allowed are up to 4 (B, H, L, S)")
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    for got, wanted in zip(mask.shape, target, strict=True):
        if got != 1 and got != wanted:
            raise ValueError(
                f"attn_mask: got shape {tuple(attn_mask.shape)}, expected broadcastable to (B, H, L, S) = {target}"
            )
    return mask


def check_key_padding_mask(mask: Tensor, query: Tensor, key: Tensor) -> None:
    """(B, S), boolean or floating."""
    _check_mask_type("key_padding_mask", mask, query)
    if mask.dim() != 2 or mask.shape[0] != query.shape[0] or mask.shape[1] != key.shape[2]:
        raise ValueError(
            f"key_padding_mask: got shape {tuple(mask.shape)}, expected (B, S) = {(query.shape[0], key.shape[2])}"
        )


def _check_mask_type(name: str, mask: Tensor, query: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, expected a torch.Tensor or None")
    _check_layout(name, mask)
    if mask.dtype != torch.bool and mask.dtype not in FLOATING:
        raise ValueError(f"{name}: got dtype {mask.dtype}, allowed are bool and floating-point types")
    if mask.device != query.device:
        raise ValueError(f"{name}: got device {mask.device}, expected query's {query.device}")


def check_dropout(dropout_p: float) -> float:
    """A probability."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: got {type(dropout_p).__name__}, expected a float in [0, 1]")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, allowed is [0, 1]")
    return float(dropout_p)


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor on the scores; 1 / sqrt(head_dim) by default."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {type(scale).__name__}, expected a float or None")
    try:
        scale = float(scale)
    except OverflowError:
        raise ValueError("scale: got an integer beyond the range of a float, expected a finite number") from None
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number")
    return scale


def check_window(window: Sequence[int | None] | None) -> tuple[int | None, int | None]:
    """(left, right), how many keys before and after a query's own position take part; None or -1 is unlimited."""
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window: got {window!r}, expected (left, right)")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, (int, torch.SymInt))):
            raise TypeError(f"window: got {window!r}, expected two integers or None")
        if side is not None and side < -1:
            raise ValueError(f"window: got {window!r}, allowed are integers >= 0, and None or -1 for unlimited")
    # No sequence is that long; a sum with such a number might not fit an index.
    left, right = (None if side is None or side == -1 or side >= 2**31 else side for side in window)
    return left, right


def check_flags(**flags: bool) -> None:
    """True or False, and what Python counts as one of them without surprise: None, integers, symbolic values.

    A word, a mask or a number in a flag's place is a slip.
    """
    for name, flag in flags.items():
        if flag is not None and not isinstance(flag, (bool, int, torch.SymBool, torch.SymInt)):
            raise TypeError(f"{name}: got {type(flag).__name__}, expected True or False")


def check_causal_alignment(alignment: str) -> None:
    """ "top-left" as torch, "bottom-right" as FlashAttention."""
    if alignment not in ("top-left", "bottom-right"):
        raise ValueError(f"causal_alignment: got {alignment!r}, allowed are 'top-left' and 'bottom-right'")
