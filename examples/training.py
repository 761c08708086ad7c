"""The training loop of the examples: a progress bar, checkpoints to go on from, the curve as CSV and picture.

A run is a folder. What it holds is a function of the seed and the number of the step alone, so a training that was
interrupted, by Ctrl-C or by force, goes on with the same command to bitwise the same losses.
"""

from __future__ import annotations

import csv
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastattn.models import checkpoint
from fastattn.profiling.memory import peak_memory
from fastattn.profiling.plot import pyplot
from fastattn.profiling.table import render
from fastattn.profiling.timing import interleaved

KIND = "training"  # of the checkpoints, which hold more than a model
_MEASURED = range(3, 6)  # steps of a run whose memory is measured: after the first ones, which build caches


@dataclass
class Run:
    """What a training has done so far.

    Attributes:
        losses, seconds: of each step.
        validations: pairs of the number of steps done and what ``validate`` returned.
        peak_bytes: the most a training step needed beyond what was there before it, gradients included.
        about: what the run was started with; None in a run without a checkpoint.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validations: list[list[float]] = field(default_factory=list)
    peak_bytes: int = 0
    about: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> Run:
        """The run in ``folder``; FileNotFoundError or ValueError where there is none, or a damaged or foreign one."""
        return cls(**checkpoint.load(folder / "checkpoint.pt", "run", kind=KIND)["run"])

    def cost(self) -> str:
        """Steps, time and memory, in words."""
        minutes, peak = sum(self.seconds) / 60, self.peak_bytes / 1e6
        return f"{len(self.losses)} steps in {minutes:.1f} minutes, peak {peak:.1f} MB a step"


def generator(seed: int, step: int) -> torch.Generator:
    """The generator of the batch of one step: it needs no state in a checkpoint."""
    return torch.Generator().manual_seed(_seed_of(seed, step))


def _seed_of(seed: int, step: int) -> int:
    return seed * 1_000_003 + step


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    next_batch: Callable[[int], tuple[Any, ...]],
    loss: Callable[..., Tensor],
    *,
    steps: int,
    folder: Path,
    seed: int = 0,
    schedule: Callable[[int], float] | None = None,
    clip: float | None = 1.0,
    save_every: int = 200,
    validate: Callable[[], float] | None = None,
    validate_every: int | None = None,
    about: dict[str, Any] | None = None,
) -> list[float]:
    """Train up to ``steps``, from where the run in ``folder`` stands.

    Args:
        model, optimizer: as they start; a checkpoint in the folder overwrites their state.
        next_batch: the arguments of ``loss`` for a step from 0, a function of that number alone; see ``generator``.
        loss: a scalar, of such arguments.
        steps: the number after which training ends.
        folder: is made; gets checkpoint.pt, losses.csv and loss.png.
        seed: of dropout, drawn anew for every step.
        schedule: factor of the learning rate at a step from 0.
        clip: largest norm of all gradients together; None leaves them.
        save_every: steps between checkpoints; there is one more at the end and at Ctrl-C.
        validate: called every ``validate_every`` steps (None: whenever a checkpoint is due) and at the end; its number
            is shown, and kept.
        about: plain values that a run must not change when it goes on, such as sizes and vocabularies.

    Returns:
        The loss of every step, those before the checkpoint included.

    Raises:
        ValueError: the checkpoint is damaged, of something else, of another model, or of another ``about``.
        SystemExit: Ctrl-C; what was done is saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    run = _resume(path, model, optimizer, about or {}) if path.exists() else Run(about=about or {})
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    device = next(model.parameters()).device
    first = len(run.losses)

    def save() -> None:
        checkpoint.save(
            path, kind=KIND, run=dict(vars(run)), model=model.state_dict(), optimizer=optimizer.state_dict()
        )  # fmt: skip

    def one_step(batch: tuple[Any, ...]) -> float:
        optimizer.zero_grad()
        value = loss(*batch)
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return value.item()

    with _interrupts() as interrupted, tqdm(total=steps, initial=first, unit="step") as progress:
        model.train()
        for step in range(first, steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1.0 if schedule is None else schedule(step))
            torch.manual_seed(_seed_of(seed, step))
            batch = next_batch(step)
            begin = time.perf_counter()
            if step - first in _MEASURED:
                results: list[float] = []
                peak = peak_memory(lambda batch=batch, results=results: results.append(one_step(batch)), device)
                run.peak_bytes = max(run.peak_bytes, peak)
                value = results[0]
            else:
                value = one_step(batch)
            run.seconds.append(time.perf_counter() - begin)
            run.losses.append(value)
            progress.update()
            progress.set_postfix_str(_status(run), refresh=False)
            if not math.isfinite(value):
                raise ValueError(f"loss: got {value} at step {step}; the checkpoint before it is kept in {path}")
            done = step + 1
            due = done % save_every == 0 or done == steps
            if validate is not None and (done == steps or (done % validate_every == 0 if validate_every else due)):
                run.validations.append([float(done), float(validate())])
                model.train()
            if due or interrupted.is_set():
                save()
            if interrupted.is_set() and done < steps:
                _write(run, folder)
                raise SystemExit(
                    f"Stopped after step {done} and saved in {folder}: the same command goes on from there."
                )
    _write(run, folder)
    return run.losses


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, about: dict[str, Any]) -> Run:
    """Load what ``train`` saved into model and optimizer; ValueError, and nothing changed, where it does not fit."""
    parts = checkpoint.load(path, "run", "model", "optimizer", kind=KIND)
    run = Run(**parts["run"])
    before = run.about or {}
    changed = [
        f"{name}={_short(before.get(name))}, now {_short(about.get(name))}"
        for name in sorted(before.keys() | about.keys())
        if before.get(name) != about.get(name)
    ]
    if changed:
        raise ValueError(f"{path} was started with {'; '.join(changed)}: take another folder, or the same settings")
    try:
        model.load_state_dict(parts["model"])
        optimizer.load_state_dict(parts["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is the checkpoint of another model or optimizer: {error}") from error
    return run


def about_of(folder: Path, example: str, wanted: str) -> dict[str, Any]:
    """What the run in ``folder`` was started with; ValueError where it is none of ``example``, ``wanted`` in words."""
    about = Run.read(folder).about or {}
    if about.get("example") != example:
        raise ValueError(f"{folder} holds a training of {about.get('example', 'something else')!r}, not {wanted}")
    return about


def load_weights(folder: Path, model: nn.Module) -> None:
    """The weights of the run in ``folder``, into its model.

    Raises FileNotFoundError or ValueError: there is none, or it is damaged, of something else, or of another model.
    """
    path = folder / "checkpoint.pt"
    try:
        model.load_state_dict(checkpoint.load(path, "model", kind=KIND)["model"])
    except RuntimeError as error:
        raise ValueError(f"{path} is the checkpoint of another model: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _status(run: Run) -> str:
    recent = statistics.fmean(run.losses[-20:])
    return f"loss {recent:.4f}" + (f", validation {run.validations[-1][1]:.4f}" if run.validations else "")


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that no step is cut in two; a second one interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def warmup_linear(steps: int, warmup: int) -> Callable[[int], float]:
    """A factor of the learning rate: up to 1 in ``warmup`` steps, then down to 0 at ``steps``, along straight lines."""
    return lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))


# The curve -----------------------------------------------------------------------------------------------------


def _write(run: Run, folder: Path) -> None:
    with open(folder / "losses.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "seconds"])
        writer.writerows(zip(range(len(run.losses)), run.losses, run.seconds, strict=True))
    plot_losses({folder.name: run}, folder / "loss.png")


def plot_losses(runs: dict[str, Run], path: Path) -> None:
    """The losses of runs over the steps, on a logarithmic axis, and beside them their validations, as a PNG."""
    plt = pyplot()
    validated = any(run.validations for run in runs.values())
    figure, axes = plt.subplots(
        1, 2 if validated else 1, figsize=(10 if validated else 6, 4), constrained_layout=True, squeeze=False
    )
    for number, (name, run) in enumerate(runs.items()):
        style = "-" if number == 0 else "--"
        axes[0, 0].plot(run.losses, style, linewidth=0.8, label=name)
        if run.validations:
            axes[0, 1].plot(*zip(*run.validations, strict=True), marker="o", label=name)
    axes[0, 0].set(xlabel="step", title="training loss", yscale="log")
    if validated:
        axes[0, 1].set(xlabel="step", title="validation")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare(fast: Path, torch_folder: Path, *, steps: int = 200) -> str:
    """A table of two runs: time, memory, and how far their losses lie apart in the first ``steps``.

    Next to ``fast`` it leaves comparison.png, both curves.
    """
    runs = {"fastattn": Run.read(fast), "torch": Run.read(torch_folder)}
    rows = [
        [name, str(len(run.losses)), f"{statistics.median(run.seconds) * 1e3:.1f}", f"{run.peak_bytes / 1e6:.1f}",
         f"{statistics.fmean(run.losses[-20:]):.4f}"]
        for name, run in runs.items()
    ]  # fmt: skip
    pairs = list(zip(*(run.losses[:steps] for run in runs.values()), strict=False))
    apart = max(abs(ours - theirs) for ours, theirs in pairs)
    relative = max(abs(ours - theirs) / max(abs(theirs), 1e-12) for ours, theirs in pairs)
    plot_losses(runs, fast / "comparison.png")
    return (
        render(["two trainings", "steps", "median ms/step", "peak MB/step", "last loss"], rows)
        + f"\nthe losses of the first {len(pairs)} steps differ by at most {apart:.1e}, or {relative:.1e} of their size"
    )


def side_by_side(models: dict[str, nn.Module], loss: Callable[[nn.Module], Tensor], *, seconds: float = 5.0) -> str:
    """A table of one step of training of each model, without the optimizer, in turns within one process.

    Two runs meet two states of the machine; here a busy one slows both down alike.
    """

    def backward(model: nn.Module) -> None:
        model.zero_grad()
        loss(model).backward()

    device = next(next(iter(models.values())).parameters()).device
    calls = {name: partial(backward, model.train()) for name, model in models.items()}
    for call in calls.values():
        call()
        call()
    times = interleaved(calls, device, seconds=seconds)
    # What malloc holds back differs by a quarter from one measurement to the next.
    peaks: dict[str, list[int]] = {name: [] for name in calls}
    for _ in range(5):
        for name, call in calls.items():
            models[name].zero_grad()
            peaks[name].append(peak_memory(call, device))
    rows = [[name, f"{times[name] * 1e3:.1f}", f"{statistics.median(peaks[name]) / 1e6:.1f}"] for name in models]
    return render(["a step, in turns", "median ms", "peak MB"], rows)
