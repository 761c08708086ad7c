"""Long short-term memory with nn.LSTM's constructor, forward, parameters and exceptions."""

from __future__ import annotations

from functools import partial
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from fastattn import lstm_dispatch
from fastattn.dispatch import Backend, Explanation
from fastattn.kernels.device import on
from fastattn.kernels.lstm import layer as kernels
from fastattn.kernels.lstm import stack
from fastattn.modules import recurrent
from fastattn.modules.recurrent import State
from fastattn.validation import autocast_enabled

# Bound at import: a program may rebind torch.nn.functional's.
_dropout = torch.nn.functional.dropout


class LSTM(RNNBase):
    """Layers of long short-term memory, a drop-in for ``torch.nn.LSTM``.

    The constructor, the parameters with their names and the state_dict are torch's; checkpoints load strictly both
    ways. What differs from torch:

    - It derives from ``nn.RNNBase`` as ``nn.LSTM`` does, but not from ``nn.LSTM``: TorchDynamo refuses every instance
      of that class, and ``torch.compile(fullgraph=True)`` works with this one.
    - The weights are read at every call, so weight norm, parametrizations and ``functional_call`` need no care, and
      no warning about non-contiguous weights is ever given.
    - Derivatives of any order, on every device, in training and in evaluation.
    - Dropout between the layers follows ``torch.manual_seed`` on every device.
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
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Layers with torch's initialisation, drawn in torch's order.

        Args:
            input_size, hidden_size: features of the input and of the cells.
            num_layers: each reads the output of the one before.
            bias: with b_ih and b_hh.
            batch_first: input and output are (B, T, features) in place of (T, B, features); states are not.
            dropout: probability that an element between two layers becomes zero in training.
            bidirectional: a second direction reads the sequence from its end.
            proj_size: above 0, the hidden state is projected to this many features.
            device, dtype: of the parameters.

        Raises:
            ValueError, TypeError: as torch's constructor does.
        """
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype,
        )  # fmt: skip

    @overload
    def forward(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]: ...

    @overload
    def forward(self, input: PackedSequence, hx: State | None = None) -> tuple[PackedSequence, State]: ...

    def forward(self, input: Any, hx: State | None = None) -> Any:
        """The hidden states of all steps, and the last states.

        Args:
            input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) without a batch, or a PackedSequence; float16,
                bfloat16, float32 or float64.
            hx: the first states h_0 (D layers, B, P) and c_0 (D layers, B, H), without B when the input has none;
                zeros when None. D = 2 when bidirectional, else 1; P = proj_size or H; H = hidden_size.

        Returns:
            The output, shaped as input with D P features, or a PackedSequence; and (h_n, c_n), shaped as hx. Under
            autocast their dtypes are those of torch's module.

        Raises:
            ValueError, RuntimeError, TypeError: as torch's module does, naming the argument.
        """
        weights = self._weights()
        data, batch_sizes, h0, c0, dtype = self._arguments(input, hx, weights)
        if dtype is None:
            out, h_n, c_n = self._layers(data, batch_sizes, h0, c0, weights)
        else:
            out, h_n, c_n = self._autocast(dtype, data, batch_sizes, h0, c0, weights)
        if isinstance(input, PackedSequence):
            order = input.unsorted_indices
            if order is not None:
                h_n, c_n = h_n.index_select(1, order), c_n.index_select(1, order)
            return PackedSequence(out, input.batch_sizes, input.sorted_indices, order), (h_n, c_n)
        if input.dim() == 2:
            return out.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return out.transpose(0, 1) if self.batch_first else out, (h_n, c_n)

    def explain(self, input: Tensor | PackedSequence, hx: State | None = None) -> Explanation:
        """The backend that ``forward`` takes for these arguments, and why not each other one.

        Takes the arguments of ``forward`` and raises its errors; computes nothing.
        """
        weights = self._weights()
        data, batch_sizes, h0, _, dtype = self._arguments(input, hx, weights)
        explanation = lstm_dispatch.explain(data.device.type, dtype or data.dtype)
        if explanation.backend is not Backend.CUDA or self.num_layers == 1:
            return explanation
        steps = data.shape[0] if batch_sizes is None else batch_sizes.shape[0]
        sizes = (self.num_layers, steps, h0.shape[1], self.hidden_size)
        with on(data.device):
            return lstm_dispatch.with_layers(explanation, self._why_in_turn(), dtype or data.dtype, sizes)

    def _why_in_turn(self) -> str | None:
        """The reason why layers on CUDA run one after another, whatever their sizes; None: those decide."""
        dropout = self.dropout if self.training else 0.0
        return lstm_dispatch.why_in_turn(self.num_layers, self.bidirectional, self.proj_size, dropout)

    def _weights(self) -> list[Tensor]:
        """The weights as they are now: a parametrized one is computed, and read once for that reason."""
        return [getattr(self, name) for name in self._flat_weights_names]

    # Arguments -----------------------------------------------------------------------------------------------

    def _arguments(
        self, input: Any, hx: State | None, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, torch.dtype | None]:
        """Checked data (T, B, I) or packed (N, I), its batch_sizes, states in the order of the data's batch, and the
        dtype that autocast wants."""
        if hx is not None:
            recurrent.check_state("LSTM", hx)
        data: Tensor
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, _ = input
            self._check_input(data, weights, 2)
            if hx is None:
                h0, c0 = self._zeros(data, _batch_of(batch_sizes, order))
            else:
                known = order is not None or not torch.compiler.is_compiling()
                h0, c0 = self._given(hx, _batch_of(batch_sizes, order) if known else None)
                if order is not None:
                    h0, c0 = h0.index_select(1, order), c0.index_select(1, order)
        else:
            data, hx = self._batched(input, hx)
            batch_sizes = None
            self._check_input(data, weights, 3)
            h0, c0 = self._zeros(data, data.shape[1]) if hx is None else self._given(hx, data.shape[1])
        tensors = (h0, c0, *weights)
        dtype = recurrent.autocast_dtype(data, tensors)
        names = ("hidden[0]", "hidden[1]", *self._flat_weights_names)
        recurrent.check_alike("LSTM", data, names, tensors, dtypes=dtype is None)
        return data, batch_sizes, h0, c0, dtype

    def _batched(self, input: Any, hx: State | None) -> tuple[Tensor, State | None]:
        """The input as (T, B, I), and states with a batch."""
        if not isinstance(input, Tensor):
            raise TypeError(f"LSTM: input: got {type(input).__name__}, expected a torch.Tensor or a PackedSequence")
        recurrent.check_layout("LSTM", input)
        dims = input.dim()
        if dims not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {dims}D instead")
        if hx is not None and (hx[0].dim() != dims or hx[1].dim() != dims):
            kind = "batched 3-D" if dims == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {dims}-D but got "
                f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        if dims == 2:
            return input.unsqueeze(1), None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        return input.transpose(0, 1) if self.batch_first else input, hx

    def _check_input(self, data: Tensor, weights: list[Tensor], dims: int) -> None:
        """torch's errors for data (T, B, I) or packed (N, I) that the weights do not fit."""
        dtype = weights[0].dtype
        if data.dtype != dtype and not autocast_enabled(data.device.type):
            raise ValueError(
                f"RNN input dtype ({data.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({data.dtype})"
            )
        if data.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {data.dim()}")
        if data.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {data.shape[-1]}"
            )
        if data.dim() == 3 and data.shape[0] == 0:
            raise RuntimeError("LSTM: input: got 0 steps, Expected sequence length to be larger than 0 in RNN")

    def _state_sizes(self) -> tuple[int, int, int]:
        """Layers times directions, and the features of the hidden and of the cell states."""
        return self.num_layers * (2 if self.bidirectional else 1), self.proj_size or self.hidden_size, self.hidden_size

    def _zeros(self, data: Tensor, batch: int) -> State:
        count, outputs, hidden = self._state_sizes()
        return data.new_zeros(count, batch, outputs), data.new_zeros(count, batch, hidden)

    def _given(self, hx: State, batch: int | None) -> State:
        """The caller's states, after a check of their sizes; a batch of None is whatever they say."""
        count, *features = self._state_sizes()
        for place, (state, size) in enumerate(zip(hx, features, strict=True)):
            if state.dim() != 3:
                raise RuntimeError(f"Expected hidden[{place}] to be 3-D, got {state.dim()}-D")
            expected = (count, hx[0].shape[1] if batch is None else batch, size)
            if tuple(state.shape) != expected:
                raise RuntimeError(f"Expected hidden[{place}] size {expected}, got {list(state.shape)}")
        return hx[0], hx[1]

    # Computation ---------------------------------------------------------------------------------------------

    def _autocast(
        self, dtype: torch.dtype, data: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor,
        weights: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """``_layers`` in the dtype of autocast, with results in the dtypes that torch's module gives."""
        hidden, cell = self._autocast_results(data, batch_sizes, c0, dtype)
        with recurrent.without_autocast(data.device.type):
            out, h_n, c_n = self._layers(
                data.to(dtype), batch_sizes, h0.to(dtype), c0.to(dtype), [weight.to(dtype) for weight in weights]
            )
        return out.to(hidden), h_n.to(hidden), c_n.to(cell)

    def _autocast_results(
        self, data: Tensor, batch_sizes: Tensor | None, c0: Tensor, dtype: torch.dtype
    ) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of out and h_n, and of c_n."""
        fused = data.dtype != torch.float16 or not torch.is_grad_enabled()
        if data.device.type != "cpu" or (fused and batch_sizes is None and not self.proj_size and data.numel() > 0):
            return dtype, dtype
        # Step by step torch's matrix products are in the autocast dtype, and the cell's sums promote to that of c_0.
        cell = torch.promote_types(dtype, c0.dtype)
        return dtype if self.proj_size else cell, cell

    def _layers(
        self, data: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """out (T, B, D P) or (N, D P), h_n (layers D, B, P) and c_n (layers D, B, H)."""
        backend = lstm_dispatch.choose(data.device.type, data.dtype)
        dropout = self.dropout if self.training else 0.0
        if backend is Backend.TORCH and (self.num_layers == 1 or dropout == 0.0):
            return kernels.torch_layers(self.num_layers, data, batch_sizes, h0, c0, weights)
        if backend is Backend.CUDA and self._why_in_turn() is None:
            return kernels.lstm_layers(backend.value, data, batch_sizes, h0, c0, weights)
        return stack.in_turn(
            partial(recurrent.layer, backend), self.num_layers, data, batch_sizes, h0, c0, weights,
            partial(_dropout, p=dropout) if dropout > 0.0 else None,
        )  # fmt: skip


def _batch_of(batch_sizes: Tensor, order: Tensor | None) -> int:
    """The batch of a PackedSequence. A compiler need not read the data where the order is known."""
    if order is not None:
        return order.shape[0]
    # Not int(): under torch.export this is a symbol.
    batch: Any = batch_sizes[0].item()
    return batch  # type: ignore[no-any-return]
