"""torch's own LSTM: what the extension does not serve, and what it is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Bound at import, as torch.nn.LSTM binds it.
_lstm: Any = torch._VF.lstm

Result = tuple[Tensor, Tensor, Tensor]


def run(
    input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], layers: int = 1
) -> Result:
    """``layers`` layers without dropout: out, h_n (layers D, B, P), c_n (layers D, B, H).

    input (T, B, I), or packed (N, I) with batch_sizes (T); h0 (layers D, B, P), c0 (layers D, B, H); weights as the
    operator takes them, layer after layer.
    """
    directions = h0.shape[0] // layers
    per_direction = len(weights) // (layers * directions)
    biases = per_direction >= 4
    if weights[0].is_cuda:
        weights = _in_one_piece(list(weights), per_direction, layers, directions, h0.shape[2], c0.shape[2])
    # In evaluation cuDNN keeps nothing for a backward.
    train = torch.is_grad_enabled()
    options = (weights, biases, layers, 0.0, train, directions == 2)
    if batch_sizes is None:
        result: Result = _lstm(input, (h0, c0), *options, False)
    else:
        result = _lstm(input, batch_sizes, (h0, c0), *options)
    return result


def gradients(
    leaves: Sequence[Tensor], results: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of those ``leaves`` that require one, through the graph of ``results``; else None."""
    pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    places = [place for place, leaf in enumerate(leaves) if leaf.requires_grad]
    found: list[Tensor | None] = [None] * len(leaves)
    if pairs:
        outputs, weighing = zip(*pairs, strict=True)
        derivatives = torch.autograd.grad(outputs, [leaves[place] for place in places], weighing, allow_unused=True)
        for place, derivative in zip(places, derivatives, strict=True):
            found[place] = derivative
    return found


# As operators ------------------------------------------------------------------------------------------------


def forward(
    input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], _save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer for a compiler; the backward computes it again, and nothing is kept for it."""
    # A compiler relies on the layout of the shape rule.
    out, h_n, c_n = (result.contiguous() for result in run(input, batch_sizes, h0, c0, weights))
    return out, h_n, c_n, input.new_empty(0), input.new_empty(0, dtype=torch.float32)


def backward(
    grad_out: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, input: Tensor,
    batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], *_saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    leaves = [tensor.detach().requires_grad_() for tensor in (input, h0, c0, *weights)]
    # An operator runs below autograd; this one needs it.
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        results = run(leaves[0], batch_sizes, leaves[1], leaves[2], leaves[3:])
        found = gradients(leaves, results, (grad_out, grad_h_n, grad_c_n))
    dinput, dh0, dc0, *dweights = (
        torch.zeros_like(leaf, memory_format=torch.contiguous_format) if grad is None else grad.contiguous()
        for leaf, grad in zip(leaves, found, strict=True)
    )
    return dinput.detach(), dh0.detach(), dc0.detach(), [grad.detach() for grad in dweights]


# cuDNN's weights ---------------------------------------------------------------------------------------------


def _in_one_piece(
    weights: list[Tensor], per_direction: int, layers: int, directions: int, outputs: int, hidden: int
) -> Sequence[Tensor]:
    """The weights as cuDNN wants them, one after another in one storage; it copies and warns where they are not."""
    if not torch.backends.cudnn.is_acceptable(weights[0]) or _are_in_one_piece(weights):
        return weights
    projection = outputs if outputs != hidden else 0
    apply: Callable[..., Sequence[Tensor]] = _InOnePiece.apply
    return apply(per_direction, hidden, projection, layers, directions == 2, *weights)


def _are_in_one_piece(weights: list[Tensor]) -> bool:
    """Whether they lie as ``flatten_parameters`` lays them: all matrices, then all biases, from a storage's start."""
    first = weights[0]
    if first.storage_offset() or any(w.untyped_storage().data_ptr() != first.data_ptr() for w in weights):
        return False
    matrices = max(weight.storage_offset() for weight in weights if weight.dim() == 2)
    return all(weight.storage_offset() > matrices for weight in weights if weight.dim() == 1)


class _InOnePiece(torch.autograd.Function):
    """Copies of the weights in one storage, in cuDNN's order."""

    @staticmethod
    def forward(
        _ctx: Any, per_direction: int, hidden: int, projection: int, layers: int, bidirectional: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        from torch.backends.cudnn import rnn

        pieces = [weight.detach().clone() for weight in weights]
        torch._cudnn_rnn_flatten_weight(
            pieces, per_direction, weights[0].shape[1], rnn.get_cudnn_mode("LSTM"), hidden, projection, layers, False,
            bidirectional,
        )  # fmt: skip
        return tuple(pieces)

    @staticmethod
    def backward(_ctx: Any, *grads: Any) -> Any:
        return (None,) * 5 + grads
