"""Attention to a cache of keys and values against the float64 oracle: every backend, every feature, appended tokens."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from backends import DEVICE, KERNELS
from cuda_graphs import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cache_cases import CacheCase, check, check_cache, eager, make_inputs

import fastattn
from fastattn import kv_cache_eager
from fastattn.dispatch import Backend
from fastattn.kernels.attention import decode_config, decode_launch

Case = CacheCase
BACKENDS = ["auto", "reference", *(["triton"] if Backend.TRITON in KERNELS else [])]
FUZZ = settings(max_examples=int(os.environ.get("FASTATTN_FUZZ", "50")))

FEATURES = {
    "plain": Case(),
    "nothing_appended": Case(appended=0),
    "one_sequence": Case(batch=1, capacity=300, lengths="full"),
    "equal_lengths": Case(lengths="equal", rows=2, appended=2),
    "empty": Case(lengths="empty", appended=0),
    "empty_sinks": Case(lengths="empty", appended=0, sinks=True),
    "first_token": Case(lengths="empty"),
    "full": Case(lengths="full", splits=3),
    "more_queries_than_keys": Case(rows=8, appended=2, lengths="empty"),
    "no_batch": Case(batch=0),
    "no_query": Case(rows=0),
    "no_room": Case(capacity=0, appended=0),
    "int64_lengths": Case(length_dtype=torch.int64),
    "grouped": Case(heads=8, key_heads=2, rows=3, appended=3),
    "one_key_head": Case(heads=5, key_heads=1, rows=5, appended=5, splits=2),
    "many_rows": Case(heads=8, key_heads=1, rows=11, appended=11, dtype=torch.float16),
    "not_causal": Case(rows=4, appended=4, causal=False),
    "page_16": Case(page=16),
    "page_32": Case(page=32, rows=3, appended=3, splits=2),
    "page_64": Case(page=64, capacity=192, heads=4),
    "page_48": Case(page=48, capacity=144),
    "page_16_heads_last": Case(page=16, layout="heads_last", dtype=torch.float16),
    "float16": Case(dtype=torch.float16, head_dim=64, heads=4),
    "bfloat16": Case(dtype=torch.bfloat16, head_dim=128, heads=4, page=16),
    "float64": Case(dtype=torch.float64),
    "dim_1": Case(head_dim=1),
    "dim_odd": Case(head_dim=37, dtype=torch.bfloat16),
    "dim_256": Case(head_dim=256, dtype=torch.float16, splits=2),
    "heads_last": Case(layout="heads_last"),
    "sliced": Case(layout="sliced", page=16),
    "window": Case(window=(20, None), rows=4, appended=4),
    "window_right": Case(window=(5, 3), rows=6, appended=2, causal=False),
    "window_self": Case(window=(0, 0), splits=2),
    "softcap": Case(softcap=2.0, scale=1.0, rows=2, appended=2),
    "softcap_large": Case(softcap=50.0),
    "alibi": Case(alibi="heads", heads=4, rows=3, appended=3, page=16),
    "alibi_batch": Case(alibi="batch", heads=4, splits=2),
    "sinks": Case(sinks=True, heads=4),
    "sinks_split": Case(sinks=True, heads=4, splits=4, dtype=torch.bfloat16),
    "everything": Case(
        heads=6, rows=5, appended=5, page=16, window=(40, 2), softcap=3.0, alibi="batch", sinks=True, splits=3,
        scale=0.9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, backend: str) -> None:
    case = FEATURES[feature]
    if backend == "triton" and case.dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    with fastattn.backend(backend):
        check(case, DEVICE)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    key_heads, rows, page = draw(st.integers(1, 2)), draw(st.integers(1, 8)), draw(st.sampled_from((0, 16, 32, 64)))
    side = st.one_of(st.none(), st.integers(0, 40))
    return Case(
        batch=draw(st.integers(1, 3)),
        heads=key_heads * draw(st.sampled_from((1, 2, 3, 4))),
        key_heads=key_heads,
        rows=rows,
        appended=draw(st.sampled_from((rows, rows, 0, 1))),
        capacity=page * draw(st.integers(1, 3)) if page else draw(st.integers(8, 150)),
        page=page,
        head_dim=draw(st.sampled_from((1, 8, 16, 31, 64, 128))),
        dtype=draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))),
        layout=draw(st.sampled_from(("heads_first", "heads_last", "sliced"))),
        lengths=draw(st.sampled_from(("random", "random", "full", "empty", "equal"))),
        causal=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.tuples(side, side))),
        softcap=draw(st.sampled_from((None, None, 5.0, 0.7))),
        alibi=draw(st.sampled_from((None, None, "heads", "batch"))),
        sinks=draw(st.booleans()),
        scale=draw(st.sampled_from((None, 1.0, -0.7))),
        splits=draw(st.sampled_from((None, 1, 2, 5))),
        length_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton on this device")
@FUZZ
@given(case=cases())
def test_triton_combinations(case: Case) -> None:
    with fastattn.backend("triton"):
        check(case, DEVICE)


@FUZZ
@given(case=cases())
def test_auto_combinations(case: Case) -> None:
    check(case, DEVICE)


@FUZZ
@given(case=cases(), backend=st.sampled_from(("auto", "reference")))
def test_one_dense_call_without_reading_lengths(case: Case, backend: str) -> None:
    """The path of a GPU without a verified kernel, here on any device."""
    inputs = make_inputs(replace(case, appended=0), DEVICE)
    left, right = case.window or (None, None)
    if case.causal:
        right = 0 if right is None else min(right, 0)
    slopes = inputs.slopes if inputs.slopes is None or inputs.slopes.dim() == 2 else inputs.slopes[None]
    how = kv_cache_eager.Scoring(
        case.scale or case.head_dim**-0.5, case.softcap, (left, right), slopes, inputs.sinks, True
    )
    with fastattn.backend(backend):
        out, lse = kv_cache_eager.at_once(
            inputs.query, inputs.key_cache, inputs.value_cache, inputs.lengths, inputs.table, how
        )
    wanted, wanted_lse, _, _ = eager(replace(case, appended=0), inputs, torch.float64)
    roundings = 32 * torch.finfo(case.dtype).eps
    torch.testing.assert_close(out.double(), wanted, rtol=roundings, atol=roundings)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa"])
@pytest.mark.parametrize("name", ["plain", "window", "window_self", "page_16", "empty", "no_batch", "grouped"])
def test_without_lse(name: str, backend: str) -> None:
    """torch's function can serve these then."""
    for rows in (1, 3):
        case = replace(FEATURES[name], rows=rows)
        inputs = make_inputs(case, DEVICE)
        with fastattn.backend(backend):
            out = fastattn.attention_with_kv_cache(
                inputs.query, inputs.key_cache, inputs.value_cache, inputs.lengths, new_key=inputs.new_key,
                new_value=inputs.new_value, block_table=inputs.table, window=case.window,
            )  # fmt: skip
        torch.testing.assert_close(out.double(), eager(case, inputs, torch.float64)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [0, 16])
def test_a_sequence_decoded_token_by_token(backend: str, page: int) -> None:
    """As much as one causal call of the dense function."""
    key, value, query = torch.randn(3, 1, 2, 40, 16, device=DEVICE).unbind()
    shape = (3, 2, 16, 16) if page else (1, 2, 48, 16)
    caches = [torch.full(shape, float("nan"), device=DEVICE) for _ in range(2)]
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=DEVICE) if page else None
    wanted = fastattn.scaled_dot_product_attention(query, key, value, is_causal=True)
    with fastattn.backend(backend):
        begin = 0
        for step in (17, 1, 1, 5, 1, 15):
            now = slice(begin, begin + step)
            out = fastattn.attention_with_kv_cache(
                query[:, :, now], *caches, torch.tensor([begin], dtype=torch.int32, device=DEVICE),
                new_key=key[:, :, now], new_value=value[:, :, now], block_table=table,
            )  # fmt: skip
            torch.testing.assert_close(out, wanted[:, :, now])
            begin += step


def test_one_split_gives_the_bits_of_a_sequence_alone() -> None:
    if "triton" not in BACKENDS:
        pytest.skip("needs Triton on this device")
    inputs = make_inputs(Case(batch=3, appended=0, capacity=200), DEVICE)
    with fastattn.backend("triton"):
        together = fastattn.attention_with_kv_cache(
            inputs.query, inputs.key_cache, inputs.value_cache, inputs.lengths, num_splits=1
        )
        for one in range(3):
            at = slice(one, one + 1)
            alone = fastattn.attention_with_kv_cache(
                inputs.query[at], inputs.key_cache[at], inputs.value_cache[at], inputs.lengths[at], num_splits=1
            )
            assert torch.equal(alone, together[at])


@pytest.mark.parametrize("write", [kv_cache_eager.append, decode_launch.append], ids=["eager", "triton"])
@pytest.mark.parametrize("page", [0, 16])
def test_tokens_without_a_place_are_dropped(write: object, page: int) -> None:
    """Beyond the cache, before it, or in a page that is none: nothing is overwritten, everything else is written."""
    if write is decode_launch.append and "triton" not in BACKENDS:
        pytest.skip("needs Triton on this device")
    case = Case(batch=3, appended=4, capacity=32, page=page, lengths="empty")
    inputs = make_inputs(case, DEVICE)
    lengths = torch.tensor([30, -2, 14], dtype=torch.int32, device=DEVICE)
    expected = [cache.clone() for cache in (inputs.key_cache, inputs.value_cache)]
    table = torch.tensor([[1, 4], [99, -1], [3, -1]], dtype=torch.int32, device=DEVICE) if page else None
    for cache, new in zip(expected, (inputs.new_key, inputs.new_value), strict=True):
        assert new is not None
        if page:
            cache[4, :, 14:16], cache[3, :, 14:16] = new[0, :, :2], new[2, :, :2]
        else:
            cache[0, :, 30:32], cache[1, :, 0:2], cache[2, :, 14:18] = new[0, :, :2], new[1, :, 2:], new[2]
    write(inputs.key_cache, inputs.value_cache, inputs.new_key, inputs.new_value, lengths, table)  # type: ignore[operator]
    for cache, wanted in zip((inputs.key_cache, inputs.value_cache), expected, strict=True):
        torch.testing.assert_close(cache, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("append", [kv_cache_eager.append, decode_launch.append], ids=["eager", "triton"])
def test_append_where_nothing_fits(append: object) -> None:
    if append is decode_launch.append and "triton" not in BACKENDS:
        pytest.skip("needs Triton on this device")
    cache = torch.randn(2, 1, 16, 8, device=DEVICE)
    before = cache.clone()
    new, table = torch.randn(2, 1, 3, 8, device=DEVICE), torch.full((2, 1), 7, dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([0, 16], dtype=torch.int32, device=DEVICE)
    append(cache, cache.clone(), new, new, lengths, table)  # type: ignore[operator]
    assert torch.equal(cache, before)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the sequence with a bad table reads what no sequence holds
@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton on this device")
def test_the_kernel_clamps_lengths_and_tables() -> None:
    """Where nothing is checked, nothing is read out of bounds; good sequences are right beside bad ones."""
    case = Case(batch=3, appended=0, capacity=48, page=16)
    inputs = make_inputs(case, DEVICE)
    assert inputs.table is not None
    good = decode_launch.attention(
        inputs.query, inputs.key_cache, inputs.value_cache, inputs.lengths, inputs.table, None, None, 0.25, 0.0, None,
        0, 0, 2,
    )  # fmt: skip
    bad_lengths, bad_table = inputs.lengths.clone(), inputs.table.clone()
    bad_lengths[1], bad_lengths[2], bad_table[1], bad_table[2] = 2**31 - 5, -4, -(2**31), 2**31 - 1
    out, lse = decode_launch.attention(
        inputs.query, inputs.key_cache, inputs.value_cache, bad_lengths, bad_table, None, None, 0.25, 0.0, None, 0, 0, 2
    )
    assert torch.equal(out[0], good[0][0])
    assert torch.equal(lse[2], torch.full_like(lse[2], float("-inf")))
    assert torch.equal(out[2], torch.zeros_like(out[2]))


def test_splits_fill_the_device_from_shapes_alone() -> None:
    assert decode_config.splits(programs=8, capacity=131072, processors=132) == 33
    assert decode_config.splits(programs=1, capacity=131072, processors=132) == decode_config.MAX_SPLITS
    assert decode_config.splits(programs=1000, capacity=131072, processors=132) == 1
    assert decode_config.splits(programs=1, capacity=100, processors=132) == 1


def test_tiles_hold_the_group() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in (1, 16, 64, 80, 128, 256):
            for rows in (1, 16, 17, 40, 500):
                tile = decode_config.tile(dtype, head_dim, rows)
                assert tile.block_m >= 16
                assert tile.block_n % 16 == 0


def test_an_unverified_kernel_is_not_the_default() -> None:
    assert decode_launch.verified("cpu") is False


@pytest.mark.gpu
def test_a_cuda_graph_serves_every_length() -> None:
    case = Case(batch=2, heads=8, key_heads=2, capacity=512, page=16, dtype=torch.bfloat16, head_dim=64)
    first = make_inputs(case, "cuda")

    def step() -> torch.Tensor:
        return fastattn.attention_with_kv_cache(
            first.query, first.key_cache, first.value_cache, first.lengths, new_key=first.new_key,
            new_value=first.new_value, block_table=first.table,
        )  # fmt: skip

    with fastattn.backend("triton"):
        graph, out = captured(step)
        for seed in range(1, 4):
            other = make_inputs(replace(case, seed=seed), "cuda")
            for name in ("query", "key_cache", "value_cache", "lengths", "new_key", "new_value", "table"):
                getattr(first, name).copy_(getattr(other, name))
            graph.replay()
            expected, _, _, _ = eager(case, other, torch.float64)
            torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
            check_cache(case, replace(other, key_cache=first.key_cache, value_cache=first.value_cache))
