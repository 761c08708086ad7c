"""The script for a machine with a GPU: no benchmark is forgotten in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _benchmarks(selection: str) -> int:
    """How many rows ``pytest benchmarks -k`` takes."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "-p", "no:cacheprovider"]
    output = subprocess.run([*command, "-k", selection], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sum(int(count) for count in re.findall(r"^benchmarks/\S+: (\d+)$", output, re.MULTILINE))


def test_the_groups_hold_every_benchmark() -> None:
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    listed = re.search(r"^for group in(.*?); do$", script, re.MULTILINE | re.DOTALL)
    assert listed is not None
    groups = re.findall(r'"([^"]+)"', listed[1])
    everything = _benchmarks("")
    assert everything > 100
    assert _benchmarks(" or ".join(f"({group})" for group in groups)) == everything
