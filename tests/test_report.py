"""Records of the benchmarks become tables, figures, and the README's section; what is slower than torch included."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastattn.__main__ import main
from fastattn.profiling import benchmark_report, report
from fastattn.profiling.lstm_report import lstm_table

README = f"before\n{report._BEGIN}\nold\n{report._END}\nafter\n"
DEVICE = "A Device, 2 cores"


def figure(seconds: float, ratio: float, peak: int = 2_000_000) -> dict[str, Any]:
    return {
        "seconds": seconds, "low": seconds * 0.9, "high": seconds * 1.1, "rounds": 3, "repeats": 1, "tflops": 0.5,
        "peak_bytes": peak, "ratio": ratio,
    }  # fmt: skip


def row(peers: dict[str, float], refused: dict[str, str] | None = None, **parameters: Any) -> dict[str, Any]:
    """A row in which ours takes 2 ms and each peer ``peers`` times that, and twice the memory."""
    figures = {"fastattn": figure(0.002, 1.0)}
    figures |= {name: figure(0.002 * ratio, ratio, 4_000_000) for name, ratio in peers.items()}
    versions = {"fastattn": "0.1.0", "torch": "2.13.0"}
    machine = {"device": DEVICE, "device_type": "cpu", "threads": 2, "versions": versions, "date": "2026-01-02"}
    return {**parameters, "flops": 1e9, "figures": figures, "refused": refused or {}, **machine}


def lstm_rows() -> dict[str, Any]:
    return {
        "test_layers[(20, 64, 64, 128)-inference-float32]": row({"nn.LSTM": 2.0}),
        "test_layers[(20, 64, 64, 128)-training-float32]": row({"fastattn, cuda": 0.5, "nn.LSTM": 0.8}),
        "test_layers[(100, 32, 256, 256)-inference-packed]": row({"nn.LSTM": 4.5}),
        "test_layers[(100, 32, 256, 256)-training-packed]": row({}, {"nn.LSTM": "RuntimeError: no"}),
        "test_cell[(20, 64, 64, 128)-inference]": row({"nn.LSTMCell": 1.25}),
        "test_cell[(20, 64, 64, 128)-training]": row({"nn.LSTMCell": 1.5}),
        "test_layers[(20, 64, 64, 128)-training-bfloat16]": row({"nn.LSTM": 3.0})
        | {"wrong": {"nn.LSTM": "nn.LSTM, result 3: differs by 1.0e-01, allowed 1.0e-02"}},
        "test_layer_norm[(20, 64, 64, 128)-training]": row({"a loop of torch's operators": 5.0}),
    }


def attention_rows() -> dict[str, Any]:
    rows = {}
    for batch, length in ((4, 1024), (1, 4096)):
        shape = (batch, length, 8, 64)
        name = f"test_function[causal-forward-{shape}-torch.float32]"
        given = {"shape": shape, "dtype": "torch.float32", "causal": True, "training": False}
        rows[name] = row({"SDPA": 1.3}, {"FlexAttention": "RuntimeError: no compiler"}, **given)
    given = {"shape": (4, 64, 128, 256), "dtype": "torch.float32", "kind": "plain", "training": False}
    rows["test_function[plain-forward-(4, 64, 128, 256)]"] = row({"eager": 3.0}, **given)
    return rows


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the checkout, with a README and one record of benchmarks."""
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    monkeypatch.setattr(report, "_README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "record.json").write_text(json.dumps(lstm_rows() | attention_rows()))
    return tmp_path


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_lstm_is_one_table_by_shape_and_case() -> None:
    text = lstm_table(lstm_rows())
    assert text is not None
    header, _, *lines = cells(text)
    assert header == ["shape", "float32", "packed", "cell", "bfloat16", "layer norm"]
    assert lines == [
        ["20 x 64, 64 → 128", "2.00, **0.80**", "", "1.25, 1.50", "?, 3.00†", "?, 5.00"],
        ["100 x 32, 256 → 256", "", "4.50, ?", "", "", ""],
    ]
    assert "inference: geometric mean 2.24, torch faster in 0 of 3" in text
    assert "training: geometric mean 2.06, torch faster in 1 of 4." in text


def test_a_record_without_an_lstm_has_no_such_table() -> None:
    assert lstm_table(attention_rows()) is None


def test_a_record_is_kept_and_written_into_the_readme(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(checkout / "record.json")]) == 0
    folder = checkout / "docs" / "results" / "a-device-2-cores"
    assert f"written: {folder / 'benchmarks.json'}" in capsys.readouterr().out
    assert json.loads((folder / "benchmarks.json").read_text()).keys() == (lstm_rows() | attention_rows()).keys()
    readme = (checkout / "README.md").read_text()
    assert readme.startswith(f"before\n{report._BEGIN}\n### {DEVICE}\n\nLSTM, time of torch / time of fastattn")
    assert "\nold\n" not in readme
    assert "**0.80**" in readme
    assert "(docs/results/a-device-2-cores/benchmarks.md) on it: 2026-01-02, fastattn 0.1.0, torch 2.13.0" in readme
    assert report.main(["--check"]) == 0


def test_the_text_shows_every_peer_of_every_row(checkout: Path) -> None:
    assert main(["report", str(checkout / "record.json"), "--out", str(checkout / "out")]) == 0
    assert (checkout / "README.md").read_text() == README
    folder = checkout / "out" / "a-device-2-cores"
    text = (folder / "benchmarks.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == ["LSTM", "LSTMCell", "LayerNormLSTM", "scaled_dot_product_attention", "additive_attention"]
    table = cells(text)
    assert ["(20, 64, 64, 128), training, float32", "2 ± 10%", "0.5", "2.0", "0.80, 2.00", "0.50, 2.00"] in table
    assert ["row", "ms", "TFLOP/s", "peak MB", "SDPA", "FlexAttention"] in table
    assert [cell for line in table for cell in line if cell == "refused"] == ["refused"] * 3
    assert "- (20, 64, 64, 128), training, bfloat16, wrong: nn.LSTM, result 3: differs by 1.0e-01" in text
    assert "3.00, 2.00 (wrong)" in text
    assert text.count("- FlexAttention refused: RuntimeError: no compiler") == 1
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert "benchmark-scaled-dot-product-attention-lengths.png" in pictures
    assert sorted(pictures) == sorted(path.name for path in folder.glob("*.png"))
    assert all((folder / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_figures_of_benchmarks_that_are_gone_are_removed(tmp_path: Path) -> None:
    benchmark_report.write(lstm_rows(), tmp_path)
    benchmark_report.write(attention_rows(), tmp_path)
    assert not (tmp_path / "benchmark-lstm.png").exists()
    assert (tmp_path / "benchmark-additive-attention.png").exists()


def test_rows_over_the_length_share_all_else() -> None:
    rows = attention_rows()
    other = {"shape": (1, 2048, 8, 128), "dtype": "torch.float32", "causal": True, "training": False}
    rows["test_function[causal-forward-(1, 2048, 8, 128)]"] = row({"SDPA": 1.0}, **other)
    groups = benchmark_report.groups(rows)
    series = benchmark_report.over_length("test_function", groups["test_function"])
    assert list(series) == ["8 x 64, causal, forward, float32"]
    assert [(length, tokens) for found in series.values() for length, tokens, _ in found] == [
        (1024, 4096), (4096, 4096)
    ]  # fmt: skip
    assert not benchmark_report.over_length("test_additive", groups["test_additive"])


def test_records_of_one_device_are_joined_and_of_others_kept_apart(tmp_path: Path) -> None:
    newer = {name: {**one, "date": "2026-02-03"} for name, one in list(lstm_rows().items())[:1]}
    elsewhere = {name: {**one, "device": "Another"} for name, one in attention_rows().items()}
    paths = []
    for number, rows in enumerate((lstm_rows(), newer, elsewhere)):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(rows))
    devices = benchmark_report.load(paths)
    assert {device: len(rows) for device, rows in devices.items()} == {"a-device-2-cores": 8, "another": 3}
    assert benchmark_report.origin(devices["a-device-2-cores"]).startswith("2026-01-02 to 2026-02-03, fastattn 0.1.0")


@pytest.mark.parametrize("content", ["{", "[]", '{"test": {}}', '{"test": {"figures": {}, "device": "x"}}', None])
def test_what_is_no_record_is_named(content: str | None, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkout / "wrong.json"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path)]) == 2
    assert f"records: got {path}, expected a record of benchmarks/measure.py" in capsys.readouterr().err
    assert (checkout / "README.md").read_text() == README


def test_an_installation_without_a_readme_asks_for_a_folder(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "README.md").unlink()
    assert main(["report", str(checkout / "record.json")]) == 2
    assert "give --out" in capsys.readouterr().err
