"""Inputs, oracle and error budget of the attention tests; imported by tests and benchmarks only.

The budget, written once: with e(x) = max |x - float64 oracle|, a kernel passes where

    e(kernel) <= k e(plain PyTorch in the same dtype) + 4 (eps c + eps32 c s)      k = 2, for gradients 3

c is the condition of the result: the oracle's own sum with every term replaced by its absolute value, which bounds
what a rounding of each term can move; s is the same for the scores, which are rounded once in float32 before exp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import reference

_GRADIENT_FACTOR, _FACTOR, _ROUNDINGS = 3.0, 2.0, 4.0


@dataclass(frozen=True)
class AttentionCase:
    """One call of ``scaled_dot_product_attention`` with everything that can vary."""

    batch: int = 1
    heads: int = 2
    key_heads: int = 2
    rows: int = 17
    columns: int = 19
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    layout: str = "heads_last"  # "heads_first", "heads_last", "packed" (one tensor for q, k, v), "sliced", "expanded"
    mask: torch.dtype | None = None
    mask_broadcast: tuple[bool, bool, bool, bool] = (False, False, False, False)
    padding: torch.dtype | None = None
    padding_kind: str = "right"  # "right", "left", "holes", "all"
    mask_grad: bool = True
    causal: bool = False
    alignment: str = "top-left"
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    segments: str | None = None  # "sorted": documents one after another; "mixed": any order
    dropout_p: float = 0.0
    average: bool = True
    loss: tuple[str, ...] = ("out", "lse", "weights")
    scale: float | None = None
    seed: int = 0

    @property
    def band(self) -> tuple[int | None, int | None]:
        """(lower, upper) bounds of column - row, from the definition of causal masks and windows."""
        left, right = self.window or (None, None)
        if self.causal:
            right = 0 if right is None else min(right, 0)
        return None if left is None else self.shift - left, None if right is None else self.shift + right

    @property
    def shift(self) -> int:
        """The position of query 0 among the keys."""
        return 0 if self.alignment == "top-left" else self.columns - self.rows


@dataclass
class Inputs:
    """Tensors of a case, all with the case's dtypes; the last three weigh the results in the loss."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    segment_ids: tuple[Tensor, Tensor] | None
    weigh_out: Tensor
    weigh_lse: Tensor
    weigh_weights: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy with floating tensors in another dtype."""
        values: dict[str, Any] = {
            name: tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor
            for name, tensor in vars(self).items()
        }
        return replace(self, **values)


def make_inputs(case: AttentionCase, device: str = "cpu") -> Inputs:
    """Random tensors in the case's layout and dtypes, the same for the same case."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def laid_out(heads: int, length: int) -> Tensor:
        batch, dim = case.batch, case.head_dim
        if case.layout == "heads_last":
            return draw(batch, length, heads, dim).transpose(1, 2)
        if case.layout == "packed":
            return draw(batch, length, 3, heads, dim)[:, :, 1].transpose(1, 2)
        if case.layout == "sliced":
            return draw(batch, heads, length + 2, dim + 3)[:, :, 1 : length + 1, :dim]
        if case.layout == "expanded":
            return draw(1, heads, length, dim).expand(batch, -1, -1, -1)
        return draw(batch, heads, length, dim)

    query, key, value = (
        laid_out(heads, length).to(case.dtype).to(device)
        for heads, length in ((case.heads, case.rows), (case.key_heads, case.columns), (case.key_heads, case.columns))
    )
    full = (case.batch, case.heads, case.rows, case.columns)
    shape = [1 if broadcast else size for size, broadcast in zip(full, case.mask_broadcast, strict=True)]
    mask = _draw_mask(case.mask, torch.rand(shape, generator=generator) > 0.3, draw(*shape))
    padding = _draw_mask(case.padding, _padding_pattern(case, generator), draw(case.batch, case.columns))
    slopes = torch.rand(case.heads, generator=generator) if case.alibi else None
    sinks = 2.0 * draw(case.heads) if case.sinks else None
    segments = None
    if case.segments is not None:
        pair = [torch.randint(0, 3, (case.batch, n), generator=generator) for n in (case.rows, case.columns)]
        if case.segments == "sorted":
            pair = [ids.sort(-1).values for ids in pair]
        segments = (pair[0].to(device), pair[1].to(device))
    weights_shape = full[:1] + full[2:] if case.average else full
    return Inputs(
        query, key, value,
        None if mask is None else mask.to(device), None if padding is None else padding.to(device),
        None if slopes is None else slopes.to(device), None if sinks is None else sinks.to(device), segments,
        draw(*full[:3], case.head_dim).to(case.dtype).to(device), draw(*full[:3]).to(device),
        draw(*weights_shape).to(case.dtype).to(device),
    )  # fmt: skip


def _draw_mask(dtype: torch.dtype | None, takes_part: Tensor, values: Tensor) -> Tensor | None:
    """Booleans, or numbers some of which are -inf, in the dtype asked for."""
    if dtype is None or dtype == torch.bool:
        return None if dtype is None else takes_part
    return values.masked_fill(~takes_part & (values > 0), float("-inf")).to(dtype)


def _padding_pattern(case: AttentionCase, generator: torch.Generator) -> Tensor:
    position = torch.arange(case.columns)
    length = torch.randint(0, case.columns + 1, (case.batch, 1), generator=generator)
    if case.padding_kind == "left":
        return position >= length
    if case.padding_kind == "holes":
        return torch.rand(case.batch, case.columns, generator=generator) > 0.5
    if case.padding_kind == "all":
        return torch.zeros(case.batch, case.columns, dtype=torch.bool)
    return position < length


def public_call(case: AttentionCase, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and weights from the public function, on whatever backend is in force."""
    torch.manual_seed(case.seed)
    out, weights, lse = fastattn.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, inputs.attn_mask, case.dropout_p, case.causal, case.scale,
        case.heads != case.key_heads, key_padding_mask=inputs.key_padding_mask, window=case.window,
        softcap=case.softcap, alibi_slopes=inputs.alibi_slopes, sinks=inputs.sinks, segment_ids=inputs.segment_ids,
        causal_alignment=case.alignment, need_weights=True, average_weights=case.average, return_lse=True,
    )  # fmt: skip
    return out, lse, weights


def eager_call(case: AttentionCase, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the eager definition, in the arithmetic of the inputs' own dtype."""
    torch.manual_seed(case.seed)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=inputs.query.device)
    out, lse, weights = reference.attention(
        inputs.query, inputs.key, inputs.value, sinks=inputs.sinks, seed=seed, dropout_p=case.dropout_p,
        compute_dtype=inputs.query.dtype, **_scoring(case, inputs),
    )  # fmt: skip
    return out, lse, weights.mean(1) if case.average else weights


def _scoring(case: AttentionCase, inputs: Inputs) -> dict[str, Any]:
    """What decides the scores, as the eager definition takes it."""
    lower, upper = case.band
    segment_query, segment_key = inputs.segment_ids or (None, None)
    return {
        "scale": case.scale or 1.0 / math.sqrt(case.head_dim), "attn_mask": inputs.attn_mask,
        "key_padding_mask": inputs.key_padding_mask, "lower": lower, "upper": upper, "softcap": case.softcap or 0.0,
        "alibi_slopes": None if inputs.alibi_slopes is None else inputs.alibi_slopes.view(1, -1),
        "shift": case.shift, "segment_query": segment_query, "segment_key": segment_key,
    }  # fmt: skip


Call = Callable[[AttentionCase, Inputs], tuple[Tensor, Tensor, Tensor]]


def evaluate(call: Call, case: AttentionCase, inputs: Inputs) -> dict[str, Tensor]:
    """Results of a call and the gradients of its inputs."""
    leaves = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    for name in ("attn_mask", "key_padding_mask"):
        mask = getattr(inputs, name)
        if case.mask_grad and mask is not None and mask.is_floating_point():
            leaves[name] = mask
    if inputs.sinks is not None:
        leaves["sinks"] = inputs.sinks
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    given: dict[str, Any] = dict(leaves)
    out, lse, weights = call(case, replace(inputs, **given))
    seen = lse > float("-inf")
    parts = {
        "out": lambda: (out * inputs.weigh_out).sum(),
        "lse": lambda: (torch.where(seen, lse, 0.0) * inputs.weigh_lse).sum(),
        "weights": lambda: (weights * inputs.weigh_weights).sum(),
    }
    loss = torch.stack([parts[name]().float() for name in case.loss]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results = {"out": out, "lse": lse, "weights": weights}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results["d" + name] = torch.zeros_like(leaf) if grad is None else grad
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def check(case: AttentionCase, call: Call = public_call, device: str = "cpu") -> None:
    """Raise AssertionError where ``call`` leaves the error budget anywhere on this case."""
    inputs = make_inputs(case, device)
    oracle = evaluate(eager_call, case, make_inputs(case).to(torch.float64))
    plain = evaluate(eager_call, case, _in_dtype(make_inputs(case), case.dtype))
    ours = evaluate(call, case, inputs)
    conditions, score = _conditions(case, make_inputs(case).to(torch.float64))
    eps, eps32 = torch.finfo(case.dtype).eps, torch.finfo(torch.float32).eps
    for name, expected in oracle.items():
        own_eps = max(eps, torch.finfo(ours[name].dtype).eps) if name != "lse" else eps32
        roundings = (own_eps + eps32 * score) * conditions[name]
        assert_within_budget(case, name, ours[name], expected, largest_error(plain[name], expected), roundings)


def assert_within_budget(
    case: object, name: str, ours: Tensor, oracle: Tensor, plain: float, roundings: float
) -> None:
    """Raise AssertionError unless e(ours) <= k ``plain`` + 4 ``roundings``; a gradient's name begins with "d"."""
    factor = _GRADIENT_FACTOR if name.startswith("d") else _FACTOR
    error, allowed = largest_error(ours, oracle), factor * plain + _ROUNDINGS * roundings
    if not error <= allowed:
        raise AssertionError(f"{name}: error {error:.3e}, allowed {allowed:.3e}\n{case}")


def largest_error(result: Tensor, oracle: Tensor) -> float:
    """e(result): infinities of the same sign agree, NaN and unequal infinities never do."""
    result = result.double()
    if result.shape != oracle.shape:
        raise AssertionError(f"shape {tuple(result.shape)}, expected {tuple(oracle.shape)}")
    if result.numel() == 0:
        return 0.0
    difference = (result - oracle).abs().masked_fill(result == oracle, 0.0)
    return float(difference.max())


def _in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Plain PyTorch adds a mask in the dtype of the scores."""
    return inputs if dtype == torch.float32 else replace(inputs.to(dtype), weigh_lse=inputs.weigh_lse)


def _conditions(case: AttentionCase, inputs: Inputs) -> tuple[dict[str, float], float]:
    """For each result the largest of its sums of absolute terms, and the same for the scores that matter."""
    group = case.heads // case.key_heads
    scale = case.scale or 1.0 / math.sqrt(case.head_dim)
    torch.manual_seed(case.seed)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    arguments = {"seed": seed, "sinks": inputs.sinks} | _scoring(case, inputs)
    _, lse, probability = reference.attention(inputs.query, inputs.key, inputs.value, **arguments)
    _, _, weight = reference.attention(
        inputs.query, inputs.key, inputs.value, dropout_p=case.dropout_p, **arguments
    )
    query = inputs.query.abs()
    key, value = (tensor.abs().repeat_interleave(group, 1) for tensor in (inputs.key, inputs.value))
    terms = query @ key.transpose(-1, -2) * abs(scale)
    for mask in (inputs.attn_mask, None if inputs.key_padding_mask is None else inputs.key_padding_mask[:, None, None]):
        if mask is not None and mask.dtype != torch.bool:
            terms = terms + mask.abs()
    if inputs.alibi_slopes is not None:
        distance = torch.arange(case.columns) - torch.arange(case.rows)[:, None] - case.shift
        terms = terms + inputs.alibi_slopes[:, None, None] * distance.abs()
    if inputs.sinks is not None:
        terms = terms + inputs.sinks.abs()[:, None, None]
    score = _largest(terms[probability > 1e-30])
    kept = torch.where(probability > 0, weight / probability.clamp(min=1e-300), 0.0)
    dprobability = torch.zeros_like(probability)
    if "out" in case.loss:
        dprobability = dprobability + kept * (inputs.weigh_out.abs() @ value.transpose(-1, -2))
    if "weights" in case.loss:
        per_head = inputs.weigh_weights.abs()
        dprobability = dprobability + kept * (per_head[:, None] / case.heads if case.average else per_head)
    delta = (probability * dprobability).sum(-1, keepdim=True)
    if "lse" in case.loss:
        delta = delta + inputs.weigh_lse.abs().unsqueeze(-1)
    dscore = probability * (dprobability + delta)

    def of_keys(tensor: Tensor) -> Tensor:
        return tensor.view(case.batch, case.key_heads, group, *tensor.shape[2:]).sum(2)

    conditions = {
        "out": weight @ value,
        "lse": terms[probability > 1e-30],
        "weights": weight,
        "dquery": dscore @ key * abs(scale),
        "dkey": of_keys(dscore.transpose(-1, -2) @ query * abs(scale)),
        "dvalue": of_keys(weight.transpose(-1, -2) @ inputs.weigh_out.abs()),
        "dkey_padding_mask": dscore.sum((1, 2)),
    }
    if inputs.sinks is not None:
        share = (inputs.sinks[:, None] - lse).exp()
        conditions["dsinks"] = (share * delta.squeeze(-1)).sum((0, 2))
        conditions["lse"] = torch.cat((conditions["lse"].flatten(), inputs.sinks.abs()))
    if inputs.attn_mask is not None:
        conditions["dattn_mask"] = dscore.sum_to_size(inputs.attn_mask.shape)
    return {name: _largest(tensor) for name, tensor in conditions.items()}, score


def _largest(tensor: Tensor) -> float:
    return float(tensor.max()) if tensor.numel() else 0.0
