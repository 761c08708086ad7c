"""Gradients by an operator's eager definition: for a derivative of a derivative, and where nothing was saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import transforms


def asked_for(*grads: Tensor | None) -> bool:
    """Whether a backward has to go by the definition, which every transform of autograd follows.

    Because a derivative of it is wanted, backward (create_graph=True) or forward, or because ``grads`` are a batch of
    gradients (is_grads_batched=True, jacobian(vectorize=True)).
    """
    if torch.is_grad_enabled() or transforms.transformed():
        return True
    return any(grad is not None and (_batched(grad) or _batched_by_autograd(grad)) for grad in grads)


_batched: Callable[[Tensor], bool] = torch._C._functorch.is_batchedtensor
_batched_by_autograd: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def gradients(
    function: Callable[..., Sequence[Any]], inputs: Sequence[Any], places: Sequence[int],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """The gradient of each of ``inputs``, None for those not in ``places``, from those of ``function(*inputs)``.

    Themselves part of a graph where gradients are enabled.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: where one input depends on another, as a logsumexp does on query, no derivative may follow it there.
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        # One that was frozen since the forward has no gradient any more.
        places = [place for place in places if (alias := aliases[place]) is not None and alias.requires_grad]
        results = function(*aliases)
    pairs = [
        (result, grad)
        for result, grad in zip(results, grads, strict=True)
        if grad is not None and result.requires_grad
    ]
    found: list[Tensor | None] = [None] * len(inputs)
    if pairs and places:
        outputs, given = zip(*pairs, strict=True)
        wanted = [alias for place in places if (alias := aliases[place]) is not None]
        computed = torch.autograd.grad(outputs, wanted, given, create_graph=create_graph, allow_unused=True)
        for place, gradient in zip(places, computed, strict=True):
            found[place] = gradient
    return found
