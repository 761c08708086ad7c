"""The C++ layer-normalised LSTM of ``csrc`` behind the operators: float32, float16 and bfloat16 on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.kernels.attention.extension import UNAVAILABLE as UNAVAILABLE

if UNAVAILABLE is None:
    import fastattn._C as _extension


def saved_floats(hidden: int) -> int:
    """What the backward needs of one row of one direction; see csrc/layer_norm_lstm.h."""
    return 14 * ((hidden + 15) // 16 * 16) + 3


def layer(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *problem, save, all_cells = args
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _extension.layer_norm_lstm_forward(
        tuple(problem), save, all_cells
    )
    return result


def layer_backward(
    grad_out: Tensor | None, grad_cells: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, out: Tensor,
    saved: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    *problem, input_grad = rest
    grads = (grad_out, grad_cells, grad_h_n, grad_c_n)
    result: tuple[Tensor, Tensor, Tensor, list[Tensor]] = _extension.layer_norm_lstm_backward(
        grads, tuple(problem), out, saved, input_grad
    )
    return result
