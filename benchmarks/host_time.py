"""The host's time for a plain call that the Triton kernels serve, the kernel replaced by nothing; needs no GPU.

    python benchmarks/host_time.py

A call of a known kind goes the shortest way (fastattn/plain_call.py); the long way checks every argument, chooses
among the backends, goes through torch's dispatcher and works out the launch. Medians of rounds in turns; the output and
the logsumexp are allocated in both. A GPU adds the switch of devices and, in both, the launch itself.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

import fastattn
from fastattn.kernels.attention import config, launch
from fastattn.profiling.environment import default_device, device_name
from fastattn.profiling.table import render

_CALLS, _ROUNDS = 1000, 15
# By name, the architecture, and whether the forward kernel is the one of specialised warps.
_HOW = {
    "sm_80, pointers": (80, False), "sm_90, descriptors": (90, False), "sm_90, specialised warps": (90, True),
}  # fmt: skip


class _Nothing:
    """A kernel that does nothing."""

    def __getitem__(self, _: Any) -> Callable[..., None]:
        return lambda **_: None


def _always(answer: Any, _: Any) -> Any:
    """Costs less than a mock that counts its calls."""
    return answer


@contextlib.contextmanager
def _without_the_kernel(arch: int, specialized: bool) -> Iterator[None]:
    with (
        mock.patch.object(launch.forward, "attention_forward", _Nothing()),
        mock.patch.object(launch.specialized_launch.forward, "attention_forward_specialized", _Nothing()),
        config.specialized() if specialized else contextlib.nullcontext(),
        mock.patch.object(launch, "why_unavailable", partial(_always, None)),
        mock.patch.object(launch, "architecture", partial(_always, arch)),
        torch.no_grad(),
        fastattn.backend("triton"),
    ):
        yield


def _microseconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - begin) / _CALLS * 1e6


def main() -> None:
    query, key, value = (torch.randn(2, 8, 64, 64, dtype=torch.bfloat16) for _ in range(3))
    call = partial(fastattn.scaled_dot_product_attention, query, key, value, is_causal=True)
    ways = {"shortest": call, "long": partial(call, deterministic=False)}  # a keyword that changes no number
    lines = []
    for how, (arch, specialized) in _HOW.items():
        with _without_the_kernel(arch, specialized):
            rounds = [{name: _microseconds(way) for name, way in ways.items()} for _ in range(_ROUNDS)]
        lines += [[how, name, f"{statistics.median(one[name] for one in rounds):.1f}"] for name in ways]
    print(f"{device_name(default_device())}, torch {torch.__version__}")
    print(render(["launch", "way", "us"], lines))


if __name__ == "__main__":
    main()
