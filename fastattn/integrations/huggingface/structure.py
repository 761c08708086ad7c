"""A mask that keeps its structure: padding (B, S) and a band, dense only for those who look inside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastattn.reference import band


class StructuredMask(torch.Tensor):
    """A boolean mask of shape (B, 1, L, S), True takes part, that holds (B, S) numbers at most.

    Query i sees key j where ``i + shift - left <= j <= i + shift + right`` (None: no bound) and the key is no
    padding. Models hand masks on as they are, so it arrives whole. It has the shape and dtype of the dense mask, and
    every operation on it computes on the dense mask: a model that slices, combines or converts it stays right.

    The padding is an inner tensor of the subclass, by which a layer compiled alone takes the mask as its input.
    """

    _padding: Tensor  # without padding: empty
    left: int | None
    right: int | None
    shift: int

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        padding: Tensor | None,
        left: int | None,
        right: int | None,
        shift: int,
        device: torch.device,
    ) -> StructuredMask:
        mask: Any = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.bool, device=device)
        mask._padding = torch.empty(0, dtype=torch.bool, device=device) if padding is None else padding
        mask.left, mask.right, mask.shift = left, right, shift
        structured: StructuredMask = mask
        return structured

    @property
    def padding(self) -> Tensor | None:
        """(B, S) boolean, True at tokens, or None."""
        return self._padding if self._padding.dim() == 2 else None

    def dense(self) -> Tensor:
        """The same mask as a plain tensor."""
        batch, _, queries, keys = self.shape
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        if self.padding is not None:
            mask = self.padding[:, None, None, :]
        if self.left is not None or self.right is not None:
            lower = None if self.left is None else self.shift - self.left
            upper = None if self.right is None else self.shift + self.right
            mask = mask & band(queries, keys, lower, upper, self.device)[None, None]
        return mask.expand(batch, 1, queries, keys)

    # Copies and pickles would otherwise go through the storage, which a wrapper has not.
    def __deepcopy__(self, memo: dict[int, Any]) -> StructuredMask:
        return copy.copy(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return StructuredMask, (tuple(self.shape), self.padding, self.left, self.right, self.shift, self.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        padded = "padded" if self.padding is not None else "not padded"
        return (
            f"StructuredMask(shape={tuple(self.shape)}, {padded}, "
            f"left={self.left}, right={self.right}, shift={self.shift})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_padding"], (self.left, self.right, self.shift)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, shape: Sequence[int], stride: Sequence[int]
    ) -> StructuredMask:
        padding, (left, right, shift) = inner["_padding"], context
        return StructuredMask(shape, padding, left, right, shift, padding.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_as_dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _as_dense(value: Any) -> Any:
    return value.dense() if isinstance(value, StructuredMask) else value
