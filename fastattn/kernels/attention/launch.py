"""Launching the Triton kernels: pointers, strides, flags and grids for each operator of ``op``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.attention import config, shapes
from fastattn.philox import keep_threshold

try:
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    from fastattn.kernels.attention import backward, forward, mask_gradient, padding, weights
except ImportError as error:
    _MISSING: str | None = f"triton cannot be imported ({error}); run: pip install 'triton>=3.6,<3.10'"
    INTERPRETED = False
else:
    _MISSING = None
    INTERPRETED = isinstance(forward.attention_forward, InterpretedFunction)

# (compute capability, triton minor version) on which the whole GPU test suite has passed. Only these may be chosen
# without being asked for: a path that never ran on a real device is not a default.
VERIFIED: frozenset[tuple[tuple[int, int], str]] = frozenset()
_LOG2E = math.log2(math.e)
_BOUNDS_BLOCK = 1024


def why_unavailable(device_type: str) -> str | None:
    """The reason the kernels cannot run on tensors of this device type; None when they can."""
    if _MISSING is not None:
        return _MISSING
    if device_type == "cpu":
        return None if INTERPRETED else "on the CPU only under Triton's interpreter: set TRITON_INTERPRET=1 before import"
    if device_type != "cuda":
        return f"device {device_type}; the kernels run on CUDA"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability()}; the kernels need 8.0"
    return None


def verified(device_type: str) -> bool:
    """Whether this device and this Triton have passed the GPU tests."""
    if device_type != "cuda" or _MISSING is not None:
        return False
    return (torch.cuda.get_device_capability(), triton.__version__.rsplit(".", 1)[0]) in VERIFIED


def why_not_verified(device_type: str) -> str:
    """The reason ``auto`` does not take the kernels although they can run."""
    return 'the kernels have not passed the tests on this device with this Triton; force with fastattn.backend("triton")'


class _Problem:
    """The arguments shared by all kernels, as their keyword arguments."""

    def __init__(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None,
        seed: Tensor | None, dropout_p: float, scale: float, lower: int | None, upper: int | None,
    ) -> None:  # fmt: skip
        self.batch, self.heads, self.rows, self.head_dim = query.shape
        self.key_heads, self.columns = key.shape[1], key.shape[2]
        self.dtype, self.device = query.dtype, query.device
        self.scale = scale
        self.dropout = dropout_p > 0.0
        self.has_mask = attn_mask is not None or key_padding_mask is not None
        self.keep_scale = 1.0 if not self.dropout else 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
        natural = any(mask is not None and mask.dtype != torch.bool for mask in (attn_mask, key_padding_mask))
        self.score_scale = scale if natural else scale * _LOG2E
        exact = self.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
        self.arguments: dict[str, Any] = {
            **_mask_arguments(attn_mask),
            **_padding_arguments(key_padding_mask),
            "seed_ptr": seed if self.dropout else None,
            "threshold": keep_threshold(dropout_p),
            "rows": self.rows,
            "columns": self.columns,
            "group": self.heads // max(self.key_heads, 1),
            "lower": 0 if lower is None else lower,
            "upper": 0 if upper is None else upper,
            "HAS_LOWER": lower is not None,
            "HAS_UPPER": upper is not None,
            "NATURAL": natural,
            "DIM": self.head_dim,
            "BLOCK_D": config.block_d(self.head_dim),
            "PRECISION": "ieee" if exact else "tf32",
        }

    @property
    def empty(self) -> bool:
        return 0 in (self.batch, self.heads, self.rows, self.columns)

    def launch(self, name: str, kernel: Any, programs: Callable[[config.Tile], int], **arguments: Any) -> None:
        tile = config.tile(name, self.dtype, self.head_dim, dropout=self.dropout, mask=self.has_mask)
        with _on(self.device):
            kernel[(programs(tile),)](
                **self.arguments, **arguments, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.warps,
                num_stages=tile.stages,
            )  # fmt: skip


def attention(query: Tensor, key: Tensor, value: Tensor, *problem: Any) -> tuple[Tensor, Tensor]:
    """See ``op``."""
    out, logsumexp = shapes.empty_output(query, value), shapes.empty_logsumexp(query)
    shared = _Problem(query, key, *problem)
    if shared.empty:
        return out.zero_(), logsumexp.fill_(float("-inf"))
    query, key, value = _rows(query), _rows(key), _rows(value)
    shared.launch(
        "forward",
        forward.attention_forward,
        lambda tile: triton.cdiv(shared.rows, tile.block_m) * shared.batch * shared.heads,
        query_ptr=query, key_ptr=key, value_ptr=value, out_ptr=out, logsumexp_ptr=logsumexp, heads=shared.heads,
        scale=shared.score_scale, keep_scale=shared.keep_scale, **_strides("query", query, "l"),
        **_strides("key", key, "s"), **_strides("value", value, "s"), **_strides("out", out, "l"),
    )  # fmt: skip
    return out, logsumexp


def attention_weights(query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> Tensor:
    """See ``op``."""
    *problem, average = rest
    result = shapes.empty_weights(query, key, average)
    shared = _Problem(query, key, *problem)
    if shared.empty:
        return result.zero_()
    query, key = _rows(query), _rows(key)
    averaged = shared.heads if average else 1
    per_head = result.unsqueeze(1) if average else result
    shared.launch(
        "weights",
        weights.attention_weights,
        lambda tile: (
            triton.cdiv(shared.rows, tile.block_m) * triton.cdiv(shared.columns, tile.block_n) * shared.batch
            * (shared.heads // averaged)
        ),
        query_ptr=query, key_ptr=key, logsumexp_ptr=logsumexp.contiguous(), weights_ptr=per_head, heads=shared.heads,
        averaged=averaged, scale=shared.score_scale, keep_scale=shared.keep_scale, **_strides("query", query, "l"),
        **_strides("key", key, "s"), **_strides("weights", per_head, "row"),
    )  # fmt: skip
    return result


def attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``op``."""
    *problem, average = rest
    out, logsumexp = attention(query, key, value, *problem)
    return out, logsumexp, attention_weights(query, key, logsumexp, *problem, average)


def attention_backward(
    grad_out: Tensor | None, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See ``op``."""
    *problem, attn_mask_grad, padding_grad = rest
    shared = _Problem(query, key, *problem)
    dquery, dkey, dvalue = (shapes.empty_like_heads_last(tensor) for tensor in (query, key, value))
    if shared.empty:
        return dquery.zero_(), dkey.zero_(), dvalue.zero_(), *_no_mask_grads(query, problem, attn_mask_grad, padding_grad)
    query, key, value, out = _rows(query), _rows(key), _rows(value), _rows(out)
    do = _rows(torch.zeros_like(out) if grad_out is None else grad_out.to(out.dtype))
    delta = torch.empty_like(logsumexp, memory_format=torch.contiguous_format)
    tile = config.tile("delta", shared.dtype, shared.head_dim)
    dlogsumexp = (0, 0, 0) if grad_logsumexp is None else grad_logsumexp.stride()
    with _on(shared.device):
        backward.attention_delta[(triton.cdiv(shared.rows, tile.block_m) * shared.batch * shared.heads,)](
            out, do, grad_logsumexp, delta, *out.stride()[:3], *do.stride()[:3], *dlogsumexp, shared.heads,
            shared.rows, DIM=shared.head_dim, BLOCK_D=config.block_d(shared.head_dim), BLOCK_M=tile.block_m,
            num_warps=tile.warps,
        )  # fmt: skip
    common = {
        "query_ptr": query, "key_ptr": key, "value_ptr": value, "do_ptr": do, "dweights_ptr": None,
        "logsumexp_ptr": logsumexp.contiguous(), "delta_ptr": delta, "HAS_DO": True, "keep_scale": shared.keep_scale,
        "dweights_stride_b": 0, "dweights_stride_h": 0, "dweights_stride_row": 0, "dweights_stride_column": 0,
        **_strides("query", query, "l"), **_strides("key", key, "s"), **_strides("value", value, "s"),
        **_strides("do", do, "l"),
    }  # fmt: skip
    _launch_gradients(shared, common, dquery, None, dkey, dvalue)
    masks = _launch_mask_gradients(shared, common, query, problem, attn_mask_grad, padding_grad)
    return dquery, dkey, dvalue, *masks


def attention_weights_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """See ``op``."""
    *problem, average, attn_mask_grad, padding_grad = rest
    shared = _Problem(query, key, *problem)
    dquery, dkey = shapes.empty_like_heads_last(query), shapes.empty_like_heads_last(key)
    dlogsumexp = shapes.empty_logsumexp(query)
    if shared.empty:
        masks = _no_mask_grads(query, problem, attn_mask_grad, padding_grad)
        return dquery.zero_(), dkey.zero_(), dlogsumexp.zero_(), *masks
    query, key = _rows(query), _rows(key)
    if average:
        grad_weights = grad_weights.unsqueeze(1).expand(-1, shared.heads, -1, -1)
    common = {
        "query_ptr": query, "key_ptr": key, "value_ptr": None, "do_ptr": None, "dweights_ptr": grad_weights,
        "logsumexp_ptr": logsumexp.contiguous(), "delta_ptr": None, "HAS_DO": False,
        "keep_scale": shared.keep_scale / (shared.heads if average else 1),
        "dweights_stride_b": grad_weights.stride(0), "dweights_stride_h": grad_weights.stride(1),
        "dweights_stride_row": grad_weights.stride(2), "dweights_stride_column": grad_weights.stride(3),
        **_strides("query", query, "l"), **_strides("key", key, "s"), **_strides("value", None, "s"),
        **_strides("do", None, "l"),
    }  # fmt: skip
    _launch_gradients(shared, common, dquery, dlogsumexp, dkey, None)
    masks = _launch_mask_gradients(shared, common, query, problem, attn_mask_grad, padding_grad)
    return dquery, dkey, dlogsumexp, *masks


def _launch_gradients(
    shared: _Problem, common: dict[str, Any], dquery: Tensor, dlogsumexp: Tensor | None, dkey: Tensor,
    dvalue: Tensor | None,
) -> None:  # fmt: skip
    shared.launch(
        "dquery",
        backward.attention_dquery,
        lambda tile: triton.cdiv(shared.rows, tile.block_m) * shared.batch * shared.heads,
        **common, dquery_ptr=dquery, dlogsumexp_ptr=dlogsumexp, heads=shared.heads, scale=shared.scale,
        score_scale=shared.score_scale, **_strides("dquery", dquery, "l"),
    )  # fmt: skip
    shared.launch(
        "dkey_dvalue",
        backward.attention_dkey_dvalue,
        lambda tile: triton.cdiv(shared.columns, tile.block_n) * shared.batch * shared.key_heads,
        **common, dkey_ptr=dkey, dvalue_ptr=dvalue, key_heads=shared.key_heads, scale=shared.scale,
        score_scale=shared.score_scale, **_strides("dkey", dkey, "s"), **_strides("dvalue", dvalue, "s"),
    )  # fmt: skip


def _launch_mask_gradients(
    shared: _Problem, common: dict[str, Any], query: Tensor, problem: list[Any], attn_mask_grad: bool,
    padding_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    attn_mask, key_padding_mask = problem[:2]
    grads = (
        shapes.empty_mask_grad(attn_mask, attn_mask_grad, query),
        shapes.empty_mask_grad(key_padding_mask, padding_grad, query),
    )
    if attn_mask_grad and attn_mask is not None:
        _launch_mask_gradient(shared, common, grads[0])
    if padding_grad and key_padding_mask is not None:
        _launch_mask_gradient(shared, common, grads[1][:, None, None, :])
    return grads


def _launch_mask_gradient(shared: _Problem, common: dict[str, Any], grad: Tensor) -> None:
    batches, heads, rows, columns = grad.shape

    def programs(tile: config.Tile) -> int:
        row_tiles = triton.cdiv(rows, tile.block_m) if rows > 1 else 1
        column_tiles = triton.cdiv(columns, tile.block_n) if columns > 1 else 1
        return int(batches * heads * row_tiles * column_tiles)

    shared.launch(
        "dmask",
        mask_gradient.attention_dmask,
        programs,
        **common, dmask_ptr=grad, dmask_batches=batches, dmask_heads=heads, dmask_stride_b=grad.stride(0),
        dmask_stride_h=grad.stride(1), dmask_stride_row=grad.stride(2), batches=shared.batch, heads=shared.heads,
        scale=shared.score_scale, GRAD_ROWS=rows > 1, GRAD_COLUMNS=columns > 1,
    )  # fmt: skip


def _no_mask_grads(
    query: Tensor, problem: list[Any], attn_mask_grad: bool, padding_grad: bool
) -> tuple[Tensor, Tensor]:
    attn_mask, key_padding_mask = problem[:2]
    return (
        shapes.empty_mask_grad(attn_mask, attn_mask_grad, query).zero_(),
        shapes.empty_mask_grad(key_padding_mask, padding_grad, query).zero_(),
    )


def _mask_arguments(mask: Tensor | None) -> dict[str, Any]:
    boolean = mask is not None and mask.dtype == torch.bool
    strides = (0,) * 4
    if mask is not None:
        strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return {
        "mask_ptr": mask.view(torch.uint8) if mask is not None and boolean else mask,
        "mask_stride_b": strides[0],
        "mask_stride_h": strides[1],
        "mask_stride_row": strides[2],
        "mask_stride_column": strides[3],
        "MASK_BOOL": boolean,
        "MASK_ROWS": mask is not None and mask.shape[2] != 1,
        "MASK_COLUMNS": mask is not None and mask.shape[3] != 1,
    }


def _padding_arguments(mask: Tensor | None) -> dict[str, Any]:
    if mask is None:
        start = end = None
        strides: tuple[int, ...] = (0, 0)
        boolean = False
    else:
        boolean = mask.dtype == torch.bool
        mask = mask.view(torch.uint8) if boolean else mask
        strides = mask.stride()
        start, end = (torch.empty(mask.shape[0], dtype=torch.int32, device=mask.device) for _ in range(2))
        if mask.shape[0] > 0:
            with _on(mask.device):
                padding.key_bounds[(mask.shape[0],)](
                    mask, start, end, *strides, mask.shape[1], PADDING_BOOL=boolean, BLOCK_N=_BOUNDS_BLOCK
                )
    return {
        "padding_ptr": mask,
        "start_ptr": start,
        "end_ptr": end,
        "padding_stride_b": strides[0],
        "padding_stride": strides[1],
        "PADDING_BOOL": boolean,
    }


def _strides(name: str, tensor: Tensor | None, length: str) -> dict[str, int]:
    """Batch, head and row strides as kernel arguments; the last dimension is contiguous."""
    batch, head, row = (0, 0, 0) if tensor is None else tensor.stride()[:3]
    return {f"{name}_stride_b": batch, f"{name}_stride_h": head, f"{name}_stride_{length}": row}


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension, which is all the kernels ask of a layout."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
