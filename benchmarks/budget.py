"""What the compiler makes of every Triton kernel that ships, for GPUs that need not be present.

    python -m benchmarks.budget                  print the checked-in table, and the paper model of it
    python -m benchmarks.budget --write          compile everything and rewrite it (some ten minutes on two cores)
    python -m benchmarks.budget --write --only 90-bfloat16-64 100     the rows of these cases, and keep the others
    python -m benchmarks.budget --check --sample 40   compile a sample and compare with the table

The kernels are compiled by the launching code itself, on tensors without storage, for sm_80, sm_90 and sm_100: what is
measured is what a user's first call compiles. Registers, spills and shared memory are the assembler's own figures;
products (mma, wgmma, tcgen05), TMA and setmaxnreg are counted in the PTX, the inner loop in the machine code.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks import machine_code, paper_model
from benchmarks.machine_code import Loop

TABLE = Path(__file__).parent / "results" / "budget.csv"
ARCHITECTURES = (80, 90, 100)
# Shared memory one program may use: CUDA C++ Programming Guide, technical specifications per compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# What the programs of one SM share, from the same table; each takes 1 KiB of shared memory for the system.
_SM_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_SM_REGISTERS, _SM_WARPS, _SM_PROGRAMS = 65536, 64, 32
DTYPES = ("bfloat16", "float32")  # float16 has bfloat16's tiles and instructions
HEAD_DIMS = (64, 80, 256)  # one for each tile; 80 is held as 128, with its columns masked
# What a call brings, by name.
FEATURES = {
    "plain": frozenset(),
    "causal": frozenset({"upper"}),
    "window": frozenset({"upper", "lower"}),
    "padding": frozenset({"padding"}),
    "mask": frozenset({"mask"}),
    "dropout": frozenset({"upper", "dropout"}),
    "softcap": frozenset({"upper", "softcap"}),
    "alibi": frozenset({"upper", "alibi"}),
    "sinks": frozenset({"upper", "sinks"}),
    "segments": frozenset({"upper", "segments"}),
    "packed": frozenset({"packed", "upper"}),
    "packed window": frozenset({"packed", "upper", "lower"}),
    "everything": frozenset({"upper", "lower", "padding", "mask", "dropout", "softcap", "alibi", "sinks", "segments"}),
}
# By pointers what otherwise is read by tensor descriptor: batches share their keys, which no descriptor can say.
FEATURES |= {f"{name} expanded": FEATURES[name] | {"expanded"} for name in ("causal", "everything")}
_logs: dict[str, str] = {}  # of the assembler, by the kernel's hash: a kernel is compiled once in a process
_TENSOR_CORE = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}


@dataclass(frozen=True)
class Case:
    """One call whose kernels are compiled."""

    arch: int
    dtype: str
    head_dim: int
    feature: str

    @property
    def name(self) -> str:
        return f"{self.arch}-{self.dtype}-{self.head_dim}-{self.feature}"


@dataclass(frozen=True)
class Row:
    """One compiled kernel: a line of the table."""

    kernel: str
    arch: int
    dtype: str
    head_dim: int
    feature: str
    tile: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    tensor_core: int  # instructions of the architecture's own: mma.sync, wgmma, tcgen05
    mma: int  # mma.sync
    serialized: int  # wgmma pipelines the assembler gave up
    tma: int  # loads and stores by tensor descriptor
    setmaxnreg: int
    # The fields of machine_code.Loop, by their names: of half precision on sm_90, as the paper model is.
    flops: int
    exponentials: int
    fp32: int
    shared_bytes: int
    issued: int
    overlapped: int

    @property
    def occupancy(self) -> int:
        """Programs one SM holds at a time."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(
            _SM_REGISTERS // (per_warp * self.warps),
            _SM_SHARED[self.arch] // (self.shared + 1024),
            _SM_WARPS // self.warps,
            _SM_PROGRAMS,
        )

    @property
    def bound(self) -> paper_model.Bound | None:
        """What the pipes of a Hopper chip allow, of half precision; None where the model does not apply."""
        if self.arch != 90 or self.dtype == "float32" or not self.tile.split("x")[-1]:
            return None
        block_m, block_n = map(int, self.tile.split("x"))
        loop = Loop(**{field.name: getattr(self, field.name) for field in fields(Loop)})
        # Of specialised warps those of the producer, a warp group like the others, take no part in the loop.
        warps, kernel = self.warps - 4 * bool(self.setmaxnreg), self.kernel.removesuffix("_specialized")
        return paper_model.bound(kernel, self.head_dim, block_m, block_n, warps, loop, wgmma=self.tensor_core > 0)

    @property
    def case(self) -> Case:
        return Case(self.arch, self.dtype, self.head_dim, self.feature)

    @property
    def key(self) -> tuple[str, int, str, int, str]:
        return self.kernel, self.arch, self.dtype, self.head_dim, self.feature

    def faults(self) -> list[str]:
        """What breaks the budget."""
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes spilled")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, the chip has {SHARED_LIMIT[self.arch]}")
        if self.dtype != "float32" and self.kernel != "attention_delta" and self.tensor_core + self.mma == 0:
            found.append("no tensor-core instruction")
        return found


def cases() -> list[Case]:
    every = itertools.product(DTYPES, HEAD_DIMS, FEATURES, ARCHITECTURES)
    return [
        Case(arch, dtype, head_dim, feature)
        for dtype, head_dim, feature, arch in every
        if "expanded" not in FEATURES[feature] or (dtype != "float32" and arch >= 90)
    ]


def compile_case(case: Case, call: Callable[[Any, Case], None] | None = None) -> list[Row]:
    """Compile every kernel that ``call``, given torch and the case, launches; by default all of attention."""
    with recording(case.arch) as compiled:
        import torch

        (call or _call)(torch, case)
    bounds = ("key_bounds", "segment_bounds")
    once = {kernel.hash: (name, given, kernel) for name, given, kernel in compiled if name not in bounds}
    return [_row(case, name + _of(given), kernel) for name, given, kernel in once.values()]


def _of(arguments: dict[str, Any]) -> str:
    """What a gradient kernel is compiled for, where that is not all that it can compute."""

    def given(name: str) -> bool:  # a descriptor is of a tensor that there is
        return name not in arguments or getattr(arguments[name], "pointer", True) is not None

    if "dweights" in arguments and given("dweights"):
        return " of weights"
    return "" if given("dkey") and given("dvalue") else " of key" if given("dkey") else " of value"


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[tuple[str, dict[str, Any], Any]]]:
    """In the block kernels are compiled for ``arch``, not launched; the list gets name, arguments, kernel of each.

    Triton reads TRITON_INTERPRET when it is imported: use this in a process that has not imported it with that set.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.jit import JITFunction

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

    triton.runtime.driver.set_active(Compiler())
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
    compiled: list[tuple[str, dict[str, Any], Any]] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        _logs.setdefault(kernel.hash, log.getvalue())
        compiled.append((self.__name__, kwargs, kernel))
        return kernel

    JITFunction.run = record
    try:
        yield compiled
    finally:
        JITFunction.run = run


def _call(torch: Any, case: Case) -> None:
    """Attention, weights and both gradients on tensors without storage."""
    from fastattn.kernels.attention import config, launch, packed_launch

    (batch, heads, length), dtype = (2, 4, 1024), getattr(torch, case.dtype)

    def empty(*shape: int, dtype: Any = dtype) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    brings = FEATURES[case.feature]
    if "packed" in brings:
        query, key, value = (empty(batch * length, heads, case.head_dim) for _ in range(3))
        bounds = empty(batch + 1, dtype=torch.int32)
        sequences = (bounds, bounds, None, length, length, 0.125, 255 if "lower" in brings else None, 0)
        out, logsumexp = packed_launch.packed_attention(query, key, value, *sequences)
        packed_launch.packed_attention_backward(out, None, query, key, value, out, logsumexp, *sequences)
        return
    query, key, value = (empty(batch, length, heads, case.head_dim).transpose(1, 2) for _ in range(3))
    if "expanded" in brings:
        key, value = (tensor[:1].expand_as(tensor) for tensor in (key, value))
    mask = empty(1, heads, length, length) if "mask" in brings else None
    padding = empty(batch, length, dtype=torch.bool) if "padding" in brings else None
    seed = empty(1, dtype=torch.int64) if "dropout" in brings else None
    band = (-255 if "lower" in brings else None, 0 if "upper" in brings else None)
    slopes = empty(1, heads, dtype=torch.float32) if "alibi" in brings else None
    ids = empty(batch, length, dtype=torch.int32) if "segments" in brings else None
    sinks = empty(heads, dtype=torch.float32) if "sinks" in brings else None
    softcap = 30.0 if "softcap" in brings else 0.0
    problem = (mask, padding, slopes, ids, ids, seed, 0.0 if seed is None else 0.1, 0.125, softcap, 0, *band)
    gradients = ("mask" in brings, False)
    out, logsumexp = launch.attention(query, key, value, sinks, *problem)
    with config.specialized():  # where they cannot serve, the same kernels once more
        launch.attention(query, key, value, sinks, *problem)
        launch.attention_backward(out, None, query, key, value, out, logsumexp, *problem, *gradients)
    launch.attention_backward(out, None, query, key, value, out, logsumexp, *problem, *gradients)
    weights = launch.attention_weights(query, key, logsumexp, *problem, True)
    launch.attention_weights_backward(weights, query, key, logsumexp, *problem, True, *gradients)


def _row(case: Case, name: str, kernel: Any) -> Row:
    metadata = kernel.metadata
    ptx = kernel.asm["ptx"]
    loop = machine_code.read(kernel.asm["cubin"]) if case.arch == 90 and case.dtype != "float32" else Loop()
    names = kernel.src.fn.arg_names
    block = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    return Row(
        kernel=name,
        **asdict(case),
        tile=f"{block.get('BLOCK_M', '')}x{block.get('BLOCK_N', '')}",
        warps=metadata.num_warps,
        stages=block.get("STAGES", metadata.num_stages),
        shared=metadata.shared,
        tensor_core=len(re.findall(_TENSOR_CORE[case.arch], ptx)),
        mma=len(re.findall(_TENSOR_CORE[80], ptx)),
        tma=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        setmaxnreg=len(re.findall("setmaxnreg", ptx)),
        **asdict(loop),
        **assembled(kernel),
    )


def assembled(kernel: Any) -> dict[str, int]:
    """What the assembler said of a recorded kernel: registers, bytes spilled, wgmma serialised or not."""
    log = _logs[kernel.hash]
    numbers = {"registers": r"Used (\d+) registers", "spills": r"(\d+) bytes spill stores"}
    found = {name: max(map(int, re.findall(pattern, log))) for name, pattern in numbers.items()}
    return {**found, "serialized": len(re.findall("serialized", log))}


def read_table() -> list[Row]:
    types = {field.name: (int if field.type == "int" else str) for field in fields(Row)}
    with TABLE.open() as file:
        return [Row(**{name: types[name](text) for name, text in line.items()}) for line in csv.DictReader(file)]


def write_table(rows: list[Row]) -> None:
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted(rows, key=lambda row: row.key))


def print_table(rows: list[Row]) -> None:
    names = [field.name for field in fields(Row)] + ["occupancy"]
    _print_aligned([names] + [[str(getattr(row, name)) for name in names] for row in rows])
    print(f"{len(rows)} kernels, {sum(bool(row.faults()) for row in rows)} over budget")


def print_model(rows: list[Row]) -> None:
    """The paper model of every kernel that has one: clocks of a pass by pipe, TFLOP/s by how much overlaps."""
    lines = []
    for row in rows:
        bound = row.bound
        if bound is not None:
            clocks = {pipe: f"{clock:.0f}" for pipe, clock in bound.clocks.items()}
            lines.append(
                {"kernel": row.kernel, "head_dim": str(row.head_dim), "feature": row.feature, "tile": row.tile}
                | {"warps": str(row.warps), "programs": str(row.occupancy), **clocks}
                | {"redundant": f"{bound.redundant:.2f}", "overlapped": str(row.overlapped)}
                | {"no overlap": f"{bound.no_overlap:.0f}", "as compiled": f"{bound.as_compiled:.0f}"}
                | {"overlap": f"{bound.overlap:.0f}"}
            )
    if lines:
        print(f"\nOn paper: TFLOP/s of an H200 at {paper_model.CLOCK / 1e9} GHz in bfloat16, clocks of a pass by pipe")
        _print_aligned([list(lines[0])] + [list(line.values()) for line in lines])


def _print_aligned(lines: list[list[str]]) -> None:
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def compile_all(selected: list[Case], workers: int) -> Iterator[list[Row]]:
    from tqdm import tqdm

    with ProcessPoolExecutor(workers) as pool:
        yield from tqdm(pool.map(compile_case, selected), total=len(selected), disable=None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="compile every case and rewrite the table")
    parser.add_argument("--check", action="store_true", help="compile and compare with the table")
    parser.add_argument("--only", nargs="+", metavar="ARCH-DTYPE-DIM-FEATURE", help="only cases that start so")
    parser.add_argument("--sample", type=int, metavar="N", help="only N cases, drawn at random")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    if not options.write and not options.check:
        print_table(read_table())
        print_model(read_table())
        return 0
    selected = cases()
    if options.only:
        selected = [case for case in selected if case.name.startswith(tuple(options.only))]
    if options.sample:
        selected = random.sample(selected, options.sample)
    rows: list[Row] = []
    kept = [row for row in read_table() if row.case in set(cases())] if options.write else []
    for found in compile_all(selected, options.workers):
        rows += found
        if options.write:  # as it goes: minutes of compiling may be cut off
            kept = [row for row in kept if row.case != found[0].case]
            write_table(kept + rows)
    faults = [f"{row.key}: {fault}" for row in rows for fault in row.faults()]
    if options.check:
        known = {row.key: row for row in read_table()}
        faults += [
            f"{row.key}: {row.spills} spilled, {row.shared} shared; the table says {known.get(row.key)}"
            for row in rows
            if row.key not in known or (row.shared, row.spills) != (known[row.key].shared, known[row.key].spills)
        ]
    print_table([row for row in rows if row.faults()] or rows[:20])
    print("\n".join(faults) or f"{len(rows)} kernels within budget")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
