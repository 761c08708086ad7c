"""generate: beam search against exhaustive search, cached against uncached, padding, sampling, bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_cases import small, tiny_gpt2, tokens

from fastattn.models import Generator, Seq2Seq, Seq2SeqConfig, Transformer, generate

END, LENGTHS = 1, torch.tensor([5, 1, 3])
STRATEGIES: dict[str, dict[str, Any]] = {"greedy": {}, "sample": {"temperature": 1.5}, "beam": {"num_beams": 3}}


def model(kind: str, vocab_size: int = 13) -> Any:
    """A model whose predictions are far from uniform and depend on all it has read and written."""
    if kind == "seq2seq":
        made: nn.Module = Seq2Seq(
            Seq2SeqConfig(
                source_size=vocab_size, target_size=vocab_size, source_embedding=8, target_embedding=8, hidden_size=8
            )
        )  # fmt: skip
    else:
        made = small(kind, vocab_size=vocab_size, tie_embeddings=False)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1:
                # The source alone would decide, and one token be repeated.
                parameter.copy_(torch.randn_like(parameter) * (0.1 if "cross_attn" in name else 0.6))
    return made.eval()


class Uncached:
    """A Transformer that reads everything again at every step."""

    def __init__(self, transformer: Transformer) -> None:
        self.model = transformer

    def start(self, source: Tensor, lengths: Tensor, max_new_tokens: int) -> tuple[Tensor, Any]:
        written = torch.full((len(source), 1), self.model.config.start_token)
        if not self.model.encoder:
            written = written[:, :0]
        return self._logits((source, lengths, written))

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        source, lengths, written = state
        return self._logits((source, lengths, torch.cat((written, tokens[:, None]), 1)))

    def reorder(self, state: Any, index: Tensor) -> Any:
        return tuple(part[index] for part in state)

    def _logits(self, state: Any) -> tuple[Tensor, Any]:
        source, lengths, written = state
        if self.model.encoder:
            return self.model(source, written, lengths=lengths)[:, -1], state
        rows = [
            self.model(torch.cat((prompt[:length], new))[None])[0, -1]
            for prompt, length, new in zip(source, lengths, written, strict=True)
        ]
        return torch.stack(rows), state


# Cached against uncached --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", "both"])
def test_every_step_gives_the_logits_of_reading_everything_again(kind: str) -> None:
    cached = model(kind)
    uncached, source, steps = Uncached(cached), tokens(3, 5), tokens(6, 3)
    with torch.no_grad():
        states = [path.start(source, LENGTHS, 7) for path in (cached, uncached)]
        for step in steps:
            torch.testing.assert_close(states[0][0], states[1][0], rtol=1e-5, atol=2e-5)
            states = [path.step(step, state) for path, (_, state) in zip((cached, uncached), states, strict=True)]
        torch.testing.assert_close(states[0][0], states[1][0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["decoder", "both"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_cache_changes_no_token(kind: str, strategy: str) -> None:
    cached, source = model(kind), tokens(3, 5)
    results = [
        generate(
            path, source, LENGTHS, max_new_tokens=8, end_token=END, strategy=strategy,
            generator=torch.Generator().manual_seed(3), **STRATEGIES[strategy],
        )
        for path in (cached, Uncached(cached))
    ]  # fmt: skip
    assert torch.equal(results[0].tokens, results[1].tokens)
    torch.testing.assert_close(results[0].scores, results[1].scores, rtol=1e-5, atol=1e-4)


def test_greedy_writes_what_transformers_writes() -> None:
    theirs = tiny_gpt2()
    ours = Transformer.from_gpt2(theirs.state_dict(), num_heads=2)
    source = tokens(3, 5)
    left = torch.arange(5) >= 5 - LENGTHS[:, None]
    wanted = theirs.generate(
        source, attention_mask=left.long(), max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0
    )  # fmt: skip
    got = generate(ours, source, key_padding_mask=left, max_new_tokens=9)
    assert torch.equal(got.tokens, wanted[:, 5:])


# Beam search --------------------------------------------------------------------------------------


def exhaustive(path: Generator[Any], source: Tensor, penalty: float) -> tuple[list[int], float]:
    """The best of all sequences of up to four tokens for one source (1, S), of a vocabulary of four."""
    beginnings = torch.tensor(list(itertools.product((0, 2, 3), repeat=3)))  # (27, 3), each in a row of its own
    lengths = torch.full((27,), source.shape[1])
    logits, state = path.start(source.expand(27, -1), lengths, 4)
    scores, best = torch.zeros(27), ([], -math.inf)
    for length in range(1, 5):
        gained = logits.log_softmax(-1)
        for row, beginning in enumerate(beginnings[:, : length - 1].tolist()):
            for token in range(4) if length == 4 else (END,):
                total = (scores[row] + gained[row, token]).item() / ((5 + length) / 6) ** penalty
                if total > best[1]:
                    best = ([*beginning, token], total)
        if length < 4:
            scores += gained.gather(1, beginnings[:, length - 1 : length]).squeeze(1)
            logits, state = path.step(beginnings[:, length - 1], state)
    return best


@pytest.mark.parametrize("kind", ["decoder", "both", "seq2seq"])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 3.0])
@torch.no_grad()
def test_a_wide_beam_finds_what_exhaustive_search_finds(kind: str, penalty: float) -> None:
    path, source = model(kind, 4), torch.tensor(list(itertools.product(range(4), repeat=2)))
    settings: dict[str, Any] = {"max_new_tokens": 4, "end_token": END, "strategy": "beam", "length_penalty": penalty}
    # As many as there are beginnings of three tokens: nothing is ever dropped.
    wide = generate(path, source, num_beams=27, **settings)
    narrow = generate(path, source, num_beams=2, **settings)
    for row in range(len(source)):
        sequence, score = exhaustive(path, source[row : row + 1], penalty)
        length = int(wide.lengths[row])
        assert wide.tokens[row, :length].tolist() == sequence
        assert wide.tokens[row, length:].eq(0).all()
        assert wide.scores[row].item() == pytest.approx(score, rel=1e-4)
        assert narrow.scores[row] <= wide.scores[row] + 1e-4


def test_a_beam_follows_the_state_of_each_of_its_sequences() -> None:
    path, source = model("both"), tokens(8, 5)
    beam = generate(path, source, max_new_tokens=5, strategy="beam", num_beams=4, length_penalty=0.0)
    target = torch.cat((torch.zeros(8, 1).long(), beam.tokens[:, :-1]), 1)
    with torch.no_grad():
        gained = path(source, target).log_softmax(-1).gather(2, beam.tokens[:, :, None])
    torch.testing.assert_close(beam.scores, gained.sum((1, 2)), rtol=1e-5, atol=1e-4)
    greedy = generate(path, source, max_new_tokens=5)
    assert (beam.scores > greedy.scores + 0.01).any()


def test_an_early_end_does_not_stop_what_can_still_win() -> None:
    probabilities = torch.tensor([[1e-9, 0.4, 0.35, 0.25], [0.25] * 4, [1e-9, 1.0, 1e-9, 1e-9], [0.25] * 4])
    settings: dict[str, Any] = {"max_new_tokens": 10, "end_token": END, "strategy": "beam", "num_beams": 1}
    source = torch.zeros(1, 1).long()
    # log 0.35 / (7 / 6)^2 is above log 0.4, though the end was the likelier token.
    assert generate(Chain(probabilities.log()), source, length_penalty=2.0, **settings).tokens.tolist() == [[2, END]]
    assert generate(Chain(probabilities.log()), source, length_penalty=0.0, **settings).tokens.tolist() == [[END]]


def test_one_beam_is_greedy_where_nothing_ends() -> None:
    path, source = model("both"), tokens(3, 5)
    greedy = generate(path, source, LENGTHS, max_new_tokens=6)
    beam = generate(path, source, LENGTHS, max_new_tokens=6, strategy="beam", num_beams=1, length_penalty=0.0)
    assert torch.equal(greedy.tokens, beam.tokens)
    torch.testing.assert_close(greedy.scores, beam.scores)


# Batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", "both", "seq2seq"])
@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_padding_and_batching_change_nothing(kind: str, strategy: str) -> None:
    path, source = model(kind), tokens(3, 5)
    settings: dict[str, Any] = {"max_new_tokens": 7, "end_token": END, "strategy": strategy}
    right = generate(path, source, LENGTHS, **settings)
    rolled = torch.stack([row.roll(5 - int(length)) for row, length in zip(source, LENGTHS, strict=True)])
    left = generate(path, rolled, key_padding_mask=torch.arange(5) >= 5 - LENGTHS[:, None], **settings)
    assert torch.equal(left.tokens, right.tokens)
    assert torch.equal(left.scores, right.scores)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = generate(path, source[row : row + 1, :length].int(), **settings)
        written = int(alone.lengths[0])
        assert right.lengths[row] == written
        assert torch.equal(right.tokens[row, :written], alone.tokens[0, :written])
        torch.testing.assert_close(right.scores[row], alone.scores[0], rtol=1e-5, atol=1e-4)


@dataclass
class Chain:
    """Next tokens depend on the last one alone: logits (V, V); row 0 begins. Counts its steps."""

    logits: Tensor
    steps: int = 0

    def start(self, source: Tensor, lengths: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        return self.logits[torch.zeros_like(lengths)], lengths

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        assert tokens.shape == state.shape
        self.steps += 1
        return self.logits[tokens], state

    def reorder(self, state: Tensor, index: Tensor) -> Tensor:
        return state[index]


def always(*order: int) -> Chain:
    """0 -> order[0] -> order[1] ..., each nearly certain."""
    logits = torch.zeros(4, 4)
    for before, after in itertools.pairwise((0, *order)):
        logits[before, after] = 20.0
    return Chain(logits)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_stops_when_every_sequence_has_ended(strategy: str) -> None:
    chain = always(2, 3, END)
    done = generate(
        chain, torch.zeros(2, 1).long(), max_new_tokens=50, end_token=END, strategy=strategy, **STRATEGIES[strategy]
    )  # fmt: skip
    assert done.tokens.tolist() == [[2, 3, END]] * 2
    assert done.lengths.tolist() == [3, 3]
    assert chain.steps < 10
    chain = always(2, 3, END)
    cut = generate(chain, torch.zeros(2, 1).long(), max_new_tokens=2, end_token=END, strategy=strategy)
    assert cut.tokens.tolist() == [[2, 3]] * 2
    assert chain.steps == 1


def test_what_stands_behind_the_end_is_padding_and_scores_stop_there() -> None:
    path, source = model("both"), tokens(8, 5)
    free = generate(path, source, max_new_tokens=9)
    end = int(free.tokens[0, 2])
    ended = generate(path, source, max_new_tokens=9, end_token=end, pad_token=12)
    for row in range(8):
        found = (free.tokens[row] == end).nonzero()
        length = int(found[0, 0]) + 1 if len(found) else ended.tokens.shape[1]
        assert ended.lengths[row] == length
        assert torch.equal(ended.tokens[row, :length], free.tokens[row, :length])
        assert ended.tokens[row, length:].eq(12).all()
        alone = generate(path, source[row : row + 1], max_new_tokens=length)
        torch.testing.assert_close(ended.scores[row], alone.scores[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["decoder", "both"])
def test_a_module_is_put_back_into_the_modes_it_had(kind: str) -> None:
    path = small(kind, dropout=0.5).train()
    path.embeddings.eval()
    results = [generate(path, tokens(1, 3) * 0, max_new_tokens=4, strategy="beam") for _ in range(2)]
    assert torch.equal(results[0].scores, results[1].scores)
    assert path.training
    assert not path.embeddings.training
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(path, tokens(2, 3), max_new_tokens=4).tokens.shape == (2, 4)


# Sampling -----------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1e-6}, [0, 1, 0, 0]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        # Of the three most probable, 4 / 9 and 3 / 9 make up 0.7.
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
    ],
)  # fmt: skip
def test_samples_have_the_distribution(settings: dict[str, Any], wanted: list[float]) -> None:
    count = 20000
    chain = Chain(PROBABILITIES.log().expand(4, 4))
    drawn = generate(chain, torch.zeros(count // 2, 1).long(), max_new_tokens=2, strategy="sample", **settings).tokens
    shares = drawn.flatten().bincount(minlength=4) / count
    expected = torch.tensor(wanted)
    # Five standard deviations; and nothing at all of what was cut off.
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all(), shares


def test_a_generator_makes_samples_reproducible() -> None:
    path, source = model("decoder"), tokens(4, 3)
    draws = [
        generate(
            path, source, max_new_tokens=8, strategy="sample", generator=torch.Generator().manual_seed(seed)
        ).tokens
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    greedy = generate(path, source, max_new_tokens=8)
    one = generate(path, source, max_new_tokens=8, strategy="sample", top_k=1)
    assert torch.equal(one.tokens, greedy.tokens)
    assert torch.equal(one.scores, greedy.scores)


# Bad input ----------------------------------------------------------------------------------------


def run(kind: str = "both", source: Any = None, **settings: Any) -> Any:
    given = torch.zeros(2, 3).long() if source is None else source
    return generate(small(kind, max_positions=6), given, **{"max_new_tokens": 4} | settings)


TRUE = torch.ones(2, 3).bool()
BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("list", lambda: run(source=[[1]]), TypeError, "source: got list, expected a torch.Tensor"),
    ("1-D", lambda: run(source=tokens(3)), ValueError, r"source: got shape \(3,\)"),
    ("empty", lambda: run(source=tokens(2, 0)), ValueError, r"source: got shape \(2, 0\)"),
    ("unknown", lambda: run(source=tokens(2, 3) + 13), ValueError, "source: got token .* allowed are 0 to 12"),
    ("unknown", lambda: run("decoder", tokens(2, 3) + 13), ValueError, "source: got token .* allowed are 0 to 12"),
    ("encoder", lambda: run("encoder"), ValueError, "model: got an encoder without a decoder"),
    (
        "too long", lambda: run("decoder", max_new_tokens=5), ValueError,
        "source, max_new_tokens: got 7 positions, allowed are 6, max_positions",
    ),
    (
        "too long",
        lambda: generate(small(positions="learned", max_positions=6), tokens(2, 3), max_new_tokens=7),
        ValueError, "max_new_tokens: got 7 positions",
    ),
    ("length 0", lambda: run(lengths=torch.tensor([0, 3])), ValueError, "lengths: got length 0, allowed are 1 to 3"),
    ("lengths' batch", lambda: run(lengths=torch.tensor([3])), ValueError, r"lengths: got shape \(1,\)"),
    (
        "both paddings", lambda: run(lengths=torch.tensor([3, 3]), key_padding_mask=TRUE), ValueError,
        "key_padding_mask: got a tensor beside lengths",
    ),
    (
        "a hole", lambda: run(key_padding_mask=torch.tensor([[True, False, True]] * 2)), ValueError,
        "key_padding_mask: got padding between real tokens",
    ),
    ("no token", lambda: run(key_padding_mask=~TRUE), ValueError, "key_padding_mask: got no real token in sequence 0"),
    ("strategy", lambda: run(strategy="best"), ValueError, "strategy: got 'best', allowed are 'greedy', 'sample'"),
    ("greedy top_k", lambda: run(top_k=3), ValueError, "allowed with strategy='sample' only, got 'greedy'"),
    ("max_new_tokens 0", lambda: run(max_new_tokens=0), ValueError, "max_new_tokens: got 0, expected at least 1"),
    ("max_new_tokens 1.5", lambda: run(max_new_tokens=1.5), TypeError, "max_new_tokens: got float"),
    ("end", lambda: run(end_token=13), ValueError, "end_token: got 13, allowed are 0 to 12"),
    ("end's type", lambda: run(end_token="."), TypeError, "end_token: got str, expected an integer"),
    ("pad", lambda: run(pad_token=-1), ValueError, "pad_token: got -1, allowed are 0 to 12"),
    ("temperature", lambda: run(strategy="sample", temperature=0.0), ValueError, "temperature: got 0.0"),
    ("top_k 0", lambda: run(strategy="sample", top_k=0), ValueError, "top_k: got 0, expected at least 1"),
    ("top_p 0", lambda: run(strategy="sample", top_p=0.0), ValueError, "top_p: got 0.0"),
    ("top_p 2", lambda: run(strategy="sample", top_p=2.0), ValueError, "top_p: got 2.0"),
    ("num_beams", lambda: run(strategy="beam", num_beams=0), ValueError, "num_beams: got 0, expected at least 1"),
    ("penalty", lambda: run(strategy="beam", length_penalty=-1.0), ValueError, "length_penalty: got -1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
