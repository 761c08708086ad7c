"""The kernels of specialised warps (fastattn/kernels/attention/specialized): on a Hopper GPU, or simulated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import attention_cases
from torch import Tensor

import fastattn
from fastattn.kernels.attention import config, launch, prepared
from fastattn.kernels.attention.config import Tile
from fastattn.testing import AttentionCase as Case
from fastattn.testing import check, evaluate, make_inputs, public_call

specialized_launch = pytest.importorskip("fastattn.kernels.attention.specialized_launch")
gluon_simulator = pytest.importorskip("gluon_simulator")
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(
    launch.why_unavailable(DEVICE) is not None or (DEVICE == "cuda" and not HOPPER), reason="needs a Hopper GPU or none"
)
KERNELS = {
    name: getattr(module, f"attention_{name}_specialized") for name, module in specialized_launch._MODULES.items()
}
TILES = [Tile(128, block_n, stages=stages, specialized=True) for block_n, stages in ((16, 3), (32, 4))]


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(**arguments: Any) -> None:
            self.launches += 1
            self.kernel[grid](**arguments)

        return start


def counted(patch: pytest.MonkeyPatch, order: int) -> dict[str, Counted]:
    """The kernels as the launch finds them from here on: the device's, or simulated in an order of events."""
    found = {}
    for name, module in specialized_launch._MODULES.items():
        found[name] = Counted(KERNELS[name] if HOPPER else gluon_simulator.Kernel(KERNELS[name], order))
        patch.setattr(module, f"attention_{name}_specialized", found[name])
    return found


def launches(kernels: dict[str, Counted]) -> list[int]:
    return [kernel.launches for kernel in kernels.values()]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[dict[str, Counted]]:
    """Another order of events for each test."""
    prepared._known.clear()
    with fastattn.backend("triton"):
        yield counted(monkeypatch, seed)
    prepared._known.clear()


CASES = {
    "lengths no tile divides": Case(rows=150, columns=77),
    "one row, one key": Case(rows=1, columns=1),
    "fewer rows than a consumer's": Case(rows=20, columns=50),
    "whole tiles": Case(rows=256, columns=128),
    "narrow": Case(rows=130, columns=70, head_dim=8),
    "features no power of two": Case(batch=2, rows=70, columns=33, head_dim=24),
    "wide": Case(rows=140, columns=70, head_dim=256, heads=1, key_heads=1),
    "causal": Case(rows=200, columns=200, causal=True),
    "more keys than rows": Case(rows=130, columns=300, causal=True),
    "more rows than keys": Case(rows=300, columns=70, causal=True),
    "bottom right": Case(rows=140, columns=275, causal=True, alignment="bottom-right"),
    "bottom right, rows without keys": Case(rows=275, columns=140, causal=True, alignment="bottom-right"),
    "window": Case(rows=300, columns=300, window=(40, 30)),
    "causal window": Case(rows=300, columns=300, causal=True, window=(100, None)),
    "window narrower than a tile": Case(rows=200, columns=200, window=(3, 2)),
    "window before all keys": Case(rows=300, columns=40, window=(5, 5)),
    "window to the right": Case(rows=150, columns=250, window=(0, None)),
    "window to the left": Case(rows=150, columns=250, window=(None, 0)),
    "grouped": Case(batch=2, heads=6, key_heads=2, rows=137, columns=45, causal=True),
    "heads first": Case(batch=2, heads=4, key_heads=2, rows=137, columns=45, layout="heads_first"),
    "packed projection": Case(batch=2, rows=137, columns=137, layout="packed"),
    "padding to the right": Case(batch=4, rows=137, columns=245, padding=torch.bool),
    "padding to the left": Case(batch=4, rows=137, columns=245, padding=torch.bool, padding_kind="left"),
    "padding with holes": Case(batch=2, rows=137, columns=245, padding=torch.bool, padding_kind="holes"),
    "nothing but padding": Case(batch=2, rows=137, columns=45, padding=torch.bool, padding_kind="all"),
    "causal, padding to the left": Case(
        batch=4, rows=200, columns=200, padding=torch.bool, padding_kind="left", causal=True
    ),
    "causal window, padding to the right": Case(
        batch=4, rows=200, columns=200, padding=torch.bool, causal=True, window=(70, None)
    ),
    "window, padding with holes": Case(
        batch=2, rows=200, columns=200, padding=torch.bool, padding_kind="holes", window=(70, 20)
    ),
    "sinks": Case(rows=137, columns=45, sinks=True, causal=True),
    "sinks of rows without keys": Case(rows=300, columns=40, sinks=True, window=(5, 5)),
}


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.block_n} keys")
@pytest.mark.parametrize("name", CASES)
def test_feature(name: str, tile: Tile, kernels: dict[str, Counted]) -> None:
    case = replace(CASES[name], dtype=torch.bfloat16)
    with config.override(tile):
        check(case if case.head_dim != 8 or name == "narrow" else replace(case, head_dim=16), device=DEVICE)
    assert min(launches(kernels)) > 0


SHIPPED = {
    "full": Case(), "causal": Case(causal=True), "window": Case(causal=True, window=(90, None)),
    "padding": Case(causal=True, padding=torch.bool),
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("name", SHIPPED)
def test_the_tiles_that_ship(
    name: str, head_dim: int, kernels: dict[str, Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "architecture", lambda _: 90)
    case = replace(SHIPPED[name], batch=2, heads=1, key_heads=1, rows=200, columns=300, head_dim=head_dim)
    with config.specialized():
        check(replace(case, dtype=torch.bfloat16), device=DEVICE)
    assert launches(kernels) == ([1, 0, 0] if head_dim == 256 else [1, 1, 1])


@settings(max_examples=40)
@given(
    case=attention_cases(), tile=st.sampled_from(TILES), dtype=st.sampled_from((torch.float16, torch.bfloat16)),
    rows=st.integers(1, 300), columns=st.integers(1, 100), order=st.integers(0, 2**31),
)  # fmt: skip
def test_combinations(case: Case, tile: Tile, dtype: torch.dtype, rows: int, columns: int, order: int) -> None:
    """All that the kernel serves, in any order of events."""
    case = replace(
        case, batch=min(max(case.batch, 1), 2), rows=rows, columns=columns, dtype=dtype,
        head_dim=min(-(-case.head_dim // 8) * 8, 64), padding=case.padding and torch.bool,
        layout="heads_last" if case.layout in ("sliced", "expanded") else case.layout, mask=None,
        softcap=None, alibi=False, segments=None, dropout_p=0.0, scale=None if case.scale == -0.7 else case.scale,
    )  # fmt: skip
    if case.layout == "packed":
        case = replace(case, key_heads=case.heads, columns=rows)
    with pytest.MonkeyPatch.context() as patch, fastattn.backend("triton"), config.override(tile):
        kernels = counted(patch, order)
        check(case, device=DEVICE)
    assert kernels["forward"].launches > 0


OTHERS = {
    "float mask": Case(mask=torch.float32), "boolean mask": Case(mask=torch.bool),
    "float padding": Case(padding=torch.float32), "dropout": Case(dropout_p=0.1), "softcap": Case(softcap=3.0),
    "alibi": Case(alibi=True), "segments": Case(segments="sorted"), "single precision": Case(dtype=torch.float32),
    "negative scale": Case(scale=-0.5), "rows of 20 bytes": Case(head_dim=10), "no key": Case(columns=0),
    "no query": Case(rows=0),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_it_does_not_serve(name: str, kernels: dict[str, Counted]) -> None:
    case = OTHERS[name]
    dtype = case.dtype if name == "single precision" else torch.float16
    with config.override(replace(TILES[0], block_m=32)):
        check(replace(case, dtype=dtype, head_dim=case.head_dim if case.head_dim == 10 else 16), device=DEVICE)
    assert max(launches(kernels)) == 0


def test_expanded_batches_are_not_served(kernels: dict[str, Counted]) -> None:
    query = torch.randn(3, 2, 20, 16, dtype=torch.float16, device=DEVICE)
    with config.override(replace(TILES[0], block_m=32)):
        attention(query, *[query[:1].expand(3, -1, -1, -1)] * 2)
    assert max(launches(kernels)) == 0


def test_packed_sequences_are_not_served(kernels: dict[str, Counted]) -> None:
    query = torch.randn(50, 2, 16, dtype=torch.float16, device=DEVICE)
    bounds = torch.tensor([0, 20, 50], dtype=torch.int32, device=DEVICE)
    with config.override(replace(TILES[0], block_m=32)):
        fastattn.varlen_attention(query, query, query, bounds, bounds, 30, 30)
    assert max(launches(kernels)) == 0


def test_values_that_nobody_sees_may_be_anything(kernels: dict[str, Counted]) -> None:
    query, key, value = (torch.randn(2, 2, n, 16, device=DEVICE).half() for n in (275, 140, 140))
    value[..., 0, :], value[..., -1, :] = float("inf"), float("nan")
    key[..., 0, :] = float("inf")
    query.requires_grad_()
    nobody = {"key_padding_mask": torch.zeros(2, 140, dtype=torch.bool, device=DEVICE)}
    # Of the last the first program's rows, which see no key.
    for masks, rows in ((nobody, 275), ({"is_causal": True, "causal_alignment": "bottom-right"}, 128)):
        with config.override(TILES[0]):
            found = fastattn.scaled_dot_product_attention(query, key, value, **masks)
            (grad,) = torch.autograd.grad(found, query, torch.ones_like(found))
        for result in (found, grad):
            assert torch.equal(result[:, :, :rows], torch.zeros_like(result[:, :, :rows]))
    assert launches(kernels) == [2, 2, 2]


def test_a_long_row_of_equal_scores(kernels: dict[str, Counted]) -> None:
    """Nothing decays from tile to tile: the first of 1,024 weighs as much as the last."""
    columns, values = 16384, torch.linspace(-1.0, 1.0, 16384, device=DEVICE)
    query, key = (torch.full((1, 1, n, 16), 5.0, device=DEVICE, dtype=torch.bfloat16) for n in (1, columns))
    value = values.to(torch.bfloat16)[None, None, :, None].expand(1, 1, columns, 16).contiguous()
    with config.override(TILES[0]), torch.no_grad():
        out, lse = fastattn.scaled_dot_product_attention(query, key, value, return_lse=True)
    assert launches(kernels) == [1, 0, 0]
    torch.testing.assert_close(lse, torch.full_like(lse, 100.0 + math.log(columns)), rtol=0, atol=2e-5)
    torch.testing.assert_close(out.float(), value.float().mean().expand_as(out), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-46, 1e-38, 1e35, 1e39])
def test_scales_at_the_ends_of_float32(scale: float, kernels: dict[str, Counted]) -> None:
    given = [torch.randn(1, 2, 20, 16, device=DEVICE).half() for _ in range(3)]
    with config.override(replace(TILES[0], block_m=32)):
        attention(*given, scale=scale)
    assert max(launches(kernels)) == 0


def attention(*tensors: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = fastattn.scaled_dot_product_attention(*tensors, **options)
    return result


def test_no_order_of_events_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(rows=300, columns=150, head_dim=16, causal=True, dtype=torch.bfloat16)
    found = []
    with fastattn.backend("triton"), config.override(TILES[1]):
        for order in range(20):
            counted(monkeypatch, order)
            found.append(evaluate(public_call, case, make_inputs(case, DEVICE)))
    for results in found[1:]:
        for name, result in results.items():
            assert torch.equal(result, found[0][name]), name


def test_neighbours_do_not_leak(kernels: dict[str, Counted]) -> None:
    """Rows and features beyond those of a view are NaN."""
    case = Case(batch=2, heads=4, key_heads=2, rows=137, columns=45, head_dim=24, dtype=torch.float16, causal=True)
    inputs = make_inputs(case, DEVICE)

    def amid_nan(tensor: Tensor) -> Tensor:
        batch, heads, length, dim = tensor.shape
        around = torch.full((batch, length + 40, heads + 2, dim + 16), float("nan"), dtype=tensor.dtype, device=DEVICE)
        return around.transpose(1, 2)[:, 1:-1, 8:-32, 8:-8].copy_(tensor)

    with config.override(TILES[1]):
        expected = evaluate(public_call, case, inputs)
        inputs = replace(inputs, query=amid_nan(inputs.query), key=amid_nan(inputs.key), value=amid_nan(inputs.value))
        found = evaluate(public_call, case, inputs)
    assert launches(kernels) == [2, 2, 2]
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_a_plain_launch_is_made_ready_once(kernels: dict[str, Counted]) -> None:
    with config.override(TILES[0]):
        for _ in range(3):
            given = [torch.randn(2, 2, 20, 16, device=DEVICE).half() for _ in range(3)]
            assert torch.equal(
                attention(*given, is_causal=True), attention(*given, is_causal=True, deterministic=False)
            )
        assert launches(kernels) == [6, 0, 0]
        assert len(prepared._known) == 1


class Named:
    """A kernel that tells its name and does nothing."""

    def __init__(self, name: str, started: list[str]) -> None:
        self.name, self.started = name, started

    def __getitem__(self, _: Any) -> Any:
        self.started.append(self.name)
        return lambda *_, **__: None


def test_they_are_chosen_where_they_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(launch, "architecture", lambda _: 90)
    for name, module in specialized_launch._MODULES.items():
        monkeypatch.setattr(module, f"attention_{name}_specialized", Named(f"specialised {name}", started))
    for module, name in (
        (launch.forward, "forward"), (launch.backward, "delta"), (launch.backward, "dquery"),
        (launch.backward, "dkey_dvalue"),
    ):  # fmt: skip
        monkeypatch.setattr(module, f"attention_{name}", Named(name, started))

    def names(head_dim: int) -> list[str]:
        started.clear()
        query = torch.zeros(1, 1, 16, head_dim, dtype=torch.bfloat16)
        problem = *(None,) * 6, 0.0, 0.1, 0.0, 0, None, 0
        out, logsumexp = launch.attention(query, query, query, None, *problem)
        launch.attention_backward(out, None, query, query, query, out, logsumexp, *problem, False, False)
        return started[:1] + started[2:]

    assert names(64) == ["forward", "dquery", "dkey_dvalue"]
    monkeypatch.setattr(config, "_SPECIALIZED_FASTER", {("forward", 64), ("dkey_dvalue", 128)})
    assert names(64) == ["specialised forward", "dquery", "dkey_dvalue"]
    assert names(128) == ["forward", "dquery", "specialised dkey_dvalue"]
    with config.specialized():
        assert names(128) == ["specialised forward", "specialised dquery", "specialised dkey_dvalue"]
        assert names(256) == ["specialised forward", "dquery", "dkey_dvalue", "dkey_dvalue"]
    assert names(256) == ["forward", "dquery", "dkey_dvalue", "dkey_dvalue"]


def test_nothing_unmeasured_is_chosen() -> None:
    """A GPU path that has never run on a device is nobody's default."""
    assert not launch.VERIFIED
    assert not config._SPECIALIZED_FASTER
