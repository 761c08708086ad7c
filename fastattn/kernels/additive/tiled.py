"""The scores and their gradients in plain PyTorch, tile by tile, on any device and in every dtype.

A tile (b, m, n, D) of ``tanh`` stays in the cache; the gradients compute it again. Nothing larger than a tile, the
inputs or the scores is ever held. Half precision is widened tile by tile, arithmetic is float32 or float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn.kernels.additive import config, shapes

_Tile = tuple[slice, slice, slice]
_FLAT = 60.0  # tanh of half of it is 1 in float64


def scores(
    query: Tensor, key: Tensor, weight: Tensor, coverage: Tensor | None, coverage_weight: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """See ``op``; columns past the last key that takes part are left unwritten."""
    result = shapes.empty_scores(query, key)
    weight = weight.to(result.dtype)
    for tile in _tiles(query, key, key_padding_mask):
        result[tile] = _tanh(tile, query, key, coverage, coverage_weight, result.dtype) @ weight
    return result


def scores_backward(
    dscores: Tensor, query: Tensor, key: Tensor, weight: Tensor, coverage: Tensor | None,
    coverage_weight: Tensor | None, key_padding_mask: Tensor | None, coverage_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """See ``op``; ``dscores`` is 0 where the mask is False.

        h_ijd = dscores_ij (1 - tanh_ijd^2)
        dq_id = w_d sum_j h_ijd,   dk_jd = w_d sum_i h_ijd,   dw_d = sum_ij dscores_ij tanh_ijd
        dc_ij = sum_d w_d wc_d h_ijd,   dwc_d = w_d sum_ij c_ij h_ijd
    """
    dtype, features = dscores.dtype, query.shape[-1]
    wide = weight.to(dtype)
    dquery, dkey, dweight = (tensor.new_zeros(tensor.shape, dtype=dtype) for tensor in (query, key, weight))
    more: list[Tensor] = []
    if coverage is not None and coverage_weight is not None:
        more = [coverage_weight.new_zeros(coverage_weight.shape, dtype=dtype)]
        if coverage_grad:
            more.append(coverage.new_zeros(coverage.shape, dtype=dtype))
    for tile in _tiles(query, key, key_padding_mask):
        batches, rows, columns = tile
        tanh, dscore = _tanh(tile, query, key, coverage, coverage_weight, dtype), dscores[tile]
        dweight.add_(dscore.reshape(-1) @ tanh.view(-1, features))
        slope = torch.ops.aten.tanh_backward(dscore.unsqueeze(-1), tanh)  # h, in one pass
        # add_, not +=, which would write the view back onto itself.
        dquery[batches, rows].add_(slope.sum(2))
        dkey[batches, columns].add_(slope.sum(1) if slope.shape[1] > 1 else slope.squeeze(1))
        if coverage is not None and coverage_weight is not None:
            covered = _of_tile(coverage, tile).to(dtype).expand_as(dscore)
            more[0].add_(covered.reshape(-1) @ slope.view(-1, features))
            if coverage_grad:
                into = _of_tile(more[1], tile)
                into.add_((slope @ (wide * coverage_weight.to(dtype))).sum_to_size(into.shape))
    if more:
        more[0].mul_(wide)
    grads = [dquery.mul_(wide).to(query.dtype), dkey.mul_(wide).to(key.dtype), dweight.to(weight.dtype)]
    originals = [tensor for tensor in (coverage_weight, coverage) if tensor is not None]
    return grads[0], grads[1], grads[2], [grad.to(own.dtype) for grad, own in zip(more, originals, strict=False)]


def _tanh(
    tile: _Tile, query: Tensor, key: Tensor, coverage: Tensor | None, coverage_weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """tanh x of a tile, x = q_i + k_j + c_ij wc, (b, m, n, D) contiguous.

    As e / (e + 2) with e = exp(2 x) - 1, within 3 roundings of its own size, near 0 too: 0.62 of the time of torch's
    tanh (AVX-512), which would be most of the work. The bound on 2 x keeps e finite where tanh has long been 1.
    """
    batches, rows, columns = tile
    queries, keys = query[batches, rows].to(dtype).mul(2), key[batches, columns].to(dtype)
    twice = torch.add(queries.unsqueeze(2), keys.unsqueeze(1), alpha=2)
    if coverage is not None and coverage_weight is not None:
        twice.addcmul_(_of_tile(coverage, tile).to(dtype).unsqueeze(-1), coverage_weight.to(dtype), value=2)
    exponential = twice.contiguous().clamp_(max=_FLAT).expm1_()
    return exponential.div_(exponential + 2)


def _of_tile(coverage: Tensor, tile: _Tile) -> Tensor:
    """The part of a (B, 1 or Tq, Tk) tensor that a tile sees."""
    batches, rows, columns = tile
    return coverage[batches, rows if coverage.shape[1] != 1 else slice(None), columns]


def _tiles(query: Tensor, key: Tensor, key_padding_mask: Tensor | None) -> Iterator[_Tile]:
    """Slices of batches, queries and keys, without the keys after the last one that takes part in a batch."""
    (batch, rows, features), columns = query.shape, key.shape[1]
    if 0 in (batch, rows, columns):
        return
    most = config.BLOCKS.numbers
    n = max(1, min(columns, config.BLOCKS.keys, most // features))
    m = max(1, min(rows, most // (n * features)))
    b = max(1, min(batch, most // (m * n * features)))
    ends = [columns] * batch if key_padding_mask is None else _ends(key_padding_mask)
    for first in range(0, batch, b):
        end = max(ends[first : first + b])
        for column in range(0, end, n):
            for row in range(0, rows, m):
                yield slice(first, first + b), slice(row, row + m), slice(column, min(column + n, end))


def _ends(key_padding_mask: Tensor) -> list[int]:
    """For each batch, one past the last key that takes part."""
    place = torch.arange(1, key_padding_mask.shape[1] + 1, device=key_padding_mask.device)
    ends: list[int] = (key_padding_mask * place).amax(1).tolist()
    return ends
