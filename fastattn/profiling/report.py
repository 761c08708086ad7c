"""The README's results, from measurements alone: ``python -m fastattn.profiling.report``.

Every folder of docs/results holds the measurements on one device: those of the demonstration, those of the benchmarks,
or both. ``--record FOLDER`` adds one of the demonstration (or replaces that device's) before the section between the
markers is written again; ``--check`` writes nothing and exits with 1 when the section is not what the measurements say.
``python -m fastattn report RECORD...`` adds those of the benchmarks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastattn.profiling import benchmark_report
from fastattn.profiling.benchmark_report import KEPT, TEXT, slug
from fastattn.profiling.lstm_report import lstm_table
from fastattn.profiling.record import PICTURE, RESULTS, TABLE
from fastattn.profiling.sequence import Point
from fastattn.profiling.table import profile_table, render

_ROOT = Path(__file__).resolve().parents[2]
_README = _ROOT / "README.md"
_RESULTS = Path("docs") / "results"
_BEGIN, _END = "<!-- results: begin, written by make results -->", "<!-- results: end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastattn.profiling.report", description=__doc__)
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="a measurement to keep, as `demo --out` wrote it")
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args(arguments)
    if options.record is not None:
        _keep(options.record)
    before = _README.read_text()
    after = rewritten(before, section())
    if options.check:
        return 0 if after == before else 1
    _README.write_text(after)
    return 0


def report(records: Sequence[Path], out: Path | None = None) -> int:
    """Write tables and figures of the benchmarks' records; returns the exit status.

    Each device has a folder in ``out``. Without ``out`` that is docs/results of this checkout, and the README's section
    is written again; a device's benchmarks are replaced as a whole. A file that is no record is named on stderr, with
    status 2.
    """
    if out is None and not _README.exists():
        print("report: this is no checkout with a README.md; give --out", file=sys.stderr)
        return 2
    try:
        devices = benchmark_report.load(records)
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    for device, rows in devices.items():
        files = benchmark_report.write(rows, (out or _ROOT / _RESULTS) / device)
        print(f"written: {', '.join(map(str, files))}")
    return main([]) if out is None else 0


def section() -> str:
    """The Markdown of every measurement kept in docs/results."""
    folders = sorted({file.parent for name in (RESULTS, KEPT) for file in (_ROOT / _RESULTS).glob(f"*/{name}")})
    parts = []
    for folder in folders:
        known = [(folder / RESULTS, _measurement), (folder / KEPT, _benchmarks)]
        texts = [text for file, describe in known if file.exists() for text in describe(file)]
        # The heading is the device, said once.
        parts.append("\n\n".join(dict.fromkeys(texts)))
    return "\n\n".join(parts) if parts else "Nothing has been measured yet: `make results`."


def rewritten(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the markers.

    Raises ValueError when the markers are missing.
    """
    if _BEGIN not in readme or _END not in readme:
        raise ValueError(f"README.md: the lines {_BEGIN!r} and {_END!r} are missing")
    head, _, rest = readme.partition(_BEGIN)
    return f"{head}{_BEGIN}\n{text}\n{_END}{rest.partition(_END)[2]}"


def _keep(folder: Path) -> None:
    record = json.loads((folder / RESULTS).read_text())
    kept = _ROOT / _RESULTS / slug(record["environment"]["device"])
    kept.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, TABLE, PICTURE):
        shutil.copyfile(folder / name, kept / name)


def _measurement(file: Path) -> list[str]:
    record = json.loads(file.read_text())
    environment = record["environment"]
    versions = environment["versions"]
    points = [Point(**point) for point in record["sequence"]]
    picture = file.with_name(PICTURE).relative_to(_ROOT)
    return [
        f"### {environment['device']}",
        f"{environment['date']}, fastattn {versions['fastattn']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {environment['threads']} threads.",
        *([_embedding(record["embedding"])] if record["embedding"] else []),
        "The default call `mha(x, x, x)`, `nn.MultiheadAttention` → `fastattn.MultiheadAttention`:",
        profile_table(points),
        f"![time and peak memory over the sequence length]({picture.as_posix()})",
    ]


def _benchmarks(file: Path) -> list[str]:
    rows = json.loads(file.read_text())
    text = file.with_name(TEXT).relative_to(_ROOT)
    lstm = lstm_table(rows)
    return [
        f"### {next(iter(rows.values()))['device']}",
        *([lstm] if lstm is not None else []),
        f"[All benchmarks]({text.as_posix()}) on it: {benchmark_report.origin(rows)}",
    ]


def _embedding(models: Sequence[dict[str, Any]]) -> str:
    header = ["MiniLM as", "sentences", "sentences/s", "peak MB", "largest difference", "smallest cosine", "backend"]
    rows = [
        [
            model["model"],
            str(model["sentences"]),
            " → ".join(f"{rate:.1f}" for rate in model["sentences_per_second"]),
            " → ".join(f"{peak / 1e6:.1f}" for peak in model["peak_bytes"]),
            f"{model['largest_difference']:.1e}",
            f"{model['smallest_cosine']:.7f}",
            model["backend"],
        ]
        for model in models
    ]
    return f"Real sentences, padded, before → after `fastattn.patch`:\n\n{render(header, rows)}"


if __name__ == "__main__":
    sys.exit(main())
