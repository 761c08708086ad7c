"""What the compiler makes of the Triton kernels of additive attention, for GPUs that need not be present.

    python -m benchmarks.budget_additive          compile every case, print registers, spills and shared memory

The kernels are compiled by the launching code itself, on tensors without storage, for sm_80, sm_90 and sm_100.
Nothing may spill: a thread holds a few numbers of a tile, whatever the number of features.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import astuple, dataclass, fields
from typing import Any

from benchmarks.budget import ARCHITECTURES, SHARED_LIMIT, assembled, recording

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

    For a process of its own: see ``recording``.
    """
    rows = []
    with recording(arch) as compiled:
        import torch

        for dtype, coverage, queries in itertools.product(dtypes, COVERAGES, LENGTHS):
            compiled.clear()
            _call(torch, getattr(torch, dtype), coverage, queries)
            kernels = [(name, arguments, kernel) for name, arguments, kernel in compiled if name.startswith("additive")]
            for number, (name, arguments, kernel) in enumerate(kernels):
                if arguments.get("OWN_KEYS"):
                    name += " of keys"
                if name == "additive_scores" and number:
                    name += " of coverage"
                metadata, found = kernel.metadata, assembled(kernel)
                rows.append(
                    Row(
                        name, arch, dtype, coverage, queries, metadata.num_warps, found["registers"], found["spills"],
                        metadata.shared,
                    )
                )  # fmt: skip
    return rows


def _call(torch: Any, dtype: Any, coverage: str, queries: int) -> None:
    """Scores and all gradients on tensors without storage."""
    from fastattn.kernels.additive import launch

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
