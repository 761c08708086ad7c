"""Tensor descriptors: which tensors the kernels read by them, and that they read the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import attention_cases
from torch import Tensor

import fastattn
from fastattn.kernels.attention import arguments, config, launch
from fastattn.kernels.attention.config import Tile
from fastattn.testing import AttentionCase as Case
from fastattn.testing import check, evaluate, make_inputs, public_call

pytestmark = pytest.mark.skipif(launch._MISSING is not None, reason="needs triton")
descriptors = pytest.importorskip("fastattn.kernels.attention.descriptors")
HERE = pytest.mark.skipif(launch.why_unavailable("cpu") is not None, reason="needs TRITON_INTERPRET=1")
TILES = (
    Tile(16, 16, descriptors=True),
    Tile(16, 32, ahead=True, edge_stages=1, descriptors=True),
    Tile(32, 16, apart=True, descriptors=True),
)


def _heads(tensor: Tensor) -> arguments.Heads:
    return arguments.Heads(tensor, *tensor.stride()[:3])


def _half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


DESCRIBABLE: dict[str, tuple[Callable[[], Tensor], bool]] = {
    "contiguous": (lambda: _half(2, 3, 5, 8), True),
    "bfloat16": (lambda: _half(2, 3, 5, 8).bfloat16(), True),
    "heads last": (lambda: _half(2, 5, 3, 24).transpose(1, 2), True),
    "part of a packed projection": (lambda: _half(2, 5, 3, 3, 16)[:, :, 1].transpose(1, 2), True),
    "every second row": (lambda: _half(2, 3, 10, 8)[:, :, ::2], True),
    "narrow rows far enough apart": (lambda: _half(2, 3, 5, 8)[..., :5], True),
    "one batch, whatever its stride": (lambda: _half(600).as_strided((1, 3, 5, 8), (7, 40, 8, 1)), True),
    "one row, whatever its stride": (lambda: _half(600).as_strided((2, 3, 1, 8), (24, 8, 3, 1)), True),
    "rows of 10 bytes": (lambda: _half(2, 3, 5, 5), False),
    "rows of 24 bytes": (lambda: _half(2, 3, 5, 12), False),
    "heads 24 bytes apart": (lambda: _half(2, 5, 3, 12).transpose(1, 2), False),
    "an address off by one number": (lambda: _half(2 * 3 * 5 * 8 + 1)[1:].view(2, 3, 5, 8), False),
    "an address off by 16 bytes": (lambda: _half(2 * 3 * 5 * 8 + 8)[8:].view(2, 3, 5, 8), True),
    "expanded batches": (lambda: _half(1, 3, 5, 8).expand(4, 3, 5, 8), False),
    "expanded heads": (lambda: _half(2, 1, 5, 8).expand(2, 3, 5, 8), False),
    "float32": (lambda: torch.zeros(2, 3, 5, 8), False),
}


@pytest.mark.parametrize("name", DESCRIBABLE)
def test_what_can_be_described(name: str) -> None:
    make, expected = DESCRIBABLE[name]
    tensor = make()
    assert descriptors.describable(_heads(tensor)) == expected
    if expected:  # and Triton agrees
        made = descriptors.of({"query": _heads(tensor)}, Tile(16, 32), 32)["query"]
        assert made.block_shape == [1, 1, 16, 32]


def test_nothing_absent_is_described() -> None:
    assert not descriptors.describable(arguments.Heads(None, 0, 0, 0))
    whole = _heads(_half(2, 3, 5, 8))
    assert descriptors.possible({"query": whole, "key": whole, "value": whole, "sinks": None})
    assert not descriptors.possible({"query": whole, "key": whole, "value": arguments.Heads(None, 0, 0, 0)})


@pytest.mark.parametrize("described", [False, True])
def test_every_architecture_has_tiles(described: bool) -> None:
    """The pointers' tiles ask for no descriptors, and only half precision on chips that have them does."""
    for arch in (0, 80, 90, 100, 120):
        for kernel in config.KERNELS:
            for dtype in (torch.float16, torch.float32):
                for head_dim in (1, 64, 80, 128, 256):
                    tile = config.tile(kernel, dtype, head_dim, heavy=kernel == "dmask", arch=arch, described=described)
                    if tile.descriptors:
                        assert described and arch in (90, 100) and dtype == torch.float16  # noqa: PT018


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all that is read by descriptor."""
    names: list[str] = []
    of = descriptors.of

    def record(*arguments: object) -> dict[str, object]:
        found: dict[str, object] = of(*arguments)
        names.extend(found)
        return found

    monkeypatch.setattr(descriptors, "of", record)
    return names


CASES = {
    "lengths no tile divides": Case(rows=37, columns=45, head_dim=16),
    "one row, one key": Case(rows=1, columns=1, head_dim=8),
    "features no power of two": Case(batch=2, rows=20, columns=33, head_dim=24),
    "features of two halves": Case(rows=20, columns=33, head_dim=72, dtype=torch.bfloat16),
    "causal": Case(rows=70, columns=70, head_dim=16, causal=True),
    "bottom right": Case(rows=20, columns=75, head_dim=16, causal=True, alignment="bottom-right"),
    "window": Case(rows=70, columns=70, head_dim=16, window=(20, 3)),
    "grouped": Case(batch=2, heads=6, key_heads=2, rows=37, columns=45, head_dim=16),
    "heads last": Case(batch=2, heads=4, key_heads=2, rows=37, columns=45, head_dim=16, layout="heads_last"),
    "packed projection": Case(batch=2, heads=3, key_heads=3, rows=37, columns=37, head_dim=16, layout="packed"),
    "sliced": Case(batch=2, rows=37, columns=45, head_dim=16, layout="sliced"),
    "sinks": Case(rows=37, columns=45, head_dim=16, sinks=True, causal=True),
    "everything": Case(
        batch=2, heads=4, key_heads=2, rows=37, columns=45, head_dim=24, mask=torch.float32, padding=torch.bool,
        causal=True, window=(20, None), dropout_p=0.2, softcap=3.0, alibi=True, sinks=True, segments="sorted",
        mask_grad=True, loss=("out", "lse", "weights"),
    ),
}  # fmt: skip


@HERE
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_feature(name: str, tile: Tile, made: list[str]) -> None:
    with fastattn.backend("triton"), config.override(tile):
        check(replace(CASES[name], dtype=torch.float16))
    assert {"query", "key", "value", "dout"} <= set(made)


@HERE
@settings(max_examples=30)
@given(case=attention_cases(), tile=st.sampled_from(TILES), dtype=st.sampled_from((torch.float16, torch.bfloat16)))
def test_combinations(case: Case, tile: Tile, dtype: torch.dtype) -> None:
    """With features that fill 16 bytes, so that only the layouts decide."""
    with fastattn.backend("triton"), config.override(tile):
        check(replace(case, dtype=dtype, head_dim=-(-case.head_dim // 8) * 8))


@HERE
@pytest.mark.parametrize("name", ["no key", "no query", "rows of 20 bytes", "single precision"])
def test_what_cannot_be_described_is_read_by_pointers(name: str, made: list[str]) -> None:
    case = {
        "no key": Case(columns=0, dtype=torch.float16),
        "no query": Case(rows=0, dtype=torch.float16),
        "rows of 20 bytes": Case(rows=37, columns=45, dtype=torch.float16, head_dim=10, layout="heads_first"),
        "single precision": Case(rows=37, columns=45, head_dim=16),
    }[name]
    with fastattn.backend("triton"), config.override(TILES[0]):
        check(case)
    assert made == []


def _behind(numbers: int) -> Callable[[Tensor], Tensor]:
    """What moves a tensor to another place in a storage that is NaN elsewhere."""

    def moved(tensor: Tensor) -> Tensor:
        storage = torch.full((tensor.numel() + numbers,), float("nan"), dtype=tensor.dtype)
        return storage[numbers:].view(tensor.shape).copy_(tensor)

    return moved


PLACES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "16 bytes into its storage": (_behind(8), True),
    "2 bytes into its storage": (_behind(1), False),
    "the first batch for all": (lambda tensor: tensor[:1].expand(tensor.shape), False),
    "the first head for all": (lambda tensor: tensor[:, :1].expand(tensor.shape), False),
}


@HERE
@pytest.mark.parametrize("name", PLACES)
def test_the_place_of_a_tensor(name: str, made: list[str]) -> None:
    place, described = PLACES[name]
    case = Case(batch=2, rows=37, columns=45, head_dim=16, dtype=torch.float16)
    inputs = make_inputs(case)
    placed = replace(inputs, query=place(inputs.query), key=place(inputs.key), value=place(inputs.value))
    dense = replace(inputs, query=placed.query.clone(), key=placed.key.clone(), value=placed.value.clone())
    with fastattn.backend("triton"), config.override(TILES[0]):
        expected = evaluate(public_call, case, dense)
        made.clear()
        found = evaluate(public_call, case, placed)
    assert bool(made) == described
    for result in expected:
        assert torch.equal(found[result], expected[result]), result


@HERE
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_neighbours_do_not_leak(tile: Tile, made: list[str]) -> None:
    """Rows and features beyond those of a view are NaN: of the next head, the rest of a buffer, the next features."""
    case = Case(batch=2, heads=4, key_heads=2, rows=37, columns=45, head_dim=24, dtype=torch.float16, causal=True)
    inputs = make_inputs(case)

    def amid_nan(tensor: Tensor) -> Tensor:
        batch, heads, length, dim = tensor.shape
        around = torch.full((batch, length + 40, heads + 2, dim + 16), float("nan"), dtype=tensor.dtype)
        return around.transpose(1, 2)[:, 1:-1, 8:-32, 8:-8].copy_(tensor)

    with fastattn.backend("triton"), config.override(tile):
        expected = evaluate(public_call, case, inputs)
        made.clear()
        inputs = replace(inputs, query=amid_nan(inputs.query), key=amid_nan(inputs.key), value=amid_nan(inputs.value))
        found = evaluate(public_call, case, inputs)
    assert set(made) == {"query", "key", "value", "dout"}
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@HERE
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_same_bits_as_by_pointers(tile: Tile) -> None:
    case = replace(CASES["everything"], dtype=torch.bfloat16)
    with fastattn.backend("triton"):
        results = []
        for used in (tile, replace(tile, descriptors=False), tile):
            with config.override(used):
                results.append(evaluate(public_call, case, make_inputs(case)))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
        assert torch.equal(results[0][name], results[2][name]), name


@HERE
def test_packed_sequences_are_read_by_pointers(made: list[str]) -> None:
    """A descriptor knows one length; what lies past the end of a sequence is the next one."""
    query = torch.randn(50, 2, 16, dtype=torch.float16)
    bounds = torch.tensor([0, 20, 50], dtype=torch.int32)
    with fastattn.backend("triton"), config.override(TILES[0]):
        fastattn.varlen_attention(query, query, query, bounds, bounds, 30, 30)
    assert made == []
