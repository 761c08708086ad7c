"""Interleaved measurements and their record; as a script, the table of a record.

    python benchmarks/measure.py benchmarks/results/<device>.json

Times are medians with quartiles of rounds in which every implementation runs once, so that a drift of the machine
meets them all. Memory is the peak beyond what was held before the call, its result included.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.profiling.environment import default_device, describe, device_name
from fastattn.profiling.memory import peak_memory
from fastattn.profiling.table import render
from fastattn.profiling.timing import synchronize

RESULTS = Path(__file__).parent / "results"
OURS = "fastattn"
LEAST_ROUNDS, MOST_ROUNDS = 3, 50
# So many rounds where they take 10 seconds at most: a training that met its memory for the first time spent 331 ms in
# the system, the next ones 24 to 48, and of three samples one such is too many.
ENOUGH_ROUNDS, ENOUGH_SECONDS = 7, 10.0
# A sample on a GPU is at least this long, so that reading the clock and waiting do not count.
_GPU_SAMPLE_SECONDS = 0.002

Call = Callable[[], Sequence[Tensor]]


def attention_flops(
    batch: int, heads: int, rows: int, columns: float, dim: int, *, causal: bool, training: bool
) -> float:
    """FlashAttention's convention: forward 4 B H L S D, half of it when causal, backward 2.5 times the forward."""
    return 4.0 * batch * heads * rows * columns * dim * (0.5 if causal else 1.0) * (3.5 if training else 1.0)


def projection_flops(tokens: int, features: int, *, training: bool) -> float:
    """The four products of multi-head self-attention, each 2 L E E, and twice that in the backward."""
    return 8.0 * tokens * features * features * (3.0 if training else 1.0)


def assert_same(what: str, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Raise AssertionError where a result is further from the other one than roundings of its dtype explain."""
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        allowed = 2.0 * torch.finfo(ours.dtype).eps ** 0.75 * float(theirs.abs().max())
        difference = float((ours.to(theirs.dtype) - theirs).abs().max())
        if not difference <= allowed:
            raise AssertionError(f"{what}, result {number}: differs by {difference:.2e}, allowed {allowed:.2e}")


def compare(
    benchmark: Any, calls: Mapping[str, Call], device: torch.device, *, flops: float, seconds: float = 0.7,
    exact: Call | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Check that all calls agree, then measure them in turns; pytest-benchmark times ``calls[OURS]``.

    A peer that raises, but for a wrong answer, is left out, and its reason kept. With ``exact``, a call in a wider
    dtype, each is held against that instead of against one another; a peer that differs is measured all the same, and
    the difference kept under "wrong". Returns what is put into ``extra_info``: for each implementation the seconds
    (median, quartiles), TFLOP/s, peak bytes, and how many times the median of ours it takes.
    """
    calls, refused, wrong = dict(calls), {}, {}
    expected = None if exact is None else [result.detach() for result in exact()]
    for name in [name for name in calls if name != OURS] + [OURS]:
        try:
            results = [result.detach() for result in calls[name]()]
        except Exception as error:
            if name == OURS:
                raise
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del calls[name]
            continue
        if expected is None:
            expected = results
        try:
            assert_same(name, results, expected)
        except AssertionError as error:
            if exact is None or name.startswith(OURS):
                raise
            wrong[name] = str(error)
        del results
    del expected
    memory, once = {}, {}
    for name, call in calls.items():
        begin = time.perf_counter()
        memory[name] = peak_memory(call, device)
        once[name] = time.perf_counter() - begin
    for name, call in calls.items():  # watching the memory slows a call down: several times, if it is short
        if once[name] < seconds:
            once[name] = _seconds(call, 1, device)
    repeats = {name: _repeats(second, device) for name, second in once.items()}
    round_seconds = sum(once[name] * repeats[name] for name in calls)
    taken: dict[str, list[float]] = {name: [] for name in calls}

    def sample(name: str) -> None:
        taken[name].append(_seconds(calls[name], repeats[name], device))

    def peers() -> None:
        for name in calls:
            if name != OURS:
                sample(name)

    least = min(max(int(ENOUGH_SECONDS / round_seconds), LEAST_ROUNDS), ENOUGH_ROUNDS)
    rounds = min(max(int(seconds / round_seconds), least), MOST_ROUNDS)
    benchmark.pedantic(sample, args=(OURS,), setup=peers, rounds=rounds, iterations=1)
    figures = {}
    ours = statistics.median(taken[OURS])
    for name, times in taken.items():
        low, median, high = _quartiles(times)
        figures[name] = {
            "seconds": median, "low": low, "high": high, "rounds": len(times), "repeats": repeats[name],
            "tflops": flops / median / 1e12, "peak_bytes": memory[name], "ratio": median / ours,
        }  # fmt: skip
    return {"flops": flops, "figures": figures, "refused": refused, "wrong": wrong}


def _repeats(seconds: float, device: torch.device) -> int:
    return max(1, int(_GPU_SAMPLE_SECONDS / seconds)) if device.type == "cuda" else 1


def _seconds(call: Call, repeats: int, device: torch.device) -> float:
    """Seconds of one call, the mean of ``repeats`` in a row."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def _quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, median, high


# The record ----------------------------------------------------------------------------------------------------


def result_file() -> Path:
    """Where the record of this machine is kept."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(default_device()).lower()).strip("-")
    return RESULTS / f"{slug}.json"


def record(path: Path, name: str, row: dict[str, Any], device: torch.device) -> None:
    """Put one row into a record, at once and in one step: a run may be stopped at any time and loses nothing."""
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows[name] = row | describe(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(path)


def table(rows: Mapping[str, dict[str, Any]]) -> str:
    """One line per row and implementation."""
    lines = []
    for name, row in rows.items():
        for who, figure in row["figures"].items():
            spread = (figure["high"] - figure["low"]) / figure["seconds"] / 2
            lines.append(
                [
                    name if who == next(iter(row["figures"])) else "",
                    who,
                    f"{figure['seconds'] * 1e3:.3f} ± {spread:.0%}",
                    f"{figure['tflops']:.3g}",
                    f"{figure['peak_bytes'] / 1e6:.1f}",
                    f"{figure['ratio']:.2f}",
                ]
            )
        lines += [["", who, "refused", reason[:40], "", ""] for who, reason in row["refused"].items()]
        lines += [["", who, "wrong", reason[len(who) + 2 :], "", ""] for who, reason in row.get("wrong", {}).items()]
    return render(["row", "implementation", "ms", "TFLOP/s", "peak MB", "time / ours"], lines)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(table(json.loads(Path(argument).read_text())))
