"""The README's code runs and prints what it says; its figures are those of docs/results; its test command is CI's."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from fastattn.profiling import report

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
_EXAMPLE = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?", re.MULTILINE | re.DOTALL
)
EXAMPLES = [match.groupdict() for match in _EXAMPLE.finditer(README)]


def test_there_are_at_least_three_examples() -> None:
    assert len(EXAMPLES) >= 3
    assert len(EXAMPLES) == README.count("```python")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["code"].splitlines()[3][:40])
def test_an_example_runs_as_pasted(example: dict[str, str | None]) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example["code"] or "", "README.md", "exec"), {"__name__": "__main__"})
    assert printed.getvalue() == (example["printed"] or "")


def test_ci_runs_the_test_command() -> None:
    assert "\nmake test " in README
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if not line.startswith(("#", "set ", "cd "))] == ["make test"]


def test_the_results_are_those_of_the_measurements() -> None:
    assert report.rewritten(README, report.section()) == README, "run: python -m fastattn.profiling.report"


def test_a_measurement_is_kept_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    monkeypatch.setattr(report, "_README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(README)
    measured = tmp_path / "demo_output"
    measured.mkdir()
    versions = {"fastattn": "0", "torch": "2", "transformers": "5"}
    point = {
        "length": 128, "forward_seconds": 0.004, "training_seconds": 0.01, "forward_bytes": 8e6, "training_bytes": 3e7
    }  # fmt: skip
    names = ("nn.MultiheadAttention", "fastattn.MultiheadAttention")
    record = {
        "environment": {
            "device": "A Device, 2 cores", "device_type": "cpu", "threads": 2, "date": "2026-01-01",
            "versions": versions,
        },
        "embedding": [],
        "sequence": [{**point, "implementation": name} for name in names],
    }  # fmt: skip
    (measured / "results.json").write_text(json.dumps(record))
    for name in ("profile.csv", "profile.png"):
        (measured / name).write_text("")
    assert report.main(["--record", str(measured)]) == 0
    assert "### A Device, 2 cores" in (tmp_path / "README.md").read_text()
    assert "| 128    | 4 → 4 (1.00x)" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "docs" / "results" / "a-device-2-cores" / "profile.png").exists()
    assert report.main(["--check"]) == 0
    (tmp_path / "README.md").write_text(README)
    assert report.main(["--check"]) == 1


def test_missing_markers_are_named() -> None:
    with pytest.raises(ValueError, match="are missing"):
        report.rewritten("no markers", "text")
