"""Which tensors are plain (fastattn/kernels/onlookers.py): what the extension says, against a look at each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn.kernels import onlookers
from fastattn.kernels.built import UNAVAILABLE

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason="needs the C++ extension")


class Subclass(Tensor):
    pass


def ones() -> Tensor:
    return torch.ones(2, 3)


@pytest.mark.parametrize("make", [
    ones,
    lambda: nn.Parameter(ones()),
    lambda: ones().requires_grad_() * 2,
    lambda: ones().t(),
    lambda: ones().expand(4, 2, 3),
], ids=["tensor", "parameter", "with a graph", "a view", "expanded"])  # fmt: skip
def test_plain(make: Callable[[], Tensor]) -> None:
    assert onlookers.alike(ones(), make())
    assert not onlookers.present(ones(), make())


def test_plain_in_inference_mode() -> None:
    with torch.inference_mode():
        assert onlookers.alike(ones(), ones() * 2)


@pytest.mark.parametrize("make", [
    lambda: ones().as_subclass(Subclass),
    lambda: torch._neg_view(ones()),
    lambda: torch._efficientzerotensor((2, 3)),
], ids=["a subclass", "to be negated", "zeros without memory"])  # fmt: skip
def test_onlookers(make: Callable[[], Tensor]) -> None:
    assert not onlookers.alike(ones(), make())
    assert not onlookers.alike(make())
    assert onlookers.present(ones(), make())


@pytest.mark.parametrize("make", [
    lambda: ones().double(),
    lambda: ones().to_sparse(),
    lambda: ones().to("meta"),
    lambda: ones().to(torch.complex64).conj(),
], ids=["dtype", "layout", "device", "conjugate"])  # fmt: skip
def test_not_alike(make: Callable[[], Tensor]) -> None:
    assert not onlookers.alike(ones(), make())


def test_a_transform_is_no_plain_tensor() -> None:
    def one(x: Tensor) -> Tensor:
        assert not onlookers.alike(x)
        return x

    torch.vmap(one)(ones())


def test_no_tensor() -> None:
    assert not onlookers.alike(ones(), None)  # type: ignore[arg-type]


def test_a_tracer_before_autograd_looks_on() -> None:
    cell = fastattn.LSTMCell(3, 4)
    with torch.no_grad():
        graph = make_fx(lambda x: cell(x)[0], pre_dispatch=True)(ones())
        assert torch.equal(graph(2 * ones()), cell(2 * ones())[0])
