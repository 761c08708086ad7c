"""Attention of packed sequences: values, gradients, empty sequences, pages, a compiler, bad input."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import DEVICE, KERNELS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from varlen_cases import LSE, bounds, ints, packed

import fastattn
from fastattn import varlen_eager
from fastattn.dispatch import Backend
from fastattn.testing import AttentionCase, Inputs, check, eager_call

FUZZ = settings(max_examples=int(os.environ.get("FASTATTN_FUZZ", "40")))


def between(before: tuple[list[int], list[int]], after: tuple[list[int], list[int]]) -> Any:
    """A call for ``fastattn.testing.check`` whose sequences stand between others in one pack."""

    def call(case: AttentionCase, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        rows = before[0] + [case.rows] * case.batch + after[0]
        columns = before[1] + [case.columns] * case.batch + after[1]
        tensors = []
        for tensor, sides in ((inputs.query, 0), (inputs.key, 1), (inputs.value, 1)):
            own = tensor.transpose(1, 2).flatten(0, 1)
            first, last = (own.new_empty(sum(side[sides]), *own.shape[1:]).normal_() for side in (before, after))
            tensors.append(torch.cat([first, own, last]))
        window = tuple(-1 if side is None else side for side in case.window or (None, None))
        if case.causal:
            window = (window[0], 0)
        out, lse = fastattn.varlen_attention(
            *tensors, bounds(rows), bounds(columns), max(rows), max(columns), return_aux=LSE, scale=case.scale,
            window_size=window, enable_gqa=case.heads != case.key_heads,
        )  # fmt: skip
        begin = sum(before[0])
        own_rows = slice(begin, begin + case.batch * case.rows)
        out = out[own_rows].unflatten(0, (case.batch, case.rows)).transpose(1, 2)
        lse = lse[:, own_rows].unflatten(1, (case.batch, case.rows)).transpose(0, 1)
        # The packed call has no weights: those of the eager call stand in for them.
        return out, lse, eager_call(case, inputs)[2]

    return call


Case = AttentionCase
CASES = {
    "plain": Case(batch=3),
    "causal": Case(batch=2, causal=True, rows=20, columns=33),
    "causal_empty_rows": Case(batch=2, causal=True, rows=33, columns=20),
    "window": Case(batch=2, window=(5, 3), rows=20, columns=33),
    "window_causal": Case(window=(5, None), causal=True, rows=40, columns=40),
    "grouped": Case(batch=2, heads=6, key_heads=2, causal=True),
    "one_key_head": Case(heads=4, key_heads=1),
    "float16": Case(batch=2, dtype=torch.float16, head_dim=64),
    "bfloat16": Case(batch=2, dtype=torch.bfloat16, head_dim=64, causal=True),
    "scale": Case(scale=-0.7),
    "no_key": Case(columns=0),
    "float64": Case(dtype=torch.float64),
}
NEIGHBOURS = {
    "alone": (([], []), ([], [])),
    "among_others": (([3, 0, 17], [5, 4, 19]), ([0, 2], [0, 0])),
}


BACKENDS = ["auto", *(["triton"] if Backend.TRITON in KERNELS else [])]


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_sequences(name: str, backend: str, neighbours: str) -> None:
    case = replace(CASES[name], alignment="bottom-right", loss=("out", "lse"))
    if backend == "triton" and case.dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    with fastattn.backend(backend):
        check(case, between(*NEIGHBOURS[neighbours]), DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@FUZZ
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=5),
    group=st.sampled_from((1, 3)),
    window=st.tuples(st.integers(-1, 12), st.integers(-1, 12)),
    bounds_dtype=st.sampled_from((torch.int32, torch.int64)),
)
def test_any_lengths(
    backend: str, lengths: list[tuple[int, int]], group: int, window: tuple[int, int], bounds_dtype: torch.dtype
) -> None:
    """Output, LSE and gradients against the dense function sequence by sequence."""
    rows, columns = [row for row, _ in lengths], [column for _, column in lengths]
    leaves = [tensor.requires_grad_() for tensor in packed(rows, columns, 2 * group, 2)]
    with fastattn.backend(backend):
        out, lse = fastattn.varlen_attention(
            *leaves, bounds(rows).to(bounds_dtype), bounds(columns).to(bounds_dtype), max(rows, default=0),
            max(columns, default=0), return_aux=LSE, window_size=window, enable_gqa=True,
        )  # fmt: skip
    assert out.shape == leaves[0].shape
    assert lse.shape == (2 * group, sum(rows))
    weigh = torch.randn_like(out)
    grads = torch.autograd.grad((out * weigh).sum() + lse[lse > float("-inf")].sum(), leaves)
    row = column = 0
    for number in range(len(lengths)):
        some, their = slice(row, row + rows[number]), slice(column, column + columns[number])
        row, column = some.stop, their.stop
        query, key, value = (
            tensor.detach()[part].transpose(0, 1)[None].requires_grad_()
            for tensor, part in zip(leaves, (some, their, their), strict=True)
        )
        wanted, wanted_lse = fastattn.scaled_dot_product_attention(
            query, key, value, enable_gqa=True, window=window, causal_alignment="bottom-right", return_lse=True
        )
        torch.testing.assert_close(out[some], wanted[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, some], wanted_lse[0])
        loss = (wanted[0].transpose(0, 1) * weigh[some]).sum() + wanted_lse[wanted_lse > float("-inf")].sum()
        for grad, part, other in zip(
            grads, (some, their, their), torch.autograd.grad(loss, (query, key, value)), strict=True
        ):
            torch.testing.assert_close(grad[part], other[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_second_derivative() -> None:
    leaves = [tensor.requires_grad_() for tensor in packed([2, 0, 3], [3, 1, 2], dtype=torch.float64)]
    cu_q, cu_k = bounds([2, 0, 3]), bounds([3, 1, 2])

    def call(*tensors: Tensor) -> Any:
        return fastattn.varlen_attention(*tensors, cu_q, cu_k, 3, 3, enable_gqa=True)

    with fastattn.backend("reference"):
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_used_keys_and_pages(dtype: torch.dtype, backend: str) -> None:
    """seqused_k alone and with a block table: as if the other keys were not there."""
    rows, columns, used = [2, 1, 3], [20, 7, 33], [13, 0, 33]
    query, key, value = packed(rows, columns)
    parts = [
        torch.cat([part[:n] for part, n in zip(tensor.split(columns), used, strict=True)]) for tensor in (key, value)
    ]
    common = {"window_size": (-1, 0), "enable_gqa": True, "return_aux": LSE}
    wanted = fastattn.varlen_attention(query, *parts, bounds(rows), bounds(used), 3, 33, **common)
    with fastattn.backend(backend):
        found = fastattn.varlen_attention(
            query, key, value, bounds(rows), bounds(columns), 3, 33, seqused_k=ints(*used, dtype=dtype), **common
        )
    pools, table = [torch.full((8, 16, 2, 8), float("nan"), device=DEVICE) for _ in range(2)], [[3, -1, -1], [-1] * 3]
    table.append([6, 0, 5])
    for pool, tensor in zip(pools, (key, value), strict=True):
        first, _, last = tensor.split(columns)
        pool[3, :13], pool[6], pool[0], pool[5, :1] = first[:13], last[:16], last[16:32], last[32:]
    with fastattn.backend(backend):
        paged = fastattn.varlen_attention(
            query, *pools, bounds(rows), None, 3, 33, seqused_k=ints(*used, dtype=dtype),
            block_table=torch.tensor(table, dtype=dtype, device=DEVICE), **common,
        )  # fmt: skip
    for results in (found, paged):
        for one, other in zip(results, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wanted", [None, LSE])
def test_opcheck(wanted: AuxRequest | None) -> None:
    tensors = [tensor.requires_grad_() for tensor in packed([3, 0, 4], [5, 2, 4])]
    problem = (bounds([3, 0, 4]), bounds([5, 2, 4]), 4, 5, 0.3, None, 0, None, None, wanted is not None)
    torch.library.opcheck(torch.ops.fastattn.varlen_attention, (*tensors, *problem))
    plain = [tensor.detach() for tensor in tensors]
    grads = (torch.randn(7, 4, 8, device=DEVICE), torch.randn(4, 7, device=DEVICE) if wanted else None)
    torch.library.opcheck(torch.ops.fastattn.varlen_attention_backward, (*grads, *plain, *problem))


@pytest.mark.parametrize("serving", BACKENDS)
@pytest.mark.parametrize("backend", ["counted", "aot_eager"])
def test_compile_once_for_all_lengths(backend: str, serving: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()

    def loss(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        out, lse = fastattn.varlen_attention(
            query, key, value, cu_q, cu_k, 64, 64, window_size=(-1, 0), enable_gqa=True, return_aux=LSE
        )
        return out.square().sum() + torch.where(lse > float("-inf"), lse, 0.0).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter if backend == "counted" else backend)
    for rows, columns in (([5, 0, 9], [7, 3, 9]), ([4, 4, 6], [2, 9, 8]), ([11, 1, 1], [20, 0, 6])):
        leaves = [tensor.requires_grad_() for tensor in packed(rows, columns)]
        with fastattn.backend(serving):
            found = torch.autograd.grad(compiled(*leaves, bounds(rows), bounds(columns)), leaves)
            wanted = torch.autograd.grad(loss(*leaves, bounds(rows), bounds(columns)), leaves)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == (1 if backend == "counted" else 0)


def test_autocast() -> None:
    torch._dynamo.reset()
    leaves = [tensor.requires_grad_() for tensor in packed([3, 0, 4], [3, 2, 4])]
    cu_q, cu_k = bounds([3, 0, 4]), bounds([3, 2, 4])

    def call(*tensors: Tensor) -> Any:
        return fastattn.varlen_attention(*tensors, cu_q, cu_k, 4, 4, enable_gqa=True)

    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = call(*leaves)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    assert out.dtype == compiled.dtype == torch.bfloat16
    torch.testing.assert_close(compiled, out)
    for one, other in zip(*(torch.autograd.grad(each.sum(), leaves) for each in (compiled, out)), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_the_gradient_of_a_pack_is_no_larger_than_the_pack() -> None:
    """A slice for each sequence would make a tensor of the whole pack for each of them."""
    lengths = [4 + n % 3 for n in range(50)]
    leaves = [tensor.requires_grad_() for tensor in packed(lengths, lengths)]
    out = fastattn.varlen_attention(*leaves, bounds(lengths), bounds(lengths), 6, 6, enable_gqa=True)
    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    assert not any("Slice" in node.name() or "Select" in node.name() for node in seen)


def test_equally_long_sequences_are_views() -> None:
    query, key, value = packed([5, 5], [7, 7])
    assert varlen_eager._whole(query, query.split([5, 5])).data_ptr() == query.data_ptr()
    out = fastattn.varlen_attention(query, key, value, ints(0, 5, 10), ints(0, 7, 14), 5, 7, enable_gqa=True)
    wanted = fastattn.scaled_dot_product_attention(
        *(t.unflatten(0, (2, -1)).transpose(1, 2) for t in (query, key, value)), enable_gqa=True
    )
    torch.testing.assert_close(out, wanted.transpose(1, 2).flatten(0, 1))


def _pack(**other: Any) -> dict[str, Any]:
    query, key, value = packed([3, 4], [5, 6])
    arguments = {
        "query": query, "key": key, "value": value, "cu_seq_q": ints(0, 3, 7), "cu_seq_k": ints(0, 5, 11),
        "max_q": 4, "max_k": 6, "enable_gqa": True,
    }  # fmt: skip
    return arguments | other


def _pool() -> Tensor:
    return torch.randn(4, 16, 2, 8, device=DEVICE)


PAGED = {"key": _pool(), "value": _pool(), "cu_seq_k": None}
BAD = {
    "query_list": ({"query": [1.0]}, TypeError, "query: got list"),
    "query_dimensions": ({"query": torch.randn(1, 7, 4, 8)}, ValueError, "query: got shape"),
    "key_dtype": ({"key": torch.randn(11, 2, 8).half()}, ValueError, "key: got dtype"),
    "integers": (
        {name: torch.zeros(size, dtype=torch.int32) for name, size in (("query", (7, 4, 8)), ("key", (11, 2, 8)))}
        | {"value": torch.zeros(11, 2, 8, dtype=torch.int32)}, ValueError, "query: got dtype torch.int32",
    ),
    "value_tokens": ({"value": torch.randn(10, 2, 8)}, ValueError, "value: got shape"),
    "head_dim": ({"query": torch.randn(7, 4, 6)}, ValueError, "key: got head_dim 8, expected query's 6"),
    "grouped": ({"enable_gqa": False}, ValueError, "enable_gqa=True"),
    "no_divisor": ({"query": torch.randn(7, 5, 8)}, ValueError, "a divisor of query's 5"),
    "bounds_float": ({"cu_seq_q": torch.tensor([0.0, 7.0])}, ValueError, "cu_seq_q: got dtype"),
    "bounds_list": ({"cu_seq_q": [0, 3, 7]}, TypeError, "cu_seq_q: got list"),
    "bounds_none": ({"cu_seq_k": None}, ValueError, "cu_seq_k: got None"),
    "bounds_number": ({"cu_seq_k": ints(0, 11)}, ValueError, "cu_seq_k: got 2 boundaries, expected cu_seq_q's 3"),
    "bounds_empty": ({"cu_seq_q": ints()}, ValueError, r"cu_seq_q: got shape \(0,\)"),
    "bounds_first": ({"cu_seq_q": ints(1, 3, 7)}, ValueError, "cu_seq_q: got first boundary 1"),
    "bounds_descending": ({"cu_seq_k": ints(0, 12, 11)}, ValueError, "cu_seq_k: got 12 before 11 at position 1"),
    "bounds_total": ({"cu_seq_k": ints(0, 5, 10)}, ValueError, "cu_seq_k: got last boundary 10, .* 11"),
    "max_q": ({"max_q": 3}, ValueError, "max_q: got 3, expected at least the longest sequence, 4"),
    "max_k": ({"max_k": -1}, ValueError, "max_k: got -1"),
    "max_float": ({"max_q": 4.0}, TypeError, "max_q: got float"),
    "window": ({"window_size": (-2, 0)}, ValueError, "window: got"),
    "window_one": ({"window_size": (3,)}, ValueError, "window: got"),
    "scale": ({"scale": "1"}, TypeError, "scale: got str"),
    "aux": ({"return_aux": True}, TypeError, "return_aux: got bool"),
    "splits": ({"num_splits": 0}, ValueError, "num_splits: got 0"),
    "used_shape": ({"seqused_k": ints(1)}, ValueError, "seqused_k: got shape"),
    "used_beyond": ({"seqused_k": ints(5, 7)}, ValueError, "seqused_k: got 7 for sequence 1, allowed are 0 to its 6"),
    "used_gradient": (
        {"seqused_k": ints(5, 6), "query": torch.randn(7, 4, 8, requires_grad=True)}, ValueError, "for inference only",
    ),
    "table_alone": (PAGED | {"block_table": ints(0, 1).view(2, 1)}, ValueError, "seqused_k: got None"),
    "table_shape": (PAGED | {"block_table": ints(0, 1), "seqused_k": ints(3, 4)}, ValueError, "block_table: got shape"),
    "table_outside": (
        PAGED | {"block_table": ints(0, 4).view(2, 1), "seqused_k": ints(3, 4)}, ValueError,
        r"block_table: got page 4 at \[1, 0\], allowed are 0 to 3",
    ),
    "table_room": (
        PAGED | {"block_table": ints(0, 1).view(2, 1), "seqused_k": ints(3, 17)}, ValueError, "lengths from 3 to 17",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, backend: str) -> None:
    changed, error, message = BAD[name]
    changed = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in changed.items()}
    with fastattn.backend(backend), fastattn.debug_checks(), pytest.raises(error, match=message):
        fastattn.varlen_attention(**_pack(**changed))


def test_accepted_arguments() -> None:
    found = fastattn.varlen_attention(**_pack(num_splits=1, return_aux=AuxRequest(), max_k=100))
    assert isinstance(found, Tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (8, 0)])
def test_like_torch(window: tuple[int, int]) -> None:
    rows, columns = [5, 33, 64], [9, 33, 80]
    tensors = packed(rows, columns, dtype=torch.bfloat16)
    arguments = (*tensors, bounds(rows), bounds(columns), 64, 80)
    found = fastattn.varlen_attention(*arguments, return_aux=LSE, window_size=window, enable_gqa=True)
    wanted = varlen_attn(*arguments, return_aux=LSE, window_size=window, enable_gqa=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2)
