"""The picture of the long-sequence profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastattn.profiling.sequence import OURS, TORCH, Point

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
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

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
