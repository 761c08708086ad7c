"""The operators of additive attention under torch's checks, the memory they take, what their kernels compile to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from additive_cases import AdditiveCase, evaluate, make_inputs, operator_name, public_call, serving
from backends import DEVICE
from test_additive import BACKENDS, NEEDS_TRITON
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from benchmarks import budget_additive
from fastattn.dispatch import Backend
from fastattn.kernels.additive import config, tiled
from fastattn.kernels.additive.config import Tile

OPS = torch.ops.fastattn


@pytest.fixture(autouse=True)
def small_tiles() -> Any:
    with config.override(Tile(16, 16)):
        yield


def _inputs(dtype: torch.dtype, coverage: str | None, padded: bool) -> list[Any]:
    """The operator's tensors; queries and keys as time-first modules give them."""
    shapes = ((3, 2, 8), (5, 2, 8), (8, 1))
    drawn = [torch.randn(shape, device=DEVICE).to(dtype).transpose(0, 1) for shape in shapes]
    drawn[2] = drawn[2][0]
    inputs: list[Any] = [tensor.detach().requires_grad_() for tensor in drawn]
    if coverage is None:
        inputs += [None, None]
    else:
        rows = 1 if coverage == "keys" else 3
        inputs.append(torch.rand(2, 5, rows, device=DEVICE).mT.requires_grad_())
        inputs.append(inputs[2].detach().clone().requires_grad_())
    return [*inputs, torch.tensor([[True] * 4 + [False], [False] * 5], device=DEVICE) if padded else None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("coverage", [None, "keys", "entries"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, coverage: str | None, dtype: torch.dtype) -> None:
    name = operator_name(backend)
    inputs = _inputs(dtype, coverage, padded=dtype == torch.bfloat16)
    # The eager and the compiled run of a test draw gradients of their own; half precision rounds them apart.
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.library.opcheck(OPS.additive_scores, (*inputs, name), **tolerance)
    plain = [tensor if tensor is None else tensor.detach() for tensor in inputs]
    for wanted in (False, True):
        torch.library.opcheck(
            OPS.additive_scores_backward, (torch.randn(2, 3, 5, device=DEVICE), *plain, wanted, name)
        )


def _loss(query: Tensor, key: Tensor, weight: Tensor, padding: Tensor, coverage: Tensor) -> Tensor:
    out, weights = fastattn.additive_attention(
        query, key, key, weight, key_padding_mask=padding, coverage=coverage, coverage_weight=weight, need_weights=True
    )
    return out.square().sum() + weights.square().sum()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("compiler", ["count", "aot_eager"])
def test_compile_once_for_all_lengths(backend: str, compiler: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        _loss, fullgraph=True, dynamic=True, backend=counter if compiler == "count" else compiler
    )
    lengths = range(11, 23, 1 if compiler == "count" and backend != Backend.TRITON else 4)
    with serving(backend):
        for length in lengths:  # from 11: dynamic shapes tie sizes that are equal at the first call
            query = torch.randn(2, length, 8, device=DEVICE, requires_grad=True)
            key = torch.randn(2, length + 3, 8, device=DEVICE, requires_grad=True)
            weight = torch.randn(8, device=DEVICE, requires_grad=True)
            padding = torch.arange(length + 3, device=DEVICE).expand(2, -1) < length
            arguments = (query, key, weight, padding, torch.rand(2, length + 3, device=DEVICE))
            grads = torch.autograd.grad(compiled(*arguments), (query, key, weight))
            expected = torch.autograd.grad(_loss(*arguments), (query, key, weight))
            for grad, other in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad, other)
    assert counter.frame_count == (1 if compiler == "count" else 0)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast_casts_inputs_and_leaves_masks_and_coverage(backend: str) -> None:
    case = AdditiveCase(mask=torch.float32, coverage="keys")
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(case, DEVICE).items()}
    inputs["attn_mask"] = torch.full((11,), -70000.0, device=DEVICE)  # -inf in float16: every row would be empty
    inputs["key"] = inputs["key"].detach().half()  # autocast brings dtypes together
    leaves = [inputs[name] for name in ("query", "value", "weight", "coverage", "coverage_weight")]
    with serving(backend):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            out, weights = public_call(inputs)
            inside = torch.autograd.grad(out.float().sum() + weights[..., 0].float().sum(), leaves, retain_graph=True)
        outside = torch.autograd.grad(out.float().sum() + weights[..., 0].float().sum(), leaves)
    assert out.dtype == weights.dtype == torch.bfloat16
    assert (weights.sum(-1) > 0.9).all()
    for first, second, leaf in zip(inside, outside, leaves, strict=True):
        assert first.dtype == leaf.dtype
        assert torch.equal(first, second)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator returns."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_tensor_is_larger_than_the_scores_or_a_tile() -> None:
    """The eager form holds (B, Tq, Tk, D); here that would be 64 times a tile."""
    batch, rows, columns, features = 2, 256, 128, 128
    query, key = torch.randn(batch, rows, features), torch.randn(batch, columns, features)
    weight, coverage = torch.randn(features), torch.rand(batch, rows, columns)
    # The functions behind the operators: a mode sees an operator, not what runs inside it.
    with _Largest() as mode:
        scores = tiled.scores(query, key, weight, coverage, weight, None)
        tiled.scores_backward(scores, query, key, weight, coverage, weight, None, True)
    assert mode.numbers <= config.BLOCKS.numbers
    assert batch * rows * columns * features == 64 * config.BLOCKS.numbers
    leaves = [tensor.requires_grad_() for tensor in (query, key, weight)]
    with _Largest() as mode:
        out = fastattn.additive_attention(query, key, key, weight, coverage=coverage, coverage_weight=weight)
        torch.autograd.grad(out.sum(), leaves)
    assert mode.numbers <= batch * rows * max(columns, features)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_nobody_asks_for(backend: str) -> None:
    """Coverage without a gradient, results one at a time, and a graph of which nothing is wanted."""
    inputs = make_inputs(AdditiveCase(coverage="entries"), DEVICE)
    query = inputs["query"].requires_grad_()
    with serving(backend):
        expected = evaluate(public_call, AdditiveCase(coverage="entries", loss=("weights",)), inputs)["dquery"]
        out, weights = public_call(inputs)
        (grad,) = torch.autograd.grad((weights * inputs["weigh_weights"]).sum(), query)
        torch.testing.assert_close(grad.cpu(), expected)
        with torch.no_grad():
            again, _ = public_call(inputs)
    assert torch.equal(again, out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_entries_have_no_gradient(backend: str) -> None:
    """Whatever gradient arrives there: the score is -inf, a constant."""
    name = operator_name(backend)
    inputs = [tensor if tensor is None else tensor.detach() for tensor in _inputs(torch.float32, "entries", False)[:5]]
    mask = torch.tensor([[True, False, True, True, False], [True, True, False, True, True]], device=DEVICE)
    dscores = torch.randn(2, 3, 5, device=DEVICE)
    *grads, more = OPS.additive_scores_backward(dscores, *inputs, mask, True, name)
    *wanted, rest = OPS.additive_scores_backward(dscores * mask.unsqueeze(1), *inputs, None, True, name)
    for grad, other in zip([*grads, *more], [*wanted, *rest], strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.gpu
def test_offsets_beyond_31_bits() -> None:
    query = torch.randn(1, 50_000, 8, device="cuda", dtype=torch.float16)
    key = torch.randn(1, 50_000, 8, device="cuda", dtype=torch.float16)
    weight = torch.randn(8, device="cuda", dtype=torch.float16)
    scores = OPS.additive_scores(query, key, weight, None, None, None, "triton")
    expected = (query[:, -1:].float() + key[:, -64:].float()).tanh() @ weight.float()
    torch.testing.assert_close(scores[0, -1, -64:], expected[0])


@NEEDS_TRITON
def test_kernels_compile_without_spills() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    code = (
        "import json, dataclasses; from benchmarks import budget_additive as budget; "
        "rows = [row for arch in budget.ARCHITECTURES for row in budget.compile_kernels(arch, ('float32',))]; "
        "print(json.dumps([dataclasses.asdict(row) for row in rows]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True,
        cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    rows = [budget_additive.Row(**row) for row in json.loads(result.stdout.splitlines()[-1])]
    assert {row.arch for row in rows} == {80, 90, 100}
    assert {row.kernel for row in rows} == {
        "additive_scores", "additive_scores of coverage", "additive_gradient", "additive_gradient of keys"
    }  # fmt: skip
    faults = [f"{asdict(row)}: {fault}" for row in rows for fault in row.faults()]
    assert not faults, "\n".join(faults)
