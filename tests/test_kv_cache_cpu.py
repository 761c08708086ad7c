"""The C++ kernel of a cache, every instruction set of it: against the float64 oracle, and called directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv_cache_cases import CacheCase, call, check, make_inputs
from torch import Tensor

import fastattn
from fastattn.kernels.attention import extension

pytestmark = pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE))

OPS = torch.ops.fastattn
Case = CacheCase
CASES = {
    "one_query": Case(head_dim=64, capacity=200),
    "group": Case(heads=8, key_heads=2, head_dim=64, capacity=200),
    "group_and_rows": Case(heads=6, key_heads=2, rows=3, appended=3, head_dim=32),
    "two_tiles": Case(heads=2, key_heads=1, rows=70, appended=20, capacity=150, batch=2),
    "splits": Case(batch=2, capacity=2500, lengths="full", heads=4, key_heads=1, head_dim=64),
    "splits_and_rows": Case(batch=2, capacity=2500, rows=5, appended=2, sinks=True, window=(1500, 2), causal=False),
    "splits_of_pages": Case(batch=2, capacity=2400, page=48, heads=3, key_heads=3, head_dim=48, softcap=3.0),
    "short_in_splits": Case(batch=4, capacity=3200, alibi="batch", page=400, seed=3),
    "page_16": Case(page=16, heads=4, head_dim=128, capacity=160),
    "page_16_rows": Case(page=16, heads=4, key_heads=1, rows=4, appended=4, head_dim=24, capacity=160),
    "page_80": Case(page=80, capacity=240, heads=2, rows=2, appended=1),
    "dim_1": Case(head_dim=1, page=16),
    "dim_24": Case(head_dim=24, heads=4),
    "dim_37": Case(head_dim=37, page=16, heads=8, key_heads=1, dtype=torch.bfloat16),
    "dim_256": Case(head_dim=256, heads=4, key_heads=2, dtype=torch.float16),
    "bfloat16": Case(dtype=torch.bfloat16, head_dim=64, heads=3, key_heads=1, page=32),
    "float16": Case(dtype=torch.float16, head_dim=80, heads=4, key_heads=4, layout="heads_last"),
    "sliced": Case(layout="sliced", rows=2, appended=2),
    "sliced_pages": Case(layout="sliced", page=32, heads=8, key_heads=1),
    "everything": Case(
        heads=6, rows=5, appended=5, page=16, window=(40, 2), softcap=3.0, alibi="batch", sinks=True, scale=0.9,
    ),
}  # fmt: skip


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name: str) -> None:
    with fastattn.backend("cpu"):
        check(CASES[name])


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("rows", [1, 7])
def test_bits_depend_on_the_sequence_alone(rows: int, page: int) -> None:
    """Neither on its place in the batch, nor on how long the others are, nor on the threads."""
    inputs = make_inputs(Case(batch=4, rows=rows, appended=0, capacity=4800, page=page, heads=4, key_heads=2))
    arguments = (inputs.query, inputs.key_cache, inputs.value_cache, inputs.lengths, inputs.table)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        together = _attention(*arguments)
        torch.set_num_threads(3)
        assert torch.equal(_attention(*arguments), together)
    finally:
        torch.set_num_threads(threads)
    for one in range(4):
        at = slice(one, one + 1)
        caches = arguments[1:3] if page else (inputs.key_cache[at], inputs.value_cache[at])
        table = None if inputs.table is None else inputs.table[at]
        assert torch.equal(_attention(inputs.query[at], *caches, inputs.lengths[at], table), together[at])


def _attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, table: Tensor | None) -> Tensor:
    out: Tensor = fastattn.attention_with_kv_cache(query, key, value, lengths, block_table=table)
    return out


def test_dense_call_and_cache_give_the_same_bits() -> None:
    """Few queries of a dense call take the kernel of the cache."""
    inputs = make_inputs(Case(batch=2, heads=4, key_heads=2, head_dim=64, appended=0, capacity=1500, lengths="full"))
    with fastattn.backend("cpu"):
        out = fastattn.scaled_dot_product_attention(
            inputs.query, inputs.key_cache, inputs.value_cache, enable_gqa=True
        )
    assert torch.equal(out, _attention(*(inputs.query, inputs.key_cache, inputs.value_cache, inputs.lengths), None))


def test_append_of_any_type_and_layout() -> None:
    for dtype in (torch.float16, torch.float64):
        case = Case(batch=2, dtype=dtype, appended=5, layout="heads_last", head_dim=7)
        inputs = make_inputs(case)
        assert inputs.new_key is not None
        assert inputs.new_value is not None
        new_key = inputs.new_key.transpose(2, 3).contiguous().transpose(2, 3)
        caches = (inputs.key_cache, inputs.value_cache)
        OPS.kv_cache_append(*caches, new_key, inputs.new_value, inputs.lengths, None, "cpu")
        for number, held in enumerate(inputs.keys):
            assert torch.equal(inputs.key_cache[number, :, : held.shape[1]], held)


def test_autocast_leaves_the_dtypes_of_the_cache() -> None:
    case = Case(batch=2, dtype=torch.bfloat16, sinks=True, alibi="heads")
    inputs = make_inputs(case)
    with torch.autocast("cpu", dtype=torch.float16):
        out, lse = call(case, inputs)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def _good(**changes: Any) -> dict[str, Any]:
    arguments = {
        "query": torch.randn(2, 4, 1, 8), "key": torch.randn(6, 2, 16, 8), "value": torch.randn(6, 2, 16, 8),
        "lengths": torch.tensor([3, 20]), "table": torch.tensor([[0, 1], [2, 3]]), "slopes": None, "sinks": None,
        "scale": 1.0, "softcap": 0.0, "left": None, "right": 0, "appended": 0, "splits": None, "lse": True,
        "backend": "cpu",
    }  # fmt: skip
    assert changes.keys() <= arguments.keys()
    return arguments | changes


BAD = {
    "query_dimensions": {"query": torch.randn(4, 1, 8)},
    "query_dtype": {"query": torch.randn(2, 4, 1, 8).double()},
    "query_batch": {"query": torch.randn(3, 4, 1, 8)},
    "query_heads": {"query": torch.randn(2, 3, 1, 8)},
    "query_dim": {"query": torch.randn(2, 4, 1, 9)},
    "no_dim": {name: torch.randn(6, 2, 16, 0) for name in ("key", "value")} | {"query": torch.randn(2, 4, 1, 0)},
    "key_dimensions": {"key": torch.randn(2, 16, 8)},
    "key_dtype": {"key": torch.randn(6, 2, 16, 8).half()},
    "value_dtype": {"value": torch.randn(6, 2, 16, 8).half()},
    "value_rows": {"value": torch.randn(6, 2, 15, 8)},
    "value_dim": {"value": torch.randn(6, 2, 16, 9)},
    "value_dimensions": {"value": torch.randn(6, 2, 16)},
    "lengths_dtype": {"lengths": torch.tensor([3.0, 20.0])},
    "lengths_number": {"lengths": torch.tensor([3])},
    "lengths_beyond": {"lengths": torch.tensor([3, 33])},
    "lengths_with_appended": {"lengths": torch.tensor([3, 30]), "appended": 3},
    "lengths_negative": {"lengths": torch.tensor([-1, 4])},
    "appended_negative": {"appended": -1},
    "table_dtype": {"table": torch.zeros(2, 2)},
    "table_dimensions": {"table": torch.tensor([0, 1])},
    "table_batch": {"table": torch.tensor([[0, 1]])},
    "table_outside": {"table": torch.tensor([[0, 1], [2, 6]])},
    "table_negative": {"table": torch.tensor([[0, 1], [-1, 3]])},
    "page_size": {name: torch.randn(6, 2, 12, 8) for name in ("key", "value")},
    "no_table": {"table": None},
    "slopes_heads": {"slopes": torch.randn(1, 3)},
    "slopes_dtype": {"slopes": torch.randn(1, 4).double()},
    "sinks": {"sinks": torch.randn(3)},
    "sinks_dtype": {"sinks": torch.tensor([1, 2, 3, 4])},
    "softcap": {"softcap": -1.0},
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_calls_of_the_operator_raise(name: str) -> None:
    OPS.kv_cache_attention(*_good().values())
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)):
        OPS.kv_cache_attention(*_good(**BAD[name]).values())


def test_windows_of_any_size() -> None:
    arguments = _good()
    usual, _ = OPS.kv_cache_attention(*arguments.values())
    out, lse = OPS.kv_cache_attention(*(arguments | {"left": -(2**63)}).values())
    assert out.eq(0).all()
    assert lse.eq(float("-inf")).all()
    out, _ = OPS.kv_cache_attention(*(arguments | {"left": 2**63 - 1, "right": 2**63 - 1}).values())
    assert torch.equal(out, usual)


def test_of_a_table_only_pages_in_use_are_read() -> None:
    """Such a table takes 8 TB as a tensor of its own."""
    arguments = _good(key=torch.randn(1, 2, 48, 8), value=torch.randn(1, 2, 48, 8))
    out, _ = OPS.kv_cache_attention(*(arguments | {"table": torch.zeros(2, 1, dtype=torch.int64)}).values())
    table = torch.zeros(1, 1, dtype=torch.int64).expand(2, 2**39)
    found, _ = OPS.kv_cache_attention(*(arguments | {"table": table}).values())
    assert torch.equal(found, out)


def test_malformed_appends_raise() -> None:
    key, value = torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 8, 4)
    new, lengths = torch.ones(2, 2, 3, 4), torch.tensor([1, 5])
    OPS.kv_cache_append(key, value, new, new, lengths, None, "cpu")
    before = key.clone()
    for wrong in (
        (key, value, new[:1], new[:1], lengths, None), (key, value, new, new[:, :1], lengths, None),
        (key, value, new, new, lengths + 1, None), (key, value, new, new, lengths - 2, None),
        (key, value, new.double(), new.double(), lengths, None), (key, value, new[..., :3], new, lengths, None),
        (key.mT, value.mT, new, new, lengths, None), (key, value, new, new, lengths, torch.tensor([[0], [1]])),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            OPS.kv_cache_append(*wrong, "cpu")
    with pytest.raises(ValueError, match="value_cache: got stride 8"):  # before anything is written
        OPS.kv_cache_append(key, torch.zeros(2, 2, 4, 8).mT, new + 1.0, new, lengths, None, "cpu")
    assert torch.equal(key, before)
