"""Named ranges for torch.profiler: which module runs, and whether an operator is projection, attention or LSTM.

They are put around modules by global hooks and around operators by a dispatch mode, both only inside
``named_ranges``: outside of it nothing is installed, so modules cost what they cost without ranges and compile as
before. Hooks of the modules themselves would not do: nn.TransformerEncoderLayer takes another path where it sees one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode

_WHOLE = ("native_multi_head_attention", "transformer_encoder_layer")  # torch's fast paths, one operator each
_ATTENTION = ("softmax", "bmm", "scaled_dot_product")
_LSTM = ("lstm", "rnn")
_PROJECTION = ("mm", "linear")


@contextmanager
def named_ranges(model: nn.Module) -> Iterator[None]:
    """Inside, torch.profiler sees what ``model`` runs under names.

    A submodule is a range with its class and its name in the model, such as ``MultiheadAttention
    layers.0.self_attn``; the operators that matter stand in ranges called ``projection``, ``attention`` and ``LSTM``.
    Operators of the backward are named by the same rule. Meant for a trace: dispatching costs time on the host.

    Raises TypeError when ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    names = {id(module): f"{type(module).__name__} {name}".rstrip() for name, module in model.named_modules()}
    # A module that raises leaves its range to the one around it, which closes all.
    running: list[tuple[int, Any]] = []

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in names:
            span = record_function(names[id(module)])
            span.__enter__()
            running.append((id(module), span))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if id(module) in names:
            while running:
                key, span = running.pop()
                span.__exit__(None, None, None)
                if key == id(module):
                    break

    operators: Any = _OperatorRanges()  # type: ignore[no-untyped-call]
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with operators:
            yield
    finally:
        for handle in handles:
            handle.remove()
        while running:
            running.pop()[1].__exit__(None, None, None)


def write_trace(calls: Mapping[str, tuple[nn.Module, Callable[[], Any]]], out: Path) -> list[Path]:
    """Run each call once under torch.profiler and write ``trace-<name>.json`` to the folder ``out``.

    The files are opened by https://ui.perfetto.dev and chrome://tracing.

    Args:
        calls: by name, the module whose parts are named, and the call, which should have run before.
        out: the folder, made where it is missing.

    Returns the paths.
    """
    out.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    written = []
    for name, (module, call) in calls.items():
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            with named_ranges(module), record_function(name):
                call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        path = out / f"trace-{''.join(letter if letter.isalnum() else '-' for letter in name)}.json"
        profiler.export_chrome_trace(str(path))
        written.append(path)
    return written


@functools.cache
def kind_of(operator: str) -> str | None:
    """The range of an operator such as ``aten::addmm``: projection, attention, both, LSTM; or None."""
    space, _, name = operator.partition("::")
    if any(part in name for part in _WHOLE):
        return "projections and attention"
    if any(part in name for part in _LSTM):
        return "LSTM"
    if space == "fastattn" or any(part in name for part in _ATTENTION):
        return "attention"
    return "projection" if any(part in name for part in _PROJECTION) else None


class _OperatorRanges(TorchDispatchMode):
    """Puts a range around every operator that has a kind."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = kind_of(func.name().partition(".")[0])
        if kind is None:
            return func(*args, **(kwargs or {}))
        with record_function(kind):
            return func(*args, **(kwargs or {}))
