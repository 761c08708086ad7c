"""LSTM layers with layer normalisation, zoneout and recurrent dropout."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastattn import layer_norm_lstm
from fastattn.dispatch import Explanation
from fastattn.layer_norm_lstm import Noise, layer
from fastattn.modules import layer_norm_lstm_checks as checks
from fastattn.validation import autocast_enabled

_MODES = ("variational", "step")


class _Base(nn.Module):
    """What the layers and the cell share: the parameters of one layer in one direction, and what is drawn at random."""

    hidden_size: int
    zoneout: tuple[float, float]
    recurrent_dropout: float
    forget_bias: float | None
    weight_ih: Tensor
    weight_ih_l0: Tensor

    def _add_parameters(self, suffix: str, input_size: int, bias: bool, **factory: Any) -> list[str]:
        """Register the parameters of a layer; their names, in the order that the operator takes them."""
        gates, hidden = 4 * self.hidden_size, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (gates, input_size),
            "weight_hh": (gates, hidden),
            "layer_norm_ih_weight": (gates,),
            "layer_norm_hh_weight": (gates,),
            "layer_norm_c_weight": (hidden,),
        }
        if bias:
            shapes |= {"bias": (gates,), "layer_norm_c_bias": (hidden,)}
        for name, shape in shapes.items():
            self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, **factory)))
        return [name + suffix for name in shapes]

    def reset_parameters(self) -> None:
        """Draw weights and biases from U(+-1 / sqrt(hidden_size)), as nn.LSTM; gains become 1, the cell's bias 0.

        The biases of the forget gates become ``forget_bias`` where that is given.
        """
        bound = self.hidden_size**-0.5
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("layer_norm"):
                nn.init.constant_(parameter, 0.0 if name.startswith("layer_norm_c_bias") else 1.0)
            else:
                nn.init.uniform_(parameter, -bound, bound)
                if name.startswith("bias") and self.forget_bias is not None:
                    with torch.no_grad():
                        parameter[self.hidden_size : 2 * self.hidden_size] = self.forget_bias

    def explain(self, input: Tensor | PackedSequence) -> Explanation:
        """The backend that ``forward`` takes for an input of this device and dtype, and why not each other one."""
        data = input.data if isinstance(input, PackedSequence) else input
        dtype = data.dtype
        if autocast_enabled(data.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(data.device.type)
        return layer_norm_lstm.explain(data.device.type, dtype)

    def _noise(self, input: Tensor, batch: int, directions: int, per_step: bool) -> Noise:
        """What one layer draws in training; in evaluation the expectation."""
        if not self.training:
            return Noise(keep_h=self.zoneout[0], keep_c=self.zoneout[1])
        steps = math.prod(input.shape[:-1])
        shape = (steps, directions, self.hidden_size)
        h_mask = None
        if self.recurrent_dropout > 0.0:
            dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
            ones = input.new_ones((steps if per_step else batch, *shape[1:]), dtype=dtype)
            h_mask = nn.functional.dropout(ones, self.recurrent_dropout)
        zoneout_h, zoneout_c = (
            torch.rand(shape, device=input.device) < probability if probability > 0.0 else None
            for probability in self.zoneout
        )
        return Noise(h_mask, zoneout_h, zoneout_c)


class LayerNormLSTM(_Base):
    """LSTM with layer normalisation (Ba, Kiros and Hinton 2016, equations 20 to 22), used as ``torch.nn.LSTM`` is.

        i, f, g, o = sigmoid, sigmoid, tanh, sigmoid (a LN(W_ih x_t) + a' LN(W_hh (m h_{t-1})) + b)
        c' = f c_{t-1} + i g,   h' = o tanh(a_c LN(c') + b_c)

    LN subtracts the mean and divides by sqrt(variance + eps); for the two projections over all 4 * hidden_size sums of
    a step, as in the paper, for the cell over its hidden_size units. The two normalised projections share one bias b.

    Zoneout (Krueger et al. 2017) keeps an element of the state with its probability in training, and takes the
    expectation in evaluation. Recurrent dropout multiplies the input h_{t-1} of W_hh by a mask m, scaled as in
    ``nn.Dropout``: one mask per sequence (Gal and Ghahramani 2016) or one per step. All of it follows
    ``torch.manual_seed``.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as nn.LSTM. Without ``bias``
            there is neither b nor b_c.
        zoneout: the probability that an element of the hidden and of the cell state is kept, or a pair of them.
        recurrent_dropout: the probability that an element of h_{t-1} is zeroed before W_hh.
        recurrent_dropout_mode: "variational", one mask for all steps of a sequence, or "step".
        eps: added to the variances.
        forget_bias: the initial bias of the forget gates; None is as the others'.
        device, dtype: of the parameters.

    Attributes:
        weight_ih_l{k}, weight_hh_l{k}: W_ih (4 * hidden_size, input features) and W_hh (4 * hidden_size, hidden_size)
            of layer k, gates in the order i, f, g, o; with ``_reverse`` for the second direction, as all others.
        layer_norm_ih_weight_l{k}, layer_norm_hh_weight_l{k}: the gains a and a', (4 * hidden_size).
        layer_norm_c_weight_l{k}, layer_norm_c_bias_l{k}: a_c and b_c, (hidden_size).
        bias_l{k}: b, (4 * hidden_size).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_mode: str = "variational",
        eps: float = 1e-5,
        forget_bias: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        checks.check_flags(bias=bias, batch_first=batch_first, bidirectional=bidirectional)
        checks.check_probabilities(dropout=dropout, recurrent_dropout=recurrent_dropout)
        checks.check_numbers(eps, forget_bias)
        if recurrent_dropout_mode not in _MODES:
            allowed = " or ".join(map(repr, _MODES))
            raise ValueError(f"recurrent_dropout_mode: got {recurrent_dropout_mode!r}, expected {allowed}")
        if dropout > 0.0 and num_layers == 1:
            warnings.warn(
                f"dropout: got {dropout} with num_layers = 1; it acts between layers, so it does nothing here",
                stacklevel=2,
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        self.dropout, self.zoneout = float(dropout), checks.zoneout_pair(zoneout)
        self.recurrent_dropout, self.recurrent_dropout_mode = float(recurrent_dropout), recurrent_dropout_mode
        self.eps, self.forget_bias = float(eps), forget_bias
        directions = ("", "_reverse") if bidirectional else ("",)
        self._names = [
            [
                name
                for direction in directions
                for name in self._add_parameters(
                    f"_l{k}{direction}",
                    input_size if k == 0 else len(directions) * hidden_size,
                    bias,
                    device=device,
                    dtype=dtype,
                )
            ]
            for k in range(num_layers)
        ]
        self.reset_parameters()

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        return_all_states: bool = False,
    ) -> Any:
        """The sequence of hidden states of the last layer, and the last states of all layers.

        Args:
            input: (T, B, input_size), (B, T, input_size) with ``batch_first``, (T, input_size) without a batch, or a
                PackedSequence; float16, bfloat16, float32 or float64, the parameters' dtype except under autocast.
            hx: the initial hidden and cell states, (num_layers * D, B, hidden_size) each, without B when unbatched;
                D is 2 where bidirectional, else 1. None is 0.
            return_all_states: also return the cell states of all steps.

        Returns:
            output, (h_n, c_n): output (T, B, D * hidden_size), laid out or packed as input is; h_n and c_n as hx. With
            ``return_all_states`` output, (h_n, c_n), cells: those of the last layer, laid out as output and
            differentiable as it is.

        Raises:
            AttributeError, RuntimeError, TypeError, ValueError: as nn.LSTM does, naming the argument.
        """
        checks.check_flags(return_all_states=return_all_states)
        checks.check_input(input, self.input_size, self.weight_ih_l0)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, return_all_states)
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(1)
        time_first = input.transpose(0, 1) if batched and self.batch_first else input
        checks.check_steps(time_first)
        states = checks.states(hx, 3 if batched else 2)
        h0, c0 = self._initial(time_first, states, time_first.shape[1] if batched else None)
        out, cells, h_n, c_n = self._layers(time_first, None, h0, c0, return_all_states)
        if not batched:
            out, h_n, c_n = out.squeeze(1), h_n.squeeze(1), c_n.squeeze(1)
        elif self.batch_first:
            out = out.transpose(0, 1)
        if not return_all_states:
            return out, (h_n, c_n)
        if not batched:
            cells = cells.squeeze(1)
        elif self.batch_first:
            cells = cells.transpose(0, 1)
        return out, (h_n, c_n), cells

    def _forward_packed(self, input: PackedSequence, hx: Any, return_all_states: bool) -> Any:
        rows, batch_sizes, order, back = input
        states = checks.states(hx, 3)
        if order is not None:  # the batch is known without reading batch_sizes: a compiler needs that
            batch = order.shape[0]
        elif states is not None and torch.compiler.is_compiling():
            batch = states[0].shape[1]
        else:
            batch = int(batch_sizes[0])
        h0, c0 = self._initial(rows, states, batch)
        if order is not None:
            h0, c0 = h0.index_select(1, order), c0.index_select(1, order)
        out, cells, h_n, c_n = self._layers(rows, batch_sizes, h0, c0, return_all_states)
        if back is not None:
            h_n, c_n = h_n.index_select(1, back), c_n.index_select(1, back)
        packed = PackedSequence(out, batch_sizes, order, back)
        if not return_all_states:
            return packed, (h_n, c_n)
        return packed, (h_n, c_n), PackedSequence(cells, batch_sizes, order, back)

    def _initial(self, input: Tensor, states: tuple[Tensor, Tensor] | None, batch: int | None) -> tuple[Tensor, Tensor]:
        """The initial states (num_layers * D, B, H) of all layers and directions; ``batch`` None is no batch."""
        layers = self.num_layers * (2 if self.bidirectional else 1)
        if states is None:
            zeros = input.new_zeros(layers, 1 if batch is None else batch, self.hidden_size)
            return zeros, zeros
        batches = () if batch is None else (batch,)
        checks.check_states(states, (layers, *batches, self.hidden_size), input)
        return states if batches else (states[0].unsqueeze(1), states[1].unsqueeze(1))

    def _layers(
        self, input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, all_cells: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        directions = 2 if self.bidirectional else 1
        per_step = self.recurrent_dropout_mode == "step"
        h_n, c_n = [], []
        cells = input
        for k, names in enumerate(self._names):
            if k > 0 and self.training and self.dropout > 0.0:
                input = nn.functional.dropout(input, self.dropout)
            here = slice(k * directions, (k + 1) * directions)
            last = k == self.num_layers - 1
            input, cells, h, c = layer(
                input,
                batch_sizes,
                h0[here],
                c0[here],
                [getattr(self, name) for name in names],
                self._noise(input, h0.shape[1], directions, per_step),
                self.eps,
                all_cells and last,
            )
            h_n.append(h)
            c_n.append(c)
        return input, cells, torch.cat(h_n), torch.cat(c_n)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, as nn.LSTM lists them."""
        count = 7 if self.bias else 5
        groups = (names[at : at + count] for names in self._names for at in range(0, len(names), count))
        return [[getattr(self, name) for name in group] for group in groups]

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False,
            "zoneout": (0.0, 0.0), "recurrent_dropout": 0.0, "eps": 1e-5,
        }  # fmt: skip
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text + (f", recurrent_dropout_mode={self.recurrent_dropout_mode!r}" if self.recurrent_dropout else "")


class LayerNormLSTMCell(_Base):
    """One step of ``LayerNormLSTM``, used as ``torch.nn.LSTMCell`` is; the equations and arguments are that class's.

    Recurrent dropout draws a mask at each call.

    Attributes:
        weight_ih, weight_hh, bias, layer_norm_ih_weight, layer_norm_hh_weight, layer_norm_c_weight, layer_norm_c_bias:
            as those of ``LayerNormLSTM``, without the suffix. The two biases are None without ``bias``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        eps: float = 1e-5,
        forget_bias: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_sizes(input_size=input_size, hidden_size=hidden_size)
        checks.check_flags(bias=bias)
        checks.check_probabilities(recurrent_dropout=recurrent_dropout)
        checks.check_numbers(eps, forget_bias)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.zoneout, self.recurrent_dropout = checks.zoneout_pair(zoneout), float(recurrent_dropout)
        self.eps, self.forget_bias = float(eps), forget_bias
        self._names = self._add_parameters("", input_size, bias, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
            self.register_parameter("layer_norm_c_bias", None)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The states after one step.

        Args:
            input: (B, input_size), or (input_size) without a batch; dtypes as for ``LayerNormLSTM``.
            hx: the hidden and cell states before it, (B, hidden_size) each, without B when unbatched. None is 0.

        Returns:
            The new hidden and cell states, shaped as hx.

        Raises:
            AttributeError, RuntimeError, TypeError, ValueError: naming the argument.
        """
        checks.check_input(input, self.input_size, self.weight_ih, ranks=(1, 2))
        batched = input.dim() == 2
        states = checks.states(hx, input.dim())
        rows = input if batched else input.unsqueeze(0)
        if states is None:
            zeros = rows.new_zeros(rows.shape[0], self.hidden_size)
            states = (zeros, zeros)
        else:
            checks.check_states(states, (*input.shape[:-1], self.hidden_size), input)
        h0, c0 = (state.unsqueeze(0) if state.dim() == 2 else state.view(1, 1, -1) for state in states)
        weights = [getattr(self, name) for name in self._names]
        noise = self._noise(rows, rows.shape[0], 1, per_step=False)
        _, _, h, c = layer(rows.unsqueeze(0), None, h0, c0, weights, noise, self.eps, all_cells=False)
        return (h[0], c[0]) if batched else (h[0, 0], c[0, 0])

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}" + ("" if self.bias is not None else ", bias=False")
        for name, default in (("zoneout", (0.0, 0.0)), ("recurrent_dropout", 0.0), ("eps", 1e-5)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text
