"""Checks of arguments that come before any kernel: each error names the argument, what was given, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for that device.

    The meta device has none, and asking for its state is an error. torch.amp.is_autocast_available would say so, and
    breaks the graph under torch.compile in torch 2.11.
    """
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Types, dtypes, devices and ranks of the three inputs of attention."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        check_layout(name, tensor)
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


def check_layout(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor that is not dense."""
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
    check_layout(name, mask)
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


def check_softcap(softcap: float | None) -> float:
    """A positive bound of the scores; 0.0 stands for none."""
    if softcap is None:
        return 0.0
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap: got {type(softcap).__name__}, expected a positive float or None")
    if not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap: got {softcap}, expected a positive finite number, or None for no cap")
    return float(softcap)


def check_alibi_slopes(slopes: Tensor, query: Tensor) -> Tensor:
    """(H) or (B, H) floating, as (1 or B, H) float32 (float64 for float64 inputs)."""
    _check_vector("alibi_slopes", slopes, query)
    batch, heads = query.shape[:2]
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(f"alibi_slopes: got shape {tuple(slopes.shape)}, expected (H) = ({heads},) or (B, H)")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes: got a tensor that requires a gradient; slopes are constants, pass detach()")
    return slopes.view(-1, heads).to(torch.promote_types(torch.float32, query.dtype))


def check_sinks(sinks: Tensor, query: Tensor) -> Tensor:
    """(H) floating."""
    _check_vector("sinks", sinks, query)
    if tuple(sinks.shape) != (query.shape[1],):
        raise ValueError(f"sinks: got shape {tuple(sinks.shape)}, expected (H) = ({query.shape[1]},)")
    return sinks


def _check_vector(name: str, tensor: Tensor, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor or None")
    check_layout(name, tensor)
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, allowed are floating-point types")
    if tensor.device != query.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected query's {query.device}")


def check_segment_ids(
    segment_ids: Tensor | Sequence[Tensor] | None, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """One (B, L) for self-attention, or a pair of (B, L) and (B, S): integers, in one dtype, int32 or int64."""
    if segment_ids is None:
        return None, None
    pair = (segment_ids, segment_ids) if isinstance(segment_ids, Tensor) else segment_ids
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(ids, Tensor) for ids in pair):
        raise TypeError(
            f"segment_ids: got {type(segment_ids).__name__}, expected a tensor (B, L), or a pair (B, L) and (B, S)"
        )
    for ids, length, side in zip(pair, (query.shape[2], key.shape[2]), ("query", "key"), strict=True):
        if ids.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
            raise ValueError(f"segment_ids: got dtype {ids.dtype}, expected integers")
        if ids.device != query.device:
            raise ValueError(f"segment_ids: got device {ids.device}, expected query's {query.device}")
        if ids.dim() != 2 or ids.shape[0] != query.shape[0] or ids.shape[1] != length:
            raise ValueError(
                f"segment_ids: got shape {tuple(ids.shape)} for the {side}, expected {(query.shape[0], length)}"
            )
    dtype = torch.promote_types(torch.int32, torch.promote_types(pair[0].dtype, pair[1].dtype))
    return pair[0].to(dtype), pair[1].to(dtype)


def check_integers(name: str, tensor: Tensor, query: Tensor) -> None:
    """A tensor of lengths, boundaries or indexes: int32 or int64, on query's device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: got dtype {tensor.dtype}, allowed are int32 and int64")
    if tensor.device != query.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected query's {query.device}")


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
