"""The files of a measurement: results.json, profile.csv, and profile.png where matplotlib is."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastattn.profiling.plot import write_plot
from fastattn.profiling.sequence import Point, write_csv

RESULTS, TABLE, PICTURE = "results.json", "profile.csv", "profile.png"


def write(
    out: Path, environment: dict[str, Any], points: Sequence[Point], embedding: Sequence[dict[str, Any]] = ()
) -> list[Path]:
    """Write the files to the folder ``out`` and return their paths.

    ``embedding`` holds the records of the demonstration's comparisons.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "environment": environment,
        "embedding": list(embedding),
        "sequence": [asdict(point) for point in points],
    }
    (out / RESULTS).write_text(json.dumps(record, indent=1) + "\n")
    write_csv(points, out / TABLE)
    written = [out / RESULTS, out / TABLE]
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return written
    write_plot(points, out / PICTURE, f"mha(x, x, x) on {environment['device']}")
    return [*written, out / PICTURE]
