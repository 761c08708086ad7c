"""One step of long short-term memory with nn.LSTMCell's constructor, forward, parameters and exceptions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import LSTMCell as TorchLSTMCell

from fastattn import lstm_dispatch
from fastattn.dispatch import Backend, Explanation
from fastattn.modules import recurrent
from fastattn.modules.recurrent import State

# Bound at import, as torch.nn.LSTMCell binds it.
_lstm_cell: Any = torch._VF.lstm_cell
_NAMES = ("hx[0]", "hx[1]", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


class LSTMCell(TorchLSTMCell):
    """One step of long short-term memory, a drop-in for ``torch.nn.LSTMCell``.

    The constructor, the parameters with their names and the state_dict are torch's; checkpoints load strictly both
    ways.
    """

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """The next states.

        Args:
            input: (B, I), or (I) without a batch; float16, bfloat16, float32 or float64.
            hx: the states h_0 and c_0, (B, H) or (H); zeros when None.

        Returns:
            h_1 and c_1, shaped as hx. Under autocast their dtype is that of torch's module.

        Raises:
            ValueError, RuntimeError, TypeError: as torch's module does, naming the argument.
        """
        weights = self._weights()
        input, h0, c0, batched, dtype = self._arguments(input, hx, weights)
        if dtype is None:
            h_1, c_1 = self._step(input, h0, c0, weights)
        else:
            # torch's matrix products are in the autocast dtype, and the cell's sums promote to that of c_0.
            result = torch.promote_types(dtype, c0.dtype) if input.device.type == "cpu" else dtype
            with recurrent.without_autocast(input.device.type):
                cast = [weight.to(dtype) for weight in weights]
                h_1, c_1 = self._step(input.to(dtype), h0.to(dtype), c0.to(dtype), cast)
            h_1, c_1 = h_1.to(result), c_1.to(result)
        return (h_1, c_1) if batched else (h_1.squeeze(0), c_1.squeeze(0))

    def explain(self, input: Tensor, hx: State | None = None) -> Explanation:
        """The backend that ``forward`` takes for these arguments, and why not each other one.

        Takes the arguments of ``forward`` and raises its errors; computes nothing.
        """
        weights = self._weights()
        input, _, _, _, dtype = self._arguments(input, hx, weights)
        return lstm_dispatch.explain(input.device.type, dtype or input.dtype)

    def _weights(self) -> list[Tensor]:
        """The weights as they are now: a parametrized one is computed, and read once for that reason."""
        if self.bias:
            return [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        return [self.weight_ih, self.weight_hh]

    def _arguments(
        self, input: Tensor, hx: State | None, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, bool, torch.dtype | None]:
        """Checked input (B, I), h0 and c0 (B, H), whether the caller's had a batch, and the dtype autocast wants."""
        if not isinstance(input, Tensor):
            raise TypeError(f"LSTMCell: input: got {type(input).__name__}, expected a torch.Tensor")
        recurrent.check_layout("LSTMCell", input)
        dims = input.dim()
        if dims not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {dims}D instead")
        batched = dims == 2
        if not batched:
            input = input.unsqueeze(0)
        if input.shape[1] != self.input_size:
            raise RuntimeError(
                f"LSTMCell: input has inconsistent input_size: got {input.shape[1]} expected {self.input_size}"
            )
        expected = (input.shape[0], self.hidden_size)
        if hx is None:
            h0 = c0 = input.new_zeros(expected)
        else:
            h0, c0 = _states(hx, batched, expected)
        tensors = (h0, c0, *weights)
        dtype = recurrent.autocast_dtype(input, tensors)
        recurrent.check_alike("LSTMCell", input, _NAMES[: len(tensors)], tensors, dtypes=dtype is None)
        return input, h0, c0, batched, dtype

    @staticmethod
    def _step(input: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor]) -> State:
        backend = lstm_dispatch.choose(input.device.type, input.dtype)
        if backend is Backend.TORCH:
            state: State = _lstm_cell(input, (h0, c0), *weights)
            return state
        return recurrent.cell(backend, input, h0, c0, weights)


def _states(hx: State, batched: bool, expected: tuple[int, int]) -> State:
    """h0 and c0 (B, H) of the caller's states."""
    recurrent.check_state("LSTMCell", hx)
    for place, state in enumerate(hx):
        if state.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected hx[{place}] to be 1D or 2D, got {state.dim()}D instead")
    h0, c0 = hx if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    batch, hidden = expected
    for place, state in enumerate((h0, c0)):
        if state.dim() != 2:
            raise RuntimeError(f"LSTMCell: hidden{place}: got shape {tuple(state.shape)}, expected {expected}")
        if state.shape[1] != hidden:
            raise RuntimeError(
                f"LSTMCell: hidden{place} has inconsistent hidden_size: got {state.shape[1]}, expected {hidden}"
            )
        if state.shape[0] != batch:
            raise RuntimeError(
                f"LSTMCell: Input batch size {batch} doesn't match hidden{place} batch size {state.shape[0]}"
            )
    return h0, c0
