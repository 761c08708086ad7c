"""What nvcc makes of the CUDA kernels of ``csrc/cuda``, for GPUs that need not be present.

    python -m benchmarks.cuda_budget             compile all of them for sm_80, sm_90, sm_100 and print the table
    python -m benchmarks.cuda_budget --arch 90   for one architecture

Fails where a kernel spills. Only the kernels are compiled: they include no header of torch, whose build may lack CUDA.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ARCHITECTURES = (80, 90, 100)
_KERNEL = re.compile(
    r"entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\d+)'.*?(?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Row:
    """One kernel for one architecture; ``spills`` in bytes, stores and loads."""

    kernel: str
    arch: int
    registers: int
    spills: int


def nvcc() -> str | None:
    """Where nvcc is, or None."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def compile_kernels(architectures: Sequence[int] = ARCHITECTURES) -> list[Row]:
    """Compile every kernel for each architecture; raises RuntimeError with the compiler's words where one fails."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("no nvcc on PATH or under /usr/local/cuda")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*.cu")):
            command = [compiler, "-c", "-O3", "-std=c++20", "-Werror", "all-warnings", "-Xptxas", "-v", *targets]
            result = subprocess.run(
                [*command, str(source), "-o", f"{folder}/{source.stem}.o"], capture_output=True, text=True, check=False
            )
            if result.returncode != 0:
                raise RuntimeError(f"{source.name}: {result.stderr}")
            rows += [_row(source.stem, match) for match in _KERNEL.finditer(result.stderr)]
    return sorted(rows, key=lambda row: (row.arch, row.kernel))


def _row(stem: str, match: re.Match[str]) -> Row:
    # _ZN...14forward_kernelIfLb1ELi8EEEv...: template arguments are the type, if any, then booleans and integers.
    found = re.search(
        r"\d+(?P<name>[a-z]\w*?_kernel)(?P<arguments>I(?P<type>f|\d+\w+?)?(?:L[bi]\d+E)*E)?", match["symbol"]
    )
    assert found is not None, match["symbol"]
    dtypes = {"f": "float", "13__nv_bfloat16": "bfloat16", "6__half": "half"}
    arguments = [dtypes[found["type"]]] if found["type"] else []
    arguments += re.findall(r"L[bi](\d+)E", found["arguments"] or "")
    name = re.sub(r"^.*\d", "", found["name"])
    detail = f"<{', '.join(arguments)}>" if arguments else ""
    spills = int(match["stores"]) + int(match["loads"])
    return Row(f"{stem}: {name}{detail}", int(match["arch"]), int(match["registers"]), spills)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append", help="only this one; repeatable")
    architectures = parser.parse_args(arguments).arch or ARCHITECTURES
    rows = compile_kernels(architectures)
    of = {(row.kernel, row.arch): row for row in rows}
    print(f"{'registers, bytes spilled':64}" + "".join(f"{f'sm_{arch}':>10}" for arch in architectures))
    for kernel in sorted({row.kernel for row in rows}):
        figures = "".join(f"{of[kernel, a].registers:>6},{of[kernel, a].spills:>3}" for a in architectures)
        print(f"{kernel:64}{figures}")
    spilling = sum(row.spills > 0 for row in rows)
    print(f"{len(rows)} kernels, {spilling} spill")
    return int(spilling > 0)


if __name__ == "__main__":
    sys.exit(main())
