"""The speed each pipe of a Hopper chip allows a kernel, from what its inner loop asks of them: paper, no measurement.

A pass of the loop takes a pipe (work of all warps) / (work per clock of one SM) clocks. With perfect overlap the
slowest pipe sets the pace; without any, the tensor cores and the slowest of the others take turns. Code as compiled
stands between: it hides the share of its exponentials that lie between a wgmma and the wait for it. Latencies,
barriers, the memory of the chip and the ends of loops come on top.

Rates per clock and SM: "CUDA C++ Programming Guide", throughput of arithmetic instructions, for compute capability
9.0; tensor cores from the data sheet of the H100/H200 SXM (989 TFLOP/s dense bfloat16 over 132 SMs at 1.83 GHz).
mma.sync reaches 63 % of wgmma's rate on them (Luo et al. 2024, "Benchmarking and dissecting the Nvidia Hopper GPU
architecture").
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.machine_code import Loop

SMS = 132
CLOCK = 1.755e9  # of an H200 at full load; 1.98e9 at most
_TENSOR = 4096
_TENSOR_MMA_SYNC = 0.63 * _TENSOR
_EXPONENTIALS = 16
_FP32 = 128
_SHARED = 128
_ISSUED = 4  # warps
# Multiplications and additions for each (query, key, feature): two for each product the algorithm needs.
_PRODUCTS = {
    "attention_forward": 2, "attention_dquery": 3, "attention_dkey_dvalue": 4, "attention_dkey_dvalue of key": 3,
    "attention_dkey_dvalue of value": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """Clocks of one pass of the loop, and TFLOP/s of useful work without overlap, with that of the code, with all."""

    clocks: dict[str, float]
    redundant: float  # work of the tensor cores over what the algorithm needs
    no_overlap: float
    as_compiled: float
    overlap: float


def bound(
    kernel: str, head_dim: int, block_m: int, block_n: int, warps: int, loop: Loop, *, wgmma: bool
) -> Bound | None:
    """The bound of a kernel in half precision, or None of one that has no model."""
    if kernel not in _PRODUCTS or not loop.flops:
        return None
    useful = 2 * _PRODUCTS[kernel] * block_m * block_n * head_dim
    clocks = {
        "tensor": warps * loop.flops / (_TENSOR if wgmma else _TENSOR_MMA_SYNC),
        "exponentials": warps * 32 * loop.exponentials / _EXPONENTIALS,
        "fp32": warps * 32 * loop.fp32 / _FP32,
        "shared": warps * loop.shared_bytes / _SHARED,
        "issue": warps * loop.issued / _ISSUED,
    }
    slowest = max(clock for pipe, clock in clocks.items() if pipe != "tensor")
    rate = useful * SMS * CLOCK / 1e12
    apart, together = clocks["tensor"] + slowest, max(clocks["tensor"], slowest)
    hidden = loop.overlapped / max(loop.exponentials, 1)
    return Bound(
        clocks=clocks,
        redundant=warps * loop.flops / useful,
        no_overlap=rate / apart,
        as_compiled=rate / (hidden * together + (1.0 - hidden) * apart),
        overlap=rate / together,
    )
