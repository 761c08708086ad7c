"""What ``gluon_simulator`` runs kernels on: warps that take turns, barriers, memory, and what happens later.

One thread at a time goes on: wherever another could notice, a random choice says which, or what copy or product is
done.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


class DeadlockError(RuntimeError):
    """Every partition waits for something that nobody is left to do."""


class MisuseError(RuntimeError):
    """What no order of events makes right."""


class Partition:
    """A thread that goes on when it is told to; its products, in order."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.turn, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.until: Callable[[], bool] = lambda: True
        self.done, self.error = False, None
        self.products: list[Callable[[], None]] = []
        self.unfenced: set[int] = set()
        self.stores = 0
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        self.turn.acquire()
        here.partition = self
        try:
            work()
        except BaseException as error:  # raised by the main thread
            self.error = error
        self.done = True
        self.stopped.release()

    def go_on(self) -> None:
        """Run until it pauses or ends."""
        self.turn.release()
        self.stopped.acquire()
        if self.error is not None:
            raise self.error
        if self.done and self.stores:
            raise MisuseError("the copy engine still reads the memory of warps that have ended")

    def oldest_product(self) -> None:
        self.products.pop(0)()


here = threading.local()


class Program:
    """One program of a grid."""

    now: ClassVar[Program]  # the one that runs

    def __init__(self, number: int, choice: random.Random) -> None:
        self.number, self.choice = number, choice
        self.copies: list[Callable[[], None]] = []

    def run(self, works: Sequence[Callable[[], None]]) -> None:
        partitions = [Partition(work) for work in works]
        # Some are much slower than others, each time another: a partition, the copies, the products of a group.
        speeds = [self.choice.choice((0.01, 1.0, 100.0)) for _ in range(2 * len(partitions) + 1)]
        while True:
            events: list[Callable[[], None] | None] = [
                partition.go_on if not partition.done and partition.until() else None for partition in partitions
            ]
            events += [partition.oldest_product if partition.products else None for partition in partitions]
            events.append(self._any_copy if self.copies else None)
            possible = [(event, speed) for event, speed in zip(events, speeds, strict=True) if event is not None]
            if not possible:
                break
            (event,) = self.choice.choices([event for event, _ in possible], [speed for _, speed in possible])
            event()
        if not all(partition.done for partition in partitions):
            raise DeadlockError(f"program {self.number}: {sum(not one.done for one in partitions)} partitions wait")

    def _any_copy(self) -> None:
        self.copies.pop(self.choice.randrange(len(self.copies)))()


def pause(until: Callable[[], bool] = lambda: True) -> None:
    """Let others go on, and wait for a condition."""
    partition = here.partition
    partition.until = until
    partition.stopped.release()
    partition.turn.acquire()


class Barrier:
    """PTX ISA, "mbarrier": a phase ends when all arrivals and all bytes that are expected have come."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def update(self, arrivals: int = 0, expected: int = 0) -> None:
        self.missing -= arrivals
        self.bytes += expected
        if self.missing < 0 or self.bytes < 0:
            raise MisuseError(f"a barrier of {self.count} got more arrivals or bytes than it expects in a phase")
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Barriers:
    def __init__(self, number: int) -> None:
        self.all = [Barrier() for _ in range(number)]

    def index(self, place: int) -> Barrier:
        return self.all[place]


class Memory:
    """A view of shared memory."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    @property
    def dtype(self) -> torch.dtype:
        return self.numbers.dtype

    def index(self, place: int) -> Memory:
        return Memory(self.numbers[place])

    def reshape(self, shape: list[int]) -> Memory:
        return Memory(self.numbers.view(shape))

    def permute(self, order: tuple[int, ...]) -> Memory:
        return Memory(self.numbers.permute(order))

    def store(self, value: Tensor) -> None:
        self.numbers.copy_(value)
        here.partition.unfenced.add(self.numbers.data_ptr())
        pause()


class Pointer:
    """Into a tensor, by elements."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)

    @property
    def numbers(self) -> Tensor:
        """All of the storage from the tensor's first element on: offsets are 64-bit, never clamped."""
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size() - self.tensor.storage_offset()
        return self.tensor.as_strided((size,), (1,))


class Accumulator:
    """A product that may not have happened yet; ``value`` is None until it has."""

    def __init__(self, value: Tensor | None = None) -> None:
        self.value = value


class Described:
    """A tensor that is read and written by tiles."""

    def __init__(self, descriptor: Any) -> None:
        self.block_shape, self.layout = descriptor.block_shape, descriptor.layout
        self.tensor = descriptor.base.detach().as_strided(descriptor.shape, descriptor.strides)
        self.dtype = descriptor.base.dtype

    def inside(self, place: Sequence[int], tile: Tensor) -> tuple[Tensor, Tensor]:
        """What of a tile that starts at ``place`` lies in the tensor: there, and in the tile."""
        there = tuple(slice(at, at + size) for at, size in zip(place, self.block_shape, strict=True))
        found = self.tensor[there]
        return found, tile.view(self.block_shape)[tuple(slice(size) for size in found.shape)]
