"""The doctor's look at the LSTMs: which backend serves each, why not the others, and whether each is right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from tqdm.auto import tqdm

from fastattn import layer_norm_lstm
from fastattn.dispatch import LSTM_BACKENDS, Backend, Explanation, backend
from fastattn.lstm_dispatch import explain, why_not
from fastattn.modules.layer_norm_lstm import LayerNormLSTM
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
    module: type[LSTM] | type[LayerNormLSTM] = LSTM


_CASES = (
    _Case("padded", {}),
    _Case("two layers, bidirectional", {"num_layers": 2, "bidirectional": True}),
    _Case("packed, bidirectional", {"bidirectional": True}, packed=True),
    _Case("packed, projected", {"proj_size": 24}, packed=True),
    _Case("layer norm, two layers", {"num_layers": 2, "zoneout": 0.1}, module=LayerNormLSTM),
    _Case("layer norm, packed", {"bidirectional": True, "zoneout": 0.1}, packed=True, module=LayerNormLSTM),
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
    """What serves a call, by kind of LSTM and dtype; on a CUDA device also why our kernels do not."""
    return {
        f"{kind}{str(dtype)[6:]}": _line(explain_kind(device.type, dtype), device)
        for kind, explain_kind in (("", explain), ("layer norm, ", layer_norm_lstm.explain))
        for dtype in (*_DTYPES, torch.float64)
    }


def _line(chosen: Explanation, device: torch.device) -> str:
    reason = chosen.why_not.get(Backend.CUDA) if device.type == "cuda" else None
    return f"{chosen.backend}: {chosen.because}" + (f" (not cuda: {reason})" if reason is not None else "")


def _answers(
    name: Backend, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Results, Results, Results]]:
    for case in _CASES:
        if case.module is LayerNormLSTM and layer_norm_lstm.why_not(name, device.type, dtype) is not None:
            continue  # torch has none
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            module = case.module(_INPUTS, _HIDDEN, **case.options).to(device, dtype)
            module.train(case.module is LSTM)  # the other draws zoneout in training, each time anew
            x = torch.randn(_LENGTHS[0], len(_LENGTHS), _INPUTS).to(device, dtype)
        wide = copy.deepcopy(module).double()
        yield (
            case.name,
            _compute(Backend.REFERENCE, case, wide, x.double()),
            _compute(Backend.REFERENCE, case, module, x),
            _compute(name, case, module, x),
        )


def _compute(name: Backend, case: _Case, module: torch.nn.Module, x: torch.Tensor) -> Results:
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
