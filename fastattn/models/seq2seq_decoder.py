"""The decoder of a Seq2Seq model: one step, and all steps of a known target at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastattn.models.seq2seq_config import Seq2SeqConfig
from fastattn.modules.additive import AdditiveAttention
from fastattn.modules.lstm import LSTM
from fastattn.modules.lstm_cell import LSTMCell
from fastattn.modules.luong import LuongAttention
from fastattn.modules.memory import ProjectedKeys
from fastattn.modules.recurrent import State


class DecoderState(NamedTuple):
    """What the decoder knows between two steps.

    Attributes:
        hidden, cell: (layers, B, hidden_size), of the LSTM.
        memory: the encoder's states (B, S, memory_size) and their projections, or None without attention.
        tokens: (B, S), boolean, True where the source has a step; None where all have.
        fed: (B, readout_size), the attentional vector of the step before; of Luong's input feeding.
        covered: (B, S), the sum of the attention weights so far; of coverage.
    """

    hidden: Tensor
    cell: Tensor
    memory: ProjectedKeys | None = None
    tokens: Tensor | None = None
    fed: Tensor | None = None
    covered: Tensor | None = None

    def reorder(self, index: Tensor) -> DecoderState:
        """The state whose row i is row index[i] of this one; index (M,) int64."""
        memory = None if self.memory is None else ProjectedKeys(*(part.index_select(0, index) for part in self.memory))
        rest = (None if part is None else part.index_select(0, index) for part in self[3:])
        return DecoderState(self.hidden.index_select(1, index), self.cell.index_select(1, index), memory, *rest)


class Step(NamedTuple):
    """What one step, or T of them, made: readout (B, R), weights (B, S), and how much of them fell on covered
    ground, (B,); or (B, T, R), (B, T, S) and (B, T)."""

    readout: Tensor
    weights: Tensor | None
    overlap: Tensor | None


class StackedLSTMCell(nn.Module):
    """One step of layers of LSTMCell, with the states and the dropout of ``LSTM``."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, dropout: float, device: Any, dtype: Any):
        super().__init__()
        self.dropout = dropout
        self.cells = nn.ModuleList(
            LSTMCell(hidden_size if layer else input_size, hidden_size, device=device, dtype=dtype)
            for layer in range(num_layers)
        )

    def forward(self, input: Tensor, state: State) -> tuple[Tensor, State]:
        """The output (B, H) for input (B, I), and the next state; h and c of a state are (layers, B, H)."""
        states = []
        for layer, cell in enumerate(self.cells):
            if layer > 0:
                input = functional.dropout(input, self.dropout, self.training)
            states.append(cell(input, (state[0][layer], state[1][layer])))
            input = states[-1][0]
        hidden, cells = (torch.stack(parts) for parts in zip(*states, strict=True))
        return input, (hidden, cells)


class Decoder(nn.Module):
    """LSTM over the target, attention over the encoder's states, and the softmax layer.

    Attributes:
        embedding: nn.Embedding, or None: the LSTM reads one-hot vectors.
        lstm: LSTM; with input feeding, whose steps cannot be run at once, StackedLSTMCell.
        attention: AdditiveAttention, LuongAttention or None.
        combine: nn.Linear, W_c [c_t; s_t] before its tanh; without attention None, or s_t to a tied embedding's size.
        output: nn.Linear to the logits.
    """

    def __init__(
        self, config: Seq2SeqConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        hidden, memory = config.hidden_size, config.memory_size
        self.embedding: nn.Embedding | None = None
        if config.target_embedding is not None:
            self.embedding = nn.Embedding(config.target_size, config.target_embedding, **made)
        inputs = config.target_embedding or config.target_size
        self.lstm: LSTM | StackedLSTMCell
        if config.input_feeding:
            inputs += memory if config.context_first else config.readout_size
            self.lstm = StackedLSTMCell(inputs, hidden, config.decoder_layers, config.dropout, **made)
        else:
            between = config.dropout if config.decoder_layers > 1 else 0.0  # torch warns where there is no between
            self.lstm = LSTM(inputs, hidden, config.decoder_layers, batch_first=True, dropout=between, **made)
        self.attention: AdditiveAttention | LuongAttention | None = None
        if config.attention == "additive":
            self.attention = AdditiveAttention(hidden, memory, hidden, coverage=config.coverage, **made)
        elif config.attention is not None:
            self.attention = LuongAttention(hidden, memory, config.attention, coverage=config.coverage, **made)
        self.combine: nn.Linear | None = None
        if self.attention is not None:
            self.combine = nn.Linear(memory + hidden, config.readout_size, bias=False, **made)
        elif config.readout_size != hidden:
            self.combine = nn.Linear(hidden, config.readout_size, **made)
        self.output = nn.Linear(config.readout_size, config.target_size, **made)
        if self.embedding is not None and config.tie_embeddings != "none":
            # The softmax's scale: rows of length 1 in place of sqrt(target_embedding) keep the first logits small.
            nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
            self.output.weight = self.embedding.weight

    def start(self, state: State, encoded: Tensor, tokens: Tensor | None) -> DecoderState:
        """The state before the first step.

        Args:
            state: h and c, (layers, B, hidden_size).
            encoded: (B, S, memory_size).
            tokens: (B, S), boolean, True where the source has a step; None where all have.
        """
        if self.attention is None:
            return DecoderState(*state)
        batch, steps = encoded.shape[:2]
        fed = covered = None
        if self.config.input_feeding and not self.config.context_first:
            fed = encoded.new_zeros(batch, self.config.readout_size)
        if self.config.coverage:
            covered = encoded.new_zeros(batch, steps)
        return DecoderState(*state, self.attention.project_keys(encoded), tokens, fed, covered)

    def step(self, tokens: Tensor, state: DecoderState, need_weights: bool = False) -> tuple[Step, DecoderState]:
        """Read tokens (B,), one a row: what the softmax layer gets, and the next state."""
        inputs, context, attended = [self._embed(tokens)], None, (None, None)
        if self.config.context_first:
            context, state, *attended = self._attend(state.hidden[-1], state, need_weights)
            inputs.append(context)
        elif state.fed is not None:
            inputs.append(state.fed)
        input = torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]
        if isinstance(self.lstm, StackedLSTMCell):
            out, (hidden, cell) = self.lstm(input, (state.hidden, state.cell))
        else:  # a sequence of one step, which takes as long as a cell's
            out, (hidden, cell) = self.lstm(input.unsqueeze(1), (state.hidden, state.cell))
            out = out.squeeze(1)
        if self.attention is not None and context is None:
            context, state, *attended = self._attend(out, state, need_weights)
        readout = self._read(out, context)
        fed = None if state.fed is None else readout
        return Step(self._drop(readout), *attended), state._replace(hidden=hidden, cell=cell, fed=fed)

    def sequence(self, tokens: Tensor, state: DecoderState, need_weights: bool = False) -> Step:
        """Read tokens (B, T): all steps of the LSTM in one call where nothing is fed back, then all of attention."""
        if isinstance(self.lstm, StackedLSTMCell):
            steps = []
            for column in tokens.unbind(1):
                made, state = self.step(column, state, need_weights)
                steps.append(made)
            return stack(steps)
        out, _ = self.lstm(self._embed(tokens), (state.hidden, state.cell))
        if self.attention is None:
            return Step(self._drop(self._read(out, None)), None, None)
        if state.covered is None:
            context, _, weights, overlap = self._attend(out, state, need_weights)
            return Step(self._drop(self._read(out, context)), weights, overlap)
        contexts, steps = [], []
        for query in out.unbind(1):  # the scores wait for the weights of the step before, the LSTM does not
            context, state, weights, overlap = self._attend(query, state, need_weights)
            contexts.append(context)
            steps.append(Step(query, weights, overlap))
        return stack(steps)._replace(readout=self._drop(self._read(out, torch.stack(contexts, 1))))

    def _embed(self, tokens: Tensor) -> Tensor:
        """What the LSTM reads of tokens (...): (..., target_embedding or target_size)."""
        if self.embedding is None:
            return functional.one_hot(tokens, self.config.target_size).to(self.output.weight.dtype)
        return self._drop(self.embedding(tokens))

    def _attend(self, query: Tensor, state: DecoderState, need_weights: bool) -> Any:
        """The context of query (B, H) or (B, T, H), the state with its coverage, the weights, and the overlap."""
        assert self.attention is not None
        covered = state.covered
        result = self.attention(
            query, state.memory, key_padding_mask=state.tokens, coverage=covered,
            need_weights=need_weights or covered is not None,
        )  # fmt: skip
        if covered is None:
            return (result[0], state, result[1], None) if need_weights else (result, state, None, None)
        context, weights = result
        overlap = torch.minimum(weights, covered).sum(-1)
        return context, state._replace(covered=covered + weights), weights if need_weights else None, overlap

    def _read(self, out: Tensor, context: Tensor | None) -> Tensor:
        """What the softmax layer reads: tanh(W_c [c_t; s_t]); without attention s_t."""
        if self.combine is None:
            return out
        if context is None:
            projected: Tensor = self.combine(out)
            return projected
        return torch.tanh(self.combine(torch.cat([context, out], -1)))

    def _drop(self, features: Tensor) -> Tensor:
        return functional.dropout(features, self.config.dropout, self.training)


def stack(steps: list[Step]) -> Step:
    """T steps as one with a dimension of T after the batch's."""
    readouts, weights, overlaps = zip(*steps, strict=True)
    return Step(
        torch.stack(readouts, 1),
        None if weights[0] is None else torch.stack(weights, 1),
        None if overlaps[0] is None else torch.stack(overlaps, 1),
    )
