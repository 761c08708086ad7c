"""Gluon kernels for Hopper on the CPU, with every order of events that the chip may choose.

Triton has no interpreter for Gluon. Here a kernel's own Python runs, each of its partitions in a thread, on torch
tensors, one thread at a time: wherever another could notice, a random choice says who goes on. What is asynchronous is
an event that the same choice may put off: a copy (TMA) until its barrier is waited for, a product (wgmma) until its
group waits for it. So a kernel that relies on an order that nothing guarantees computes NaN or something else:

- memory is NaN from the moment a copy into it is started until the copy happens, and a product reads its operands when
  it happens: to hand back a place too early, or to read it too early, shows;
- an accumulator can be used by nothing but the next product until it was waited for;
- what threads store must be fenced before the copy engine reads it;
- a partition does not end before what it stores was read; barriers count arrivals and bytes, and complain of one too
  many; a program in which nobody can go on is a deadlock.

Layouts are ignored, and a product is rounded before it is added; registers, and what the compiler makes of it all, are
the concern of the budget (benchmarks/budget.py).
"""

from __future__ import annotations

import math
import random
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gluon_machine import (
    Accumulator,
    Barrier,
    Barriers,
    Described,
    Memory,
    MisuseError,
    Pointer,
    Program,
    here,
    pause,
)
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.runtime.jit import ConstexprFunction, JITCallable

# What kernels call --------------------------------------------------------------------------------------------


def _load_tile(descriptor: Described, place: Sequence[int], barrier: Barrier, memory: Memory) -> None:
    memory.numbers.fill_(float("nan"))

    def happen() -> None:
        memory.numbers.zero_()
        there, here = descriptor.inside(place, memory.numbers)
        here.copy_(there)
        barrier.update(expected=-memory.numbers.numel() * memory.numbers.element_size())

    Program.now.copies.append(happen)
    pause()


def _store_tile(descriptor: Described, place: Sequence[int], memory: Memory) -> None:
    partition = here.partition
    if memory.numbers.data_ptr() in partition.unfenced:
        raise MisuseError("the copy engine reads what was stored and not fenced")
    partition.stores += 1

    def happen() -> None:
        there, here = descriptor.inside(place, memory.numbers)
        there.copy_(here)
        partition.stores -= 1

    Program.now.copies.append(happen)
    pause()


def _store_wait(most: int) -> None:
    partition = here.partition
    pause(lambda: partition.stores <= most)


def _wait(barrier: Barrier, parity: int, pred: bool = True) -> None:
    pause(lambda: not pred or barrier.phase % 2 != parity)


def _arrive(barrier: Barrier, *, pred: bool = True) -> None:
    if pred:
        barrier.update(arrivals=1)
    pause()


def _expect(barrier: Barrier, number: int) -> None:
    barrier.update(arrivals=1, expected=number)
    pause()


def _mma(a: Any, b: Memory, accumulator: Any, *, use_acc: bool = True, is_async: bool = False) -> Accumulator:
    assert is_async
    result = Accumulator()

    def happen() -> None:
        before = accumulator.value if isinstance(accumulator, Accumulator) else accumulator
        product = (a.numbers if isinstance(a, Memory) else a).float() @ b.numbers.float()
        result.value = before + product if use_acc else product

    here.partition.products.append(happen)
    pause()
    return result


def _mma_wait(most: int, deps: Sequence[Accumulator]) -> Any:
    partition = here.partition
    pause(lambda: len(partition.products) <= most)
    values = tuple(accumulator.value for accumulator in deps)
    if any(value is None for value in values):
        raise MisuseError("a product is used that was not waited for")
    return values if len(values) > 1 else values[0]


def _fence() -> None:
    if hasattr(here, "partition"):  # else before the partitions start
        here.partition.unfenced.clear()
        pause()


def _warp_specialize(parts: Sequence[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
    assert len(parts) == len(warps) + 1 == len(registers) + 1
    Program.now.run([lambda work=work, given=given: work(*given) for work, given in parts])  # type: ignore[misc]


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(math.prod(shape))
    return Memory(torch.full(shape, float("nan"), dtype=dtype))


def _read(pointer: Pointer, mask: Tensor | None = None, other: float = 0) -> Any:
    """A tensor; of one number, which decides where the program goes, a number."""
    if mask is None:
        found = pointer.numbers[pointer.offset]
        return found if found.is_floating_point() else int(found)
    return torch.where(mask, pointer.numbers[pointer.offset.where(mask, 0)], other)


def _write(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    pointer.numbers[pointer.offset[mask]] = value[mask]


def _extreme(of_numbers: Callable[..., Any], of_tensors: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return of_numbers(a, b)
        return of_tensors(*(x if isinstance(x, Tensor) else torch.tensor(x) for x in (a, b)))

    return call


def _where(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else a if condition else b


def _static_assert(condition: bool) -> None:
    assert condition


def _ignored(*_: Any, **__: Any) -> None:
    return None


_LANGUAGE = types.SimpleNamespace(
    program_id=lambda _: Program.now.number,
    # As the compiled code, towards 0; kernels divide by // what is not negative.
    cdiv=lambda a, b: int((a + b - 1) / b),
    minimum=_extreme(min, torch.minimum), maximum=_extreme(max, torch.maximum), where=_where,
    max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log2=torch.log2,
    zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, _: torch.full(shape, value, dtype=dtype),
    arange=lambda begin, end, _: torch.arange(begin, end, dtype=torch.int32),
    cast=lambda x, dtype: x.to(dtype) if isinstance(x, Tensor) else x,
    convert_layout=lambda x, _: x, static_range=range, load=_read, store=_write,
    static_assert=_static_assert, allocate_shared_memory=_allocate, warp_specialize=_warp_specialize,
    float32=torch.float32, int32=torch.int32, int64=torch.int64, constexpr=gl.constexpr,
    SliceLayout=_ignored, DotOperandLayout=_ignored, NVMMADistributedLayout=_ignored,
)  # fmt: skip
_BARRIER = types.SimpleNamespace(
    init=Barrier.init, wait=_wait, arrive=_arrive, expect=_expect, MBarrierLayout=lambda: "barriers"
)
_TMA = types.SimpleNamespace(store_wait=_store_wait)
_HOPPER = types.SimpleNamespace(
    warpgroup_mma=_mma, warpgroup_mma_init=Accumulator, warpgroup_mma_wait=_mma_wait, fence_async_shared=_fence,
    mbarrier=_BARRIER, tma=_TMA,
)  # fmt: skip


class Kernel:
    """Stands in for a ``gluon.jit`` kernel: ``Kernel(kernel, seed)[grid](**arguments)``."""

    def __init__(self, kernel: Any, seed: int = 0) -> None:
        self._function, self._choice, self.launches = _simulated(kernel, {}), random.Random(seed), 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*, num_warps: int, **arguments: Any) -> None:
            assert num_warps == 4
            self.launches += 1
            given = {name: _given(argument) for name, argument in arguments.items()}
            for number in range(math.prod(grid)):
                Program.now = Program(number, self._choice)
                self._function(**given)

        return launch


def _given(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Pointer(argument.detach())
    if hasattr(argument, "_fields"):
        return type(argument)(*map(_given, argument))
    return Described(argument) if hasattr(argument, "block_shape") else argument


def _simulated(value: Any, known: dict[int, Any]) -> Any:
    """What a kernel finds under a global name: other kernels as Python, Gluon's operations as those above."""
    if isinstance(value, gl.constexpr):
        return value.value
    if isinstance(value, ConstexprFunction):
        return _ignored
    replaced: list[tuple[Any, Any]] = [(gl, _LANGUAGE), (mbarrier, _BARRIER), (tma, _TMA), (gluon, None)]
    for name in ("async_load", "async_copy_global_to_shared"):
        replaced.append((getattr(tma, name, _TMA), _load_tile))
    for name in ("async_store", "async_copy_shared_to_global"):
        replaced.append((getattr(tma, name, _TMA), _store_tile))
    for original, ours in replaced:
        if value is original:
            return ours
    if isinstance(value, types.ModuleType) and value.__name__.endswith("nvidia.hopper"):
        return _HOPPER
    if not isinstance(value, JITCallable):
        return value
    if id(value) not in known:
        names: dict[str, Any] = {"__builtins__": __builtins__}
        known[id(value)] = types.FunctionType(value.fn.__code__, names, value.fn.__name__)
        names |= {name: _simulated(found, known) for name, found in value.fn.__globals__.items() if name[:2] != "__"}
    return known[id(value)]
