"""Forward-mode differentiation and torch.func, for which operators have no rule: right numbers, never a silent 0."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn.transforms import transformed

Call = Callable[[Tensor], Tensor]
BATCH, STEPS, SIZE = 2, 40, 16


def _attention(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
    return fastattn.scaled_dot_product_attention(heads, heads.tanh(), heads, is_causal=True)


def _packed(x: Tensor) -> Tensor:
    tokens, bounds = x.flatten(0, 1).unflatten(-1, (2, 8)), torch.tensor([0, 7, BATCH * STEPS])
    return fastattn.varlen_attention(tokens, tokens.tanh(), tokens, bounds, bounds, BATCH * STEPS, BATCH * STEPS)


def _additive(x: Tensor) -> Tensor:
    return fastattn.additive_attention(x, x.tanh(), x, torch.linspace(-1, 1, SIZE, dtype=x.dtype))


def _cell(x: Tensor) -> Tensor:
    state = None
    for step in x.unbind(1)[:3]:
        state = CELL(step, state)
    assert state is not None
    return torch.cat(state)


def _weights(x: Tensor) -> Tensor:
    weights = ATTENTION(x, x, x)[1]
    assert weights is not None
    return weights


def _of(module: torch.nn.Module) -> Call:
    """The module, or in float64 its copy."""
    wide = copy.deepcopy(module).double()

    def call(x: Tensor) -> Tensor:
        inputs = (x, x, x) if isinstance(module, fastattn.MultiheadAttention) else (x,)
        result: Tensor = (wide if x.dtype == torch.float64 else module)(*inputs)[0]
        return result

    return call


def _calls() -> dict[str, Call]:
    torch.manual_seed(0)
    modules = {
        "MultiheadAttention": fastattn.MultiheadAttention(SIZE, 2, batch_first=True),
        "LSTM": fastattn.LSTM(SIZE, SIZE, batch_first=True),
        "LayerNormLSTM": fastattn.LayerNormLSTM(SIZE, SIZE, batch_first=True),
    }
    functions = {"attention": _attention, "packed": _packed, "additive": _additive}
    return functions | {name: _of(module.requires_grad_(False)) for name, module in modules.items()}


CALLS = _calls()
CELL = fastattn.LSTMCell(SIZE, SIZE)
ATTENTION = fastattn.MultiheadAttention(SIZE, 2, batch_first=True)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode(name: str) -> None:
    call = CALLS[name]
    x, along = torch.randn(2, BATCH, STEPS, SIZE)
    step = 1e-6 * along.double()
    wanted = (call(x.double() + step) - call(x.double() - step)) / 2e-6
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, along))).tangent
    for found in (tangent, torch.func.jvp(call, (x,), (along,))[1]):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CALLS)
def test_gradient_and_batches_of_torch_func(name: str) -> None:
    call = CALLS[name]
    x = torch.randn(BATCH, STEPS, SIZE)
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(call(leaf).square().sum(), leaf)[0]
    found = torch.func.grad(lambda each: call(each).square().sum())(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    if name not in ("packed", "LSTM", "LayerNormLSTM"):
        batched = torch.vmap(call)(torch.stack([x, -x]))
        torch.testing.assert_close(batched, torch.stack([call(x), call(-x)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*CALLS, "LSTMCell", "attention with weights"])
def test_gradients_in_batches(name: str) -> None:
    """is_grads_batched, which jacobian(vectorize=True) takes: torch's own modules can."""
    call = {**CALLS, "LSTMCell": _cell, "attention with weights": _weights}[name]
    x = torch.randn(BATCH, STEPS, SIZE, requires_grad=True)
    result = call(x)
    cotangents = torch.randn(3, *result.shape)
    wanted = [torch.autograd.grad(result, x, cotangent, retain_graph=True)[0] for cotangent in cotangents]
    found = torch.autograd.grad(result, x, cotangents, is_grads_batched=True)[0]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "triton", "sdpa"])
def test_a_forced_backend_says_why(backend: str) -> None:
    x = torch.randn(BATCH, STEPS, SIZE)
    with fastattn.backend(backend), pytest.raises(RuntimeError, match=r"transform of torch\.func or forward-mode"):
        torch.func.jvp(_attention, (x,), (x,))


def test_a_cache_has_no_derivative() -> None:
    query, cache = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 16, 8)
    lengths = torch.tensor([5])
    with pytest.raises(ValueError, match="query: got a call inside a transform"):
        torch.func.jvp(lambda q: fastattn.attention_with_kv_cache(q, cache, cache, lengths), (query,), (query,))


def test_outside_nothing_is_transformed() -> None:
    assert not transformed()
    with forward_ad.dual_level():
        assert transformed()
    assert torch.vmap(lambda x: x + float(transformed()))(torch.zeros(1)).item() == 1.0
