"""Additive attention on every backend against the float64 oracle, alone and in combination; what it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from additive_cases import (
    AdditiveCase,
    additive_cases,
    check,
    evaluate,
    make_inputs,
    operator_name,
    public_call,
    serving,
)
from backends import DEVICE
from hypothesis import given, settings
from torch import Tensor

import fastattn
from fastattn.dispatch import Backend
from fastattn.kernels.additive import config, launch
from fastattn.kernels.additive.config import Blocks, Tile

TRITON = launch.why_not(DEVICE, torch.float32) is None
BACKENDS = ["auto", "tiled", *([Backend.TRITON] if TRITON else [])]
NEEDS_TRITON = pytest.mark.skipif(not TRITON, reason="needs CUDA or TRITON_INTERPRET=1")
Case = AdditiveCase
FUZZ = int(os.environ.get("FASTATTN_FUZZ", "100"))

FEATURES = {
    "plain": Case(),
    "float16": Case(dtype=torch.float16, features=33),
    "bfloat16": Case(dtype=torch.bfloat16, features=33),
    "one_query": Case(rows=1, columns=23),
    "one_key": Case(columns=1),
    "no_query": Case(rows=0),
    "no_key": Case(columns=0, coverage="keys", mask=torch.bool, padding=torch.bool),
    "no_batch": Case(batch=0, coverage="keys"),
    "one_feature": Case(features=1, value_features=1),
    "more_rows_than_a_tile": Case(rows=37, columns=29, features=5),
    "near_zero": Case(size=1e-4),
    "saturated": Case(size=20.0),
    "mask_bool": Case(mask=torch.bool),
    "mask_float": Case(mask=torch.float32, mask_broadcast=(True, False, False)),
    "mask_float16": Case(mask=torch.float16, dtype=torch.bfloat16, mask_broadcast=(False, True, False)),
    "padding": Case(batch=4, padding=torch.bool, columns=23),
    "padding_left": Case(batch=3, padding=torch.bool, padding_kind="left"),
    "padding_holes_and_mask": Case(padding=torch.bool, padding_kind="holes", mask=torch.float32),
    "padding_all": Case(padding=torch.bool, padding_kind="all", coverage="keys"),
    "padding_float": Case(padding=torch.float32, mask=torch.bool),
    "coverage": Case(coverage="keys"),
    "coverage_of_one_query": Case(coverage="entries", rows=1),
    "coverage_entries": Case(coverage="entries", coverage_dtype=torch.float16, padding=torch.bool),
    "coverage_keeps_its_dtype": Case(coverage="keys", dtype=torch.float16),
    "transposed": Case(layout="transposed", coverage="entries"),
    "expanded": Case(layout="expanded", batch=3),
    "weights_only": Case(loss=("weights",)),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(config, "BLOCKS", Blocks(numbers=300, keys=8))
    with config.override(Tile(16, 8)):
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FEATURES)
def test_feature(name: str, backend: str) -> None:
    with serving(backend):
        check(FEATURES[name], DEVICE)


@settings(max_examples=FUZZ)
@given(case=additive_cases())
def test_combinations(case: AdditiveCase) -> None:
    check(case, DEVICE)


@NEEDS_TRITON
@settings(max_examples=(FUZZ + 4) // 5)
@given(case=additive_cases(longest=19))
def test_triton_combinations(case: AdditiveCase) -> None:
    with fastattn.backend("triton"):
        check(case, DEVICE)


@pytest.mark.parametrize("name", ["plain", "bfloat16", "coverage_entries", "padding_holes_and_mask"])
def test_reference(name: str) -> None:
    with fastattn.backend("reference"):
        check(FEATURES[name], DEVICE)


def test_the_tiles_that_ship() -> None:
    case = Case(batch=2, rows=70, columns=67, features=3, padding=torch.bool, coverage="keys")
    for backend in BACKENDS:
        with serving(backend), pytest.MonkeyPatch.context() as patch:
            patch.setattr(config, "BLOCKS", Blocks())
            patch.setattr(config, "_override", None)
            check(case, DEVICE)
            check(replace(case, rows=1, coverage=None), DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tanh_keeps_its_digits(backend: str) -> None:
    """One feature: the score is tanh itself, its gradient 1 - tanh^2; near 0, at the seam of 0.625, and flat."""
    sizes = torch.cat([torch.logspace(-30, 1.3, 200), torch.linspace(0.6, 0.65, 50), torch.tensor([0.0, 50.0, 300.0])])
    query = torch.cat([sizes, -sizes]).to(DEVICE).view(1, -1, 1).requires_grad_()
    zero, one = torch.zeros(1, 1, 1, device=DEVICE), torch.ones(1, device=DEVICE)
    name = operator_name(backend)
    scores = torch.ops.fastattn.additive_scores(query, zero, one, None, None, None, name)
    (slope,) = torch.autograd.grad(scores.sum(), query)
    wide = query.detach().double()
    torch.testing.assert_close(scores.double(), wide.tanh(), rtol=5e-7, atol=0.0)
    # torch's own derivative is 1 - tanh^2 of the rounded tanh; ours keeps its digits there too.
    flat = 1.0 / wide.cosh().square()
    kept = {"rtol": 3e-6, "atol": 1e-38} if name == "triton" else {"rtol": 1e-6, "atol": 5e-7}
    torch.testing.assert_close(slope.double(), flat, **kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_at_every_run(backend: str) -> None:
    case = Case(batch=1, rows=19, columns=11, features=5, coverage="entries", padding=torch.bool)
    with serving(backend):
        first, second = (evaluate(public_call, case, make_inputs(case, DEVICE)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_behind_the_last_one_are_not_read(backend: str) -> None:
    case = Case(batch=2, columns=24, value_features=3)
    inputs = make_inputs(case, DEVICE)
    inputs["key_padding_mask"] = (torch.arange(24, device=DEVICE) < 6).expand(2, -1)
    inputs["key"][:, 6:] = float("nan")
    with serving(backend):
        results = evaluate(public_call, case, inputs)
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_lowest_float_is_unlikely_but_not_masked(backend: str) -> None:
    query, key, weight = torch.randn(1, 4, 8), torch.zeros(1, 6, 8), torch.randn(8)
    mask = torch.full((4, 6), torch.finfo(torch.float32).min)
    tensors = (tensor.to(DEVICE) for tensor in (query, key, torch.ones(1, 6, 2), weight))
    with serving(backend):
        _, weights = fastattn.additive_attention(*tensors, attn_mask=mask.to(DEVICE), need_weights=True)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))


@pytest.mark.parametrize("coverage", [None, "keys", "entries"])
def test_gradients_in_float64(coverage: str | None) -> None:
    case = Case(rows=4, columns=5, features=3, value_features=2, dtype=torch.float64, mask=torch.float64)
    case = replace(case, coverage=coverage, coverage_dtype=torch.float64, padding=torch.bool, padding_kind="left")
    inputs = {name: tensor for name, tensor in make_inputs(case).items() if not name.startswith("weigh_")}
    names = [name for name, tensor in inputs.items() if tensor.is_floating_point()]

    def call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return public_call({**inputs, **dict(zip(names, leaves, strict=True))})

    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


# What is refused ---------------------------------------------------------------------------------------------


def _good() -> dict[str, Any]:
    shapes = {"query": (2, 3, 8), "key": (2, 5, 8), "value": (2, 5, 4), "weight": (8,)}
    return {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}


def _coverage(*shape: int, features: int = 8) -> dict[str, Any]:
    return {"coverage": torch.rand(shape, device=DEVICE), "coverage_weight": torch.rand(features, device=DEVICE)}


BAD: list[tuple[Any, type[Exception], str]] = [
    ({"query": None}, TypeError, "query: got NoneType, expected a torch.Tensor"),
    ({"value": [1.0]}, TypeError, "value: got list, expected a torch.Tensor"),
    ({"query": torch.randn(2, 8)}, ValueError, r"query: got shape \(2, 8\), expected 3 dimensions"),
    ({"weight": torch.randn(8, 1)}, ValueError, r"weight: got shape \(8, 1\), expected 1 dimensions"),
    ({"query": torch.ones(2, 3, 8, dtype=torch.int64)}, ValueError, "query: got dtype torch.int64, allowed are"),
    ({"query": torch.randn(2, 3, 0)}, ValueError, "query: got 0 features, expected at least 1"),
    ({"query": torch.randn(2, 3, 8).to_sparse()}, ValueError, "query: got layout torch.sparse_coo"),
    ({"query": torch.nested.nested_tensor([torch.randn(3, 8)])}, ValueError, "query: got a nested tensor"),
    ({"key": torch.randn(2, 5, 8).half()}, ValueError, "key: got dtype torch.float16, expected query's torch.float32"),
    ({"weight": torch.randn(8).double()}, ValueError, "weight: got dtype torch.float64, expected query's"),
    ({"key": torch.randn(2, 5, 8, device="meta")}, ValueError, "key: got device meta, expected query's"),
    ({"key": torch.randn(2, 5, 7)}, ValueError, "key: got features 7, expected query's 8"),
    ({"key": torch.randn(3, 5, 8)}, ValueError, "key: got batch size 3, expected query's 2"),
    ({"value": torch.randn(1, 5, 4)}, ValueError, "value: got batch size 1, expected query's 2"),
    ({"value": torch.randn(2, 6, 4)}, ValueError, "value: got length 6, expected key's 5"),
    ({"weight": torch.randn(7)}, ValueError, "weight: got features 7, expected query's 8"),
    ({"attn_mask": True}, TypeError, "attn_mask: got bool, expected a torch.Tensor"),
    ({"attn_mask": torch.ones(3, 5).long()}, ValueError, "attn_mask: got dtype torch.int64, allowed are bool, float16"),
    ({"attn_mask": torch.ones(2, 1, 3, 5)}, ValueError, r"attn_mask: got shape \(2, 1, 3, 5\), expected at most 3"),
    ({"attn_mask": torch.ones(5, 3)}, ValueError, r"attn_mask: got shape \(5, 3\), expected .*\(2, 3, 5\)"),
    ({"key_padding_mask": torch.ones(5).bool()}, ValueError, r"key_padding_mask: got shape \(5,\), expected 2"),
    ({"key_padding_mask": torch.ones(2, 3)}, ValueError, r"key_padding_mask: got shape \(2, 3\), expected .*\(2, 5\)"),
    ({"coverage": torch.rand(2, 5)}, ValueError, "coverage_weight: got None beside coverage, expected both or neither"),
    ({"coverage_weight": torch.rand(8)}, ValueError, "coverage: got None beside coverage_weight"),
    (_coverage(2, 3), ValueError, r"coverage: got shape \(2, 3\), expected \(B, Tk\) = \(2, 5\)"),
    (_coverage(2, 5, 3), ValueError, r"coverage: got shape \(2, 5, 3\), expected \(B, Tq, Tk\) = \(2, 3, 5\)"),
    (_coverage(2, 5, features=7), ValueError, "coverage_weight: got features 7, expected query's 8"),
    ({"need_weights": "no"}, TypeError, "need_weights: got str, expected True or False"),
]  # fmt: skip


@pytest.mark.parametrize("row", BAD, ids=lambda row: row[2][:40])
def test_bad_input(row: tuple[Any, type[Exception], str]) -> None:
    changed = {name: x.to(DEVICE) if isinstance(x, Tensor) and not x.is_meta else x for name, x in row[0].items()}
    for backend in (*BACKENDS, "reference"):
        with serving(backend), pytest.raises(row[1], match=row[2]):
            fastattn.additive_attention(**_good() | changed)


def test_a_forced_backend_serves_or_refuses() -> None:
    with fastattn.backend("sdpa"), pytest.raises(RuntimeError, match="torch has no fused additive attention"):
        fastattn.additive_attention(**_good())
    wide = {name: tensor.double() for name, tensor in _good().items()}
    with fastattn.backend("triton"), pytest.raises(RuntimeError, match="cannot serve this call: dtype"):
        fastattn.additive_attention(**wide)
    if DEVICE == "cpu":
        with fastattn.backend("cpu"):
            assert fastattn.additive_attention(**wide).dtype == torch.float64
    else:
        with fastattn.backend("cpu"), pytest.raises(RuntimeError, match="runs on the CPU"):
            fastattn.additive_attention(**wide)


def test_unverified_kernels_are_never_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    if launch.verified(DEVICE):
        pytest.skip("verified here")

    def refuse(*_: Any) -> None:
        raise AssertionError("the Triton kernels were launched")

    monkeypatch.setattr(launch, "scores", refuse)
    fastattn.additive_attention(**_good())
