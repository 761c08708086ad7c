"""The layers of a stack one after another, whoever computes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Results = tuple[Tensor, Tensor, Tensor]  # out, h_n, c_n
# (input, batch_sizes, h0, c0, weights), those of one layer in its D directions.
Layer = Callable[[Tensor, Tensor | None, Tensor, Tensor, list[Tensor]], Results]


def in_turn(
    one: Layer, layers: int, input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor,
    weights: Sequence[Tensor], between: Callable[[Tensor], Tensor] | None = None,
) -> Results:  # fmt: skip
    """out, h_n and c_n of ``layers`` layers, each by ``one``.

    Args:
        one: computes a layer.
        input, batch_sizes: of the first layer.
        h0, c0: (layers D, B, P) and (layers D, B, H).
        weights: layer after layer.
        between: changes the input of every layer but the first.
    """
    directions, per_layer = h0.shape[0] // layers, len(weights) // layers
    states = []
    for layer in range(layers):
        if layer > 0 and between is not None:
            input = between(input)
        rows = slice(layer * directions, (layer + 1) * directions)
        of_layer = list(weights[layer * per_layer : (layer + 1) * per_layer])
        input, h_n, c_n = one(input, batch_sizes, h0[rows], c0[rows], of_layer)
        states.append((h_n, c_n))
    if layers == 1:
        return input, *states[0]
    return input, torch.cat([h_n for h_n, _ in states]), torch.cat([c_n for _, c_n in states])
