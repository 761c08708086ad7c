"""The long-sequence profile: the default call ``mha(x, x, x)`` of both modules over growing lengths."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastattn.modules.attention import MultiheadAttention
from fastattn.profiling.memory import peak_memory
from fastattn.profiling.prediction import free_memory
from fastattn.profiling.timing import interleaved

TORCH, OURS = "nn.MultiheadAttention", "fastattn.MultiheadAttention"
DEFAULT_LENGTHS = (128, 256, 512, 1024, 2048, 4096)

_TorchMultiheadAttention = nn.MultiheadAttention
# torch's module holds about this many (B, H, L, S) tensors at its peak in training; used to leave out what cannot fit.
_SCORE_COPIES = 4


@dataclass(frozen=True)
class Point:
    """One implementation at one length: medians of time, peaks of memory beyond the input and the parameters."""

    length: int
    implementation: str
    forward_seconds: float
    training_seconds: float
    forward_bytes: int
    training_bytes: int


def profile(
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    embed_dim: int = 256,
    heads: int = 8,
    seconds: float = 1.0,
) -> list[Point]:
    """Measure ``mha(x, x, x)``: forward in eval mode without gradients, and training (forward and backward).

    Both modules hold the same parameters and take x (batch, length, embed_dim). The call is the default one, so both
    return the head-averaged weights (batch, length, length). Their outputs are compared before anything is measured.
    ``seconds`` is the time spent on each of the two timings of a length, unless one round takes longer. A length
    whose scores do not fit the memory is left out.

    Raises ValueError for lengths that are not positive.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths: got {list(lengths)}, expected one or more positive numbers")
    theirs = _TorchMultiheadAttention(embed_dim, heads, batch_first=True, device=device, dtype=dtype)
    ours = MultiheadAttention(embed_dim, heads, batch_first=True, device=device, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    modules: dict[str, nn.Module] = {TORCH: theirs, OURS: ours}
    points = []
    with tqdm(sorted(set(lengths)), desc="mha(x, x, x)", unit="length") as bar:
        for length in bar:
            bar.set_postfix(length=length)
            needed = _SCORE_COPIES * batch * heads * length * length * dtype.itemsize
            if needed > free_memory(device):
                bar.write(f"length {length} left out: its scores need about {needed / 2**30:.0f} GiB")
                continue
            x = torch.randn(batch, length, embed_dim, device=device, dtype=dtype)
            points += _measure(modules, x, seconds)
    return points


def _measure(modules: dict[str, nn.Module], x: Tensor, seconds: float) -> list[Point]:
    forwards = {name: _forward(module, x) for name, module in modules.items()}
    trainings = {name: _training(module, x) for name, module in modules.items()}
    _set_training(modules, False)
    expected, got = (forward() for forward in forwards.values())
    _assert_same(expected, got, x.shape[1])
    forward_bytes = {name: peak_memory(call, x.device) for name, call in forwards.items()}
    forward_seconds = interleaved(forwards, x.device, seconds=seconds)
    _set_training(modules, True)
    for call in trainings.values():
        call()
    training_bytes = {name: peak_memory(call, x.device) for name, call in trainings.items()}
    training_seconds = interleaved(trainings, x.device, seconds=seconds)
    return [
        Point(
            x.shape[1], name, forward_seconds[name], training_seconds[name], forward_bytes[name], training_bytes[name]
        )
        for name in modules
    ]


def _set_training(modules: dict[str, nn.Module], mode: bool) -> None:
    for module in modules.values():
        module.train(mode)


def _forward(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return module(x, x, x)

    return call


def _training(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    x = x.clone().requires_grad_()

    def call() -> Any:
        x.grad = None
        module.zero_grad(set_to_none=True)
        out, _ = module(x, x, x)
        out.backward(torch.ones_like(out))
        return out

    return call


def _assert_same(expected: tuple[Tensor, Tensor], got: tuple[Tensor, Tensor], length: int) -> None:
    for what, wanted, found in zip(("output", "weights"), expected, got, strict=True):
        tolerance = 5 * torch.finfo(wanted.dtype).eps ** 0.75
        if not torch.allclose(found, wanted, atol=tolerance, rtol=1e-3):
            difference = float((found - wanted).abs().max())
            raise AssertionError(f"{what} at length {length} differs by {difference}: nothing was measured")


def write_csv(points: Sequence[Point], path: Path) -> None:
    """One line per implementation and length; seconds and bytes."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)
