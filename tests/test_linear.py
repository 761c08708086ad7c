"""The projections of the modules where gradients are wanted (fastattn/modules/linear.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import instruction_sets
import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.kernels.attention import extension
from fastattn.modules.linear import linear

pytest.importorskip("fastattn._C")

torchs = torch.nn.functional.linear
# Those with products of their own, with which a projection is a node of ours, and one without.
SETS = [name for name in instruction_sets.ALL if name in (instruction_sets.ALL[0], "portable+panels", "portable+split")]


@pytest.fixture(params=[*SETS, "portable"], autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from instruction_sets.chosen(request.param)


def operands(bias: bool = True) -> list[Tensor]:
    """x (2, 300, 128), a weight and a bias, with gradients."""
    given = [torch.randn(2, 300, 128), torch.randn(200, 128)] + [torch.randn(200)] * bias
    return [tensor.requires_grad_() for tensor in given]


def in_float64(given: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in given]


def call(function: object, given: list[Tensor]) -> Tensor:
    result: Tensor = function(given[0], given[1], given[2] if len(given) > 2 else None)  # type: ignore[operator]
    return result


def assert_same(found: object, wanted: object) -> None:
    for one, other in zip(found, wanted, strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(bias: bool, frozen: int | None) -> None:
    given = operands(bias)
    if frozen is not None and frozen < len(given):
        given[frozen].requires_grad_(False)
    exact = in_float64(given)
    ours, theirs = call(linear, given), call(torchs, exact)
    if extension.least_rows() < sys.maxsize:
        assert "WithGradients" in type(ours.grad_fn).__name__
    cotangent = torch.randn(300, 2, 200).transpose(0, 1)
    places = [place for place, tensor in enumerate(given) if tensor.requires_grad]
    found = torch.autograd.grad(ours, [given[place] for place in places], cotangent)
    wanted = torch.autograd.grad(theirs, [exact[place] for place in places], cotangent.double())
    assert_same([ours, *found], [theirs, *wanted])


def test_a_gradient_that_is_one_number() -> None:
    given = operands()
    exact = in_float64(given)
    assert_same(
        torch.autograd.grad(call(linear, given).sum(), given), torch.autograd.grad(call(torchs, exact).sum(), exact)
    )


def test_second_derivatives() -> None:
    found = []
    given = operands()
    exact = in_float64(given)
    for function, tensors in ((linear, given), (torchs, exact)):
        first = torch.autograd.grad(call(function, tensors).sin().sum(), tensors, create_graph=True)
        total = torch.stack([(gradient * 1e-2).square().sum() for gradient in first]).sum()
        found.append(torch.autograd.grad(total, tensors))
    assert_same(*found)


def test_gradients_in_batches() -> None:
    found = []
    given = operands()
    exact = in_float64(given)
    cotangents = torch.randn(3, 2, 300, 200)
    for function, tensors in ((linear, given), (torchs, exact)):
        result = call(function, tensors)
        found.append(torch.autograd.grad(result, tensors, cotangents.to(result.dtype), is_grads_batched=True))
    assert_same(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    given = operands()
    wanted = torch.autograd.grad(call(linear, given).sin().sum(), given)
    checkpoint(linear, *given, use_reentrant=reentrant).sin().sum().backward()
    assert all(torch.equal(tensor.grad, gradient) for tensor, gradient in zip(given, wanted, strict=True))  # type: ignore[arg-type]


def test_a_weight_changed_before_the_backward() -> None:
    given = operands()
    result = call(linear, given)
    with torch.no_grad():
        given[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_no_more_is_kept_than_torch_keeps() -> None:
    """What a frozen weight was given may be changed in place, and so may a weight that no input waits for."""
    x, weight, bias = operands()
    hidden = x * 1
    result = linear(hidden, weight.detach(), bias.detach())
    hidden.relu_()
    result.sum().backward()
    result = linear(x.detach(), weight, bias)
    with torch.no_grad():
        weight.mul_(2)
    result.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


def test_a_gradient_that_is_a_subclass() -> None:
    given = operands()
    result = call(linear, given)
    ones = torch.ones_like(result)
    found = torch.autograd.grad(result, given, TwoTensor(ones, 2 * ones))
    exact = in_float64(given)
    wanted = torch.autograd.grad(call(torchs, exact).sum(), exact)
    assert all(isinstance(gradient, TwoTensor) for gradient in found)
    assert_same([gradient.a for gradient in found], wanted)
    assert_same([gradient.b for gradient in found], [2 * gradient for gradient in wanted])


def test_a_gradient_with_a_lazy_sign() -> None:
    given = operands()
    result = call(linear, given)
    ones = torch.ones_like(result)
    found = torch.autograd.grad(result, given, torch._neg_view(ones), retain_graph=True)
    assert_same(found, [-gradient.double() for gradient in torch.autograd.grad(result, given, ones)])


def test_compiled() -> None:
    given = operands()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert_same([call(compiled, given)], [call(torchs, [tensor.detach().double() for tensor in given])])


def test_small_projections_are_torchs() -> None:
    x, weight, bias = torch.randn(30, 64, requires_grad=True), torch.randn(64, 64), torch.randn(64)
    assert torch.equal(linear(x, weight, bias), torchs(x, weight, bias))


def test_attention_in_training() -> None:
    ours = fastattn.MultiheadAttention(256, 4, batch_first=True)
    theirs = torch.nn.MultiheadAttention(256, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    theirs.double()
    x = torch.randn(2, 300, 256)
    for module, given in ((ours, x), (theirs, x.double())):
        module(given, given, given)[0].sin().sum().backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
