"""Launching the Triton kernels: strides, grids and the sums over tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.kernels.additive import config, shapes
from fastattn.kernels.attention.launch import why_unavailable
from fastattn.kernels.device import on

try:
    import triton

    from fastattn.kernels.additive import gradient as gradient_kernel
    from fastattn.kernels.additive import scores as scores_kernel
    from fastattn.kernels.additive.primitives import Strided
    from fastattn.kernels.attention.operands import bounds
except ImportError:  # why_unavailable says so
    _TRITON = False
else:
    _TRITON = True

# (compute capability, triton minor version) on which the GPU tests have passed. Only these may be chosen without being
# asked for: a path that never ran on a real device is not a default.
VERIFIED: frozenset[tuple[tuple[int, int], str]] = frozenset()
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """The reason the kernels cannot serve tensors of this device and dtype; None when they can."""
    if dtype not in _DTYPES:
        return f"dtype {dtype}; our kernels take float16, bfloat16 and float32"
    return why_unavailable(device_type)


def verified(device_type: str) -> bool:
    """Whether this device and this Triton have passed the GPU tests."""
    if device_type != "cuda" or not _TRITON:
        return False
    return (torch.cuda.get_device_capability(), triton.__version__.rsplit(".", 1)[0]) in VERIFIED


def scores(
    query: Tensor, key: Tensor, weight: Tensor, coverage: Tensor | None, coverage_weight: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """See ``op``; tiles past the last key that takes part are 0."""
    result = shapes.empty_scores(query, key)
    end = _ends(key_padding_mask)
    _walk_features(query, key, weight, coverage, coverage_weight, None, end, result)
    return result


def scores_backward(
    dscores: Tensor, query: Tensor, key: Tensor, weight: Tensor, coverage: Tensor | None,
    coverage_weight: Tensor | None, key_padding_mask: Tensor | None, coverage_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """See ``op``."""
    end = _ends(key_padding_mask)
    rest = (weight, coverage, coverage_weight, dscores, end)
    dquery, sums = _walk_others(query, key, *rest, of_keys=False)
    dkey, _ = _walk_others(key, query, *rest, of_keys=True)
    dweight, *more = (total.to(weight.dtype) for total in sums)
    if coverage is not None and coverage_grad:
        whole = torch.empty_like(dscores, memory_format=torch.contiguous_format)
        _walk_features(query, key, weight, coverage, coverage_weight, dscores, end, whole)
        more.append(whole.sum_to_size(coverage.shape).to(coverage.dtype))
    return dquery, dkey, dweight, more


def _walk_features(
    query: Tensor, key: Tensor, weight: Tensor, coverage: Tensor | None, coverage_weight: Tensor | None,
    dscores: Tensor | None, end: Tensor | None, result: Tensor,
) -> None:  # fmt: skip
    (batch, rows, features), columns = query.shape, key.shape[1]
    tile = config.scores_tile(rows)
    programs = batch * triton.cdiv(rows, tile.first) * triton.cdiv(columns, tile.second)
    if programs == 0:
        return
    if rows >= config.FEATURES_FIRST_ROWS:
        # A feature of neighbouring keys is then neighbouring memory: one load where there were as many as keys.
        query, key = (tensor.mT.contiguous().mT for tensor in (query, key))
    with on(query.device):
        scores_kernel.additive_scores[(programs,)](
            _strided(query), _strided(key), weight.contiguous(), _strided(coverage), _contiguous(coverage_weight),
            _strided(dscores), end, _strided(result), rows, columns, features,
            BLOCK_M=tile.first, BLOCK_N=tile.second, num_warps=tile.warps, maxnreg=tile.registers,
        )  # fmt: skip


def _walk_others(
    own: Tensor, other: Tensor, weight: Tensor, coverage: Tensor | None, coverage_weight: Tensor | None,
    dscores: Tensor, end: Tensor | None, *, of_keys: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The gradient of ``own`` and, from the walk over the keys, those of weight and coverage_weight in float32."""
    batch, owns, features = own.shape
    tile = config.gradient_tile()
    lines = batch * triton.cdiv(owns, tile.first)
    grad = own.new_empty(own.shape)
    parts: list[Tensor] = []
    if not of_keys:
        parts = [own.new_empty((lines, features), dtype=torch.float32) for _ in range(1 if coverage is None else 2)]
    if of_keys:
        dscores = dscores.mT
        coverage = None if coverage is None else coverage.mT
    if lines:
        with on(own.device):
            gradient_kernel.additive_gradient[(lines * triton.cdiv(features, tile.second),)](
                _strided(own), _strided(other), weight.contiguous(), _strided(coverage), _contiguous(coverage_weight),
                _strided(dscores), end, _strided(grad), *(*parts, None, None)[:2], owns, other.shape[1], features,
                OWN_KEYS=of_keys, BLOCK_M=tile.first, BLOCK_D=tile.second, num_warps=tile.warps,
                maxnreg=tile.registers,
            )  # fmt: skip
    return grad, [part.sum(0) for part in parts]


def _ends(key_padding_mask: Tensor | None) -> Tensor | None:
    """For each batch, one past the last key that takes part, (B) int32."""
    if key_padding_mask is None or key_padding_mask.numel() == 0:
        return None
    _, end, _ = bounds(key_padding_mask)
    return end


def _strided(tensor: Tensor | None) -> Strided:
    """A (B, rows, columns) tensor for a kernel, with stride 0 where a dimension of one broadcasts."""
    if tensor is None:
        return Strided(None, 0, 0, 0)
    strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return Strided(tensor, *strides)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
