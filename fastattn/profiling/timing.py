"""Times of several implementations of one thing, taken in turns so that a drift of the machine meets them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int = 3,
    seconds: float = 1.0,
    most_rounds: int = 50,
) -> dict[str, float]:
    """Median seconds of each call. Every round runs each one once; all have to have run before (warm).

    There are at least ``rounds`` rounds, then more until ``seconds`` have passed or ``most_rounds`` were run.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in range(most_rounds):
        if number >= rounds and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            synchronize(device)
            begin = time.perf_counter()
            call()
            synchronize(device)
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
