"""The cache operators under torch's checks and a compiler, their bad input, and the compiled kernels' spills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import DEVICE, KERNELS
from kv_cache_cases import CacheCase, call, check_cache, make_inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fastattn

OPS = torch.ops.fastattn
ROOT = Path(__file__).resolve().parents[1]
# The operator's backend, and the one to force for it.
BACKENDS = {"dense": "auto", **{name.value: name.value for name in KERNELS}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, page: int, dtype: torch.dtype) -> None:
    case = CacheCase(
        batch=2, heads=4, rows=2, appended=2, capacity=32, page=page, dtype=dtype, alibi="batch", sinks=True
    )
    inputs = make_inputs(case, DEVICE)
    # opcheck finds NaN unequal to itself.
    caches = [cache.nan_to_num(0.5) for cache in (inputs.key_cache, inputs.value_cache)]
    held = (*caches, inputs.lengths, inputs.table)
    torch.library.opcheck(
        OPS.kv_cache_append, (*caches, inputs.new_key, inputs.new_value, inputs.lengths, inputs.table, backend)
    )
    for return_lse in (True, False):
        torch.library.opcheck(
            OPS.kv_cache_attention,
            (inputs.query, *held, inputs.slopes, inputs.sinks, 0.3, 2.0, 9, 0, 2, 2, return_lse, backend),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_once_for_all_lengths(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    with fastattn.backend(BACKENDS[backend]):
        for seed in range(6):
            case = CacheCase(page=16)
            inputs, others = make_inputs(case, DEVICE), make_inputs(case, DEVICE)
            for each in (inputs, others):
                each.lengths.add_(seed)  # other lengths; what lies between is NaN in the cache
                each.key_cache.nan_to_num_(0.5), each.value_cache.nan_to_num_(0.5)
                each.table.clamp_(min=0)  # type: ignore[union-attr]
            found, wanted = compiled(case, inputs), call(case, others)
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other)
            torch.testing.assert_close(inputs.key_cache, others.key_cache)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_through_functionalization_the_cache_is_written(backend: str) -> None:
    torch._dynamo.reset()
    case = CacheCase(rows=2, appended=2)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(case, DEVICE)
    with fastattn.backend(BACKENDS[backend]):
        out, _ = compiled(case, inputs)
        wanted, _ = call(case, make_inputs(case, DEVICE))
    torch.testing.assert_close(out, wanted)
    check_cache(case, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_append_is_a_change_in_place(backend: str) -> None:
    """A backward that needs the cache as it was is refused."""
    inputs = make_inputs(CacheCase(), DEVICE)
    given = (inputs.new_key, inputs.new_value, inputs.lengths, inputs.table, backend)
    for cache in (inputs.key_cache, inputs.value_cache):
        weight = torch.ones_like(cache, requires_grad=True)
        product = (cache * weight).sum()
        OPS.kv_cache_append(inputs.key_cache, inputs.value_cache, *given)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_autocast_leaves_the_dtypes_of_the_cache() -> None:
    case = CacheCase()
    inputs = make_inputs(case, DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, _ = call(case, inputs)
    assert out.dtype == torch.float32


def good(page: int = 0, **other: Any) -> dict[str, Any]:
    """The arguments of a call that is right, with some of them replaced."""
    inputs = make_inputs(CacheCase(batch=2, heads=4, capacity=64, page=page), DEVICE)
    arguments = {
        "query": inputs.query, "key_cache": inputs.key_cache, "value_cache": inputs.value_cache,
        "cache_lengths": inputs.lengths, "new_key": inputs.new_key, "new_value": inputs.new_value,
        "block_table": inputs.table,
    }  # fmt: skip
    return arguments | other


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


BAD = {
    "query_list": ({"query": [1.0]}, TypeError, "query: got list"),
    "query_integers": (
        {name: torch.zeros(2, 2, 64, 16, dtype=torch.int32, device=DEVICE) for name in ("key_cache", "value_cache")}
        | {"query": torch.zeros(2, 4, 1, 16, dtype=torch.int32, device=DEVICE)}, ValueError, "query: got dtype",
    ),
    "query_dimensions": ({"query": floats(4, 1, 16)}, ValueError, r"query: got shape \(4, 1, 16\)"),
    "cache_dtype": ({"key_cache": floats(2, 2, 64, 16, dtype=torch.float16)}, ValueError, "key_cache: got dtype"),
    "head_dim": ({"key_cache": floats(2, 2, 64, 8)}, ValueError, "key_cache: got head_dim 8"),
    "cache_sizes": ({"value_cache": floats(2, 2, 60, 16)}, ValueError, "value_cache: got shape"),
    "cache_heads": (
        {"key_cache": floats(2, 3, 64, 16), "value_cache": floats(2, 3, 64, 16)}, ValueError, "a divisor of query's 4",
    ),
    "cache_batch": (
        {"key_cache": floats(3, 2, 64, 16), "value_cache": floats(3, 2, 64, 16)}, ValueError, "or a block_table",
    ),
    "cache_strides": ({"key_cache": floats(2, 2, 16, 64).transpose(2, 3)}, ValueError, "key_cache: got stride 64"),
    "cache_expanded": ({"key_cache": floats(1, 2, 64, 16).expand(2, -1, -1, -1)}, ValueError, "expanded"),
    "lengths_float": ({"cache_lengths": floats(2)}, ValueError, "cache_lengths: got dtype"),
    "lengths_number": ({"cache_lengths": 3}, TypeError, "cache_lengths: got int"),
    "lengths_shape": ({"cache_lengths": ints(1, 2, 3)}, ValueError, r"cache_lengths: got shape \(3,\)"),
    "lengths_beyond": ({"cache_lengths": ints(3, 64)}, ValueError, "lengths from 3 to 64 and 1 new tokens"),
    "lengths_negative": ({"cache_lengths": ints(-1, 4)}, ValueError, "lengths from -1 to 4"),
    "lengths_beyond_without_new": (
        {"cache_lengths": ints(3, 65), "new_key": None, "new_value": None}, ValueError, "lengths from 3 to 65",
    ),
    "new_value_missing": ({"new_value": None}, ValueError, "new_value: got None"),
    "new_key_heads": ({"new_key": floats(2, 4, 1, 16)}, ValueError, "new_key: got shape"),
    "new_value_tokens": ({"new_value": floats(2, 2, 2, 16)}, ValueError, "new_value: got shape"),
    "causal_word": ({"is_causal": "yes"}, TypeError, "is_causal: got str"),
    "window": ({"window": (-2, 0)}, ValueError, "window: got"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap: got"),
    "slopes": ({"alibi_slopes": floats(3)}, ValueError, "alibi_slopes: got shape"),
    "sinks": ({"sinks": floats(3)}, ValueError, "sinks: got shape"),
    "scale": ({"scale": float("inf")}, ValueError, "scale: got inf"),
    "splits_zero": ({"num_splits": 0}, ValueError, "num_splits: got 0"),
    "splits_word": ({"num_splits": "all"}, TypeError, "num_splits: got str"),
    "gradient": ({"query": floats(2, 4, 1, 16).requires_grad_()}, ValueError, "query: got a tensor that requires a"),
    "table_dtype": ({"page": 16, "block_table": floats(2, 4)}, ValueError, "block_table: got dtype"),
    "table_batch": ({"page": 16, "block_table": ints(1, 2)}, ValueError, "block_table: got shape"),
    "page_size": ({"block_table": ints(0, 1).view(2, 1), "key_cache": floats(5, 2, 24, 16),
                   "value_cache": floats(5, 2, 24, 16)}, ValueError, "page size of 24 tokens"),
    "table_outside": (
        {"page": 16, "block_table": ints(0, 1, 2, 3, 0, 10, 2, 3).view(2, 4), "cache_lengths": ints(60, 60)},
        ValueError, r"block_table: got page 10 at \[1, 1\], allowed are 0 to 9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, backend: str) -> None:
    changed, error, message = BAD[name]
    arguments = good(**changed)
    before = arguments["key_cache"].clone() if isinstance(arguments["key_cache"], Tensor) else None
    with fastattn.backend(BACKENDS[backend]), fastattn.debug_checks(), pytest.raises(error, match=message):
        fastattn.attention_with_kv_cache(**arguments)
    if before is not None:
        torch.testing.assert_close(arguments["key_cache"], before, rtol=0, atol=0, equal_nan=True)


def test_right_calls() -> None:
    fastattn.attention_with_kv_cache(**good())
    with torch.no_grad():
        fastattn.attention_with_kv_cache(**good(query=floats(2, 4, 1, 16).requires_grad_()))
    # Pages that are not used may be any number.
    table = ints(0, -1, 99, 7, 1, 2, 99, 99).view(2, 4)
    fastattn.attention_with_kv_cache(**good(16, block_table=table, cache_lengths=ints(10, 20)))


def test_a_forced_backend_that_cannot_serve_refuses() -> None:
    arguments = good()
    for name in ("query", "key_cache", "value_cache", "new_key", "new_value"):
        arguments[name] = arguments[name].double()
    with fastattn.backend("triton"), pytest.raises(RuntimeError, match="cannot serve this call"):
        fastattn.attention_with_kv_cache(**arguments)
    with fastattn.backend("sdpa"), pytest.raises(RuntimeError, match="softcap"):
        fastattn.attention_with_kv_cache(**good(softcap=1.0))
    with fastattn.backend("sdpa"):
        fastattn.attention_with_kv_cache(**good())


@pytest.mark.gpu
def test_on_a_gpu_contents_are_checked_on_demand() -> None:
    for lengths, table in ((ints(3, 64), None), (ints(3, 40), ints(0, 1, 2, 3, 0, 10, 2, 3).view(2, 4))):
        arguments = good(16 if table is not None else 0, cache_lengths=lengths)
        if table is not None:
            arguments["block_table"] = table
        for backend in BACKENDS.values():
            with fastattn.backend(backend):
                out = fastattn.attention_with_kv_cache(**arguments)
                assert out.shape == arguments["query"].shape
                with fastattn.debug_checks(), pytest.raises(ValueError, match="got"):
                    fastattn.attention_with_kv_cache(**arguments)


COMPILED = ("bfloat16-128-chunk-everything", "bfloat16-256-everything", "float32-128-plain")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_kernels_spill_nothing(arch: int) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.budget_decode", "--only", *(f"{case}-{arch}" for case in COMPILED)],
        cwd=ROOT, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("12 kernels within budget\n"), result.stdout
