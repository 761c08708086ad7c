"""Float32 products by panels (csrc/panels_cpu.h): chosen on processors of AMD, right everywhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import instruction_sets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_split import drawn
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fastattn
from fastattn.kernels.attention import extension
from fastattn.modules.linear import linear

_C = pytest.importorskip("fastattn._C")


def own_sets() -> Iterator[str]:
    """The sets of this processor that choose panels, and the one that does everywhere."""
    for each in instruction_sets.ALL:
        for name in instruction_sets.chosen(each):
            if extension.least_rows() < sys.maxsize and "split" not in name and "amx" not in name:
                yield name


@pytest.fixture(params=list(own_sets()))
def panels(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from instruction_sets.chosen(request.param)


def error(result: Tensor, exact: Tensor) -> float:
    return (result - exact).square().mean().sqrt().item()


def products(rows: Any, columns: Any, depth: Any) -> Any:
    """``given`` for a test of products of such sizes, for ``both``."""
    return given(
        rows=rows, columns=columns, depth=depth, turned=st.tuples(st.booleans(), st.booleans()), bias=st.booleans(),
        seed=st.integers(0, 2**31),
    )  # fmt: skip


def both(
    rows: int, columns: int, depth: int, turned: tuple[bool, bool], bias: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Our product, torch's and the exact one."""
    left, right = drawn(rows, columns, depth, turned, seed)
    exact = left.double() @ right.double()
    if not bias:
        return _C.mm(left, right), left @ right, exact
    shift = torch.randn(columns)
    return _C.linear(left, right.t(), shift), torch.addmm(shift, left, right), exact + shift


@pytest.mark.usefixtures("panels")
@settings(max_examples=15, deadline=None)
@products(
    rows=st.integers(900, 1000),
    columns=st.integers(256, 330),
    depth=st.one_of(st.integers(600, 700), st.sampled_from((1024, 1025, 2050))),
)
def test_error_of_float32(**product: Any) -> None:
    ours, theirs, exact = both(**product)
    assert not torch.equal(ours, theirs)
    assert error(ours, exact) <= 1.5 * error(theirs, exact)


@pytest.mark.usefixtures("panels")
def test_results_larger_than_the_caches() -> None:
    """Written around them, where rows begin at whole vectors, and through them where not."""
    for columns in (768, 770):
        left, weight, bias = torch.randn(1500, 130), torch.randn(columns, 130), torch.randn(columns)
        exact = torch.nn.functional.linear(left.double(), weight.double(), bias.double())
        torch.testing.assert_close(_C.linear(left, weight, bias), exact.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e-42], ids=str)
def test_numbers_stay_in_their_row(number: float) -> None:
    left, right = torch.randn(1024, 256), torch.randn(256, 512)
    wanted = left @ right
    left[77] = number
    found = _C.mm(left, right)
    others = torch.arange(1024) != 77
    torch.testing.assert_close(found[others], wanted[others], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[77].isfinite(), (left @ right)[77].isfinite())


@pytest.mark.usefixtures("panels")
def test_views_and_strides() -> None:
    wide = torch.randn(1100, 700)
    for left in (wide[:1024, 100:400], wide[:1024, ::2][:, :300], wide[:300, :600].t()[:, :300]):
        right = torch.randn(left.shape[1], 600)
        exact = left.double() @ right.double()
        torch.testing.assert_close(_C.mm(left, right), exact.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("panels")
@settings(max_examples=60, deadline=None)
@products(
    rows=st.integers(1, 110),
    columns=st.one_of(st.integers(8, 140), st.sampled_from((16, 64, 80, 128))),
    depth=st.one_of(st.integers(2, 200), st.sampled_from((128, 1024, 1100))),
)
def test_small_products(**product: Any) -> None:
    """Few rows meet the right operand as it is, or panels that are made where they are used."""
    ours, theirs, exact = both(**product)
    # Up to 128 terms in a row, where torch's kernels for dot products have a sum for each lane.
    assert error(ours, exact) <= 3.0 * error(theirs, exact) + 1e-7


@pytest.mark.usefixtures("panels")
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 110),
    columns=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    depth=st.one_of(st.integers(1, 200), st.sampled_from((1024, 1100))),
    turned=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_two_products_of_one_operand(
    rows: int, columns: tuple[int, int], depth: int, turned: tuple[bool, bool], seed: int
) -> None:
    """As one after the other, bit for bit: the same sums in the same order."""
    left, right = drawn(rows, sum(columns), depth, turned, seed)
    first, second = right[:, : columns[0]], right[:, columns[0] :]
    found = _C.mm_both(left, first, second)
    for result, wanted in zip(found, (_C.mm(left, first), _C.mm(left, second)), strict=True):
        assert result.is_contiguous()
        assert torch.equal(result, wanted)


@pytest.mark.usefixtures("panels")
def test_negative_views_are_torchs() -> None:
    """What stands in their memory has the other sign."""
    left, right, bias = torch.randn(1024, 512), torch.randn(512, 512), torch.randn(512)
    exact = torch.addmm(bias.double(), left.double(), right.double())
    for turned in (left._neg_view(), right._neg_view(), bias._neg_view()):
        given = [turned if turned.shape == each.shape else each for each in (left, right, bias)]
        wanted = torch.addmm(given[2].double(), given[0].double(), given[1].double())
        assert not torch.allclose(wanted, exact)
        torch.testing.assert_close(_C.linear(given[0], given[1].t(), given[2]).double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_C.mm_both(left, right, right._neg_view())[1], -(left @ right), rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("panels")
def test_tiny_products_and_other_types_are_torchs() -> None:
    for left, right in [
        (torch.randn(30, 30), torch.randn(30, 30)),
        (torch.randn(1024, 512), torch.randn(512, 4)),
        (torch.randn(1024, 1), torch.randn(1, 512)),
        (torch.randn(512, 512).double(), torch.randn(512, 512).double()),
        (torch.randn(512, 512).bfloat16(), torch.randn(512, 512).bfloat16()),
        (torch.randn(512, 0), torch.randn(0, 512)),
    ]:
        assert torch.equal(_C.mm(left, right), left @ right)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        _C.mm(torch.randn(1024, 512), torch.randn(511, 512))


@pytest.mark.usefixtures("panels")
def test_the_number_of_threads_changes_no_bit() -> None:
    left, right = torch.randn(1024, 300), torch.randn(300, 500)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(_C.mm(left, right))
    torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("panels")
def test_projection_and_module_in_inference() -> None:
    x, weight, bias = torch.randn(2, 512, 384), torch.nn.Parameter(torch.randn(384, 384)), torch.randn(384)
    theirs = torch.nn.functional.linear(x, weight, bias)
    with torch.no_grad():
        ours = linear(x, weight, bias)
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-4)
    module, peer = fastattn.MultiheadAttention(384, 4), torch.nn.MultiheadAttention(384, 4)
    peer.load_state_dict(module.state_dict())
    with torch.no_grad():
        out, wanted = module(x, x, x)[0], peer.double()(*[x.double()] * 3)[0]
    torch.testing.assert_close(out, wanted.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [3, 40, 130])
def test_sums_of_the_input_some_steps_at_a_time(batch: int, dtype: torch.dtype) -> None:
    """Weights beyond the second-level cache, or few rows: their product comes first, for so many steps at a time."""
    ours = fastattn.LSTM(300, 320, bidirectional=True).to(dtype)
    theirs = torch.nn.LSTM(300, 320, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    lengths = torch.randint(1, 80, (batch,)) if batch < 100 else torch.randint(1, 7, (batch,))
    x = torch.randn(int(lengths.max()), batch, 300).to(dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.0, "atol": 3e-2}
    for pack in (lambda x: x, lambda x: pack_padded_sequence(x, lengths, enforce_sorted=False)):
        with torch.no_grad():
            (found, states), (wanted, last) = ours(pack(x)), theirs(pack(x.float()))
        found, wanted = (out if isinstance(out, Tensor) else out.data for out in (found, wanted))
        for one, other in zip([found, *states], [wanted, *last], strict=True):
            torch.testing.assert_close(one.float(), other, **tolerance)
