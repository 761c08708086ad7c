"""The doctor's look at the LSTM: which backend serves it, why not the others, and whether each is right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from tqdm.auto import tqdm

from fastattn.dispatch import LSTM_BACKENDS, Backend, backend
from fastattn.lstm_dispatch import explain, why_not
from fastattn.modules.lstm import LSTM
from fastattn.profiling.verdict import Results, Verdict, judge

_SEED = 0
_INPUTS, _HIDDEN, _LENGTHS = 24, 40, (9, 5, 1)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Case:
    """One problem of the self-check: a module's options, and whether its input is packed."""

    name: str
    options: dict[str, Any]
    packed: bool = False


_CASES = (
    _Case("padded", {}),
    _Case("two layers, bidirectional", {"num_layers": 2, "bidirectional": True}),
    _Case("packed, bidirectional", {"bidirectional": True}, packed=True),
    _Case("packed, projected", {"proj_size": 24}, packed=True),
)


def self_check(device: torch.device) -> tuple[list[Verdict], dict[Backend, str]]:
    """Verdicts on the backends available on ``device``, and for each other one the reason."""
    verdicts, unavailable = [], {}
    jobs = [(name, dtype) for name in LSTM_BACKENDS if name is not Backend.REFERENCE for dtype in _DTYPES]
    for name, dtype in tqdm(jobs, desc="self-check of the LSTM", unit="backend", leave=False):
        reason = why_not(name, device.type, dtype)
        if reason is None:
            verdicts.append(judge(name, dtype, _answers(name, dtype, device)))
        else:
            unavailable[name] = reason
    return verdicts, unavailable


def choices(device: torch.device) -> dict[str, str]:
    """What serves a call, by dtype."""
    chosen = {str(dtype)[6:]: explain(device.type, dtype) for dtype in (*_DTYPES, torch.float64)}
    return {dtype: f"{one.backend}: {one.because}" for dtype, one in chosen.items()}


def _answers(
    name: Backend, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Results, Results, Results]]:
    for case in _CASES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            module = LSTM(_INPUTS, _HIDDEN, **case.options).to(device, dtype)
            x = torch.randn(_LENGTHS[0], len(_LENGTHS), _INPUTS).to(device, dtype)
        wide = copy.deepcopy(module).double()
        yield (
            case.name,
            _compute(Backend.REFERENCE, case, wide, x.double()),
            _compute(Backend.REFERENCE, case, module, x),
            _compute(name, case, module, x),
        )


def _compute(name: Backend, case: _Case, module: LSTM, x: torch.Tensor) -> Results:
    """Outputs, and gradients of the input and of every weight."""
    leaf = x.detach().requires_grad_()
    given: Any = pack_padded_sequence(leaf, torch.tensor(_LENGTHS)) if case.packed else leaf
    with backend(name):
        out, (h_n, c_n) = module(given)
        data = out.data if isinstance(out, PackedSequence) else out
        loss = data.square().sum() + h_n.sum() + c_n.square().sum()
        grads = torch.autograd.grad(loss, [leaf, *module.parameters()])
    names = ["input", *dict(module.named_parameters())]
    outputs = {"output": data.detach(), "h_n": h_n.detach(), "c_n": c_n.detach()}
    return outputs | {f"gradient of {key}": grad for key, grad in zip(names, grads, strict=True)}
