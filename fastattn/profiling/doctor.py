"""``python -m fastattn doctor``: what is installed, what can run here, and whether it computes the right thing.

Each available backend computes outputs and gradients on this very device and is held against the float64 reference:
a compiler that miscompiles a kernel (it has happened, in the gradients first) shows here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastattn.dispatch import ATTENTION_BACKENDS, Backend, Request, backend, why_not
from fastattn.functional import explain, scaled_dot_product_attention
from fastattn.kernels.attention import extension
from fastattn.profiling import lstm_doctor
from fastattn.profiling.environment import device_name, versions
from fastattn.profiling.verdict import Results, Verdict, judge

_SEED = 0


@dataclass(frozen=True)
class Case:
    """One problem of the self-check: (B, H, L, S, D) and the masks it carries."""

    name: str
    shape: tuple[int, int, int, int, int]
    causal: bool = False
    padding: bool = False
    bias: bool = False


def examine(device: torch.device) -> int:
    """Print versions, device, backends and the self-check; 0 when every available backend is right, else 1."""
    print("\n".join(f"{name:<13} {version}" for name, version in versions().items()))
    print(f"{'device':<13} {_device_line(device)}")
    print(f"{'extension':<13} {extension.UNAVAILABLE or 'built'}")
    attention, lstm = self_check(device), lstm_doctor.self_check(device)
    for title, (verdicts, unavailable) in (("attention", attention), ("LSTM", lstm)):
        print(f"\n{title}: backends, forward and backward against the float64 reference (share of the error allowed)")
        print("\n".join(f"  {verdict}" for verdict in verdicts))
        print("\n".join(f"  absent {name:<10} {reason}" for name, reason in unavailable.items()))
    print("\nwhat serves a call (batch 2, 8 heads of 64, length 512)")
    for call, chosen in _choices(device).items():
        print(f"  {call:<28} {chosen}")
    print("\nwhat serves an LSTM")
    for call, chosen in lstm_doctor.choices(device).items():
        print(f"  {call:<28} {chosen}")
    wrong = [verdict for verdict in (*attention[0], *lstm[0]) if not verdict.passed]
    print(f"\n{'all available backends are right' if not wrong else f'{len(wrong)} checks failed'}")
    return 1 if wrong else 0


def self_check(device: torch.device) -> tuple[list[Verdict], dict[Backend, str]]:
    """Verdicts on the backends available on ``device``, and for each other one the reason."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    verdicts, unavailable = [], {}
    jobs = [(name, dtype) for name in ATTENTION_BACKENDS if name is not Backend.REFERENCE for dtype in dtypes]
    for name, dtype in tqdm(jobs, desc="self-check", unit="backend", leave=False):
        reason = why_not(name, Request(device.type, dtype, head_dim=64, value_dim=64))
        if reason is None:
            verdicts.append(judge(name, dtype, _answers(name, dtype, device)))
        else:
            unavailable[name] = reason
    return verdicts, unavailable


def _cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        return [
            Case("plain, head dimension 64", (2, 4, 300, 300, 64)),
            Case("plain, head dimension 128", (2, 2, 300, 300, 128)),
            Case("causal with padding", (2, 4, 257, 257, 64), causal=True, padding=True),
            Case("additive mask, L != S", (2, 2, 130, 200, 64), bias=True),
        ]
    # Small: the Triton kernels run in the interpreter here.
    return [
        Case("plain", (1, 2, 70, 70, 16)),
        Case("causal with padding", (2, 2, 33, 33, 16), causal=True, padding=True),
        Case("additive mask, L != S", (1, 2, 20, 37, 32), bias=True),
    ]


def _answers(
    name: Backend, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Results, Results, Results]]:
    for case in _cases(device):
        inputs = _inputs(case, dtype, device)
        yield (
            case.name,
            _compute(Backend.REFERENCE, case, _as(inputs, torch.float64)),
            _compute(Backend.REFERENCE, case, inputs),
            _compute(name, case, inputs),
        )


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    batch, heads, rows, columns, dim = case.shape
    generator = torch.Generator().manual_seed(_SEED)
    shapes = {
        "query": (batch, heads, rows, dim), "key": (batch, heads, columns, dim), "value": (batch, heads, columns, dim),
        "grad": (batch, heads, rows, dim),
    }  # fmt: skip
    if case.bias:
        shapes["attn_mask"] = (1, heads, rows, columns)
    inputs = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    if case.padding:
        lengths = torch.tensor([[columns], [columns // 3]], device=device)
        inputs["key_padding_mask"] = torch.arange(columns, device=device) < lengths
    return inputs


def _as(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def _compute(name: Backend, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of every floating input."""
    tensors: dict[str, Any] = {key: tensor.detach().clone() for key, tensor in inputs.items()}
    grad = tensors.pop("grad")
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items() if tensor.is_floating_point()}
    with backend(name):
        out: Any = scaled_dot_product_attention(**tensors, is_causal=case.causal)
        grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"output": out.detach()} | {f"gradient of {key}": one for key, one in zip(leaves, grads, strict=True)}


def _choices(device: torch.device) -> dict[str, str]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query = torch.empty(2, 8, 512, 64, device=device, dtype=dtype)
    padding = torch.ones(2, 512, device=device, dtype=torch.bool)
    calls: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"is_causal": True},
        "padding": {"key_padding_mask": padding},
        "weights, as mha(x, x, x)": {"need_weights": True},
        "dropout": {"dropout_p": 0.1},
    }
    chosen = {title: explain(query, query, query, **options) for title, options in calls.items()}
    return {title: f"{one.backend}: {one.because}" for title, one in chosen.items()}


def _device_line(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device}: {device_name(device)}, {torch.get_num_threads()} threads, no CUDA device in use"
    major, minor = torch.cuda.get_device_capability(device)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{device}: {device_name(device)}, sm_{major}{minor}, {memory:.0f} GiB"
