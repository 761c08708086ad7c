"""Attention against its peers: the module against nn.MultiheadAttention, the function against torch's kernels.

    pytest benchmarks/test_attention.py --benchmark-only [--record FILE] [--seconds-left N]

Rows stand in order of importance; sizes are chosen by the device. Every row asserts that all answers agree.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import OURS, Call, attention_flops, compare, projection_flops
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.kernels.attention import config
from fastattn.profiling.environment import default_device

DEVICE = default_device()
CUDA = DEVICE.type == "cuda"
HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32,)
TORCH = "nn.MultiheadAttention"
AS_BUILT = f"{TORCH}, not in eval()"  # torch has a faster path of its own in evaluation
# (batch, length, features, heads), then (batch, length, heads, head dimension).
MODULES = [(8, 128, 384, 12), (2, 512, 512, 8), (2, 1024, 512, 8), (1, 4096, 512, 8)]
FUNCTIONS = [(2, 1024, 8, 64)]
if CUDA:
    MODULES = [(1, 4096, 512, 8), (8, 2048, 1024, 16), (32, 512, 1024, 16), (8, 128, 384, 12), (1, 16384, 1024, 16)]
    FUNCTIONS = [
        (16384 // length, length, 2048 // dim, dim) for length in (4096, 16384, 1024) for dim in (64, 128)
    ]
# (batch, queries, keys, heads, key heads, head dimension): steps of a decoder, a few tokens at once.
FEW_QUERIES = [(1, 1, 2048, 32, 8, 128), (8, 1, 512, 8, 8, 64), (8, 16, 1024, 8, 8, 64), (2, 64, 2048, 8, 8, 64)]
if CUDA:
    FEW_QUERIES = [(16, 1, 8192, 32, 8, 128), (16, 4, 8192, 32, 8, 128), (16, 64, 4096, 32, 8, 128)]
# Whether weights are asked for, whether half of the keys are padding.
KINDS = {"default": (True, False), "no weights": (False, False), "padded": (True, True)}

Run = Callable[..., Any]


def in_training(call: Callable[[], Tensor | tuple[Tensor, ...]], leaves: list[Tensor]) -> Call:
    """Forward and backward; the results are the output and the gradient of the first leaf."""

    def step() -> list[Tensor]:
        result = call()
        out = result[0] if isinstance(result, tuple) else result
        out.backward(torch.ones_like(out))
        grad = leaves[0].grad
        assert grad is not None
        # None is left over from one step to the next: each step's peak of memory counts all of them.
        for leaf in leaves:
            leaf.grad = None
        return [out, grad]

    return step


def in_evaluation(call: Callable[[], Any]) -> Call:
    @torch.no_grad()
    def step() -> list[Tensor]:
        result = call()
        return [part for part in (result if isinstance(result, tuple) else (result,)) if part is not None]

    return step


def on(backend: str, call: Run) -> Run:
    @functools.wraps(call)
    def forced(*args: Any, **kwargs: Any) -> Any:
        with fastattn.backend(backend):
            return call(*args, **kwargs)

    return forced


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MODULES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_module(
    benchmark: Any, keep: Any, kind: str, training: bool, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    batch, length, features, heads = shape
    need_weights, padded = KINDS[kind]
    theirs = nn.MultiheadAttention(features, heads, batch_first=True, device=DEVICE, dtype=dtype).train(training)
    ours = fastattn.MultiheadAttention(features, heads, batch_first=True, device=DEVICE, dtype=dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, length, features, device=DEVICE, dtype=dtype, requires_grad=training)
    padding, columns = None, float(length)
    if padded:
        # Lengths spread evenly, half of all keys are padding.
        lengths = torch.tensor([max(1, length * (2 * i + 1) // (2 * batch)) for i in range(batch)], device=DEVICE)
        padding, columns = torch.arange(length, device=DEVICE) >= lengths[:, None], float(lengths.float().mean())
    runs: dict[str, tuple[nn.Module, str]] = {OURS: (ours, "auto"), TORCH: (theirs, "auto")}
    if not training:
        runs[AS_BUILT] = (copy.deepcopy(theirs).train(), "auto")
    if CUDA:
        runs["fastattn triton"] = (ours, "triton")
    calls: dict[str, Call] = {}
    for name, (module, backend) in runs.items():
        call = functools.partial(on(backend, module), x, x, x, key_padding_mask=padding, need_weights=need_weights)
        calls[name] = in_training(call, [x, *module.parameters()]) if training else in_evaluation(call)
    flops = attention_flops(batch, heads, length, columns, features // heads, causal=False, training=training)
    flops += projection_flops(batch * length, features, training=training)
    row = compare(benchmark, calls, DEVICE, flops=flops)
    keep({"shape": shape, "dtype": str(dtype), "kind": kind, "training": training} | row, DEVICE)


def by_specialised_warps(call: Call) -> Call:
    """With our kernels for Hopper, measured whether they are chosen or not."""

    def forced() -> Any:
        with config.specialized():
            return call()

    return forced


def torch_peers(causal: bool) -> dict[str, Run]:
    """torch's kernels one by one; on the CPU there is one."""
    sdpa = functools.partial(nn.functional.scaled_dot_product_attention, is_causal=causal)
    if not CUDA:
        return {"SDPA": sdpa}

    def only(backend: SDPBackend) -> Run:
        def call(*tensors: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(*tensors)

        return call

    return {
        "SDPA cuDNN": only(SDPBackend.CUDNN_ATTENTION),
        "SDPA flash": only(SDPBackend.FLASH_ATTENTION),
        "SDPA efficient": only(SDPBackend.EFFICIENT_ATTENTION),
        "FlexAttention": flex(causal),
    }


def flex(causal: bool) -> Run:
    """FlexAttention, compiled; the causal one with its block mask, made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
        length = query.shape[2]
        if causal and length not in masks:
            masks[length] = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=DEVICE)
        return compiled(query, key, value, block_mask=masks.get(length))

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FUNCTIONS, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_function(
    benchmark: Any, keep: Any, causal: bool, training: bool, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Our own kernels, forced, and the automatic choice, on views (B, H, L, D) of (B, L, H, D)."""
    batch, length, heads, dim = shape
    leaves = [
        torch.randn(batch, length, heads, dim, device=DEVICE, dtype=dtype, requires_grad=training) for _ in range(3)
    ]
    ours = functools.partial(fastattn.scaled_dot_product_attention, is_causal=causal)
    runs = {OURS: on("triton" if CUDA else "cpu", ours), "fastattn auto": ours, **torch_peers(causal)}

    def bound(run: Run) -> Call:
        def call() -> Any:
            return run(*(leaf.transpose(1, 2) for leaf in leaves))

        return in_training(call, leaves) if training else in_evaluation(call)

    calls = {name: bound(run) for name, run in runs.items()}
    if HOPPER:
        calls["fastattn specialised"] = by_specialised_warps(calls[OURS])
    flops = attention_flops(batch, heads, length, length, dim, causal=causal, training=training)
    row = compare(benchmark, calls, DEVICE, flops=flops)
    keep({"shape": shape, "dtype": str(dtype), "causal": causal, "training": training} | row, DEVICE)


@pytest.mark.parametrize("dtype", (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", FEW_QUERIES, ids=str)
def test_few_queries(
    benchmark: Any, keep: Any, shape: tuple[int, int, int, int, int, int], dtype: torch.dtype
) -> None:
    """The automatic choice against torch's function; both have the keys as dense tensors."""
    batch, rows, columns, heads, key_heads, dim = shape
    query = torch.randn(batch, heads, rows, dim, device=DEVICE, dtype=dtype)
    keys = [torch.randn(batch, key_heads, columns, dim, device=DEVICE, dtype=dtype) for _ in range(2)]
    gqa = heads != key_heads
    calls = {
        OURS: in_evaluation(lambda: fastattn.scaled_dot_product_attention(query, *keys, enable_gqa=gqa)),
        "SDPA": in_evaluation(lambda: nn.functional.scaled_dot_product_attention(query, *keys, enable_gqa=gqa)),
    }
    flops = attention_flops(batch, heads, rows, columns, dim, causal=False, training=False)
    row = compare(benchmark, calls, DEVICE, flops=flops)
    keep({"shape": shape, "dtype": str(dtype), "training": False} | row, DEVICE)
