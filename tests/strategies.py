"""Hypothesis strategies: calls of attention with every feature, alone and in combination."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from fastattn.kernels.attention.config import Tile
from fastattn.testing import AttentionCase

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MASK_DTYPES = (None, None, torch.bool, torch.float32, torch.float16, torch.float64)
# Below, at and above tiles of 16 and 32; primes; none at all.
_LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from((1, 15, 16, 17, 31, 32, 33, 47)))
_HEAD_DIMS = st.one_of(st.integers(1, 40), st.sampled_from((1, 2, 7, 16, 31, 64, 65, 128, 129, 256)))
SMALL_TILES = st.sampled_from(
    (Tile(16, 16), Tile(32, 16), Tile(16, 16, ahead=True, apart=True), Tile(16, 16, descriptors=True))
)
LARGE_TILES = st.sampled_from(
    (Tile(16, 32), Tile(32, 32), Tile(64, 32), Tile(32, 32, ahead=True, apart=True, edge_stages=1, descriptors=True))
)


@st.composite
def attention_cases(draw: st.DrawFn) -> AttentionCase:
    """Any call the kernels serve, small enough for the interpreter."""
    key_heads = draw(st.integers(1, 2))
    side = st.one_of(st.none(), st.integers(0, 20))
    return AttentionCase(
        batch=draw(st.sampled_from((1, 1, 2, 3, 0))),
        heads=key_heads * draw(st.sampled_from((1, 1, 2, 3))),
        key_heads=key_heads,
        rows=draw(_LENGTHS),
        columns=draw(_LENGTHS),
        head_dim=draw(_HEAD_DIMS),
        dtype=draw(st.sampled_from(_DTYPES)),
        layout=draw(st.sampled_from(("heads_first", "heads_last", "packed", "sliced", "expanded"))),
        mask=draw(st.sampled_from(_MASK_DTYPES)),
        mask_broadcast=draw(st.tuples(*(st.booleans() for _ in range(4)))),
        padding=draw(st.sampled_from(_MASK_DTYPES)),
        padding_kind=draw(st.sampled_from(("right", "left", "holes", "all"))),
        mask_grad=draw(st.booleans()),
        causal=draw(st.booleans()),
        alignment=draw(st.sampled_from(("top-left", "bottom-right"))),
        window=draw(st.one_of(st.none(), st.tuples(side, side))),
        softcap=draw(st.sampled_from((None, None, 5.0, 0.7))),
        alibi=draw(st.sampled_from((False, False, True))),
        sinks=draw(st.sampled_from((False, False, True))),
        segments=draw(st.sampled_from((None, None, "sorted", "mixed"))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.1, 0.5, 1.0))),
        average=draw(st.booleans()),
        loss=draw(st.sampled_from((("out",), ("out", "lse"), ("weights",), ("lse",), ("out", "lse", "weights")))),
        scale=draw(st.sampled_from((None, None, 1.0, 0.05, -0.7))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
