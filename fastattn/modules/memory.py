"""What a decoder attends to at every step: the keys, and their projections, computed once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class ProjectedKeys(NamedTuple):
    """Keys (B, Tk, Dk) and their projections (B, Tk, D), from ``project_keys`` of the module they are for."""

    key: Tensor
    projection: Tensor


def check_step(
    query: Tensor, key: Tensor | ProjectedKeys, value: Tensor | None, query_dim: int, key_dim: int
) -> None:
    """query (B, Tq, query_dim) or (B, query_dim), key (B, Tk, key_dim) or its projections, value (B, Tk, Dv) or None.

    Raises TypeError for anything but tensors, ValueError for a wrong shape.
    """
    check_tensor("query", query, query_dim, (2, 3))
    if not isinstance(key, ProjectedKeys):
        check_tensor("key", key, key_dim)
    if value is not None:
        check_tensor("value", value, None)


def check_tensor(name: str, tensor: Any, features: int | None, ranks: tuple[int, ...] = (3,)) -> None:
    """A tensor of one of the ranks whose last dimension is ``features``; None is any.

    Raises TypeError, ValueError.
    """
    if not isinstance(tensor, Tensor):
        also = " or what project_keys returns" if name == "key" else ""
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor{also}")
    if tensor.dim() not in ranks:
        expected = " or ".join(map(str, ranks))
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected} dimensions")
    if features is not None and tensor.shape[-1] != features:
        raise ValueError(f"{name}: got {tensor.shape[-1]} features, expected {features}")


def check_sizes(**sizes: int) -> None:
    """Integers of at least 1, by the name of the argument.

    Raises TypeError, ValueError.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: got {type(size).__name__}, expected an integer")
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")


def drop_step(result: Tensor | tuple[Tensor, Tensor], step: bool) -> Tensor | tuple[Tensor, Tensor]:
    """The results without the dimension of one query that a (B, query_dim) query was given."""
    if not step:
        return result
    if isinstance(result, tuple):
        return result[0].squeeze(1), result[1].squeeze(1)
    return result.squeeze(1)


def uniform_(parameter: Tensor, features: int) -> None:
    """U(-1 / sqrt(features), 1 / sqrt(features)): what nn.Linear draws for so many inputs."""
    torch.nn.init.uniform_(parameter, -(features**-0.5), features**-0.5)
