"""Plain launches made ready once (fastattn/kernels/attention/prepared.py): what is used again, and what is not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import DEVICE
from cuda_graphs import captured
from torch import Tensor

import fastattn
from fastattn import plain_call
from fastattn.kernels.attention import config, launch, prepared
from fastattn.kernels.attention.config import Tile

pytestmark = pytest.mark.skipif(launch.why_unavailable(DEVICE) is not None, reason="needs triton")
TILE, DESCRIBED = Tile(16, 16), Tile(16, 16, descriptors=True)


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    prepared._known.clear()
    with fastattn.backend("triton"):
        yield
    prepared._known.clear()


def tensors(rows: int = 20, columns: int = 20, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, 2, n, 16, device=DEVICE).to(dtype) for n in (rows, columns, columns))  # type: ignore


def short(*given: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    found = plain_call.attention(*given, causal, scale, False, "top-left")
    assert found is not None
    return found


def long(*given: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    found: Tensor = fastattn.scaled_dot_product_attention(*given, is_causal=causal, scale=scale, deterministic=False)
    return found


@pytest.mark.parametrize("tile", [TILE, DESCRIBED], ids=["pointers", "descriptors"])
def test_other_numbers_of_the_same_kind(tile: Tile) -> None:
    with config.override(tile):
        for _ in range(3):
            given = tensors()
            assert torch.equal(short(*given, causal=True), long(*given, causal=True))
    assert len(prepared._known) == 1


@pytest.mark.parametrize("change", [
    {"causal": True}, {"scale": 0.5}, {"scale": -1.0},
    {"given": lambda: tensors(rows=21)}, {"given": lambda: tensors(columns=33)},
    {"given": lambda: tensors(dtype=torch.bfloat16)}, {"given": lambda: tensors(dtype=torch.float32)},
    {"given": lambda: tuple(tensor.transpose(0, 1) for tensor in tensors())},
    {"given": lambda: tuple(tensor.expand(2, -1, -1, -1) for tensor in (x[:1] for x in tensors()))},
], ids=[
    "causal", "scale", "negative scale", "rows", "columns", "bfloat16", "float32", "strides", "expanded",
])  # fmt: skip
@pytest.mark.parametrize("tile", [TILE, DESCRIBED], ids=["pointers", "descriptors"])
def test_another_kind_is_made_ready_by_itself(tile: Tile, change: dict[str, Any]) -> None:
    keywords = dict(change)
    make: Callable[[], tuple[Tensor, ...]] = keywords.pop("given", tensors)
    with config.override(tile):
        short(*tensors())
        for _ in range(2):
            given = make()
            assert torch.equal(short(*given, **keywords), long(*given, **keywords))
    assert len(prepared._known) == 2


def test_addresses_that_descriptors_cannot_read() -> None:
    with config.override(DESCRIBED):
        query, key, value = tensors()
        short(query, key, value)
        shifted = torch.cat([query.new_zeros(1), key.flatten()])[1:].view_as(key)
        assert shifted.data_ptr() % 16 != 0
        assert torch.equal(short(query, shifted, value), short(query, key, value))
    assert len(prepared._known) == 2


def test_the_tile_of_a_test_is_its_own() -> None:
    given = tensors()
    for tile in (TILE, DESCRIBED, Tile(32, 16)):
        with config.override(tile):
            short(*given)
    assert len(prepared._known) == 3


def test_the_precision_of_products_is_part_of_the_kind() -> None:
    given, before = tensors(dtype=torch.float32), torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            short(*given)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [ready.given["F"].precision for ready in prepared._known.values()] == ["ieee", "tf32"]


def test_tensors_that_are_copied_first_are_not_kept() -> None:
    query, key, value = tensors()
    query = query.transpose(2, 3).contiguous().transpose(2, 3)
    for _ in range(2):
        assert torch.equal(short(query, key, value), long(query, key, value))
    assert not prepared._known


@pytest.mark.parametrize("tile", [TILE, DESCRIBED], ids=["pointers", "descriptors"])
def test_nothing_of_the_user_is_kept(tile: Tile) -> None:
    with config.override(tile):
        given = tensors()
        kept = [weakref.ref(tensor) for tensor in (*given, short(*given))]
    del given
    gc.collect()
    assert prepared._known
    assert not any(reference() is not None for reference in kept)


def test_kinds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_MOST", 3)
    for columns in range(1, 8):
        given = tensors(columns=columns)
        assert torch.equal(short(*given), long(*given))
        assert len(prepared._known) <= 3


@pytest.mark.gpu
def test_cuda_graph() -> None:
    given = tensors()
    graph, (result,) = captured(lambda: (short(*given, causal=True),))
    for tensor in given:
        tensor.normal_()
    graph.replay()
    assert torch.equal(result, long(*given, causal=True))
