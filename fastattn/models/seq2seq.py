"""Sequence to sequence with long short-term memory: encoder, attention, decoder."""

from __future__ import annotations

import dataclasses
import math
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastattn.models import checkpoint, static_packing
from fastattn.models.checks import check_tokens
from fastattn.models.seq2seq_checks import check_features, check_probability, known_lengths
from fastattn.models.seq2seq_config import Seq2SeqConfig
from fastattn.models.seq2seq_decoder import Decoder, DecoderState, Step, stack
from fastattn.modules.lstm import LSTM
from fastattn.modules.recurrent import State


class Seq2Seq(nn.Module):
    """Encoder and decoder of long short-term memory with attention between them.

        h_i = LSTM(h_{i-1}, x_i)                    encoder, over the source, one or both directions
        s_t = LSTM(s_{t-1}, y_{t-1})                decoder, s_0 from the last h by ``bridge``
        a_ti = softmax_i score(s_t, h_i)            attention
        c_t = sum_i a_ti h_i
        p(y_t) = softmax(W tanh(W_c [c_t; s_t]))

    This is Luong, Pham and Manning 2015; without attention p(y_t) = softmax(W s_t), Sutskever, Vinyals and Le 2014.
    With ``input_feeding`` the decoder reads what was attended to, and its steps wait for each other:

        s_t = LSTM(s_{t-1}, [y_{t-1}; tanh(W_c [c_{t-1}; s_{t-1}])])                     Luong's scores
        a_ti = softmax_i score(s_{t-1}, h_i),   s_t = LSTM(s_{t-1}, [y_{t-1}; c_t])      additive

    The latter is Bahdanau, Cho and Bengio 2015, with W_c in place of their maxout layer.

    Where nothing is fed back (no input feeding, teacher forcing of 1) the decoder's LSTM runs over all steps in one
    call, and attention over all its states in another. ``start``, ``step`` and ``reorder`` serve
    ``fastattn.models.generation.generate``.

    Under torch.compile and torch.export one graph serves all batches and lengths. Steps that wait for each other are
    unrolled in it: with input feeding, coverage or a teacher forcing below 1 it serves one length of the target. What
    tokens and lengths hold is not checked there.

    Args:
        config: sizes and options.
        device, dtype: of the parameters; float32 and float64, and half precision as the modules take it.

    Attributes:
        encoder_embedding: nn.Embedding, or None: the source is real features.
        encoder: LSTM.
        bridge: two nn.Linear, for h and c, from the encoder's last states, all layers and directions of a sequence in
            one vector, to the decoder's first; None where these have the same sizes, and are the same.
        decoder: Decoder.

    Raises:
        TypeError: config is no Seq2SeqConfig.
    """

    def __init__(
        self, config: Seq2SeqConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not isinstance(config, Seq2SeqConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a Seq2SeqConfig")
        self.config = config
        self.decoder = Decoder(config, device, dtype)
        self.encoder_embedding: nn.Embedding | None = None
        if config.tie_embeddings == "all":
            self.encoder_embedding = self.decoder.embedding
        elif config.source_embedding is not None:
            self.encoder_embedding = nn.Embedding(
                config.source_size, config.source_embedding, device=device, dtype=dtype
            )
        between = config.dropout if config.encoder_layers > 1 else 0.0  # torch warns where there is no between
        self.encoder = LSTM(
            config.source_embedding or config.source_size, config.direction_size, config.encoder_layers,
            batch_first=True, dropout=between, bidirectional=config.bidirectional, device=device, dtype=dtype,
        )  # fmt: skip
        last = (config.encoder_layers * config.directions, config.direction_size)
        first = (config.decoder_layers, config.hidden_size)
        self.bridge: nn.ModuleList | None = None
        if config.bidirectional or last != first:
            self.bridge = nn.ModuleList(
                nn.Linear(math.prod(last), math.prod(first), device=device, dtype=dtype) for _ in range(2)
            )

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        *,
        lengths: Tensor | None = None,
        teacher_forcing: float = 1.0,
        need_weights: bool = False,
    ) -> Any:
        """Logits of the token after each token of the target.

        Args:
            source: (B, S), int64 or int32 tokens; with ``source_embedding=None`` (B, S, source_size), of the
                parameters' dtype.
            target: (B, T), int64 or int32: what the decoder reads, beginning with the start token and padded on the
                right. It needs no lengths: a step never sees the padding behind it.
            lengths: (B,), int64 or int32, steps of each source, from 1 to S, padded on the right; None is S.
            teacher_forcing: probability that a step after the first reads the target's token in place of the likeliest
                one of the step before, drawn for every token (Bengio, Vinyals, Jaitly and Shazeer 2015); at 0 of the
                target only the first column and T count. ``inverse_sigmoid`` is that paper's schedule of it.
            need_weights: also return the attention weights.

        Returns:
            Logits (B, T, target_size) of the next token; with ``need_weights`` a pair of them and the attention weights
            (B, T, S). What stands at padding means nothing.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        if need_weights and self.config.attention is None:
            raise ValueError("need_weights: got True, expected False for a model with attention=None")
        steps = self._steps(source, target, lengths, teacher_forcing, need_weights)
        logits = self.decoder.output(steps.readout)
        return (logits, steps.weights) if need_weights else logits

    def loss(
        self,
        source: Tensor,
        target: Tensor,
        *,
        lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
        teacher_forcing: float = 1.0,
        coverage_weight: float = 1.0,
    ) -> Tensor:
        """Cross-entropy of every token of the target but the first, the mean over all tokens of the batch.

        With coverage, plus coverage_weight sum_i min(a_ti, sum_{t' < t} a_t'i) (See, Liu and Manning 2017, equations 12
        and 13).

        Args:
            source, lengths, teacher_forcing: as in ``forward``.
            target: (B, T), int64 or int32, T >= 2: from the start token to the end token.
            target_lengths: (B,), int64 or int32, from 2 to T; None is T. What stands behind them does not count.
            coverage_weight: lambda, of a model with coverage.

        Returns:
            A scalar.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        check_tokens("target", target, self.config.target_size)
        if target.shape[1] < 2:
            raise ValueError(f"target: got shape {tuple(target.shape)}, expected at least 2 tokens, a start and an end")
        known = known_lengths("target_lengths", target_lengths, target)
        if known is not None and not torch.compiler.is_compiling() and known.min() < 2:
            raise ValueError(f"target_lengths: got {int(known.min())}, allowed are 2 to {target.shape[1]}")
        steps = self._steps(source, target[:, :-1], lengths, teacher_forcing, False)
        logits = self.decoder.output(steps.readout)
        losses = functional.cross_entropy(logits.transpose(1, 2), target[:, 1:].long(), reduction="none")
        if steps.overlap is not None:
            losses = losses + coverage_weight * steps.overlap
        if known is None:
            return losses.mean()
        counted = _mask(known - 1, losses)
        return losses.masked_fill(~counted, 0.0).sum() / counted.sum()

    # Generation ----------------------------------------------------------------------------------------------

    def start(self, source: Tensor, lengths: Tensor, max_new_tokens: int) -> tuple[Tensor, DecoderState]:
        """Encode the source, and read the start token: logits (B, target_size) of the first token, and the state.

        Args:
            source, lengths: as in ``forward``.
            max_new_tokens: of no interest to a state whose size does not grow.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        self._check_source(source)
        state = self._encode(source, lengths)
        return self.step(torch.full(source.shape[:1], self.config.start_token, device=source.device), state)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Logits (N, target_size) of what follows tokens (N,), int64, one a row of the state; and the next state.

        Raises TypeError or ValueError for anything but tokens of the vocabulary.
        """
        check_tokens("tokens", tokens.unsqueeze(-1), self.config.target_size)
        step, state = self.decoder.step(tokens, state)
        logits: Tensor = self.decoder.output(step.readout)
        return logits, state

    def reorder(self, state: DecoderState, index: Tensor) -> DecoderState:
        """The state whose row i is row index[i] of ``state``; index (M,), int64."""
        return state.reorder(index)

    # Checkpoints ---------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write config and weights to ``path``, whole or not at all: an interruption leaves what was there."""
        checkpoint.save(
            path, kind=type(self).__name__, config=dataclasses.asdict(self.config), weights=self.state_dict()
        )  # fmt: skip

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        map_location: torch.device | str = "cpu",
        *,
        config: Seq2SeqConfig | None = None,
    ) -> Seq2Seq:
        """The model that ``save`` wrote, in eval mode. Runs no code from the file (weights_only=True).

        Args:
            path: of the file.
            map_location: the device of the parameters.
            config: what the file has to hold, such as the sizes of a tokenizer's vocabulary; None takes what it holds.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, no checkpoint of a Seq2Seq, or of another config; the message says which.
        """
        saved, weights = checkpoint.load_model(
            path, Seq2SeqConfig, config, kind=cls.__name__, map_location=map_location
        )
        try:
            dtype = weights["decoder.output.weight"].dtype
            model = cls(saved, device=map_location, dtype=dtype)
            model.load_state_dict(weights)
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"path: got {path}, whose weights do not fit its config: {error}") from error
        return model.eval()

    # Computation ---------------------------------------------------------------------------------------------

    def _check_source(self, source: Tensor) -> None:
        if self.config.source_embedding is None:
            check_features("source", source, self.config.source_size, self.decoder.output.weight.dtype)
        else:
            check_tokens("source", source, self.config.source_size)

    def _steps(
        self, source: Tensor, target: Tensor, lengths: Tensor | None, teacher_forcing: float, need_weights: bool
    ) -> Step:
        """The decoder's steps over checked arguments of ``forward``."""
        self._check_source(source)
        check_tokens("target", target, self.config.target_size, batch=source.shape[0])
        check_probability("teacher_forcing", teacher_forcing)
        state = self._encode(source, lengths)
        if teacher_forcing == 1.0:
            return self.decoder.sequence(target.long(), state, need_weights)
        return self._sampled(target.long(), state, teacher_forcing, need_weights)

    def _encode(self, source: Tensor, lengths: Tensor | None) -> DecoderState:
        """The decoder's state before its first step."""
        known = known_lengths("lengths", lengths, source)
        inputs = source
        if self.encoder_embedding is not None:
            inputs = functional.dropout(self.encoder_embedding(source), self.config.dropout, self.training)
        if known is None:
            encoded, last = self.encoder(inputs)
            return self.decoder.start(self._bridge(last), encoded, None)
        if torch.compiler.is_compiling():
            encoded, last = static_packing.run(self.encoder, inputs, known)
            return self.decoder.start(self._bridge(last), encoded, _mask(known, source))
        packed, last = self.encoder(pack_padded_sequence(inputs, known, batch_first=True, enforce_sorted=False))
        encoded, _ = pad_packed_sequence(packed, batch_first=True, total_length=source.shape[1])
        return self.decoder.start(self._bridge(last), encoded, _mask(known, source))

    def _bridge(self, last: State) -> State:
        """The decoder's first states (layers, B, hidden_size) from the encoder's last (layers D, B, direction_size)."""
        if self.bridge is None:
            return last
        size = (-1, self.config.decoder_layers, self.config.hidden_size)
        hidden, cell = (
            linear(state.transpose(0, 1).flatten(1)).view(size).transpose(0, 1).contiguous()
            for linear, state in zip(self.bridge, last, strict=True)
        )
        return hidden, cell

    def _sampled(self, target: Tensor, state: DecoderState, teacher_forcing: float, need_weights: bool) -> Step:
        """The decoder's steps, each reading the target's token or the likeliest one of the step before."""
        taught = torch.rand(target.shape, device=target.device) < teacher_forcing
        steps: list[Step] = []
        tokens = target[:, 0]
        for place in range(target.shape[1]):
            if place > 0:
                # The softmax layer of all steps at once, whose gradient counts, comes after the loop.
                with torch.no_grad():
                    likeliest = self.decoder.output(steps[-1].readout).argmax(-1)
                tokens = torch.where(taught[:, place], target[:, place], likeliest)
            step, state = self.decoder.step(tokens, state, need_weights)
            steps.append(step)
        return stack(steps)


def inverse_sigmoid(step: int, speed: float) -> float:
    """Probability of teacher forcing at a training step from 0: k / (k + exp(step / k)), k = speed.

    From almost 1 it falls to a half near step k ln k (Bengio, Vinyals, Jaitly and Shazeer 2015, section 2.4).

    Raises ValueError for a speed below 1 or a negative step.
    """
    if speed < 1.0:
        raise ValueError(f"speed: got {speed}, expected at least 1")
    if step < 0:
        raise ValueError(f"step: got {step}, expected at least 0")
    # Divided by the exponential, which overflows late in a training.
    decay = math.exp(-step / speed)
    return speed * decay / (speed * decay + 1.0)


def _mask(lengths: Tensor, sequences: Tensor) -> Tensor:
    """(B, T), True within lengths (B,), on the device of sequences (B, T, ...)."""
    return torch.arange(sequences.shape[1], device=sequences.device) < lengths.to(sequences.device).unsqueeze(1)
