"""Gradients by an operator's eager definition: for a derivative of a derivative, and where nothing was saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(
    results: Sequence[Tensor], grads: Sequence[Tensor | None], inputs: Sequence[Any], places: Sequence[int],
    create_graph: bool = True,
) -> list[Tensor | None]:  # fmt: skip
    """The gradient of each of ``inputs``, None for those not in ``places``, from those of ``results``.

    ``inputs`` are aliases that ``results`` were computed from: where one input of an operator depends on another, no
    derivative may follow it there.
    """
    pairs = [
        (result, grad)
        for result, grad in zip(results, grads, strict=True)
        if grad is not None and result.requires_grad
    ]
    found: list[Tensor | None] = [None] * len(inputs)
    if pairs and places:
        outputs, given = zip(*pairs, strict=True)
        wanted = [inputs[place] for place in places]
        computed = torch.autograd.grad(outputs, wanted, given, create_graph=create_graph, allow_unused=True)
        for place, gradient in zip(places, computed, strict=True):
            found[place] = gradient
    return found
