"""The simulator of Gluon kernels finds what no order of events makes right, and nothing in what is right in all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from gluon_machine import DeadlockError, MisuseError
from gluon_simulator import Kernel
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
TILES = 5


@gluon.jit
def _fetch_all(source, place, filled, read, fault: gl.constexpr):  # type: ignore[no-untyped-def]
    for tile in range(TILES):
        if fault != "place not waited for":
            mbarrier.wait(read, (tile & 1) ^ 1)
        mbarrier.expect(filled, 16 * 16 * 2 * (2 if fault == "too few bytes" else 1))
        load(source, [tile * 16, 0], filled, place)


@gluon.jit
def _square_all(out, place, filled, read, fault: gl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of all tiles times themselves."""
    total = gl.zeros([16, 16], gl.float32, None)
    for tile in range(TILES):
        if fault != "tile not waited for":
            mbarrier.wait(filled, tile & 1)
        total = hopper.warpgroup_mma(place, place, total, is_async=True)
        if fault == "place handed back too early":
            mbarrier.arrive(read)
        total = hopper.warpgroup_mma_wait(1 if fault == "product not waited for" else 0, deps=[total])
        if fault != "place handed back too early" and fault != "place not handed back":
            mbarrier.arrive(read)
        if fault == "place handed back twice":
            mbarrier.arrive(read)
    place.store(total.to(place.dtype))
    if fault != "store not fenced":
        hopper.fence_async_shared()
    store(out, [0, 0], place)
    if fault != "store not waited for":
        tma.store_wait(0)


@gluon.jit
def _kernel(source, out, fault: gl.constexpr):  # type: ignore[no-untyped-def]
    place = gl.allocate_shared_memory(source.dtype, [16, 16], source.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    filled, read = barriers.index(0), barriers.index(1)
    mbarrier.init(filled, count=1)
    mbarrier.init(read, count=1)
    squares, copies = (out, place, filled, read, fault), (source, place, filled, read, fault)
    gl.warp_specialize([(_square_all, squares), (_fetch_all, copies)], [1], [24])


def described(tensor: Tensor) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([16, 16], gl.float16)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [16, 16], layout)


def run(fault: str, order: int) -> tuple[Tensor, Tensor]:
    """What the kernel computes of 75 rows in one order of events, and the right answer; rows past the end read 0."""
    source = (torch.randn(75, 16) / 4).half()
    out = torch.full((13, 16), float("nan"), dtype=torch.float16)
    Kernel(_kernel, order)[(1,)](source=described(source), out=described(out), fault=fault, num_warps=4)
    tiles = torch.cat([source, source.new_zeros(5, 16)]).view(TILES, 16, 16).float()
    return out, (tiles @ tiles).sum(0)[:13]


def test_what_is_right_is_right_in_every_order() -> None:
    for order in range(100):
        found, expected = run("none", order)
        torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("fault", [
    "place not waited for", "tile not waited for", "product not waited for", "place handed back too early",
    "place handed back twice", "place not handed back", "store not fenced", "store not waited for",
    "too few bytes",
])  # fmt: skip
def test_what_is_wrong_shows_in_some_order(fault: str) -> None:
    shown: list[Any] = []
    for order in range(100):
        try:
            found, expected = run(fault, order)
        except (DeadlockError, MisuseError) as error:
            shown.append(error)
        else:
            if not torch.allclose(found.float(), expected, rtol=2e-3, atol=2e-3):
                shown.append(found)
    assert shown, fault


def test_the_error_of_a_partition_is_raised() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        Kernel(_wrong)[(1,)](num_warps=4)


@gluon.jit
def _mistaken(place):  # type: ignore[no-untyped-def]
    place.nothing()


@gluon.jit
def _wrong():  # type: ignore[no-untyped-def]
    gl.warp_specialize([(_mistaken, (None,)), (_mistaken, (None,))], [1], [24])
