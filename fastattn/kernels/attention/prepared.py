"""A plain forward launch, made ready at the first call of its kind and used again by the next.

Checks, tiles, strides and features depend on the shapes and layouts of the tensors alone, and finding them costs less
than working them out once more: a public call with the kernel replaced by nothing takes 9 us of an EPYC's time
(Zen 5), 45 by the long way with pointers and 64 with descriptors (benchmarks/host_time.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels.attention import arguments, config, launch, shapes
from fastattn.kernels.device import on

# Kinds of calls that are kept; then all are forgotten. A sequence that grows makes a new one at each step.
_MOST = 512


class _Ready(NamedTuple):
    start: Callable[..., Any]  # the kernel with its grid
    given: dict[str, Any]  # its arguments but for the tensors
    query: Any  # Heads or a descriptor without its tensor, as the next ones
    key: Any
    value: Any
    out: Any
    out_stride: tuple[int, ...]
    logsumexp_shape: tuple[int, ...]


_known: dict[tuple[Any, ...], _Ready] = {}


def kind_of(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Any, ...]:
    """What a launch depends on beside the numbers; ``rest`` are the other arguments of the call, hashable."""
    # Descriptors need it of all three; where one has it not, none is used.
    aligned = (query.data_ptr() | key.data_ptr() | value.data_ptr()) % 16 == 0
    precision = torch.get_float32_matmul_precision() if query.dtype == torch.float32 else None
    return (
        query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(), query.dtype, query.device,
        aligned, precision, *config.in_force(), *rest,
    )  # fmt: skip


def again(kind: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """The output of a call of a known kind; None of another one."""
    ready = _known.get(kind)
    if ready is None:
        return None
    out = query.new_empty_strided(query.shape, ready.out_stride)  # as ``shapes.empty_output``
    logsumexp = query.new_empty(ready.logsumexp_shape, dtype=torch.float32)
    with on(query.device):
        ready.start(
            query=_with(ready.query, query), key=_with(ready.key, key), value=_with(ready.value, value),
            out=_with(ready.out, out), logsumexp=logsumexp, **ready.given,
        )  # fmt: skip
    return out


def first(
    kind: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor, scale: float, shift: int, upper: int | None
) -> Tensor:
    """The output of a checked call, without masks; its launch is kept for the next ones of this kind."""
    shared = launch.Problem(query, key, *(None,) * 6, 0.0, scale, 0.0, shift, None, upper)
    out, logsumexp = shapes.empty_output(query, value), shapes.empty_logsumexp(query)
    start, given = launch.forward_launch(shared, query, key, value, None, out, logsumexp)
    with on(query.device):
        start(**given)
    tensors = {"query": query, "key": key, "value": value, "out": out}
    places = {name: given.pop(name) for name in (*tensors, "logsumexp")}
    # A tensor that the kernel cannot read where it lies was copied, and would have to be each time.
    if all(_tensor(places[name]) is tensor for name, tensor in tensors.items()):
        if len(_known) >= _MOST:
            _known.clear()
        empty = {name: _with(places[name], None) for name in tensors}
        _known[kind] = _Ready(start, given, **empty, out_stride=out.stride(), logsumexp_shape=tuple(logsumexp.shape))
    return out


def _tensor(place: Any) -> Tensor:
    """The tensor of a ``Heads`` or of a descriptor."""
    tensor: Tensor = place.pointer if isinstance(place, arguments.Heads) else place.base
    return tensor


def _with(place: Any, tensor: Tensor | None) -> Any:
    """A ``Heads`` or a descriptor with another tensor of the same layout, which needs no checks."""
    if isinstance(place, arguments.Heads):
        return arguments.Heads(tensor, *place[1:])
    other = object.__new__(type(place))
    other.__dict__.update(place.__dict__)
    other.base = tensor
    return other
