"""The operators under torch's own checks: opcheck, torch.compile without recompiling, autocast, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import DEVICE, KERNELS
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fastattn
from fastattn.dispatch import Backend
from fastattn.kernels.attention import config
from fastattn.kernels.attention.config import Tile

OPS = torch.ops.fastattn


@pytest.fixture(autouse=True)
def small_tiles() -> Any:
    with config.override(Tile(16, 16)):
        yield


def _problem(name: str) -> tuple[Any, ...]:
    """The problem arguments of ``op`` for a named combination."""
    mask = padding = slopes = segment_query = segment_key = seed = lower = upper = None
    dropout_p = softcap = 0.0
    if "mask" in name:
        mask = torch.randn(1, 2, 5, 7, device=DEVICE, requires_grad=True)
    if "padding" in name:
        padding = torch.tensor([[True] * 4 + [False] * 3, [True] * 7], device=DEVICE)
    if "dropout" in name:
        seed, dropout_p = torch.tensor([7], device=DEVICE), 0.25
    if "band" in name:
        lower, upper = -3, 1
    if "softcap" in name:
        softcap = 2.0
    if "alibi" in name:
        slopes = torch.rand(1, 4, device=DEVICE)
    if "segments" in name:
        segment_query = torch.tensor([[0, 0, 0, 1, 1]] * 2, dtype=torch.int32, device=DEVICE)
        segment_key = torch.tensor([[0, 0, 1, 1, 1, 1, 2]] * 2, dtype=torch.int32, device=DEVICE)
    return (
        mask, padding, slopes, segment_query, segment_key, seed, dropout_p, 0.3, softcap, 2, lower, upper
    )  # fmt: skip


def _inputs(dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    if layout == "heads_last":
        tensors = [torch.randn(b, n, h, d, dtype=dtype, device=DEVICE).transpose(1, 2) for b, h, n, d in shapes]
    else:
        tensors = [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes]
    query, key, value = (tensor.detach().requires_grad_() for tensor in tensors)
    return query, key, value


PROBLEMS = ("plain", "band", "padding", "dropout", "padding dropout band", "softcap alibi segments sinks")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, "heads_last"), (torch.float16, "heads_first"), (torch.bfloat16, "heads_last")]
)
def test_opcheck(backend: Backend, problem: str, dtype: torch.dtype, layout: str) -> None:
    query, key, value = _inputs(dtype, layout)
    arguments = _problem(problem)
    name = backend.value
    sinks = torch.randn(4, device=DEVICE, requires_grad=True) if "sinks" in problem else None
    # The eager and the compiled run of a test draw gradients of their own; half precision rounds them apart.
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.library.opcheck(OPS.attention, (query, key, value, sinks, *arguments, name), **tolerance)
    out, logsumexp = OPS.attention(query, key, value, sinks, *arguments, name)
    out, logsumexp = out.detach(), logsumexp.detach()
    plain = (query.detach(), key.detach(), value.detach())
    torch.library.opcheck(
        OPS.attention_backward,
        (torch.randn_like(out), torch.randn_like(logsumexp), *plain, out, logsumexp, *arguments, False, False, name),
    )
    leaf = logsumexp.clone().requires_grad_()
    for average in (True, False):
        torch.library.opcheck(
            OPS.attention_weights, (query, key, leaf, *arguments, average, name), **tolerance
        )
        weights = OPS.attention_weights(*plain[:2], logsumexp, *arguments, average, name)
        torch.library.opcheck(
            OPS.attention_weights_backward,
            (torch.randn_like(weights), *plain[:2], logsumexp, *arguments, average, False, False, name),
        )
    torch.library.opcheck(OPS.attention_with_weights, (query, key, value, sinks, *arguments, True, name), **tolerance)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck_of_a_mask_with_gradient(backend: Backend) -> None:
    query, key, value = _inputs(torch.float32, "heads_last")
    mask = torch.randn(2, 1, 5, 7, device=DEVICE, requires_grad=True)
    padding = torch.randn(2, 7, device=DEVICE, requires_grad=True)
    arguments = (mask, padding, None, None, None, None, 0.0, 0.3, 0.0, 0, None, 2)
    torch.library.opcheck(OPS.attention, (query, key, value, None, *arguments, backend.value), rtol=1e-3, atol=1e-3)


def _loss(query: Tensor, key: Tensor, padding: Tensor, causal: bool, weights: bool) -> Tensor:
    result = fastattn.scaled_dot_product_attention(
        query, key, key, is_causal=causal, key_padding_mask=padding, need_weights=weights
    )
    return sum(part.square().sum() for part in result) if weights else result.square().sum()


@pytest.mark.parametrize("backend", [*KERNELS, Backend.SDPA, Backend.REFERENCE, "auto"])
@pytest.mark.parametrize("weights", [False, True])
def test_compile_forward_and_backward_once_for_twenty_lengths(backend: str, weights: bool) -> None:
    if backend == Backend.SDPA and weights:
        pytest.skip("torch's fused kernels do not return the weights")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(_loss, fullgraph=True, dynamic=True, backend=counter)
    with fastattn.backend(backend):
        for length in range(11, 31):  # from 11: dynamic shapes tie sizes that are equal at the first call
            query = torch.randn(2, 2, length, 8, device=DEVICE, requires_grad=True)
            key = torch.randn(2, 2, length + 3, 8, device=DEVICE, requires_grad=True)
            padding = torch.arange(length + 3, device=DEVICE).expand(2, -1) < length
            loss = compiled(query, key, padding, True, weights)
            grads = torch.autograd.grad(loss, (query, key))
            expected = _loss(query, key, padding, True, weights)
            torch.testing.assert_close(loss, expected)
            for grad, other in zip(grads, torch.autograd.grad(expected, (query, key)), strict=True):
                torch.testing.assert_close(grad, other)
    assert counter.frame_count == 1


def _windowed(query: Tensor, segments: Tensor, left: int, right: int) -> Tensor:
    out = fastattn.scaled_dot_product_attention(
        query, query, query, window=(left, right), segment_ids=segments, softcap=3.0, sinks=query.new_zeros(2)
    )
    return out.square().sum()


@pytest.mark.parametrize("backend", [*KERNELS, Backend.REFERENCE])
def test_compile_once_for_all_windows_and_segments(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(_windowed, fullgraph=True, dynamic=True, backend=counter)
    with fastattn.backend(backend):
        for left in range(2, 12):
            query = torch.randn(1, 2, left + 9, 8, device=DEVICE, requires_grad=True)
            segments = torch.arange(left + 9, device=DEVICE)[None] // 7
            loss, expected = (call(query, segments, left, left // 2 + 1) for call in (compiled, _windowed))
            torch.testing.assert_close(loss, expected)
            grads = [torch.autograd.grad(value, query)[0] for value in (loss, expected)]
            torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", KERNELS)
def test_compile_through_aot_autograd(backend: Backend) -> None:
    """The backward graph is traced from the shape rules, forward and backward run from it."""
    torch._dynamo.reset()
    compiled = torch.compile(_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with fastattn.backend(backend):
        for length in (5, 9, 18):
            query = torch.randn(2, 2, length, 8, device=DEVICE, requires_grad=True)
            key = torch.randn(2, 2, length, 8, device=DEVICE, requires_grad=True)
            padding = torch.arange(length, device=DEVICE).expand(2, -1) < length - 1
            grads = torch.autograd.grad(compiled(query, key, padding, True, True), (query, key))
            expected = torch.autograd.grad(_loss(query, key, padding, True, True), (query, key))
            for grad, other in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_inputs_and_leaves_masks(backend: Backend, dtype: torch.dtype) -> None:
    query, key, value = _inputs(torch.float32, "heads_last")
    mask = torch.full((5, 7), -70000.0, device=DEVICE)  # -inf in float16: every row would be empty
    with torch.autocast(DEVICE, dtype=dtype), fastattn.backend(backend):
        out = fastattn.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        problem = (mask[None, None], *(None,) * 5, 0.0, 8**-0.5, 0.0, 0, None, None)
        direct, _ = OPS.attention(query, key, value, None, *problem, backend.value)
    assert out.dtype == direct.dtype == dtype
    assert torch.equal(out, direct)
    assert (out != 0).all()
    grads = torch.autograd.grad(out.float().sum(), (query, key, value))
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_compiler_drops_weights_nobody_reads(backend: Backend) -> None:
    seen: list[str] = []

    def collect(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    def call(query: Tensor) -> Tensor:
        return fastattn.scaled_dot_product_attention(query, query, query, need_weights=True)[0]

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    with fastattn.backend(backend):
        torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=collect))(torch.randn(1, 2, 5, 8))
    assert any("fastattn.attention." in name for name in seen)
    assert not any("weights" in name for name in seen)
