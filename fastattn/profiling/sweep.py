"""Time, throughput and peak memory of any model over the sequence length, before and after ``fastattn.patch``."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastattn.profiling.environment import describe
from fastattn.profiling.memory import peak_memory
from fastattn.profiling.page import Profile
from fastattn.profiling.prediction import free_memory, is_out_of_memory, predicted_bytes
from fastattn.profiling.sweep_table import OUT_OF_MEMORY, Measurement
from fastattn.profiling.timing import interleaved

# On the CPU a length is left out that would take more than this share of the available memory: beyond it the system
# ends processes instead of refusing memory.
_SHARE = 0.8
# Lengths tried first on the CPU where all those asked for are longer, so that there is something to predict from.
_PROBES, _LONG = (512, 1024), 2048
_LEAST_ROUNDS = 3

Run = Callable[..., Any]


def profile(
    model: Run | Mapping[str, Run],
    make_batch: Callable[[int], Any],
    seq_lens: Sequence[int],
    *,
    name: str = "model",
    title: str = "profile over the sequence length",
    backward: bool = False,
    batch_size: int = 1,
    flops: Callable[[int], float] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    seconds: float = 1.0,
) -> Profile:
    """Measure a model over growing sequence lengths.

    ::

        before = profile(model, make_batch, [1024, 2048, 4096], name="torch")
        fastattn.patch(model)
        after = profile(model, make_batch, [1024, 2048, 4096], name="fastattn")
        print(before + after)

    A length whose memory cannot be had is a row that says so, with what it would need; on the CPU that is predicted
    from shorter lengths. A length at which the model raises a RuntimeError or IndexError is a row with its message.
    Ctrl-C ends the measurement, and the lengths that were finished are returned.

    Args:
        model: a module or another callable, or several by name, which are measured in turns and whose outputs are
            held against the first one's. Whether modules train or evaluate is left as it is.
        make_batch: gives the batch of a length: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments, all on the device that is to be measured.
        seq_lens: positive lengths, in any order.
        name: of ``model`` in the table; a mapping has its own names.
        title: of the table and the report.
        backward: measure forward and backward, with gradients of all parameters and of the inputs that require them;
            else the forward without gradients.
        batch_size: sequences in a batch; a length has ``batch_size * length`` tokens, padding included.
        flops: floating-point operations of one measured call at a length, for TFLOP/s.
        output: takes the tensor to compare and differentiate out of what the model returns; by default the first
            floating tensor in it.
        seconds: spent on the timing of a length, unless one round takes longer.

    Returns:
        a Profile: one Measurement per length and implementation; seconds are medians, bytes are peaks beyond the
        parameters and the batch.

    Raises:
        ValueError: lengths that are not positive, no model, a size or time that is not positive, or nothing to
            differentiate by.
        TypeError: a model or ``make_batch`` that cannot be called.
    """
    runs: dict[str, Run] = dict(model) if isinstance(model, Mapping) else {name: model}
    _check(runs, make_batch, seq_lens, batch_size, seconds)
    lengths = sorted(set(seq_lens))
    sweep = _Sweep(runs, make_batch, backward, batch_size, flops, output, seconds)
    interrupted = False
    with tqdm(lengths, desc=title, unit="length") as bar:
        try:
            for length in bar:
                bar.set_postfix(length=length)
                sweep.measure(length, shortest=length == lengths[0])
        except KeyboardInterrupt:
            interrupted = True
    return Profile(title, describe(sweep.device or torch.device("cpu")), sweep.measurements, interrupted)


class _Sweep:
    """The state of one measurement: the rows so far, and the memory that each implementation took."""

    def __init__(
        self,
        runs: dict[str, Run],
        make_batch: Callable[[int], Any],
        backward: bool,
        batch_size: int,
        flops: Callable[[int], float] | None,
        output: Callable[[Any], Tensor] | None,
        seconds: float,
    ) -> None:
        self.runs, self.make_batch, self.backward = runs, make_batch, backward
        self.batch_size, self.flops, self.output, self.seconds = batch_size, flops, output, seconds
        self.measurements: list[Measurement] = []
        self.device: torch.device | None = None
        self.peaks: dict[str, list[tuple[int, int]]] = {name: [] for name in runs}
        self.full: set[str] = set()  # those that ran out of memory: longer sequences will, too

    def measure(self, length: int, *, shortest: bool) -> None:
        """Add the rows of ``length``: those that fit are timed in turns."""
        try:
            if shortest and length > _LONG:
                self._probe()
            device, calls = self._calls_at(length)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # The batch alone is too large.
            self.measurements += [Measurement(**self._row(name, length), error=OUT_OF_MEMORY) for name in self.runs]
            return
        self.device = device
        rows: dict[str, Measurement] = {}
        expected: list[Tensor] = []
        slowest = 0.0
        for name, call in calls.items():
            begin = time.perf_counter()
            rows[name] = self._try(name, call, length, device, expected)
            slowest = max(slowest, (time.perf_counter() - begin) / 2)
        fitting = {name: call for name, call in calls.items() if rows[name].error is None}
        expected.clear()
        if fitting:
            rounds = _LEAST_ROUNDS if slowest < 2 * self.seconds else 1
            for name, median in interleaved(fitting, device, rounds=rounds, seconds=self.seconds).items():
                rows[name] = Measurement(**{**asdict(rows[name]), "seconds": median})
        self.measurements += rows.values()

    def _probe(self) -> None:
        """On the CPU, the memory at short lengths, which predicts that of long ones."""
        for length in _PROBES:
            device, calls = self._calls_at(length)
            for name, call in calls.items() if device.type == "cpu" else ():
                self._try(name, call, length, device, None)

    def _row(self, name: str, length: int) -> dict[str, Any]:
        flops = self.flops(length) if self.flops else None
        return {"length": length, "implementation": name, "tokens": self.batch_size * length, "flops": flops}

    def _calls_at(self, length: int) -> tuple[torch.device, dict[str, Callable[[], Tensor]]]:
        batch = self.make_batch(length)
        calls = {name: bound(run, batch, self.backward, self.output) for name, run in self.runs.items()}
        return _device_of(_arguments(batch)), calls

    def _try(
        self, name: str, call: Callable[[], Tensor], length: int, device: torch.device, expected: list[Tensor] | None
    ) -> Measurement:
        """The row without its time: run once to warm up and for the answer, once more for the memory."""
        row = self._row(name, length)
        needed = predicted_bytes(self.peaks[name], length)
        does_not_fit = device.type == "cpu" and needed is not None and needed > _SHARE * free_memory(device)
        if name in self.full or does_not_fit:
            self.full.add(name)
            return Measurement(**row, error=OUT_OF_MEMORY, needed_bytes=needed)
        try:
            difference = _difference(call(), expected)
            peak = peak_memory(call, device)
        except (MemoryError, RuntimeError, IndexError) as error:
            if not is_out_of_memory(error):
                message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                return Measurement(**row, error=message)
            self.full.add(name)
        else:
            self.peaks[name].append((length, peak))
            return Measurement(**row, peak_bytes=peak, difference=difference)
        # Out of the handler, whose traceback held the tensors of the call.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return Measurement(**row, error=OUT_OF_MEMORY, needed_bytes=needed)


def bound(
    run: Run, batch: Any, backward: bool, output: Callable[[Any], Tensor] | None = None
) -> Callable[[], Tensor]:
    """The measured call: ``run`` on ``batch``, and with ``backward`` the gradients; gives the output, detached.

    The arguments are those of ``profile``. Raises ValueError where the backward has nothing to differentiate by.
    """
    args, kwargs = _arguments(batch)
    parameters = list(run.parameters()) if isinstance(run, nn.Module) else []
    leaves = [leaf for leaf in (*parameters, *_tensors((args, kwargs))) if leaf.requires_grad and leaf.is_leaf]
    if backward and not leaves:
        raise ValueError(
            f"backward: got {type(run).__name__} as model, expected a module with parameters, or inputs that require "
            "gradients"
        )
    output = output or _first_floating

    def call() -> Tensor:
        with torch.set_grad_enabled(backward):
            out = output(run(*args, **kwargs))
            if backward:
                # Not out.backward(): the gradients that the caller's parameters hold stay as they are.
                torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
        return out.detach()

    return call


def _difference(found: Tensor, expected: list[Tensor] | None) -> float | None:
    """Largest difference from the first implementation's output, as a share of its largest entry; None for itself."""
    if expected is None:
        return None
    if not expected:
        expected.append(found)
        return None
    if found.shape != expected[0].shape:
        return math.inf
    return float((found - expected[0]).abs().max() / expected[0].abs().max().clamp_min(1e-30))


def _check(
    runs: Mapping[str, Run], make_batch: Any, seq_lens: Sequence[int], batch_size: int, seconds: float
) -> None:
    if not runs:
        raise ValueError("model: got an empty mapping, expected at least one model")
    for name, run in runs.items():
        if not callable(run):
            raise TypeError(f"model: got {type(run).__name__} as {name!r}, expected a module or another callable")
    if not callable(make_batch):
        raise TypeError(f"make_batch: got {type(make_batch).__name__}, expected a function of a length")
    if not seq_lens or min(seq_lens) < 1:
        raise ValueError(f"seq_lens: got {list(seq_lens)}, expected one or more positive numbers")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected a positive number")
    if seconds <= 0:
        raise ValueError(f"seconds: got {seconds}, expected a positive number")


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments. A named tuple, such as a PackedSequence, is one argument."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple) and not hasattr(batch, "_fields"):
        return batch, {}
    return (batch,), {}


def _tensors(tree: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [tensor for part in tree for tensor in _tensors(part)]


def _device_of(tree: Any) -> torch.device:
    """The GPU where a tensor lies on one; a PackedSequence keeps its lengths on the CPU."""
    devices = [tensor.device for tensor in _tensors(tree)]
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


def _first_floating(result: Any) -> Tensor:
    if isinstance(result, tuple) or not isinstance(result, Mapping):
        found = _tensors(result)
    else:  # a ModelOutput of transformers
        found = _tensors(tuple(result.values()))
    for tensor in found:
        if tensor.is_floating_point():
            return tensor
    raise TypeError(f"output: the model returned {type(result).__name__} without a floating tensor; give `output`")
