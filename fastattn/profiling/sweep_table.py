"""One row of a profile over the sequence length, the table of them, and what they say in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastattn.profiling.table import render

OUT_OF_MEMORY = "out of memory"
HEADER = (
    "length", "implementation", "ms", "TFLOP/s", "tokens/s", "peak memory", "difference",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One implementation at one length; where it did not run, ``error`` says why and there is no time.

    Attributes:
        length, tokens: of a sequence, and all those of the batch.
        implementation: its name.
        seconds: median of one call.
        peak_bytes: beyond the parameters and the batch.
        flops: floating-point operations of one call, where they are known.
        difference: from the first implementation's output, the largest, as a share of its largest entry.
        error: "out of memory", or the message of what the model raised.
        needed_bytes: prediction of the peak where it did not fit, if there was something to predict from.
    """

    length: int
    implementation: str
    tokens: int
    seconds: float | None = None
    peak_bytes: int | None = None
    flops: float | None = None
    difference: float | None = None
    error: str | None = None
    needed_bytes: float | None = None


def cells(row: Measurement) -> list[str]:
    """The cells of one row, as HEADER names them."""
    if row.seconds is None:
        needed = "" if row.needed_bytes is None else f"needs about {human_bytes(row.needed_bytes)}"
        return [human_length(row.length), row.implementation, row.error or "", "", "", needed, ""]
    return [
        human_length(row.length),
        row.implementation,
        f"{row.seconds * 1e3:.4g}",
        "" if row.flops is None else f"{row.flops / row.seconds / 1e12:.3g}",
        f"{row.tokens / row.seconds:.4g}" if row.tokens / row.seconds < 1e4 else f"{row.tokens / row.seconds:.0f}",
        "" if row.peak_bytes is None else human_bytes(row.peak_bytes),
        "" if row.difference is None else f"{row.difference:.1e}",
    ]


def ordered(rows: Sequence[Measurement]) -> list[Measurement]:
    """By length, within one as they came."""
    return sorted(rows, key=lambda row: row.length)


def table(rows: Sequence[Measurement]) -> str:
    """One line per length and implementation."""
    return render(HEADER, [cells(row) for row in ordered(rows)])


def summary(rows: Sequence[Measurement]) -> list[str]:
    """For each implementation the longest length that ran and the first out of memory; then times held together."""
    lines = []
    for name in dict.fromkeys(row.implementation for row in rows):
        mine = [row for row in rows if row.implementation == name]
        ran = [row.length for row in mine if row.seconds is not None]
        full = [row.length for row in mine if row.error == OUT_OF_MEMORY]
        parts = [f"runs up to {human_length(max(ran))}"] if ran else []
        parts += [f"{OUT_OF_MEMORY} at {human_length(min(full))}"] if full else []
        lines.append(f"{name}: {', '.join(parts) or 'did not run'}")
    return lines + _ratios(rows)


def _ratios(rows: Sequence[Measurement]) -> list[str]:
    """Against the last implementation, at the longest length that both ran."""
    names = list(dict.fromkeys(row.implementation for row in rows))
    timed = {(row.implementation, row.length): row for row in rows if row.seconds is not None}
    lines = []
    for other in names[:-1]:
        shared = [length for name, length in timed if name == other and (names[-1], length) in timed]
        if not shared:
            continue
        theirs, ours = timed[other, max(shared)], timed[names[-1], max(shared)]
        assert theirs.seconds is not None
        assert ours.seconds is not None
        line = f"at {human_length(max(shared))} {other} takes {theirs.seconds / ours.seconds:.2f}x the time"
        if theirs.peak_bytes and ours.peak_bytes:
            line += f" and {theirs.peak_bytes / ours.peak_bytes:.2f}x the memory"
        lines.append(f"{line} of {names[-1]}")
    return lines


def human_length(length: int) -> str:
    """32768 as 32k; what is no multiple of 1024 stays."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def human_bytes(count: float) -> str:
    """Binary units, three digits."""
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1024:.3g} GiB" if count / 1024 < 1000 else f"{count / 1024:.0f} GiB"
