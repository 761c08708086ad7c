"""The README's table of the LSTM, from a record of benchmarks/test_lstm.py."""

from __future__ import annotations

import re
import statistics
from typing import Any

from fastattn.profiling.benchmark_report import OURS, Rows
from fastattn.profiling.table import render

_NAME = re.compile(
    r"test_(?P<test>layers|cell|layer_norm)\[\((?P<shape>[\d, ]+)\)-(?P<mode>inference|training)(-(?P<kind>.+))?\]"
)
_MODES = ("inference", "training")


def lstm_table(rows: Rows) -> str | None:
    """torch's time over ours by shape and case, in inference and in training, and how many rows are slower.

    Returns Markdown, or None where no row is of the LSTM.
    """
    ratios: dict[tuple[str, str], dict[str, float | None]] = {}
    wrong: dict[tuple[str, str], set[str]] = {}
    for name, row in rows.items():
        match = _NAME.fullmatch(name)
        if match is not None:
            steps, batch, features, hidden = (part.strip() for part in match["shape"].split(","))
            case = match["kind"] or {"cell": "cell", "layer_norm": "layer norm"}[match["test"]]
            shape = f"{steps} x {batch}, {features} → {hidden}"
            mode = match["mode"]
            ratios.setdefault((shape, case), {})[mode] = _ratio(row)
            if row.get("wrong"):
                wrong.setdefault((shape, case), set()).add(mode)
    if not ratios:
        return None
    shapes, cases = (list(dict.fromkeys(key[place] for key in ratios)) for place in (0, 1))
    lines = [
        [shape, *(_cell(ratios.get((shape, case), {}), wrong.get((shape, case), set())) for case in cases)]
        for shape in shapes
    ]
    noted = " † torch's answer is further from a wider dtype's than roundings explain." if wrong else ""
    return (
        "LSTM, time of torch / time of fastattn, inference and training, for steps x batch and inputs → units; below "
        "1, in bold, torch is faster; `?` was not measured, or torch refused it. `cell` takes ten steps in a loop; "
        "`layer norm`, of which torch has no fused form, is held against a loop of its operators."
        f"{noted}\n\n"
        f"{render(['shape', *cases], lines)}\n\n{_counted(ratios)}"
    )


def _ratio(row: dict[str, Any]) -> float | None:
    """The time of torch, the first peer that is none of ours, over ours; None where it refused."""
    return next((figure["ratio"] for who, figure in row["figures"].items() if not who.startswith(OURS)), None)


def _cell(modes: dict[str, float | None], wrong: set[str]) -> str:
    parts = []
    for mode in _MODES:
        ratio = modes.get(mode)
        text = "?" if ratio is None else f"{ratio:.2f}"
        text = f"**{text}**" if ratio is not None and ratio < 1.0 else text
        parts.append(f"{text}†" if mode in wrong else text)
    return ", ".join(parts) if modes else ""


def _counted(ratios: dict[tuple[str, str], dict[str, float | None]]) -> str:
    parts = []
    for mode in _MODES:
        found = [ratio for modes in ratios.values() if (ratio := modes.get(mode)) is not None]
        if found:
            mean, slower = statistics.geometric_mean(found), sum(ratio < 1.0 for ratio in found)
            parts.append(f"{mode}: geometric mean {mean:.2f}, torch faster in {slower} of {len(found)}")
    return "; ".join(parts) + "."
