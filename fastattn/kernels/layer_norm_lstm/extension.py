"""The layer-normalised LSTM of ``csrc`` behind the operators: float32, float16 and bfloat16, on the CPU and on CUDA.

``csrc/layer_norm_lstm.h`` says what every tensor is; the extension checks what it is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.built import UNAVAILABLE as _NOT_BUILT
from fastattn.kernels.built import extension as _extension
from fastattn.kernels.lstm.extension import DTYPES as DTYPES
from fastattn.kernels.lstm.extension import verified as verified


def saved_floats(hidden: int, backend: str) -> int:
    """What the backward needs of one row of one direction; see csrc/layer_norm_lstm.h."""
    return 14 * (hidden if backend == "cuda" else (hidden + 15) // 16 * 16) + 3


class Kernels:
    """The extension's functions for tensors on one kind of device, "cpu" or "cuda", as the operators call them."""

    def __init__(self, backend: str) -> None:
        suffix = "_cuda" if backend == "cuda" else ""
        self._backend = backend
        self._forward: Any = getattr(_extension, f"layer_norm_lstm_forward{suffix}", None)
        self._backward: Any = getattr(_extension, f"layer_norm_lstm_backward{suffix}", None)

    def why_unavailable(self) -> str | None:
        """The reason they cannot run; None when they can."""
        if _NOT_BUILT is not None:
            return _NOT_BUILT
        if self._forward is None:
            device = " for CUDA" if self._backend == "cuda" else ""
            return f"the C++ extension fastattn._C was built without this LSTM{device}; run: pip install -e ."
        if self._backend == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return None

    def layer(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        self._check()
        *problem, save, all_cells = args
        result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = self._forward(tuple(problem), save, all_cells)
        return result

    def layer_backward(
        self, grad_out: Tensor | None, grad_cells: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None,
        out: Tensor, saved: Tensor, *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
        self._check()
        *problem, input_grad = rest
        grads = (grad_out, grad_cells, grad_h_n, grad_c_n)
        result: tuple[Tensor, Tensor, Tensor, list[Tensor]] = self._backward(
            grads, tuple(problem), out, saved, input_grad
        )
        return result

    def _check(self) -> None:
        if self._forward is None:
            raise RuntimeError(f"backend: got {self._backend!r}, but {self.why_unavailable()}")


KERNELS = {name: Kernels(name) for name in ("cpu", "cuda")}
