"""What the compiler makes of the Triton kernels of additive attention, for GPUs that need not be present.

    python -m benchmarks.budget_additive          compile every case, print registers, spills and shared memory

The kernels are compiled by the launching code itself, on tensors without storage, for sm_80, sm_90 and sm_100.
Nothing may spill: a thread holds a few numbers of a tile, whatever the number of features.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import astuple, dataclass, fields
from typing import Any

from benchmarks.budget import ARCHITECTURES, SHARED_LIMIT, _assemble

DTYPES = ("bfloat16", "float16", "float32")
COVERAGES = ("none", "of keys", "of queries and keys")
LENGTHS = (1, 512)


@dataclass(frozen=True)
class Row:
    """One compiled kernel of a call with so many queries."""

    kernel: str
    arch: int
    dtype: str
    coverage: str
    queries: int
    warps: int
    registers: int
    spills: int
    shared: int

    def faults(self) -> list[str]:
        found = [f"{self.spills} bytes spilled"] if self.spills else []
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, the chip has {SHARED_LIMIT[self.arch]}")
        return found


def compile_kernels(arch: int, dtypes: tuple[str, ...] = DTYPES) -> list[Row]:
    """Compile the kernels of every kind of call and its gradients for one architecture.

    Triton reads TRITON_INTERPRET when it is imported: call this in a process without it.
    """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.jit import JITFunction

    from fastattn.kernels.additive import launch

    class Compiler(DriverBase):
        """A driver that knows its target and has no device."""

        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("meta")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_device(self) -> int:
            return arch  # compiled kernels are kept per device: one for each architecture

        def get_current_stream(self, device: int) -> int:
            return 0

    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if self.__name__.startswith("additive"):
            compiled.append((self.__name__ + (" of keys" if kwargs.get("OWN_KEYS") else ""), kernel))
        return kernel

    triton.runtime.driver.set_active(Compiler())
    rows = []
    assembled: dict[Any, dict[str, int]] = {}  # calls share kernels
    JITFunction.run = record
    try:
        for dtype, coverage, queries in itertools.product(dtypes, COVERAGES, LENGTHS):
            compiled.clear()
            _call(launch, torch, getattr(torch, dtype), coverage, queries)
            for number, (name, kernel) in enumerate(compiled):
                if name == "additive_scores" and number:
                    name += " of coverage"
                if kernel.hash not in assembled:
                    assembled[kernel.hash] = _assemble(arch, kernel.asm["ptx"])
                metadata, found = kernel.metadata, assembled[kernel.hash]
                rows.append(
                    Row(
                        name, arch, dtype, coverage, queries, metadata.num_warps, found["registers"], found["spills"],
                        metadata.shared,
                    )
                )  # fmt: skip
    finally:
        JITFunction.run = run
    return rows


def _call(launch: Any, torch: Any, dtype: Any, coverage: str, queries: int) -> None:
    """Scores and all gradients on tensors without storage."""
    batch, keys, features = 2, 512, 256

    def empty(*shape: int, dtype: Any = dtype) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs = [empty(batch, queries, features), empty(batch, keys, features), empty(features), None, None]
    if coverage != "none":
        inputs[3:] = empty(batch, 1 if coverage == "of keys" else queries, keys), empty(features)
    padding = empty(batch, keys, dtype=torch.bool)
    scores = launch.scores(*inputs, padding)
    launch.scores_backward(scores, *inputs, padding, True)


def main() -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    rows = [row for arch in ARCHITECTURES for row in compile_kernels(arch)]
    names = tuple(field.name for field in fields(Row))
    lines = [names, *(tuple(map(str, astuple(row))) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(names))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    faults = [f"{row}: {fault}" for row in rows for fault in row.faults()]
    print("\n".join(faults) or f"{len(rows)} kernels within budget")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
