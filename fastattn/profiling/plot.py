"""The pictures of the profiles: the demonstration's, and that of any model over the sequence length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastattn.profiling.sequence import OURS, TORCH, Point
from fastattn.profiling.sweep_table import OUT_OF_MEMORY, Measurement, human_length

_PANELS = (
    ("forward_seconds", "forward, ms", 1e3),
    ("training_seconds", "forward + backward, ms", 1e3),
    ("forward_bytes", "forward, peak memory, MB", 1e-6),
    ("training_bytes", "forward + backward, peak memory, MB", 1e-6),
)
_STYLES = {TORCH: {"color": "0.45", "marker": "s"}, OURS: {"color": "tab:blue", "marker": "o"}}
_SMALLEST_SHOWN = 1e-3  # a peak below the resolution of the measurement would be lost on a logarithmic axis


def write_plot(points: Sequence[Point], path: Path, title: str) -> None:
    """Time and peak memory over the length, both axes logarithmic, as a PNG at ``path``."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for axis, (field, label, factor) in zip(axes.flat, _PANELS, strict=True):
        for name, style in _STYLES.items():
            mine = [point for point in points if point.implementation == name]
            heights = [max(getattr(point, field) * factor, _SMALLEST_SHOWN) for point in mine]
            axis.plot([point.length for point in mine], heights, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="sequence length", title=label)
        axis.set_xticks(sorted({point.length for point in points}))
        axis.get_xaxis().set_major_formatter(lambda tick, _: f"{tick:.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_sweep_plot(rows: Sequence[Measurement], path: Path, title: str) -> None:
    """Time, TFLOP/s or tokens/s, and peak memory over the length, as a PNG at ``path``.

    Where an implementation ran out of memory, a cross stands at what it would need.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), constrained_layout=True)
    counted = all(row.flops is not None for row in rows)
    for name in dict.fromkeys(row.implementation for row in rows):
        ran = [row for row in rows if row.implementation == name and row.seconds is not None]
        lengths = [row.length for row in ran]
        times = [row.seconds or 0.0 for row in ran]
        work = [(row.flops or 0.0) / 1e12 if counted else row.tokens for row in ran]
        (line,) = axes[0].plot(lengths, [time * 1e3 for time in times], marker="o", label=name)
        color = line.get_color()
        rates = [amount / time for amount, time in zip(work, times, strict=True)]
        axes[1].plot(lengths, rates, marker="o", color=color)
        peaks = [max((row.peak_bytes or 0) / 2**20, _SMALLEST_SHOWN) for row in ran]
        axes[2].plot(lengths, peaks, marker="o", color=color)
        full = [row for row in rows if row.implementation == name and row.error == OUT_OF_MEMORY and row.needed_bytes]
        needed = [(row.needed_bytes or 0.0) / 2**20 for row in full]
        axes[2].scatter(
            [row.length for row in full], needed, marker="x", color=color, label=f"{name}: would need" if full else None
        )
    for axis, label in zip(axes, ("ms", "TFLOP/s" if counted else "tokens/s", "peak memory, MiB"), strict=True):
        axis.set(xscale="log", xlabel="sequence length", title=label)
        axis.set_xticks(sorted({row.length for row in rows}))
        axis.get_xaxis().set_major_formatter(lambda tick, _: human_length(round(tick)))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in (axes[0], axes[2]):
        axis.set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[0].legend()
    if axes[2].get_legend_handles_labels()[0]:
        axes[2].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib's pyplot, set to draw files alone."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt
