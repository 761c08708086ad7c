"""What one pass through a kernel's innermost loop asks of each pipe of the chip, read from its machine code (SASS).

The loop is the one with the most tensor-core work, and among several of the same work the shortest: the one for whole
tiles. Everything is counted for one warp; a wgmma is the work of four.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<operands>[^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"\((\.L_x_\d+)\)")
_LANES = 32
_WARPS_OF_WGMMA = 4


@dataclass(frozen=True)
class Loop:
    """One pass, for one warp."""

    flops: int = 0  # of the tensor cores
    exponentials: int = 0  # MUFU instructions, all of them
    fp32: int = 0  # FADD, FMUL, FFMA instructions
    shared_bytes: int = 0  # bytes read from and written to shared memory, operands of wgmma included
    issued: int = 0  # instructions
    overlapped: int = 0  # exponentials between the issue of a wgmma and the wait for it


def read(cubin: bytes) -> Loop:
    """The counts of a compiled kernel, by the disassembler of the Triton wheel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", binary]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(sass: str) -> Loop:
    """The counts of disassembled code."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found["name"], found["operands"]))
    bodies = []
    for place, (name, operands) in enumerate(instructions):
        target = _TARGET.search(operands) if name == "BRA" else None
        if target and labels.get(target[1], place) < place:
            bodies.append((labels[target[1]], place))
    innermost = [
        (begin, end) for begin, end in bodies if not any(begin <= other < end for _, other in bodies)
    ]
    loops = [_count(instructions[begin : end + 1]) for begin, end in innermost]
    return max(loops, key=lambda loop: (loop.flops, -loop.issued), default=Loop())


def _count(body: list[tuple[str, str]]) -> Loop:
    return Loop(
        flops=sum(_flops(name) for name, _ in body),
        exponentials=sum(name.startswith("MUFU") for name, _ in body),
        fp32=sum(name.split(".")[0] in ("FADD", "FMUL", "FFMA") for name, _ in body),
        shared_bytes=sum(_shared_bytes(name, operands) for name, operands in body),
        issued=len(body),
        overlapped=_overlapped(body),
    )


def _shape(name: str) -> tuple[int, int, int] | None:
    """Rows, columns and depth of a tensor-core instruction: HGMMA.64x128x16..., HMMA.16816..."""
    if found := re.match(r"HGMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)", name):
        return int(found[1]), int(found[2]), int(found[3])
    if found := re.match(r"HMMA\.(16)(8)(8|16)", name):
        return int(found[1]), int(found[2]), int(found[3])
    return None


def _flops(name: str) -> int:
    shape = _shape(name)
    if shape is None:
        return 0
    rows, columns, depth = shape
    return 2 * rows * columns * depth // (_WARPS_OF_WGMMA if name.startswith("HGMMA") else 1)


def _shared_bytes(name: str, operands: str) -> int:
    """Bytes of one warp. A wgmma reads its second operand from shared memory, and the first unless it is a register."""
    if name.startswith("HGMMA"):
        rows, columns, depth = _shape(name) or (0, 0, 0)
        first = operands.split(",")[1].strip()
        numbers = columns * depth + (rows * depth if first.startswith("gdesc") else 0)
        return 2 * numbers // _WARPS_OF_WGMMA
    kind, *modifiers = name.split(".")
    if kind in ("LDS", "STS", "LDGSTS"):
        width = next((int(modifier) for modifier in modifiers if modifier in ("64", "128")), 32)
        return _LANES * width // 8
    if kind in ("LDSM", "STSM"):  # matrices of 8 x 8 numbers of 16 bits
        return 128 * next((int(modifier) for modifier in modifiers if modifier in ("2", "4")), 1)
    return 0


def _overlapped(body: list[tuple[str, str]]) -> int:
    """Exponentials while a wgmma runs; it may have been issued in the pass before."""
    running, found = False, 0
    for place, (name, operands) in enumerate(itertools.chain(body, body)):
        if name.startswith("HGMMA"):
            running = True
        elif name.startswith("WARPGROUP.DEPBAR") and operands.rstrip().endswith("0x0"):
            running = False
        elif name.startswith("MUFU.EX2") and running and place >= len(body):
            found += 1
    return found
