"""What a call costs beside its kernel: small eager calls without gradients against the kernel's bare launch.

    pytest benchmarks/test_overhead.py --benchmark-only [--record FILE] [--seconds-left N]

The bare launch has its arguments at hand and checks nothing; on a GPU it writes to an output that is there. The kernels
are so small that the calls are the time. Of the Triton kernels without a GPU: benchmarks/host_time.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import OURS, Call, attention_flops, compare
from torch import Tensor

import fastattn
from fastattn.kernels.attention import extension, launch, shapes
from fastattn.profiling.environment import default_device

DEVICE = default_device()
CUDA = DEVICE.type == "cuda"
BATCH, HEADS, LENGTH, DIM = 1, 2, 16, 16
CALLS = 200  # of one measurement


@pytest.mark.parametrize("dtype", (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16), ids=str)
def test_overhead(benchmark: Any, keep: Any, dtype: torch.dtype) -> None:
    tensors = [torch.randn(BATCH, HEADS, LENGTH, DIM, device=DEVICE, dtype=dtype) for _ in range(3)]
    calls: dict[str, Call] = {
        OURS: _many(lambda: fastattn.scaled_dot_product_attention(*tensors), "triton" if CUDA else "cpu"),
        "bare launch": _many(_bare(*tensors)),
        "SDPA": _many(lambda: torch.nn.functional.scaled_dot_product_attention(*tensors)),
    }
    flops = CALLS * attention_flops(BATCH, HEADS, LENGTH, LENGTH, DIM, causal=False, training=False)
    row = compare(benchmark, calls, DEVICE, flops=flops)
    ours, bare = (row["figures"][name]["seconds"] / CALLS for name in (OURS, "bare launch"))
    more = {"dtype": str(dtype), "training": False, "calls": CALLS, "overhead_us": (ours - bare) * 1e6}
    keep(more | row, DEVICE)


def _many(call: Callable[[], Tensor], backend: str = "auto") -> Call:
    @torch.no_grad()
    def calls() -> list[Tensor]:
        with fastattn.backend(backend):
            for _ in range(CALLS - 1):
                call()
            return [call()]

    return calls


def _bare(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    arguments = (*(None,) * 6, 0.0, DIM**-0.5, 0.0, 0, None, None)
    if not CUDA:
        return lambda: extension.attention(query, key, value, None, *arguments)[0]
    out, logsumexp = shapes.empty_output(query, value), shapes.empty_logsumexp(query)
    problem = launch.Problem(query, key, *arguments)
    start, given = launch.forward_launch(problem, query, key, value, None, out, logsumexp)

    def bare() -> Tensor:
        start(**given)
        return out

    return bare
