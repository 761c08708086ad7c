"""Checks of additive attention's arguments: each error names the argument, what was given and what is allowed.

Shapes are compared for equality only, never ordered, so that a compiled call keeps one graph for every length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.validation import FLOATING, autocast_enabled, check_layout


def check_inputs(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> None:
    """query (B, Tq, D), key (B, Tk, D), value (B, Tk, Dv) and weight (D) of one dtype and device.

    Under autocast, which casts them all, the dtypes may differ.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value), ("weight", weight)):
        check_tensor(name, tensor, (1,) if name == "weight" else (3,))
    for name, tensor in (("key", key), ("value", value), ("weight", weight)):
        _check_beside(name, tensor, query)
    if query.shape[-1] == 0:
        raise ValueError("query: got 0 features, expected at least 1")
    _check_size("key", "features", key.shape[-1], "query's", query.shape[-1])
    _check_size("weight", "features", weight.shape[0], "query's", query.shape[-1])
    _check_size("key", "batch size", key.shape[0], "query's", query.shape[0])
    _check_size("value", "batch size", value.shape[0], "query's", query.shape[0])
    _check_size("value", "length", value.shape[1], "key's", key.shape[1])


def check_coverage(
    coverage: Tensor | None, coverage_weight: Tensor | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """Both (B, Tk) or (B, Tq, Tk) and (D), or neither; the coverage as (B, 1 or Tq, Tk)."""
    if coverage is None and coverage_weight is None:
        return None
    if coverage is None or coverage_weight is None:
        given, missing = ("coverage_weight", "coverage") if coverage is None else ("coverage", "coverage_weight")
        raise ValueError(f"{missing}: got None beside {given}, expected both or neither")
    check_tensor("coverage", coverage, (2, 3))
    check_tensor("coverage_weight", coverage_weight, (1,))
    _check_device("coverage", coverage, query)
    _check_beside("coverage_weight", coverage_weight, query)
    _check_size("coverage_weight", "features", coverage_weight.shape[0], "query's", query.shape[-1])
    allowed = (query.shape[0], key.shape[1]) if coverage.dim() == 2 else (*query.shape[:2], key.shape[1])
    if tuple(coverage.shape) != tuple(allowed):
        names = "(B, Tk)" if coverage.dim() == 2 else "(B, Tq, Tk)"
        raise ValueError(f"coverage: got shape {tuple(coverage.shape)}, expected {names} = {tuple(allowed)}")
    return coverage.unsqueeze(1) if coverage.dim() == 2 else coverage


def check_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    """attn_mask broadcastable to (B, Tq, Tk), key_padding_mask (B, Tk); boolean or floating."""
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask, (0, 1, 2, 3), mask=True)
        _check_device("attn_mask", attn_mask, query)
        target = (*query.shape[:2], key.shape[1])
        pairs = zip(reversed(attn_mask.shape), reversed(target), strict=False)
        if any(got != 1 and got != wanted for got, wanted in pairs):
            raise ValueError(
                f"attn_mask: got shape {tuple(attn_mask.shape)}, expected broadcastable to (B, Tq, Tk) = {target}"
            )
    if key_padding_mask is not None:
        check_tensor("key_padding_mask", key_padding_mask, (2,), mask=True)
        _check_device("key_padding_mask", key_padding_mask, query)
        if key_padding_mask.shape[0] != query.shape[0] or key_padding_mask.shape[1] != key.shape[1]:
            raise ValueError(
                f"key_padding_mask: got shape {tuple(key_padding_mask.shape)}, expected (B, Tk) = "
                f"{(query.shape[0], key.shape[1])}"
            )


def check_tensor(name: str, tensor: Any, ranks: tuple[int, ...], *, mask: bool = False) -> None:
    """A dense tensor with one of the numbers of dimensions, floating, or boolean where it is a mask."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    check_layout(name, tensor)
    if tensor.dtype not in FLOATING and not (mask and tensor.dtype == torch.bool):
        also = "bool, " if mask else ""
        raise ValueError(f"{name}: got dtype {tensor.dtype}, allowed are {also}float16, bfloat16, float32 and float64")
    if tensor.dim() not in ranks:
        expected = "at most 3" if 0 in ranks else " or ".join(map(str, ranks))
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected} dimensions")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast brings tensors of this device to; None where it is off."""
    device_type = tensor.device.type
    if autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _check_beside(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype != query.dtype and autocast_dtype(query) is None:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, expected query's {query.dtype}")
    _check_device(name, tensor, query)


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected query's {query.device}")


def _check_size(name: str, what: str, got: int, whose: str, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"{name}: got {what} {got}, expected {whose} {wanted}")
