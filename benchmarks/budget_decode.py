"""What the compiler makes of the decode kernels, for GPUs that need not be present: ``budget`` of other calls.

    python -m benchmarks.budget_decode [--sample N]   compile, print a table, exit with 1 if anything is over budget
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from dataclasses import asdict
from typing import Any

from benchmarks import budget

DTYPES = ("bfloat16", "float32")
HEAD_DIMS = (32, 64, 80, 128, 256)  # 80 is held as 128, with its columns masked
# What a call brings, by name; "few" and "chunk": more queries than one.
FEATURES = {
    "plain": frozenset(),
    "paged": frozenset({"paged", "upper"}),
    "chunk": frozenset({"paged", "upper", "chunk"}),
    "everything": frozenset({"paged", "upper", "lower", "few", "softcap", "alibi", "sinks"}),
    "chunk-everything": frozenset({"paged", "upper", "lower", "chunk", "softcap", "alibi", "sinks"}),
}


def cases() -> list[budget.Case]:
    every = itertools.product(DTYPES, HEAD_DIMS, FEATURES, budget.ARCHITECTURES)
    return [budget.Case(arch, dtype, head_dim, feature) for dtype, head_dim, feature, arch in every]


def compile_case(case: budget.Case) -> list[budget.Row]:
    """Append and attention, with the keys in one part and in several."""
    return budget.compile_case(case, _call)


def _call(torch: Any, case: budget.Case) -> None:
    from fastattn.kernels.attention import decode_launch

    brings = FEATURES[case.feature]
    batch, heads, key_heads, page, pages = 2, 32, 8, 16, 128
    rows = 12 if "chunk" in brings else 5 if "few" in brings else 1
    dtype = getattr(torch, case.dtype)

    def empty(*shape: int, dtype: Any = dtype) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    table = empty(batch, pages // batch, dtype=torch.int32) if "paged" in brings else None
    shape = (batch, key_heads, 1024, case.head_dim) if table is None else (pages, key_heads, page, case.head_dim)
    query, key, value = empty(batch, heads, rows, case.head_dim), empty(*shape), empty(*shape)
    new = empty(batch, key_heads, rows, case.head_dim)
    lengths = empty(batch, dtype=torch.int32)
    slopes = empty(1, heads, dtype=torch.float32) if "alibi" in brings else None
    sinks = empty(heads) if "sinks" in brings else None
    decode_launch.append(key, value, new, new, lengths, table)
    for splits in (1, 8):
        decode_launch.attention(
            query, key, value, lengths, table, slopes, sinks, 0.125, 30.0 if "softcap" in brings else 0.0,
            255 if "lower" in brings else None, 0 if "upper" in brings else None, rows, splits,
        )  # fmt: skip


def faults(row: budget.Row) -> list[str]:
    """What breaks the budget; only the kernel that multiplies needs tensor cores."""
    found = row.faults()
    return found if row.kernel == "decode_split" else [fault for fault in found if "tensor-core" not in fault]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="only N cases, drawn at random")
    parser.add_argument("--only", nargs="*", metavar="DTYPE-DIM-FEATURE-ARCH", help="only these cases")
    options = parser.parse_args(arguments)
    selected = cases()
    if options.only:
        selected = [
            case for case in selected if f"{case.dtype}-{case.head_dim}-{case.feature}-{case.arch}" in options.only
        ]
    if options.sample:
        selected = random.sample(selected, options.sample)
    rows = [row for case in selected for row in compile_case(case)]
    for row in rows:
        print(" ".join(f"{name}={value}" for name, value in asdict(row).items()))
    broken = [f"{row.key}: {fault}" for row in rows for fault in faults(row)]
    print("\n".join(broken) or f"{len(rows)} kernels within budget")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
