"""The profile over the sequence length: rows for what fits and what does not, its page, its trace, its options."""

from __future__ import annotations

import gc
import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.__main__ import main
from fastattn.profiling import Measurement, named_ranges, options, profile, sweep, write_trace
from fastattn.profiling.prediction import is_out_of_memory, predicted_bytes
from fastattn.profiling.ranges import kind_of
from fastattn.profiling.sweep_table import OUT_OF_MEMORY, human_bytes, human_length, summary, table
from fastattn.profiling.workloads import Shape, build

TINY = ("--embed-dim", "16", "--heads", "2", "--device", "cpu", "--seconds", "0.01")
CPU_SHAPE = Shape(batch=2, features=16, heads=2, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """Every measurement of memory collects garbage: what was there before need not be looked at again."""
    gc.freeze()
    yield
    gc.unfreeze()


def quick(model: Any, lengths: list[int], **arguments: Any) -> sweep.Profile:
    return profile(model, lambda length: torch.randn(1, length, 4), lengths, seconds=1e-6, **arguments)


def traced_names(path: Path) -> Counter[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


# The function ----------------------------------------------------------------------------------------------------


def test_a_model_before_and_after_patch() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    before = quick(model, [8, 4, 8], name="torch", flops=lambda length: 1e6 * length)
    fastattn.patch(model)
    after = quick(model, [4, 8], name="fastattn")
    both = before + after
    assert [(row.length, row.implementation) for row in both.measurements] == [
        (4, "torch"), (8, "torch"), (4, "fastattn"), (8, "fastattn")
    ]  # fmt: skip
    assert all(row.seconds and row.seconds > 0 and row.peak_bytes is not None for row in both.measurements)
    assert [row.flops for row in before.measurements] == [4e6, 8e6]
    assert re.search(r"\| 4 +\| fastattn ", str(both))
    assert "at 8 torch takes" in str(both)
    assert not both.interrupted


@pytest.mark.parametrize("backward", [False, True])
def test_implementations_are_held_against_the_first(backward: bool) -> None:
    class Returning(nn.Module):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.base, self.wrap = base, wrap

        def forward(self, x: Tensor) -> Any:
            return self.wrap(self.base(x))

    base = nn.Linear(4, 3)
    runs = {"one": base, "same": Returning(lambda y: {"logits": y}), "other": Returning(lambda y: (None, 2 * y))}
    rows = quick(runs, [4], backward=backward, batch_size=3).measurements
    assert [row.difference for row in rows] == [None, 0.0, 1.0]
    assert rows[0].tokens == 12
    assert base.weight.grad is None


def test_backward_takes_the_gradients_of_parameters_and_inputs() -> None:
    seen: list[bool] = []
    model = nn.Linear(4, 4)
    model.weight.register_hook(lambda grad: seen.append(True))

    def make_batch(length: int) -> dict[str, Tensor]:
        return {"input": torch.randn(length, 4, requires_grad=True)}

    assert profile(model, make_batch, [2], backward=True, seconds=1e-6).measurements[0].error is None
    assert seen


def test_a_length_predicted_not_to_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setattr(sweep, "peak_memory", lambda call, device: call().shape[1] ** 2 * 1000)
    monkeypatch.setattr(sweep, "free_memory", lambda device: 10_000_000)

    def model(x: Tensor) -> Tensor:
        ran.append(x.shape[1])
        return x

    rows = quick(model, [32, 64, 128, 256]).measurements
    assert [row.error for row in rows] == [None, None, OUT_OF_MEMORY, OUT_OF_MEMORY]
    assert [row.needed_bytes for row in rows[2:]] == [pytest.approx(128**2 * 1000), pytest.approx(256**2 * 1000)]
    assert max(ran) == 64
    assert f"{OUT_OF_MEMORY} at 128" in summary(rows)[0]
    assert "needs about 15.6 MiB" in table(rows)


def test_long_lengths_alone_are_predicted_from_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "free_memory", lambda device: 1)
    monkeypatch.setattr(sweep, "peak_memory", lambda call, device: call().shape[1] * 10)
    rows = quick({"torch": torch.neg}, [4096]).measurements
    # The shorter probe is the one thing that nothing speaks against.
    assert [(row.length, row.error) for row in rows] == [(4096, OUT_OF_MEMORY)]
    assert rows[0].needed_bytes == pytest.approx(5120 * 64)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OUT_OF_MEMORY),
        (RuntimeError("no such kernel\nsecond line"), "RuntimeError: no such kernel"),
        (IndexError("index out of range in self"), "IndexError: index out of range in self"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_length_that_raises_is_a_row(error: Exception, message: str) -> None:
    def model(x: Tensor) -> Tensor:
        if x.shape[1] > 4:
            raise error
        return x

    result = quick({"raises": model, "fine": torch.neg}, [4, 8])
    assert [row.error for row in result.measurements] == [None, None, message, None]
    assert message in str(result)


def test_a_batch_that_does_not_fit_is_a_row() -> None:
    def make_batch(length: int) -> Tensor:
        if length > 4:
            raise MemoryError
        return torch.ones(length)

    rows = profile(torch.neg, make_batch, [4, 8], seconds=1e-6).measurements
    assert [row.error for row in rows] == [None, OUT_OF_MEMORY]


def test_other_errors_are_the_callers() -> None:
    def model(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quick(model, [4])


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    def model(x: Tensor) -> Tensor:
        if x.shape[1] == 8:
            raise KeyboardInterrupt
        return x

    result = quick(model, [4, 8, 16])
    assert result.interrupted
    assert [row.length for row in result.measurements] == [4]
    assert "stopped early" in str(result)
    result.write(tmp_path)
    assert "stopped early" in (tmp_path / "sweep.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seq_lens": []}, ValueError, r"seq_lens: got \[\], expected"),
        ({"seq_lens": [4, 0]}, ValueError, r"seq_lens: got \[4, 0\]"),
        ({"model": {}}, ValueError, "model: got an empty mapping"),
        ({"model": {"a": 3}}, TypeError, "model: got int as 'a'"),
        ({"make_batch": torch.ones(3)}, TypeError, "make_batch: got Tensor"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"seconds": 0.0}, ValueError, "seconds: got 0.0"),
        ({"backward": True}, ValueError, "backward: got builtin_function_or_method as model"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"model": torch.neg, "make_batch": torch.ones, "seq_lens": [4]} | arguments
    with pytest.raises(error, match=message):
        profile(**given)


def test_a_result_without_a_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="output: the model returned NoneType"):
        quick(lambda x: None, [4])


@pytest.mark.parametrize("length", [20, 400])
@pytest.mark.parametrize(("linear", "quadratic"), [(0, 3), (7, 0), (5, 2)])
def test_memory_is_predicted_from_two_lengths(length: int, linear: int, quadratic: int) -> None:
    def curve(at: int) -> int:
        return linear * at + quadratic * at**2

    assert predicted_bytes([(5, curve(5)), (10, curve(10))], length) == pytest.approx(curve(length))


def test_predictions_at_the_edges() -> None:
    assert predicted_bytes([], 10) is None
    assert predicted_bytes([(5, 100)], 10) == 400
    assert predicted_bytes([(5, 100), (10, 100)], 20) == 200  # less than linear: taken as linear
    assert predicted_bytes([(5, 0), (10, 100)], 20) == 400  # more than quadratic: taken as quadratic
    assert not is_out_of_memory(ValueError("out of memory"))


def test_sizes_for_people() -> None:
    assert [human_length(length) for length in (32768, 1000)] == ["32k", "1000"]
    assert [human_bytes(count) for count in (2048, 3 * 2**20, 2**37)] == ["2 KiB", "3 MiB", "128 GiB"]


# Named ranges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "projection"), ("aten::bmm", "attention"), ("fastattn::attention_backward", "attention"),
        ("aten::_scaled_dot_product_flash_attention", "attention"), ("fastattn::lstm_layer", "LSTM"),
        ("aten::_cudnn_rnn", "LSTM"), ("aten::mkldnn_rnn_layer", "LSTM"), ("aten::add", None),
        ("aten::_native_multi_head_attention", "projections and attention"),
    ],
)  # fmt: skip
def test_kinds_of_operators(operator: str, kind: str | None) -> None:
    assert kind_of(operator) == kind


def test_a_trace_names_projections_attention_lstm_and_modules(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = fastattn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = fastattn.LSTM(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.attention(x, x, x)
            return self.lstm(out)[0]  # type: ignore[no-any-return]

    model, x = Both(), torch.randn(2, 5, 8)
    (path,) = write_trace({"both: one": (model, lambda: model(x).sum().backward())}, tmp_path)
    names = traced_names(path)
    assert path.name == "trace-both--one.json"
    expected = ("both: one", "Both", "MultiheadAttention attention", "LSTM lstm", "projection", "attention", "LSTM")
    assert not [name for name in expected if not names[name]]
    assert names["LSTM"] == 2  # forward and backward


def test_ranges_leave_nothing_behind() -> None:
    model = nn.Linear(3, 3)
    hooks = nn.modules.module
    for x in (torch.ones(1, 3), torch.ones(1, 4)):
        try:
            with named_ranges(model):
                assert hooks._global_forward_pre_hooks
                model(x)
        except RuntimeError:
            assert x.shape[1] == 4
        assert not hooks._global_forward_pre_hooks
        assert not hooks._global_forward_hooks
    assert not model._forward_hooks
    with pytest.raises(TypeError, match="model: got function"), named_ranges(test_ranges_leave_nothing_behind):
        pass


def test_ranges_leave_torchs_fast_path(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    x = torch.randn(1, 4, 8)

    @torch.no_grad()
    def call() -> Tensor:
        return model(x)  # type: ignore[no-any-return]

    (path,) = write_trace({"torch": (model, call)}, tmp_path)
    assert traced_names(path)["projections and attention"] == 1


# The command -----------------------------------------------------------------------------------------------------


class _Sources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        assert tag not in ("script", "link", "iframe")


def test_the_command_writes_table_page_picture_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["profile", "--seq-lens", "4:8", "--compare", "torch,sdpa", "--trace", "--out", str(tmp_path), *TINY])
    printed = capsys.readouterr()
    assert status == 0
    assert "mha, forward: batch 1" in printed.err  # the progress bar
    assert printed.out.count("| fastattn ") == 2
    record = json.loads((tmp_path / "sweep.json").read_text())
    rows = [Measurement(**row) for row in record["measurements"]]
    assert [row.implementation for row in rows] == ["torch", "sdpa", "fastattn"] * 2
    assert all(row.flops and row.error is None and (row.difference or 0.0) < 1e-5 for row in rows)
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    page = _Sources()
    page.feed((tmp_path / "sweep.html").read_text())
    assert len(page.sources) == 1
    assert page.sources[0].startswith("data:image/png;base64,")
    assert traced_names(tmp_path / "trace-fastattn.json")["attention"] == 1


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("mask", ["none", "causal", "padding:0.5"])
@pytest.mark.parametrize("model", ["mha", "encoder", "lstm"])
def test_implementations_of_a_workload_agree(model: str, mask: str, backward: bool) -> None:
    if model == "lstm" and mask == "causal":
        pytest.skip("an LSTM is causal by itself")
    compare = ["torch", "fastattn:reference"] + ["sdpa"] * (model != "lstm")
    workload = build(model, compare, CPU_SHAPE, options.mask(mask), backward=backward, weights=False)
    rows = profile(workload.models, workload.make_batch, [6], backward=backward, seconds=1e-6).measurements
    assert [row.implementation for row in rows] == [*compare, "fastattn"]
    assert all(row.error is None for row in rows), rows
    assert all(row.difference < 1e-5 for row in rows[1:])
    first, *others = (list(model.parameters()) for model in workload.models.values())
    assert all(one is other for parameters in others for one, other in zip(first, parameters, strict=True))


def test_a_hugging_face_model_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=11,
        max_position_embeddings=16,
    ).save_pretrained(tmp_path)  # fmt: skip
    arguments = ["profile", "--model", f"hf:{tmp_path}", "--mask", "padding:0.5", "--out", str(tmp_path), *TINY]
    assert main([*arguments, "--seq-lens", "8", "--compare", "torch,sdpa"]) == 0
    rows = json.loads((tmp_path / "sweep.json").read_text())["measurements"]
    assert [row["implementation"] for row in rows] == ["torch", "sdpa", "fastattn"]
    assert all((row["difference"] or 0.0) < 1e-5 for row in rows)
    assert main([*arguments, "--seq-lens", "8,32"]) == 2
    assert "--seq-lens: got 32, the model has 16 positions" in capsys.readouterr().err


def test_the_command_stops_with_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = sweep._Sweep.measure

    def interrupted(self: sweep._Sweep, length: int, *, shortest: bool) -> None:
        if length == 8:
            raise KeyboardInterrupt
        measure(self, length, shortest=shortest)

    monkeypatch.setattr(sweep._Sweep, "measure", interrupted)
    assert main(["profile", "--seq-lens", "4:16", "--trace", "--out", str(tmp_path), *TINY]) == 130
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["interrupted"]
    assert [row["length"] for row in record["measurements"]] == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seq-lens", "8k:1k"), "--seq-lens: got '8k:1k', expected FIRST:LAST"),
        (("--seq-lens", "many"), "--seq-lens: got 'many'"),
        (("--seq-lens", "0:4"), "--seq-lens: got '0:4'"),
        (("--mask", "padding:1"), "--mask: got 'padding:1', expected none, causal, or padding:SHARE"),
        (("--mask", "padding:x"), "--mask: got 'padding:x'"),
        (("--model", "gru"), "--model: got 'gru', expected mha, encoder, lstm, hf:PATH"),
        (("--model", "hf:nowhere"), "--model: got hf:nowhere, expected a folder with config.json"),
        (("--compare", "trch"), "--compare: got 'trch', expected names out of torch, sdpa"),
        (("--compare", "fastattn:fast"), "--compare: got 'fastattn:fast', expected a backend out of"),
        (("--model", "lstm", "--mask", "causal"), "--mask: got causal"),
        (("--model", "lstm", "--compare", "sdpa"), "--compare: got sdpa"),
        (("--model", "encoder", "--weights"), "--weights: got --model encoder, expected mha"),
        (("--seconds", "0"), "--seconds: got 0.0, expected more than 0"),
        (("--batch", "0"), "--batch: got 0"),
        (("--heads", "3"), "--heads: got 3, expected a divisor of --embed-dim 16"),
    ],
)
def test_bad_options_are_named(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *TINY, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_lengths_and_masks_are_read() -> None:
    assert options.seq_lens("1k:4k") == [1024, 2048, 4096]
    assert options.seq_lens("512, 3K") == [512, 3072]
    assert options.mask("padding:0.25") == options.Mask(kept=0.75)
