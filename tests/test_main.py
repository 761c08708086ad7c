"""The commands of ``python -m fastattn``, each run as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastattn.demo import main as demo
from fastattn.dispatch import Backend
from fastattn.kernels.attention import extension
from fastattn.profiling import doctor
from fastattn.profiling.memory import _sampled_peak, peak_memory
from fastattn.profiling.sequence import profile

CPU = torch.device("cpu")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # One thread: two that wait for one another make small work slow on a busy machine.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "fastattn", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_demo(tmp_path: Path) -> None:
    result = run(
        "demo", "--sentences", "8", "--batch-size", "4", "--longest", "32", "--lengths", "16", "64",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "| BertModel " in result.stdout
    assert "| nn.TransformerEncoder " in result.stdout
    assert "replaced bert.encoder.layer.5.attention.self" in result.stdout
    assert "not reference: " in result.stdout
    assert "mha(x, x, x)" in result.stderr  # the progress bar
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "profile.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["length"], row["implementation"]) for row in rows] == [
        (length, name) for length in ("16", "64") for name in ("nn.MultiheadAttention", "fastattn.MultiheadAttention")
    ]
    record = json.loads((tmp_path / "results.json").read_text())
    assert [model["replaced"] for model in record["embedding"]] == [6, 6]
    assert all(model["largest_difference"] < 1e-4 for model in record["embedding"])
    assert all(model["smallest_cosine"] > 0.999999 for model in record["embedding"])


def test_doctor_succeeds_where_every_available_backend_is_right() -> None:
    result = run("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"torch         {torch.__version__}" in result.stdout
    assert "ok     sdpa" in result.stdout
    assert "all available backends are right" in result.stdout


@pytest.mark.parametrize("fault", [1.001, float("nan")])
def test_doctor_fails_when_a_backend_is_wrong(
    fault: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = doctor._compute

    def wrong(name: Backend, case: doctor.Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = right(name, case, inputs)
        if name is Backend.SDPA:
            results["gradient of key"] = results["gradient of key"] * fault
        return results

    monkeypatch.setattr(doctor, "_compute", wrong)
    assert doctor.examine(CPU) == 1
    printed = capsys.readouterr().out
    assert "WRONG  sdpa" in printed
    assert "gradient of key" in printed


def test_doctor_reports_a_backend_that_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = doctor._compute

    def broken(name: Backend, case: doctor.Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if name is Backend.SDPA:
            raise RuntimeError("no such kernel")
        return right(name, case, inputs)

    monkeypatch.setattr(doctor, "_compute", broken)
    assert doctor.examine(CPU) == 1
    assert "raised RuntimeError: no such kernel" in capsys.readouterr().out


def test_profile(tmp_path: Path) -> None:
    result = run("profile", "--lengths", "8", "16", "--embed-dim", "32", "--heads", "2", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" → ") == 8
    assert (tmp_path / "profile.png").exists()


def test_demo_names_the_packages_it_misses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "_NEEDS", {"no_such_module": "no-such-package", "torch": "torch"})
    with pytest.raises(SystemExit, match="demo needs no-such-package: pip install"):
        demo.run(tmp_path, CPU, count=1, batch_size=1, longest=8, lengths=[8])


def test_an_unknown_command_is_refused() -> None:
    result = run("dance")
    assert result.returncode == 2
    assert "invalid choice: 'dance'" in result.stderr


def test_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match=r"lengths: got \[0, 4\]"):
        profile([0, 4], device=CPU)


@pytest.mark.parametrize("measure", [lambda call: peak_memory(call, CPU), _sampled_peak], ids=["peak", "sampled"])
def test_peak_memory_sees_what_is_gone_at_the_end(measure: object) -> None:
    size = 64 * 2**20

    def call() -> float:
        temporary = torch.ones(size // 4)
        total = float(temporary.sum())
        time.sleep(0.25)  # a sampler sees what outlives its interval, on a busy machine a long one
        return total

    call()
    assert 0.95 * size < measure(call) < 1.3 * size
    assert measure(lambda: None) < 0.1 * size


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_extension_is_built_where_a_compiler_is() -> None:
    """Setting up goes on without it, so only this tells that it no longer compiles."""
    assert extension.UNAVAILABLE is None
