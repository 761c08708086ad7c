"""Seq2Seq against the papers' equations in plain torch: logits, loss curves, padding, generation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import DEVICE
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from examples import classic_seq2seq
from fastattn.models import Generator, Seq2Seq, Seq2SeqConfig, generate
from fastattn.models.seq2seq import inverse_sigmoid
from fastattn.models.seq2seq_decoder import DecoderState, StackedLSTMCell

SOURCES, TARGETS = 11, 7


def _config(**options: Any) -> Seq2SeqConfig:
    sizes = {"source_size": SOURCES, "target_size": TARGETS, "source_embedding": 5, "target_embedding": 6}
    return Seq2SeqConfig(**{**sizes, "hidden_size": 8, **options})


def _options() -> dict[str, dict[str, Any]]:
    found = {}
    kinds = (None, "additive", "dot", "general", "concat")
    for kind, coverage, feeding, both in itertools.product(kinds, *[(False, True)] * 3):
        if (coverage and kind not in ("additive", "concat")) or (feeding and kind is None):
            continue
        names = (("coverage", coverage), ("input_feeding", feeding), ("bidirectional", both))
        name = " ".join([str(kind), *(word for word, on in names if on)])
        found[name] = {"attention": kind, **dict(names)}
    return found


OPTIONS = _options()
DEEP = {"encoder_layers": 2, "decoder_layers": 3}
every_kind = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """cuDNN's LSTM in float32, not TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def _model(**options: Any) -> Seq2Seq:
    return Seq2Seq(_config(**options), device=DEVICE)


def _batch(steps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.randint(SOURCES, (3, 5), device=DEVICE)
    target = torch.randint(TARGETS, (3, steps), device=DEVICE)
    target[:, 0] = 0
    return source, target, torch.tensor([4, 2, 5], device=DEVICE)


def _score(model: Seq2Seq, query: Tensor, keys: Tensor, covered: Tensor) -> Tensor:
    """e_ti for query (B, H) and keys (B, S, M)."""
    attention: Any = model.decoder.attention
    kind = model.config.attention
    if kind == "dot":
        return torch.einsum("bh,bsh->bs", query, keys)
    if kind == "general":
        return torch.einsum("bm,bsm->bs", attention.projection(query), keys)
    additive = attention if kind == "additive" else attention.additive
    total = additive.query_projection(query).unsqueeze(1) + additive.key_projection(keys)
    if model.config.coverage:
        total = total + covered.unsqueeze(2) * additive.coverage_weight
    return total.tanh() @ additive.weight


def _plain(model: Seq2Seq, source: Tensor, target: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights and coverage loss of the equations, one step after another, in torch's own modules."""
    config, decoder = model.config, model.decoder
    embed: Any = model.encoder_embedding
    encoder = nn.LSTM(
        embed.embedding_dim, config.direction_size, config.encoder_layers, batch_first=True,
        bidirectional=config.bidirectional, dtype=embed.weight.dtype, device=DEVICE,
    )  # fmt: skip
    packed = pack_padded_sequence(embed(source), lengths.cpu(), batch_first=True, enforce_sorted=False)
    parameters = dict(model.encoder.named_parameters())
    out, last = torch.func.functional_call(encoder, parameters, (packed,))
    keys, _ = pad_packed_sequence(out, batch_first=True, total_length=source.shape[1])
    if model.bridge is not None:
        last = [
            line(state.transpose(0, 1).flatten(1)).unflatten(1, (config.decoder_layers, -1)).transpose(0, 1)
            for line, state in zip(model.bridge, last, strict=True)
        ]
    states = [(last[0][layer], last[1][layer]) for layer in range(config.decoder_layers)]
    beyond = torch.arange(source.shape[1], device=DEVICE) >= lengths[:, None]
    covered, fed = keys.new_zeros(source.shape), keys.new_zeros(len(source), config.readout_size)
    logits, maps, overlaps = [], [], []

    def attend(query: Tensor) -> Tensor:
        nonlocal covered
        weights = _score(model, query, keys, covered).masked_fill(beyond, float("-inf")).softmax(-1)
        maps.append(weights)
        overlaps.append(torch.minimum(weights, covered).sum(-1))
        covered = covered + weights
        return torch.einsum("bs,bsm->bm", weights, keys)

    for column in target.unbind(1):
        assert decoder.embedding is not None
        x = decoder.embedding(column)
        if config.context_first:
            context = attend(states[-1][0])
            x = torch.cat([x, context], -1)
        elif config.input_feeding:
            x = torch.cat([x, fed], -1)
        for layer, state in enumerate(states):
            states[layer] = torch.lstm_cell(x, state, *_of_layer(model, layer))
            x = states[layer][0]
        if config.attention is not None and not config.context_first:
            context = attend(x)
        if config.attention is not None:
            x = fed = torch.tanh(torch.cat([context, x], -1) @ decoder.combine.weight.T)
        elif decoder.combine is not None:
            x = decoder.combine(x)
        logits.append(functional.linear(x, decoder.output.weight, decoder.output.bias))
    return tuple(torch.stack(steps, 1) if steps else keys for steps in (logits, maps, overlaps))  # type: ignore[return-value]


def _of_layer(model: Seq2Seq, layer: int) -> list[Tensor]:
    lstm = model.decoder.lstm
    return list(lstm.cells[layer].parameters()) if isinstance(lstm, StackedLSTMCell) else lstm.all_weights[layer]


def _assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("extra", [{}, DEEP], ids=["one layer", "deep"])
@every_kind
def test_the_equations(options: dict[str, Any], extra: dict[str, Any]) -> None:
    model = _model(**options, **extra)
    source, target, lengths = _batch()
    wanted, maps, _ = _plain(copy.deepcopy(model).double(), source, target, lengths)
    _assert_close(model(source, target, lengths=lengths), wanted)
    if options["attention"] is not None:
        logits, weights = model(source, target, lengths=lengths, need_weights=True)
        _assert_close(logits, wanted)
        _assert_close(weights, maps)


@every_kind
def test_a_training_step(options: dict[str, Any]) -> None:
    for teacher_forcing in (1.0, 0.5):
        model = _model(**options, dropout=0.2, **DEEP)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        source, target, lengths = _batch()
        rest = {"lengths": lengths, "target_lengths": torch.tensor([3, 4, 2], device=DEVICE)}
        model.loss(source, target, teacher_forcing=teacher_forcing, **rest).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@every_kind
def test_padding_changes_nothing(options: dict[str, Any]) -> None:
    model = _model(**options)
    source, target, lengths = _batch()
    target_lengths = torch.tensor([4, 2, 3], device=DEVICE)
    together = model(source, target, lengths=lengths)
    losses = []
    for row, (length, steps) in enumerate(zip(lengths.tolist(), target_lengths.tolist(), strict=True)):
        alone = source[row : row + 1, :length], target[row : row + 1, :steps]
        _assert_close(model(*alone)[0], together[row, :steps])
        losses.append(model.loss(*alone) * (steps - 1))
    loss = model.loss(source, target, lengths=lengths, target_lengths=target_lengths)
    _assert_close(loss, sum(losses) / (target_lengths - 1).sum())
    columns = torch.arange(5, device=DEVICE)
    other = torch.where(columns < lengths[:, None], source, (source + 1) % SOURCES)
    assert torch.equal(model(other, target, lengths=lengths), together)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": None, **DEEP},
        {"attention": "general", "bidirectional": True},
        {"attention": "additive", "input_feeding": True, "coverage": True},
    ],
    ids=lambda options: str(options["attention"]),
)
def test_the_loss_curve_is_that_of_torchs_modules(options: dict[str, Any]) -> None:
    ours = _model(**options)
    plain = copy.deepcopy(ours)
    # RMSprop and Adam divide by a gradient's size: where that is near 0, they make steps of its rounding.
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (ours, plain)]
    curves: list[list[float]] = [[], []]
    source, target, lengths = _batch()
    for _ in range(50):
        loss = ours.loss(source, target, lengths=lengths)
        logits, _, overlaps = _plain(plain, source, target[:, :-1], lengths)
        wanted = functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
        if ours.config.coverage:
            wanted = wanted + overlaps.mean()
        for curve, optimizer, value in zip(curves, optimizers, (loss, wanted), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curve.append(value.item())
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-5, atol=1e-5)
    assert curves[0][-1] < 0.9 * curves[0][0]


def test_the_steps_run_at_once_where_nothing_is_fed_back() -> None:
    source, target, lengths = _batch()
    for options, calls in (({}, 1), ({"attention": "additive", "coverage": True}, 1), ({"input_feeding": True}, 4)):
        model, count = _model(**options), []
        model.decoder.lstm.register_forward_hook(lambda *_, count=count: count.append(1))
        model(source, target, lengths=lengths)
        assert len(count) == calls
        model(source, target, teacher_forcing=0.5)
        assert len(count) == calls + target.shape[1]


# Feeding back ------------------------------------------------------------------------------------------------


@every_kind
def test_step_by_step_is_the_whole_sequence(options: dict[str, Any]) -> None:
    model: Any = _model(**options, **DEEP).eval()
    protocol: Generator[DecoderState] = model
    source, target, lengths = _batch()
    whole = model(source, target, lengths=lengths)
    index = torch.tensor([2, 0, 0, 1], device=DEVICE)
    logits, state = protocol.start(source, lengths, 4)
    _assert_close(logits, whole[:, 0])
    state = protocol.reorder(state, index)
    for place in range(1, 4):
        logits, state = protocol.step(target[index, place], state)
        _assert_close(logits, whole[index, place])


@every_kind
def test_without_teacher_the_model_reads_what_it_writes(options: dict[str, Any]) -> None:
    model = _model(**options).eval()
    source, target, lengths = _batch()
    written = model(source, target, lengths=lengths, teacher_forcing=0.0).argmax(-1)
    assert torch.equal(generate(model, source, lengths, max_new_tokens=4).tokens, written)
    other = torch.cat([target[:, :1], (target[:, 1:] + 1) % TARGETS], 1)
    assert torch.equal(model(source, other, lengths=lengths, teacher_forcing=0.0).argmax(-1), written)


def test_the_teacher_is_asked_with_the_probability_given() -> None:
    model = _model()
    source, target, _ = _batch()
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(model(source, target, teacher_forcing=0.5))
    assert torch.equal(*drawn)
    read: list[Tensor] = []
    model.decoder.embedding.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    target = torch.full((500, 9), TARGETS - 1, device=DEVICE)
    model.decoder.output.bias.data[0] = 1e4  # what it writes is 0
    model(source[:1].expand(500, -1), target, teacher_forcing=0.25)
    assert (read[0] == TARGETS - 1).all()
    share = (torch.stack(read[1:]) == TARGETS - 1).float().mean().item()
    assert abs(share - 0.25) < 0.03  # 4 standard deviations of 4000 draws


def test_the_schedule_of_the_teacher() -> None:
    assert inverse_sigmoid(0, 100.0) == pytest.approx(100 / 101)
    assert inverse_sigmoid(461, 100.0) == pytest.approx(0.5, abs=0.01)
    assert inverse_sigmoid(10**9, 1.0) == 0.0
    with pytest.raises(ValueError, match=r"speed: got 0\.5"):
        inverse_sigmoid(1, 0.5)
    with pytest.raises(ValueError, match="step: got -1"):
        inverse_sigmoid(-1, 5.0)


@pytest.mark.parametrize("options", [OPTIONS["None"], OPTIONS["additive coverage input_feeding bidirectional"]])
def test_beam_search_finds_what_exhaustive_search_does(options: dict[str, Any]) -> None:
    size, longest, end = 4, 3, 1
    model = Seq2Seq(_config(**options, target_size=size), device=DEVICE).eval()
    model.decoder.output.weight.data *= 5  # decisions that matter
    source, _, lengths = _batch()
    found = generate(
        model, source, lengths, max_new_tokens=longest, end_token=end, strategy="beam", num_beams=size**longest,
        length_penalty=0.6,
    )  # fmt: skip
    for row in range(len(source)):
        best: tuple[float, tuple[int, ...]] = (-float("inf"), ())
        for tokens in itertools.chain(*(itertools.product(range(size), repeat=n) for n in range(1, longest + 1))):
            if end in tokens[:-1] or (len(tokens) < longest and tokens[-1] != end):
                continue
            read = torch.tensor([(0, *tokens[:-1])], device=DEVICE)
            logits = model(source[row : row + 1], read, lengths=lengths[row : row + 1])[0]
            written = torch.tensor(tokens, device=DEVICE)
            chance = logits.log_softmax(-1).gather(1, written[:, None]).sum().item()
            best = max(best, (chance / ((5 + len(tokens)) / 6) ** 0.6, tokens))
        assert found.tokens[row, : found.lengths[row]].tolist() == list(best[1])
        assert found.scores[row].item() == pytest.approx(best[0], rel=1e-5)


# What it is made of ------------------------------------------------------------------------------------------


def test_the_classic() -> None:
    model = Seq2Seq(Seq2SeqConfig.classic(start_token=3), device=DEVICE)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    lstm = {"weight_ih_l0": (512, 64), "weight_hh_l0": (512, 128), "bias_ih_l0": (512,), "bias_hh_l0": (512,)}
    wanted = {f"{part}.{name}": shape for part in ("encoder", "decoder.lstm") for name, shape in lstm.items()}
    assert shapes == {**wanted, "decoder.output.weight": (64, 128), "decoder.output.bias": (64,)}
    source = torch.randn(2, 5, 64, device=DEVICE)
    target = torch.randint(64, (2, 4), device=DEVICE)
    one_hot = functional.one_hot(target, 64).float()
    _, state = nn.LSTM.forward(_torch_lstm(model.encoder), source)
    out, _ = nn.LSTM.forward(_torch_lstm(model.decoder.lstm), one_hot, state)
    _assert_close(model(source, target), model.decoder.output(out))
    assert generate(model, source, max_new_tokens=6, strategy="beam").tokens.shape == (2, 6)


def test_the_classic_learns_to_reverse() -> None:
    source, target = classic_seq2seq.pairs(count=320, length=2, symbols=4)
    assert torch.equal(source.argmax(-1).flip(1), target[:, 1:-1])
    model = Seq2Seq(Seq2SeqConfig.classic(classic_seq2seq.START), device=DEVICE)
    loss, exact = classic_seq2seq.train(model, source.to(DEVICE), target.to(DEVICE), epochs=100)
    assert loss < 0.1
    assert exact > 0.95


def _torch_lstm(lstm: Any) -> nn.LSTM:
    made = nn.LSTM(lstm.input_size, lstm.hidden_size, batch_first=True, device=DEVICE)
    made.load_state_dict(lstm.state_dict())
    return made


@pytest.mark.parametrize("attention", [None, "general"])
def test_tied_embeddings(attention: str | None) -> None:
    output = _model(tie_embeddings="output", attention=attention)
    assert output.decoder.output.weight is output.decoder.embedding.weight
    assert output.encoder_embedding.weight is not output.decoder.embedding.weight
    every = _model(tie_embeddings="all", attention=attention, source_size=TARGETS, source_embedding=6)
    assert every.encoder_embedding.weight is every.decoder.output.weight
    source, target, lengths = _batch()
    _assert_close(output(source, target, lengths=lengths), _plain(output, source, target, lengths)[0])
    copied = copy.deepcopy(every)
    assert copied.encoder_embedding.weight is copied.decoder.output.weight


def test_a_bridge_where_the_states_differ() -> None:
    assert _model().bridge is None
    assert _model(**{**DEEP, "decoder_layers": 2}).bridge is None
    for options in ({"bidirectional": True}, {"encoder_size": 5}, DEEP):
        assert _model(**options).bridge is not None, options
