"""Tables for people, in plain text that is Markdown too."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.profiling.sequence import OURS, TORCH, Point


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up as they stand."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = [_line(header, widths), _line(["-" * width for width in widths], widths)]
    return "\n".join(lines + [_line(row, widths) for row in rows])


def profile_table(points: Sequence[Point]) -> str:
    """One line per length, torch's figure and ours beside one another."""
    by_key = {(point.length, point.implementation): point for point in points}
    rows = []
    for length in sorted({point.length for point in points}):
        theirs, ours = by_key[length, TORCH], by_key[length, OURS]
        rows.append(
            [
                str(length),
                _ratio(theirs.forward_seconds * 1e3, ours.forward_seconds * 1e3),
                _ratio(theirs.training_seconds * 1e3, ours.training_seconds * 1e3),
                _change(theirs.forward_bytes / 1e6, ours.forward_bytes / 1e6),
                _change(theirs.training_bytes / 1e6, ours.training_bytes / 1e6),
            ]
        )
    header = ["length", "forward, ms", "forward + backward, ms", "forward, peak MB", "forward + backward, peak MB"]
    return render(header, rows)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def _ratio(theirs: float, ours: float) -> str:
    return f"{_change(theirs, ours)} ({theirs / ours:.2f}x)"


def _change(theirs: float, ours: float) -> str:
    return f"{theirs:.4g} → {ours:.4g}"
