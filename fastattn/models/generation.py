"""Decoding: greedy, sampling and beam search, from any model that keeps a state between tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastattn.models import checks

State = TypeVar("State")

_STRATEGIES = ("greedy", "sample", "beam")


class Generator(Protocol[State]):
    """What ``generate`` asks of a model. ``State`` is the model's own: a KV cache, a recurrent state.

    A row is one sequence being written. ``start`` opens one row for each sequence of the batch; ``reorder`` repeats,
    drops and permutes rows, so that beam search needs nothing else. All three run under ``torch.no_grad()`` with the
    model in eval mode. A state is used once: ``step`` and ``reorder`` may write into what they are given.
    """

    def start(self, source: Tensor, lengths: Tensor, max_new_tokens: int) -> tuple[Tensor, State]:
        """Read the input and predict the first new token.

        A model with an encoder encodes ``source`` and feeds its own start token to the decoder; a decoder-only model
        reads ``source`` as the prompt.

        Args:
            source: (B, S) int64 tokens, padded on the right; S >= 1. The numbers behind a length mean nothing, and
                are valid tokens. Or features (B, S, F), of a model that takes such.
            lengths: (B,) int64, 1 <= length <= S, on source's device.
            max_new_tokens: ``step`` will be called at most max_new_tokens - 1 times: the room a cache needs.

        Returns:
            Logits (B, V) of the first new token, floating, and the state.

        Raises:
            ValueError: a token outside of the vocabulary, or more positions than the model has, naming the argument.
        """
        ...

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (N, V) of the token that follows tokens (N,), int64, in each of the state's N rows; the next state."""
        ...

    def reorder(self, state: State, index: Tensor) -> State:
        """The state whose row i is row index[i] of ``state``; index (M,), int64, for any number M of rows."""
        ...


@dataclass(frozen=True)
class Generated:
    """What ``generate`` wrote.

    Attributes:
        tokens: (B, T) int64, T <= max_new_tokens, the end token included, pad_token behind it.
        lengths: (B,) int64, tokens up to the end token.
        scores: (B,) float32, log p(tokens | source) under the model, of whatever strategy; of beam search divided by
            the length penalty.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor


def generate(
    model: Generator[Any],
    source: Tensor,
    lengths: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    max_new_tokens: int,
    end_token: int | None = None,
    pad_token: int = 0,
    strategy: str = "greedy",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    num_beams: int = 4,
    length_penalty: float = 0.6,
) -> Generated:
    """Continue the prompts, or answer the sources, of a batch.

    - "greedy" takes the most probable token at every step.
    - "sample" draws from softmax(logits / temperature), cut to the ``top_k`` most probable tokens and to the smallest
      set of probability ``top_p`` or more (nucleus sampling, Holtzman et al. 2020).
    - "beam" keeps the ``num_beams`` most probable beginnings and returns the ending with the highest

          log p(Y) / ((5 + |Y|) / 6)^length_penalty      (Wu et al. 2016, equation 14)

      where Y ended by itself or reached max_new_tokens. A sequence stops when nothing in its beam can still win.

    Args:
        model: a Transformer with a decoder, a Seq2Seq, or anything else that is a ``Generator``. An nn.Module is put
            in eval mode meanwhile. Its ``start`` and ``step`` are called, not its ``forward``, be that compiled or not:
            ``model.step = torch.compile(model.step, dynamic=True)`` compiles decoding.
        source: (B, S), int64 or int32; or features (B, S, F), of a model that takes such.
        lengths: (B,), int64 or int32, of sequences padded on the right; None is S each.
        key_padding_mask: (B, S), boolean, True at real tokens, instead of ``lengths``: for padding on the left, on the
            right or on both sides. The result does not depend on the side.
        max_new_tokens: at most so many.
        end_token: ends a sequence; None writes max_new_tokens each.
        pad_token: what stands behind an end token.
        strategy: "greedy", "sample" or "beam".
        temperature, top_k, top_p, generator: of "sample". A generator, on source's device, makes it reproducible.
        num_beams, length_penalty: of "beam"; penalty 0 takes the most probable Y, 1 nearly the best mean.

    Returns:
        A ``Generated``: tokens (B, T), lengths (B,), scores (B,).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed; also those of ``model.start``.
    """
    _check_settings(max_new_tokens, strategy, temperature, top_k, top_p, num_beams, length_penalty)
    source, lengths = _padded_on_the_right(source, lengths, key_padding_mask)
    with torch.no_grad(), _evaluating(model):
        logits, state = model.start(source, lengths, max_new_tokens)
        for name, token in (("end_token", end_token), ("pad_token", pad_token)):
            _check_token(name, token, logits.shape[-1])
        if strategy == "beam":
            return _beam_search(
                model, logits, state, max_new_tokens, end_token, pad_token, num_beams, length_penalty
            )  # fmt: skip
        sampling = None
        if strategy == "sample":
            sampling = _Sampling(temperature, top_k, top_p, generator)
        return _one_by_one(model, logits, state, max_new_tokens, end_token, pad_token, sampling)


@dataclass(frozen=True)
class _Sampling:
    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def draw(self, logits: Tensor) -> Tensor:
        """Tokens (B,) for logits (B, V)."""
        logits, order = (logits.float() / self.temperature).sort(descending=True, stable=True)
        probabilities = logits.softmax(-1)
        if self.top_k is not None:
            probabilities[:, self.top_k :] = 0.0
        if self.top_p is not None:
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
            # A token stays while those before it have less than top_p: the first always does.
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        drawn = torch.multinomial(probabilities, 1, generator=self.generator)
        return order.gather(1, drawn).squeeze(1)


def _one_by_one(
    model: Generator[State],
    logits: Tensor,
    state: State,
    max_new_tokens: int,
    end_token: int | None,
    pad_token: int,
    sampling: _Sampling | None,
) -> Generated:
    """Greedy decoding, or sampling."""
    written: list[Tensor] = []
    done = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    lengths = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    scores = torch.zeros(logits.shape[0], device=logits.device)
    while True:
        token = logits.argmax(-1) if sampling is None else sampling.draw(logits)
        gained = logits.float().log_softmax(-1).gather(1, token[:, None]).squeeze(1)
        scores = torch.where(done, scores, scores + gained)
        token = token.masked_fill(done, pad_token)
        lengths += ~done
        written.append(token)
        if end_token is not None:
            done = done | (token == end_token)
        if len(written) == max_new_tokens or bool(done.all()):
            return Generated(torch.stack(written, 1), lengths, scores)
        logits, state = model.step(token, state)


def _beam_search(
    model: Generator[State],
    logits: Tensor,
    state: State,
    max_new_tokens: int,
    end_token: int | None,
    pad_token: int,
    beams: int,
    length_penalty: float,
) -> Generated:
    batch, vocab_size = logits.shape
    device = logits.device
    first_rows = torch.arange(batch, device=device)[:, None] * beams  # of each sequence
    state = model.reorder(state, torch.arange(batch, device=device).repeat_interleave(beams))
    logits = logits.repeat_interleave(beams, 0)
    # All beams of a sequence begin the same: the others must not be taken for alternatives.
    scores = torch.full((batch, beams), -math.inf, device=device)
    scores[:, 0] = 0.0
    written = torch.empty(batch, beams, 0, dtype=torch.int64, device=device)
    best = Generated(
        torch.full((batch, max_new_tokens), pad_token, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
        torch.full((batch,), -math.inf, device=device),
    )
    for length in range(1, max_new_tokens + 1):
        gained = logits.float().log_softmax(-1).view(batch, beams, vocab_size)
        candidates = (scores[:, :, None] + gained).flatten(1)
        # At most one ending in each beam: twice as many candidates leave enough beginnings.
        values, places = candidates.topk(min(2 * beams, candidates.shape[1]))
        beam, token = places // vocab_size, places % vocab_size
        sequences = torch.cat((_take(written, beam), token[:, :, None]), 2)
        last = length == max_new_tokens
        ended = torch.full_like(token, last, dtype=torch.bool)
        if end_token is not None:
            ended = ended | (token == end_token)
        penalty = ((5 + length) / 6) ** length_penalty
        best = _better(best, values.masked_fill(~ended, -math.inf) / penalty, sequences, pad_token)
        if last:
            break
        scores, chosen = values.masked_fill(ended, -math.inf).topk(min(beams, values.shape[1]))
        if scores.shape[1] < beams:
            missing = beams - scores.shape[1]
            scores = nn.functional.pad(scores, (0, missing), value=-math.inf)
            chosen = nn.functional.pad(chosen, (0, missing))
        # A score only falls from here on, and is divided by no more than the penalty of the longest.
        hope = scores[:, 0] / ((5 + max_new_tokens) / 6) ** length_penalty
        if bool((best.scores >= hope).all()):
            break
        written = _take(sequences, chosen)
        state = model.reorder(state, (first_rows + beam.gather(1, chosen)).flatten())
        logits, state = model.step(token.gather(1, chosen).flatten(), state)
    longest = int(best.lengths.max()) if batch else 0
    return Generated(best.tokens[:, :longest], best.lengths, best.scores)


def _take(sequences: Tensor, index: Tensor) -> Tensor:
    """(B, M, T): sequences index (B, M) of each (K, T) in (B, K, T)."""
    return sequences.gather(1, index[:, :, None].expand(-1, -1, sequences.shape[2]))


def _better(best: Generated, scores: Tensor, sequences: Tensor, pad_token: int) -> Generated:
    """The best so far, or the best of sequences (B, M, T) with scores (B, M), where that is higher."""
    score, place = scores.max(1)
    higher = score > best.scores
    found = _take(sequences, place[:, None]).squeeze(1)
    found = nn.functional.pad(found, (0, best.tokens.shape[1] - found.shape[1]), value=pad_token)
    return Generated(
        torch.where(higher[:, None], found, best.tokens),
        best.lengths.masked_fill(higher, sequences.shape[2]),
        torch.where(higher, score, best.scores),
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A module in eval mode, and afterwards every part of it in the mode it was."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _padded_on_the_right(
    source: Tensor, lengths: Tensor | None, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The source with its real tokens first, and their numbers (B,), int64."""
    if not isinstance(source, Tensor):
        raise TypeError(f"source: got {type(source).__name__}, expected a torch.Tensor")
    if source.dim() not in (2, 3) or source.shape[1] == 0:
        raise ValueError(f"source: got shape {tuple(source.shape)}, expected (B, S) or (B, S, F) with S >= 1")
    if source.dtype == torch.int32:
        source = source.long()
    if lengths is not None and key_padding_mask is not None:
        raise ValueError("key_padding_mask: got a tensor beside lengths, expected one of the two")
    if lengths is not None:
        checks.check_lengths("lengths", lengths, source)
        return source, lengths.long()
    if key_padding_mask is None:
        return source, torch.full(source.shape[:1], source.shape[1], device=source.device)
    checks.check_padding_mask("key_padding_mask", key_padding_mask, source[:, :, 0] if source.dim() == 3 else source)
    lengths = key_padding_mask.sum(1)
    positions = torch.arange(source.shape[1], device=source.device)
    first = key_padding_mask.to(torch.uint8).argmax(1)
    index = (positions + first[:, None]) % source.shape[1]
    if not torch.equal(key_padding_mask.gather(1, index), positions < lengths[:, None]):
        raise ValueError("key_padding_mask: got padding between real tokens, expected it on the left and right alone")
    return source[torch.arange(source.shape[0], device=source.device)[:, None], index], lengths


def _check_token(name: str, token: int | None, vocab_size: int) -> None:
    if token is None:
        return
    if isinstance(token, bool) or not isinstance(token, int):
        raise TypeError(f"{name}: got {type(token).__name__}, expected an integer")
    if not 0 <= token < vocab_size:
        raise ValueError(f"{name}: got {token}, allowed are 0 to {vocab_size - 1}, the vocabulary of the model")


def _check_settings(
    max_new_tokens: int,
    strategy: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    num_beams: int,
    length_penalty: float,
) -> None:
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}, allowed are {', '.join(map(repr, _STRATEGIES))}")
    if strategy != "sample" and (temperature != 1.0 or top_k is not None or top_p is not None):
        raise ValueError(f"temperature, top_k, top_p: allowed with strategy='sample' only, got {strategy!r}")
    for name, number in (("max_new_tokens", max_new_tokens), ("top_k", top_k), ("num_beams", num_beams)):
        if name == "top_k" and number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name}: got {type(number).__name__}, expected an integer")
        if number < 1:
            raise ValueError(f"{name}: got {number}, expected at least 1")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, expected a finite number above 0")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: got {top_p}, expected more than 0 and at most 1")
    if not 0.0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty: got {length_penalty}, expected a finite number of at least 0")
