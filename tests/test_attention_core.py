"""The attention kernels of every backend against the float64 oracle, feature by feature and in random combination."""

from __future__ import annotations

import os

import pytest
import torch
from backends import DEVICE, KERNELS
from hypothesis import given, settings
from strategies import LARGE_TILES, SMALL_TILES, attention_cases

import fastattn
from fastattn.dispatch import Backend
from fastattn.kernels.attention import config, launch
from fastattn.kernels.attention.config import Tile
from fastattn.philox import dropout_keep
from fastattn.testing import AttentionCase, check, evaluate, make_inputs, public_call

Case = AttentionCase
FUZZ = settings(max_examples=int(os.environ.get("FASTATTN_FUZZ", "500")))
# Half of the draws in small tiles, half in large ones. When many are asked for they come in batches, so that every core
# gets its share, and what has passed is seen before the end.
_BATCH = 100 if "FASTATTN_FUZZ" in os.environ else 250
BATCHES = pytest.mark.parametrize("batch", range(max(1, (FUZZ.max_examples + 1) // 2 // _BATCH)))
HALF = settings(max_examples=min(_BATCH, (FUZZ.max_examples + 1) // 2))

FEATURES = {
    "plain": Case(),
    "float16": Case(dtype=torch.float16, head_dim=64),
    "bfloat16": Case(dtype=torch.bfloat16, head_dim=64),
    "one_key": Case(columns=1),
    "one_query": Case(rows=1),
    "no_query": Case(rows=0),
    "no_key": Case(columns=0),
    "no_batch": Case(batch=0),
    "dim_1": Case(head_dim=1),
    "dim_odd": Case(head_dim=37, dtype=torch.float16),
    "dim_256": Case(head_dim=256, dtype=torch.bfloat16),
    "causal": Case(causal=True, rows=40, columns=40),
    "causal_more_queries": Case(causal=True, rows=40, columns=17),
    "causal_bottom_right": Case(causal=True, alignment="bottom-right", rows=17, columns=40),
    "causal_bottom_right_empty_rows": Case(causal=True, alignment="bottom-right", rows=40, columns=17),
    "window": Case(window=(5, 3), rows=50, columns=50),
    "window_left": Case(window=(5, None), rows=50, columns=50),
    "window_causal": Case(window=(7, None), causal=True, rows=50, columns=50),
    "window_self": Case(window=(0, 0)),
    "window_of_everything": Case(window=(2**31 - 1, 2**31 - 1), alignment="bottom-right", rows=20, columns=50),
    "grouped_heads": Case(heads=6, key_heads=2),
    "one_key_head": Case(heads=4, key_heads=1, causal=True),
    "padding_right": Case(batch=3, padding=torch.bool, columns=45),
    "padding_left": Case(batch=3, padding=torch.bool, padding_kind="left", columns=45),
    "padding_holes": Case(batch=3, padding=torch.bool, padding_kind="holes", columns=45),
    "padding_all": Case(batch=2, padding=torch.bool, padding_kind="all"),
    "padding_all_dropout": Case(batch=2, padding=torch.bool, padding_kind="all", dropout_p=0.3),
    "padding_float": Case(batch=2, padding=torch.float32),
    "mask_bool": Case(mask=torch.bool),
    "mask_bool_rows": Case(mask=torch.bool, mask_broadcast=(False, False, False, True)),
    "mask_bool_causal": Case(mask=torch.bool, causal=True),
    "mask_float": Case(mask=torch.float32),
    "mask_float64": Case(mask=torch.float64),
    "mask_float16_of_bfloat16": Case(mask=torch.float16, dtype=torch.bfloat16),
    "mask_batch_broadcast": Case(batch=3, mask=torch.float32, mask_broadcast=(True, False, False, False)),
    "mask_all_heads": Case(batch=2, mask=torch.float32, mask_broadcast=(False, True, False, False)),
    "mask_one_row": Case(batch=2, mask=torch.float32, mask_broadcast=(False, True, True, False), rows=40),
    "mask_one_column": Case(batch=2, mask=torch.float32, mask_broadcast=(False, False, False, True), columns=40),
    "mask_one_number": Case(batch=2, mask=torch.float32, mask_broadcast=(True, True, True, True)),
    "mask_and_padding": Case(batch=2, mask=torch.float32, padding=torch.bool),
    "mask_and_float_padding": Case(batch=2, mask=torch.bool, padding=torch.float32, causal=True),
    "dropout": Case(dropout_p=0.3, rows=40, columns=50),
    "dropout_float16": Case(dropout_p=0.3, dtype=torch.float16),
    "dropout_everything": Case(dropout_p=1.0),
    "softcap": Case(softcap=2.0, scale=1.0),
    "softcap_mask": Case(softcap=2.0, scale=1.0, mask=torch.float32, average=False),
    "softcap_large": Case(softcap=50.0, dtype=torch.bfloat16, head_dim=64),
    "alibi": Case(alibi=True, heads=4),
    "alibi_bottom_right": Case(alibi=True, causal=True, alignment="bottom-right", rows=20, columns=45),
    "alibi_float_mask": Case(alibi=True, mask=torch.float32, batch=2),
    "sinks": Case(sinks=True),
    "sinks_causal_grouped": Case(sinks=True, causal=True, heads=4, key_heads=2, dtype=torch.bfloat16),
    "sinks_empty_rows": Case(sinks=True, padding=torch.bool, padding_kind="all", batch=2),
    "sinks_no_key": Case(sinks=True, columns=0),
    "sinks_float_mask_dropout": Case(sinks=True, mask=torch.float32, dropout_p=0.2),
    "segments": Case(segments="sorted", batch=2, rows=50, columns=50),
    "segments_cross": Case(segments="sorted", batch=2, rows=37, columns=60),
    "segments_mixed_causal": Case(segments="mixed", causal=True, rows=40, columns=40),
    "segments_padding": Case(segments="sorted", padding=torch.bool, batch=3, rows=40, columns=40),
    "weights_per_head": Case(average=False, heads=3, key_heads=3),
    "weights_only": Case(loss=("weights",)),
    "lse_only": Case(loss=("lse",)),
    "negative_scale": Case(scale=-0.5),
    "packed": Case(layout="packed", batch=2),
    "sliced": Case(layout="sliced", batch=2),
    "expanded": Case(layout="expanded", batch=3),
    "everything": Case(
        batch=2, heads=4, key_heads=2, rows=37, columns=45, mask=torch.float32, padding=torch.bool, causal=True,
        window=(20, None), alignment="bottom-right", dropout_p=0.2, mask_broadcast=(True, False, False, False),
        softcap=3.0, alibi=True, sinks=True, segments="sorted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", FEATURES)
def test_feature(name: str, backend: Backend) -> None:
    with fastattn.backend(backend), config.override(Tile(16, 32)):
        check(FEATURES[name], device=DEVICE)


@pytest.mark.skipif(Backend.TRITON not in KERNELS, reason="needs CUDA or TRITON_INTERPRET=1")
@BATCHES
@HALF
@given(case=attention_cases(), tile=SMALL_TILES)
def test_triton_combinations_in_small_tiles(case: AttentionCase, tile: Tile, batch: int) -> None:
    with fastattn.backend("triton"), config.override(tile):
        check(case, device=DEVICE)


@pytest.mark.skipif(Backend.TRITON not in KERNELS, reason="needs CUDA or TRITON_INTERPRET=1")
@BATCHES
@HALF
@given(case=attention_cases(), tile=LARGE_TILES)
def test_triton_combinations_in_large_tiles(case: AttentionCase, tile: Tile, batch: int) -> None:
    with fastattn.backend("triton"), config.override(tile):
        check(case, device=DEVICE)


@pytest.mark.skipif(Backend.CPU not in KERNELS, reason="needs the C++ extension")
@FUZZ
@given(case=attention_cases())
def test_cpu_combinations(case: AttentionCase) -> None:
    with fastattn.backend("cpu"):
        check(case)


@settings(FUZZ, max_examples=100)
@given(case=attention_cases())
def test_auto_combinations(case: AttentionCase) -> None:
    """Whatever backend the dispatcher takes, with the weights and LSE this call always asks for."""
    check(case, device=DEVICE)


@pytest.mark.parametrize("backend", KERNELS)
def test_same_bits_at_every_run(backend: Backend) -> None:
    case = FEATURES["everything"]
    with fastattn.backend(backend), config.override(Tile(16, 32)):
        first, second = (evaluate(public_call, case, make_inputs(case, DEVICE)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("tile", [Tile(16, 16), Tile(32, 64)])
def test_dropout_is_a_function_of_position(backend: Backend, tile: Tile) -> None:
    """The weights vanish exactly where Philox drops them, whatever the tiles."""
    case = Case(batch=2, heads=3, key_heads=3, rows=37, columns=45, dropout_p=0.4, average=False)
    with fastattn.backend(backend), config.override(tile):
        weights = evaluate(public_call, case, make_inputs(case, DEVICE))["weights"]
    torch.manual_seed(case.seed)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=DEVICE).cpu()
    assert torch.equal(weights != 0, dropout_keep(seed, 0.4, 2, 3, 37, 45))


@pytest.mark.parametrize("backend", KERNELS)
def test_lowest_float_is_unlikely_but_not_masked(backend: Backend) -> None:
    """A row of finfo.min is uniform in torch, not empty."""
    query = torch.randn(1, 1, 4, 8, device=DEVICE)
    mask = torch.full((4, 6), torch.finfo(torch.float32).min, device=DEVICE)
    with fastattn.backend(backend):
        _, weights = fastattn.scaled_dot_product_attention(
            query, query.new_zeros(1, 1, 6, 8), query.new_ones(1, 1, 6, 8), mask, need_weights=True
        )
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))


@pytest.mark.parametrize("backend", KERNELS)
def test_tiles_of_nothing_are_finite(backend: Backend) -> None:
    """Inputs that overflow where they are masked do not reach the results."""
    query = torch.randn(1, 2, 40, 8, device=DEVICE)
    key = query.clone()
    key[:, :, 33:] = float("nan")
    padding = torch.arange(40, device=DEVICE)[None] < 33
    with fastattn.backend(backend), config.override(Tile(16, 16)):
        out = fastattn.scaled_dot_product_attention(query, key, query, key_padding_mask=padding)
    expected = fastattn.scaled_dot_product_attention(query, query[:, :, :33], query[:, :, :33])
    torch.testing.assert_close(out, expected)


def test_tile_choice_is_complete() -> None:
    for kernel in config.KERNELS:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for head_dim in range(1, 257):
                for heavy in (True,) if kernel == "dmask" else (False, True):  # a mask makes a call heavy
                    tile = config.tile(kernel, dtype, head_dim, heavy=heavy)
                    assert tile.block_m % 16 == 0
                    assert tile.block_n % 16 == 0


def test_unverified_kernels_are_never_the_default() -> None:
    if not launch.verified(DEVICE):
        query = torch.randn(1, 1, 4, 8, device=DEVICE)
        explanation = fastattn.explain(query, query, query)
        assert explanation.backend is not Backend.TRITON
        assert Backend.TRITON in explanation.why_not
