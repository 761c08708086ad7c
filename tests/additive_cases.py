"""Calls of additive attention, their float64 oracle and their error budget; nothing of the library is called for them.

The budget is that of ``fastattn.testing``: with e(x) = max |x - float64 oracle|, a result passes where

    e(ours) <= k e(plain PyTorch in the same dtype) + 4 (eps c + eps32 c s)      k = 2, for gradients 3

c is the oracle's own sum with every term replaced by its absolute value; s is the same for the scores, which are
rounded once in float32 before exp. A rounding of x moves tanh(x) by |x| (1 - tanh(x)^2), and 1 - tanh^2 has the terms
1 and tanh^2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn.kernels.additive import extension
from fastattn.testing import assert_within_budget, largest_error

Named = dict[str, Tensor]


@dataclass(frozen=True)
class AdditiveCase:
    """One call of ``additive_attention`` with everything that can vary."""

    batch: int = 2
    rows: int = 7
    columns: int = 11
    features: int = 9
    value_features: int = 5
    dtype: torch.dtype = torch.float32
    layout: str = "plain"  # "plain", "transposed", "expanded"
    mask: torch.dtype | None = None
    mask_broadcast: tuple[bool, bool, bool] = (False, False, False)
    padding: torch.dtype | None = None
    padding_kind: str = "right"  # "right", "left", "holes", "all"
    coverage: str | None = None  # "keys" (B, Tk), "entries" (B, Tq, Tk)
    coverage_dtype: torch.dtype = torch.float32
    loss: tuple[str, ...] = ("out", "weights")
    size: float = 1.0  # of queries and keys: small ones are where tanh is linear, large ones where it is flat
    seed: int = 0


def make_inputs(case: AdditiveCase, device: str = "cpu") -> Named:
    """Arguments of the call, and what weighs its results in the loss; the same for the same case."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    def laid_out(length: int, features: int) -> Tensor:
        if case.layout == "transposed":
            return draw(length, features, case.batch).permute(2, 0, 1)
        if case.layout == "expanded":
            return draw(1, length, features).expand(case.batch, -1, -1)
        return draw(case.batch, length, features)

    full = (case.batch, case.rows, case.columns)
    inputs = {
        "query": laid_out(case.rows, case.features) * case.size,
        "key": laid_out(case.columns, case.features) * case.size,
        "value": laid_out(case.columns, case.value_features),
        "weight": draw(case.features),
        "weigh_out": draw(case.batch, case.rows, case.value_features),
        "weigh_weights": draw(*full),
    }
    if case.mask is not None:
        shape = tuple(1 if one else size for size, one in zip(full, case.mask_broadcast, strict=True))
        inputs["attn_mask"] = _mask(case.mask, torch.rand(shape, generator=generator) > 0.3, draw(*shape).cpu(), device)
    if case.padding is not None:
        pattern = _padding(case, generator)
        inputs["key_padding_mask"] = _mask(case.padding, pattern, draw(*pattern.shape).cpu(), device)
    if case.coverage is not None:
        shape = (case.batch, case.columns) if case.coverage == "keys" else full
        inputs["coverage"] = draw(*shape, dtype=case.coverage_dtype).abs()
        inputs["coverage_weight"] = draw(case.features)
    return inputs


def _mask(dtype: torch.dtype, takes_part: Tensor, values: Tensor, device: str) -> Tensor:
    if dtype == torch.bool:
        return takes_part.to(device)
    return values.masked_fill(~takes_part, float("-inf")).to(dtype).to(device)


def _padding(case: AdditiveCase, generator: torch.Generator) -> Tensor:
    place = torch.arange(case.columns)
    length = torch.randint(0, case.columns + 1, (case.batch, 1), generator=generator)
    if case.padding_kind == "left":
        return place >= length
    if case.padding_kind == "holes":
        return torch.rand(case.batch, case.columns, generator=generator) > 0.5
    return place < (torch.zeros_like(length) if case.padding_kind == "all" else length)


def operator_name(backend: str) -> str:
    """What the operator calls the path that ``serving(backend)`` takes for float32 on this device."""
    if backend in ("triton", "tiled"):
        return backend
    return "tiled" if extension.why_not("cuda" if torch.cuda.is_available() else "cpu", torch.float32) else "cpu"


@contextlib.contextmanager
def serving(backend: str) -> Iterator[None]:
    """``fastattn.backend``, and "tiled": what is taken where there is neither the extension nor Triton."""
    if backend != "tiled":
        with fastattn.backend(backend):
            yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "why_not", lambda *_: "not built")
        yield


def public_call(inputs: Named) -> tuple[Tensor, Tensor]:
    """Output and weights from the public function, on whatever backend is in force."""
    arguments: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if not name.startswith("weigh_")}
    out, weights = fastattn.additive_attention(**arguments, need_weights=True)
    return out, weights


def _argument(inputs: Named) -> Tensor:
    """What tanh is taken of, (B, Tq, Tk, D)."""
    total = inputs["query"].unsqueeze(2) + inputs["key"].unsqueeze(1)
    if "coverage" in inputs:
        coverage = inputs["coverage"] if inputs["coverage"].dim() == 3 else inputs["coverage"].unsqueeze(1)
        total = total + coverage.unsqueeze(-1) * inputs["coverage_weight"]
    return total


def _masks(inputs: Named) -> list[Tensor]:
    masks = [inputs["attn_mask"]] if "attn_mask" in inputs else []
    return [*masks, inputs["key_padding_mask"].unsqueeze(1)] if "key_padding_mask" in inputs else masks


def plain_call(inputs: Named) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, in the arithmetic of the inputs' own dtype."""
    scores = _argument(inputs).tanh() @ inputs["weight"]
    for mask in _masks(inputs):
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return weights @ inputs["value"], weights


def in_dtype(inputs: Named, dtype: torch.dtype) -> Named:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def evaluate(call: Any, case: AdditiveCase, inputs: Named) -> Named:
    """Results of a call, and the gradients of its floating inputs."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in inputs.items()
        if tensor.is_floating_point() and not name.startswith("weigh_")
    }
    results = dict(zip(("out", "weights"), call({**inputs, **leaves}), strict=True))
    loss = sum((results[name] * inputs[f"weigh_{name}"]).double().sum() for name in case.loss)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results["d" + name] = torch.zeros_like(leaf) if grad is None else grad
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def check(case: AdditiveCase, device: str = "cpu") -> None:
    """Raise AssertionError where the public function leaves the error budget anywhere on this case."""
    inputs = make_inputs(case)
    wide = in_dtype(inputs, torch.float64)
    oracle = evaluate(plain_call, case, wide)
    plain = evaluate(plain_call, case, in_dtype(inputs, case.dtype))
    ours = evaluate(public_call, case, make_inputs(case, device))
    conditions, score = _conditions(case, wide)
    eps32 = torch.finfo(torch.float32).eps
    for name, expected in oracle.items():
        eps = max(torch.finfo(case.dtype).eps, torch.finfo(ours[name].dtype).eps)
        roundings = (eps + eps32 * score) * conditions[name]
        assert_within_budget(case, name, ours[name], expected, largest_error(plain[name], expected), roundings)


def _conditions(case: AdditiveCase, inputs: Named) -> tuple[dict[str, float], float]:
    """For each result the largest of its sums of absolute terms, and the same for the scores that matter."""
    positive = {name: tensor.abs() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    tanh, size, weight = _argument(inputs).tanh(), _argument(positive), positive["weight"]
    slope = 1.0 - tanh.square()
    of_tanh = tanh.abs() + slope * size
    of_slope = 1.0 + tanh.square() + 2.0 * tanh.abs() * slope * size
    terms = of_tanh @ weight
    for mask in _masks(positive):
        terms = terms if mask.dtype == torch.bool else terms + mask
    _, weights = plain_call(inputs)
    dweights = torch.zeros_like(weights)
    if "out" in case.loss:
        dweights = dweights + positive["weigh_out"] @ positive["value"].mT
    if "weights" in case.loss:
        dweights = dweights + positive["weigh_weights"]
    dscore = weights * (dweights + (weights * dweights).sum(-1, keepdim=True))
    wide = dscore.unsqueeze(-1) * of_slope * weight
    found = {
        "out": weights @ positive["value"], "weights": weights, "dquery": wide.sum(2), "dkey": wide.sum(1),
        "dvalue": weights.mT @ positive["weigh_out"], "dweight": (dscore.unsqueeze(-1) * of_tanh).sum((0, 1, 2)),
    }  # fmt: skip
    if "attn_mask" in inputs:
        found["dattn_mask"] = dscore.sum_to_size(inputs["attn_mask"].shape)
    if "key_padding_mask" in inputs:
        found["dkey_padding_mask"] = dscore.sum(1)
    if "coverage" in inputs:
        dcoverage = wide @ positive["coverage_weight"]
        coverage = positive["coverage"] if case.coverage == "entries" else positive["coverage"].unsqueeze(1)
        found["dcoverage"] = dcoverage if case.coverage == "entries" else dcoverage.sum(1)
        found["dcoverage_weight"] = (coverage.unsqueeze(-1) * wide).sum((0, 1, 2))
    largest = {name: float(tensor.max()) if tensor.numel() else 0.0 for name, tensor in found.items()}
    relevant = terms[weights > 1e-30]
    return largest, float(relevant.max()) if relevant.numel() else 0.0


_MASKS = st.sampled_from((None, None, torch.bool, torch.float32, torch.float16, torch.float64))


@st.composite
def additive_cases(draw: st.DrawFn, longest: int = 40) -> AdditiveCase:
    """Any call, small enough for the interpreter."""
    lengths = st.one_of(st.integers(0, longest), st.sampled_from((1, 2, 7, 13, 16, 17)))
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return AdditiveCase(
        batch=draw(st.sampled_from((1, 1, 2, 3, 0))),
        rows=draw(lengths),
        columns=draw(lengths),
        features=draw(st.one_of(st.integers(1, longest), st.sampled_from((1, 3, 16, 17, 31)))),
        value_features=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(("plain", "transposed", "expanded"))),
        mask=draw(_MASKS),
        mask_broadcast=draw(st.tuples(*(st.booleans() for _ in range(3)))),
        padding=draw(_MASKS),
        padding_kind=draw(st.sampled_from(("right", "left", "holes", "all"))),
        coverage=draw(st.sampled_from((None, "keys", "entries"))),
        coverage_dtype=draw(st.sampled_from((*dtypes, torch.float64))),
        loss=draw(st.sampled_from((("out",), ("weights",), ("out", "weights")))),
        size=draw(st.sampled_from((1.0, 1.0, 1e-3, 10.0))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
