"""The models under torch.compile and torch.export: eager's numbers, and one graph for every length and batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformer_cases import KINDS, small

import fastattn
from fastattn.models import Seq2Seq, Seq2SeqConfig, Transformer, generate, static_packing

Call = tuple[tuple[Tensor, ...], dict[str, Any]]
# Batch and source length. All sizes of a call differ: at the first one equal sizes would be tied to each other.
SIZES = ((5, 11), (3, 8), (7, 17), (2, 30))
ONCE = [1] * len(SIZES)
DEEP = {"encoder_layers": 2, "decoder_layers": 2, "bidirectional": True}


def transformer(kind: str, **changes: Any) -> Transformer:
    """Small, with one layer in each of its stacks."""
    layers = {name: min(1, count) for name, count in KINDS[kind].items() if name.endswith("_layers")}
    return small(kind, **layers, **changes)


def seq2seq(**options: Any) -> Seq2Seq:
    sizes = {"source_size": 11, "target_size": 7, "source_embedding": 5, "target_embedding": 6, "hidden_size": 8}
    return Seq2Seq(Seq2SeqConfig(**{**sizes, **options}))


def random_lengths(batch: int, length: int) -> Tensor:
    """From 1 to ``length``, both among them."""
    lengths = torch.randint(1, length + 1, (batch,))
    lengths[0], lengths[-1] = 1, length
    return lengths


def call_of(model: nn.Module, batch: int, length: int, steps: int | None = None, **options: Any) -> Call:
    """Arguments of a model; a target has ``steps`` tokens, two more than the source where None."""
    source, lengths = torch.randint(7, (batch, length)), random_lengths(batch, length)
    target = torch.randint(7, (batch, length + 2 if steps is None else steps))
    if isinstance(model, Transformer) and not (model.encoder and model.decoder):
        return (source,), {"lengths": lengths, **options}
    return (source, target), {"lengths": lengths, **options}


def both_ways(call: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
    """The results of a call, and the gradients of the parameters."""
    model.zero_grad()
    torch.manual_seed(0)
    results = call(*args, **kwargs)
    parts = results if isinstance(results, tuple) else (results,)
    torch.stack([part.square().mean() for part in parts]).sum().backward()
    return [*parts, [parameter.grad for parameter in model.parameters()]]


def compilations(
    model: nn.Module, calls: list[Call], function: Any = None, backend: str = "aot_eager", floats: bool = False
) -> list[int]:
    """How often something had been compiled after each call, whose results and gradients are eager's.

    Args:
        function: compiled in place of the model's forward.
        floats: leave Python numbers symbolic, as torch does by default. It compiles the first call twice then, where a
            module holds one, as nn.Dropout does, and takes twice as long.
    """
    torch._dynamo.reset()
    counter, function = CompileCounterWithBackend(backend), model if function is None else function
    counts = []
    with torch._dynamo.config.patch(specialize_float=not floats):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
        for args, kwargs in calls:
            got, wanted = (both_ways(call, model, *args, **kwargs) for call in (compiled, function))
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)
            counts.append(counter.frame_count)
    return counts


# Transformer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["labels", "decoder", "both"])
def test_a_transformer_compiles_once(kind: str) -> None:
    model = transformer(kind)
    assert compilations(model, [call_of(model, *sizes) for sizes in SIZES]) == ONCE


@pytest.mark.parametrize("kind", ["labels", "decoder"])
def test_with_padding_on_the_left(kind: str) -> None:
    model, calls = transformer(kind), []
    for batch, length in SIZES:
        mask = torch.arange(length) >= length - random_lengths(batch, length)[:, None]
        types = {"token_types": torch.randint(2, (batch, length))} if kind == "labels" else {}
        calls.append(((torch.randint(7, (batch, length)),), {"key_padding_mask": mask, **types}))
    assert compilations(model, calls, backend="eager") == ONCE


def test_dropout_draws_the_same() -> None:
    model = transformer("both", dropout=0.2).train()
    calls = [call_of(model, *sizes) for sizes in SIZES]
    assert compilations(model, calls, backend="eager", floats=True) == ONCE


# Seq2Seq -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "options", "backend"),
    [
        ("additive", {"bidirectional": True}, "aot_eager"),
        ("general", {}, "aot_eager"),
        ("dot", {"tie_embeddings": "output"}, "eager"),
        ("concat", {}, "eager"),
        (None, DEEP, "eager"),
    ],
)  # fmt: skip
def test_a_seq2seq_compiles_once(attention: str | None, options: dict[str, Any], backend: str) -> None:
    model = seq2seq(attention=attention, **options)
    wanted = {"need_weights": attention is not None}
    assert compilations(model, [call_of(model, *sizes, **wanted) for sizes in SIZES], backend=backend) == ONCE


def test_its_loss_compiles_once() -> None:
    model, calls = seq2seq(), []
    for batch, length in SIZES:
        calls.append(call_of(model, batch, length, target_lengths=1 + random_lengths(batch, length + 1)))
    assert compilations(model, calls, model.loss, backend="eager") == ONCE


def test_steps_that_wait_for_each_other_are_one_graph_for_each_number_of_them() -> None:
    """A loop over a dimension is unrolled."""
    model, sizes = seq2seq(input_feeding=True), [(5, 11, 2), (3, 8, 2), (3, 8, 1), (7, 17, 2)]
    counts = compilations(model, [call_of(model, *size) for size in sizes], backend="eager")
    assert counts == [1, 1, 2, 2]
    model = seq2seq(attention="additive", coverage=True)
    calls = [call_of(model, *size, steps=3, target_lengths=torch.full(size[:1], 3)) for size in SIZES]
    assert compilations(model, calls, model.loss, backend="eager") == ONCE


def test_a_schedule_of_the_teacher_compiles_nothing_again() -> None:
    model = seq2seq()
    calls = [
        call_of(model, *size, steps=2, teacher_forcing=chance)
        for size, chance in zip(SIZES, (0.9, 0.6, 0.3, 0.0), strict=True)
    ]
    assert compilations(model, calls, backend="eager", floats=True) == ONCE


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 3}], ids=str)
@pytest.mark.parametrize("lengths", [[1], [4], [4, 4], [1, 1, 1], [2, 4, 1, 3], [3, 2]], ids=str)
def test_static_packing_is_torchs(lengths: list[int], options: dict[str, Any], dtype: torch.dtype) -> None:
    lstm, steps = fastattn.LSTM(3, 5, batch_first=True, **options), 4
    given = torch.tensor(lengths, dtype=dtype)
    inputs = torch.randn(len(lengths), steps, 3)
    inputs[torch.arange(steps) >= given[:, None]] = float("nan")
    inputs.requires_grad_()

    def by_torch() -> Any:
        packed, state = lstm(pack_padded_sequence(inputs, given, batch_first=True, enforce_sorted=False))
        return pad_packed_sequence(packed, batch_first=True, total_length=steps)[0], *state

    def by_us() -> Any:
        outputs, state = static_packing.run(lstm, inputs, given)
        return outputs, *state

    found = []
    for call in (by_us, by_torch):
        inputs.grad = None
        found.append([*both_ways(call, lstm), inputs.grad])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("wrong", [0, -1, 5, 9])
def test_a_wrong_length_is_an_error_when_nobody_reads_it(wrong: int) -> None:
    with pytest.raises(IndexError):
        static_packing.run(fastattn.LSTM(3, 5), torch.randn(3, 4, 3), torch.tensor([2, wrong, 3]))


# Export ------------------------------------------------------------------------------------------------------


def model_of(kind: str) -> Any:
    return seq2seq(**DEEP).eval() if kind == "seq2seq" else transformer(kind)


@pytest.mark.parametrize(
    ("kind", "strict"),
    [("labels", True), ("labels", False), ("decoder", False), ("both", False), ("seq2seq", False)],
)
def test_export(kind: str, strict: bool) -> None:
    model = model_of(kind)
    # Learned positions end, and an exported length with them.
    batch, length, steps = (torch.export.Dim(name, max=512) for name in ("batch", "length", "steps"))
    args, kwargs = call_of(model, 5, 11)
    names = ("source", "target") if kind == "seq2seq" else ("tokens", "target")
    dims = {name: {0: batch, 1: size} for name, size, _ in zip(names, (length, steps), args, strict=False)}
    shapes = {**dims, "lengths": {0: batch}}
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict).module()
    for size in (*SIZES, (4, 100), (1, 2)):
        args, kwargs = call_of(model, *size)
        torch.testing.assert_close(program(*args, **kwargs), model(*args, **kwargs))


# Generation and checkpoints ----------------------------------------------------------------------------------

GENERATORS = ["decoder", "both", "seq2seq"]


@pytest.mark.parametrize("kind", GENERATORS)
def test_generate_takes_compiled_models_and_calls_nothing_compiled(kind: str) -> None:
    torch._dynamo.reset()
    model, counter = model_of(kind).train(), CompileCounterWithBackend("eager")
    args, kwargs = call_of(model, 5, 11)
    written = [generate(model, args[0], **kwargs, max_new_tokens=6, strategy="beam")]
    wrapped = torch.compile(model, fullgraph=True, backend=counter)
    written.append(generate(wrapped, args[0], **kwargs, max_new_tokens=6, strategy="beam"))
    model.compile(fullgraph=True, backend=counter)
    written.append(generate(model, args[0], **kwargs, max_new_tokens=6, strategy="beam"))
    assert all(torch.equal(each.tokens, written[0].tokens) for each in written)
    assert model.training
    assert counter.frame_count == 0  # generate calls start and step, not forward
    model(*args, **kwargs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_compiled_step_serves_every_length_and_batch(kind: str) -> None:
    torch._dynamo.reset()
    model, plain, counter = model_of(kind), model_of(kind), CompileCounterWithBackend("eager")
    plain.load_state_dict(model.state_dict())
    model.step = torch.compile(model.step, fullgraph=True, dynamic=True, backend=counter)
    for place, size in enumerate(SIZES):
        (source, *_), kwargs = call_of(model, *size)
        got, wanted = (generate(each, source, **kwargs, max_new_tokens=6 + place) for each in (model, plain))
        assert torch.equal(got.tokens, wanted.tokens)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", GENERATORS[1:])
def test_copies_and_checkpoints_of_a_compiled_model(kind: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = model_of(kind)
    names, (args, kwargs) = list(model.state_dict()), call_of(model, 5, 11)
    model.compile(backend="eager")
    wanted = model(*args, **kwargs)
    assert list(model.state_dict()) == names
    torch.compile(model, backend="eager").save(tmp_path / "wrapped.pt")
    model.save(tmp_path / "model.pt")
    loaded = [type(model).load(tmp_path / name) for name in ("model.pt", "wrapped.pt")]
    for other in (copy.deepcopy(model), *loaded):
        torch.testing.assert_close(other(*args, **kwargs), wanted, rtol=1e-5, atol=1e-5)
