"""Bad and borderline calls of everything public: each raises an error that helps, or gives the right answer.

An error names the argument, what was given and what is allowed; it comes before any kernel, so that it is the same
whatever the backend, and ``explain`` raises it too. Every row runs on each backend.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from bad_input import (
    BACKENDS,
    BATCH,
    BF16,
    C64,
    COLUMNS,
    DEVICE,
    DIM,
    F16,
    F64,
    I64,
    INF,
    RIGHT,
    TE,
    VE,
    assert_close,
    assert_right,
    bools,
    dims,
    sized,
    t,
)
from torch import Tensor

import fastattn
from fastattn.kernels.attention import config

MAX = 2**31 - 1


@pytest.fixture(autouse=True)
def small_tiles() -> Any:
    with config.override(config.Tile(16, 16)):
        yield


def no_heads(batches: tuple[int, int] = (2, 2)) -> dict[str, Tensor]:
    return {"query": t(batches[0], 3, 8), "key": t(batches[1], 5, 8), "value": t(batches[1], 5, 8)}


def two_batches(second: tuple[int, int] = (2, 3)) -> dict[str, Tensor]:
    return {"query": t(2, 3, 4, 3, 8), "key": t(*second, 4, 5, 8), "value": t(*second, 4, 5, 8)}


def grouped(heads: int, gqa: bool = True) -> dict[str, Any]:
    return {"key": t(BATCH, heads, COLUMNS, DIM), "value": t(BATCH, heads, COLUMNS, DIM), "enable_gqa": gqa}


# Each row: name, the arguments that differ from a good call, then an exception and what its message matches, or RIGHT.
ATTENTION: list[tuple[Any, ...]] = [
    # Types.
    ("query None", lambda: {"query": None}, TE, "query: got NoneType, expected a torch.Tensor"),
    ("query str", lambda: {"query": "q"}, TE, "query: got str, expected a torch.Tensor"),
    ("query list", lambda: {"query": [[1.0]]}, TE, "query: got list, expected a torch.Tensor"),
    ("key None", lambda: {"key": None}, TE, "key: got NoneType, expected a torch.Tensor"),
    ("value float", lambda: {"value": 1.0}, TE, "value: got float, expected a torch.Tensor"),
    ("query int64", lambda: {"query": t(2, 4, 3, 8, dtype=I64)}, VE, "query: got dtype torch.int64, allowed"),
    ("query bool", lambda: {"query": bools(2, 4, 3, 8)}, VE, "query: got dtype torch.bool, allowed are float16"),
    ("query complex", lambda: {"query": t(2, 4, 3, 8, dtype=C64)}, VE, "query: got dtype torch.complex64"),
    ("query float8", lambda: {"query": t(2, 4, 3, 8, dtype=torch.float8_e4m3fn)}, VE, "query: .*float8_e4m3fn"),
    ("key float16", lambda: {"key": t(2, 4, 5, 8, dtype=F16)}, VE, "key: got dtype torch.float16.*float32"),
    ("value float64", lambda: {"value": t(2, 4, 5, 8, dtype=F64)}, VE, "value: got dtype torch.float64.*query"),
    ("key meta", lambda: {"key": t(2, 4, 5, 8, device="meta")}, VE, f"key: got device meta.*{DEVICE}"),
    ("value meta", lambda: {"value": t(2, 4, 5, 8, device="meta")}, VE, f"value: got device meta.*{DEVICE}"),
    ("query meta", lambda: {"query": t(2, 4, 3, 8, device="meta")}, VE, f"key: got device {DEVICE}.*meta"),
    ("query nested", lambda: {"query": torch.nested.nested_tensor([t(4, 3, 8)])}, VE, "query: got a nested"),
    ("query sparse", lambda: {"query": t(2, 4, 3, 8).to_sparse()}, VE, "query: got layout torch.sparse_coo"),
    # Ranks and shapes.
    ("query scalar", lambda: {"query": t()}, VE, r"query: got shape \(\), expected at least 2"),
    ("query 1-D", lambda: {"query": t(8)}, VE, r"query: got shape \(8,\), expected at least 2 dimensions"),
    ("value 1-D", lambda: {"value": t(8)}, VE, r"value: got shape \(8,\), expected at least 2 dimensions"),
    ("query 3-D", lambda: {"query": t(4, 3, 8)}, VE, "key: got 4 dimensions, expected query's 3"),
    ("value 5-D", lambda: {"value": t(1, 2, 4, 5, 8)}, VE, "value: got 5 dimensions, expected query's 4"),
    ("head_dim 0", lambda: dims(0), VE, r"head_dim: got 0 \(value 0\), expected at least 1"),
    ("value's head_dim 0", lambda: dims(8, 0), VE, r"head_dim: got 8 \(value 0\), expected at least 1"),
    ("key's head_dim", lambda: {"key": t(2, 4, 5, 7)}, VE, "key: got head_dim 7, expected query's 8"),
    ("value's length", lambda: {"value": t(2, 4, 6, 8)}, VE, "value: got length 6, expected key's 5"),
    ("key's batch", lambda: {"key": t(3, 4, 5, 8)}, VE, "key, value: got batch sizes 3 and 2.*query's 2"),
    ("value's batch", lambda: {"value": t(1, 4, 5, 8)}, VE, "key, value: got batch sizes 2 and 1.*query's 2"),
    ("value's heads", lambda: {"value": t(2, 2, 5, 8)}, VE, "value: got 2 heads, expected key's 4"),
    ("fewer heads", lambda: grouped(2, gqa=False), VE, "key: got 2 heads, expected query's 4.*enable_gqa=True"),
    ("heads no divisor", lambda: grouped(3), VE, "key: got 3 heads, expected a divisor of query's 4"),
    ("more key heads", lambda: grouped(8), VE, "key: got 8 heads, expected a divisor of query's 4"),
    ("no key head", lambda: grouped(0), VE, "key: got 0 heads, expected a divisor of query's 4"),
    ("3-D batches", lambda: no_heads((2, 3)), VE, "key: got 3 heads, expected query's 2.*enable_gqa=True"),
    ("5-D batches", lambda: two_batches((3, 2)), VE, r"key: got batch dimensions \(3, 2\).*\(2, 3\)"),
    # Masks.
    ("attn_mask str", lambda: {"attn_mask": "causal"}, TE, "attn_mask: got str, expected a torch.Tensor or None"),
    ("attn_mask True", lambda: {"attn_mask": True}, TE, "attn_mask: got bool, expected a torch.Tensor or None"),
    ("attn_mask int", lambda: {"attn_mask": t(3, 5, dtype=I64)}, VE, "attn_mask: got dtype torch.int64, allowed"),
    ("attn_mask complex", lambda: {"attn_mask": t(3, 5, dtype=C64)}, VE, "attn_mask: got dtype torch.complex64"),
    ("attn_mask meta", lambda: {"attn_mask": t(3, 5, device="meta")}, VE, "attn_mask: got device meta, expected"),
    ("attn_mask rows", lambda: {"attn_mask": t(4, 5)}, VE, r"attn_mask: got shape \(4, 5\).*\(2, 4, 3, 5\)"),
    ("attn_mask columns", lambda: {"attn_mask": t(3, 6)}, VE, r"attn_mask: got shape \(3, 6\).*\(2, 4, 3, 5\)"),
    ("attn_mask transposed", lambda: {"attn_mask": t(5, 3)}, VE, r"attn_mask: got shape \(5, 3\), expected"),
    ("attn_mask heads", lambda: {"attn_mask": t(2, 3, 5)}, VE, r"attn_mask: got shape \(2, 3, 5\), expected"),
    ("attn_mask batch", lambda: {"attn_mask": t(3, 1, 3, 5)}, VE, r"attn_mask: got shape \(3, 1, 3, 5\)"),
    ("attn_mask 5-D", lambda: {"attn_mask": t(1, 1, 1, 3, 5)}, VE, "attn_mask: got 5 dimensions, allowed"),
    ("attn_mask empty", lambda: {"attn_mask": t(0, 5)}, VE, r"attn_mask: got shape \(0, 5\), expected"),
    ("5-D mask", lambda: two_batches() | {"attn_mask": t(2, 2, 1, 3, 5)}, VE, r"attn_mask: got shape \(2, 2"),
    ("5-D mask int", lambda: two_batches() | {"attn_mask": t(2, 3, 1, 3, 5, dtype=I64)}, VE, "attn_mask: .*int64"),
    ("5-D mask rows", lambda: two_batches() | {"attn_mask": t(2, 3, 1, 4, 5)}, VE, r"attn_mask: got .*4, 5\), exp"),
    ("5-D mask 6-D", lambda: two_batches() | {"attn_mask": t(1, 2, 3, 1, 3, 5)}, VE, r"attn_mask: got shape \(1, 2, 3"),
    ("padding str", lambda: {"key_padding_mask": "x"}, TE, "key_padding_mask: got str, expected a torch.Tensor"),
    ("padding lengths", lambda: {"key_padding_mask": [5, 3]}, TE, "key_padding_mask: got list, expected a torch"),
    ("padding int", lambda: {"key_padding_mask": t(2, 5, dtype=I64)}, VE, "key_padding_mask: got dtype torch.int"),
    ("padding meta", lambda: {"key_padding_mask": t(2, 5, device="meta")}, VE, "key_padding_mask: got device meta"),
    ("padding 1-D", lambda: {"key_padding_mask": bools(5)}, VE, r"key_padding_mask: got shape \(5,\).*\(2, 5\)"),
    ("padding 4-D", lambda: {"key_padding_mask": bools(2, 1, 1, 5)}, VE, r"key_padding_mask: got shape \(2, 1, 1, 5"),
    ("padding batch", lambda: {"key_padding_mask": bools(1, 5)}, VE, r"key_padding_mask: got shape \(1, 5\)"),
    ("padding length", lambda: {"key_padding_mask": bools(2, 3)}, VE, r"key_padding_mask: got shape \(2, 3\)"),
    # Numbers, flags, words.
    ("dropout < 0", lambda: {"dropout_p": -0.1}, VE, r"dropout_p: got -0.1, allowed is \[0, 1\]"),
    ("dropout > 1", lambda: {"dropout_p": 1.5}, VE, r"dropout_p: got 1.5, allowed is \[0, 1\]"),
    ("dropout NaN", lambda: {"dropout_p": float("nan")}, VE, r"dropout_p: got nan, allowed is \[0, 1\]"),
    ("dropout None", lambda: {"dropout_p": None}, TE, "dropout_p: got NoneType, expected a float"),
    ("dropout str", lambda: {"dropout_p": "0.1"}, TE, "dropout_p: got str, expected a float"),
    ("dropout bool", lambda: {"dropout_p": True}, TE, "dropout_p: got bool, expected a float"),
    ("dropout tensor", lambda: {"dropout_p": t()}, TE, "dropout_p: got Tensor, expected a float"),
    ("scale NaN", lambda: {"scale": float("nan")}, VE, "scale: got nan, expected a finite number"),
    ("scale infinite", lambda: {"scale": -INF}, VE, "scale: got -inf, expected a finite number"),
    ("scale str", lambda: {"scale": "auto"}, TE, "scale: got str, expected a float or None"),
    ("scale bool", lambda: {"scale": False}, TE, "scale: got bool, expected a float or None"),
    ("scale tensor", lambda: {"scale": t(1)}, TE, "scale: got Tensor, expected a float or None"),
    ("scale huge int", lambda: {"scale": 10**400}, VE, "scale: got an integer beyond the range of a float"),
    ("window int", lambda: {"window": 3}, VE, r"window: got 3, expected \(left, right\)"),
    ("window of 1", lambda: {"window": (3,)}, VE, r"window: got \(3,\), expected \(left, right\)"),
    ("window of 3", lambda: {"window": [1, 2, 3]}, VE, r"window: got \[1, 2, 3\], expected \(left, right\)"),
    ("window str", lambda: {"window": "ab"}, VE, r"window: got 'ab', expected \(left, right\)"),
    ("window -2", lambda: {"window": (-2, 0)}, VE, r"window: got \(-2, 0\), allowed are integers >= 0"),
    ("window right -5", lambda: {"window": (0, -5)}, VE, r"window: got \(0, -5\), allowed are integers >= 0"),
    ("window float", lambda: {"window": (1.0, 0)}, TE, r"window: got \(1.0, 0\), expected two integers"),
    ("window bool", lambda: {"window": (True, 0)}, TE, r"window: got \(True, 0\), expected two integers"),
    ("alignment typo", lambda: {"causal_alignment": "top_left"}, VE, "causal_alignment: got 'top_left', allowed"),
    ("alignment None", lambda: {"causal_alignment": None}, VE, "causal_alignment: got None, allowed are"),
    ("is_causal str", lambda: {"is_causal": "no"}, TE, "is_causal: got str, expected True or False"),
    ("is_causal tensor", lambda: {"is_causal": bools(3, 5)}, TE, "is_causal: got Tensor, expected True or False"),
    ("is_causal float", lambda: {"is_causal": 0.125}, TE, "is_causal: got float, expected True or False"),
    ("enable_gqa str", lambda: {"enable_gqa": "4"}, TE, "enable_gqa: got str, expected True or False"),
    ("need_weights str", lambda: {"need_weights": "yes"}, TE, "need_weights: got str, expected True or False"),
    ("average_weights list", lambda: {"average_weights": []}, TE, "average_weights: got list, expected True"),
    ("return_lse tensor", lambda: {"return_lse": t(3)}, TE, "return_lse: got Tensor, expected True or False"),
    ("unknown argument", lambda: {"mask": None}, TE, "unexpected keyword argument 'mask'"),
    ("softcap 0", lambda: {"softcap": 0.0}, VE, "softcap: got 0.0, expected a positive finite number"),
    ("softcap < 0", lambda: {"softcap": -1}, VE, "softcap: got -1, expected a positive finite number"),
    ("softcap infinite", lambda: {"softcap": INF}, VE, "softcap: got inf, expected a positive finite number"),
    ("softcap tensor", lambda: {"softcap": t(1)}, TE, "softcap: got Tensor, expected a positive float or None"),
    ("slopes list", lambda: {"alibi_slopes": [0.5]}, TE, "alibi_slopes: got list, expected a torch.Tensor"),
    ("slopes int", lambda: {"alibi_slopes": t(4, dtype=I64)}, VE, "alibi_slopes: got dtype torch.int64"),
    ("slopes of 3", lambda: {"alibi_slopes": t(3)}, VE, r"alibi_slopes: got shape \(3,\), expected \(H\) = \(4,\)"),
    ("slopes of batch", lambda: {"alibi_slopes": t(3, 4)}, VE, r"alibi_slopes: got shape \(3, 4\)"),
    ("slopes meta", lambda: {"alibi_slopes": t(4, device="meta")}, VE, "alibi_slopes: got device meta"),
    ("slopes' gradient", lambda: {"alibi_slopes": t(4).requires_grad_()}, VE, "alibi_slopes: .*pass detach"),
    ("sinks float", lambda: {"sinks": 0.5}, TE, "sinks: got float, expected a torch.Tensor or None"),
    ("sinks int", lambda: {"sinks": t(4, dtype=I64)}, VE, "sinks: got dtype torch.int64, allowed are floating"),
    ("sinks of 3", lambda: {"sinks": t(3)}, VE, r"sinks: got shape \(3,\), expected \(H\) = \(4,\)"),
    ("sinks 2-D", lambda: {"sinks": t(2, 4)}, VE, r"sinks: got shape \(2, 4\), expected \(H\)"),
    ("segments str", lambda: {"segment_ids": "ab"}, TE, "segment_ids: got str, expected a tensor"),
    ("segments of one side", lambda: {"segment_ids": t(2, 3, dtype=I64)}, VE, r"segment_ids: .*\(2, 3\) for the key"),
    ("segments of three", lambda: {"segment_ids": [t(2, 3, dtype=I64)] * 3}, TE, "segment_ids: got list, expected"),
    ("segments float", lambda: {"segment_ids": (t(2, 3), t(2, 5))}, VE, "segment_ids: got dtype torch.float32"),
    ("segments 1-D", lambda: {"segment_ids": (t(3, dtype=I64), t(5, dtype=I64))}, VE, r"segment_ids: got shape \(3,\)"),
    ("deterministic str", lambda: {"deterministic": "no"}, TE, "deterministic: got str, expected True or False"),
    # Borderline calls that are right.
    ("softcap huge", lambda: {"softcap": 1e30}, RIGHT),
    ("slopes of 0", lambda: {"alibi_slopes": t(4) * 0}, RIGHT),
    ("sinks of -inf", lambda: {"sinks": torch.full((4,), -INF, device=DEVICE)}, RIGHT),
    ("one segment", lambda: {"segment_ids": (t(2, 3, dtype=I64) * 0, t(2, 5, dtype=I64) * 0)}, RIGHT),
    ("no batch", lambda: sized(batch=0), RIGHT),
    ("no head", lambda: sized(heads=0), RIGHT),
    ("no query", lambda: sized(rows=0), RIGHT),
    ("no key", lambda: sized(columns=0), RIGHT),
    ("no key, masks", lambda: sized(columns=0) | {"attn_mask": t(3, 0), "key_padding_mask": bools(2, 0)}, RIGHT),
    ("one query, one key", lambda: sized(rows=1, columns=1), RIGHT),
    ("2-D", lambda: {"query": t(3, 8), "key": t(5, 8), "value": t(5, 8)}, RIGHT),
    ("2-D, mask", lambda: {"query": t(3, 8), "key": t(5, 8), "value": t(5, 8), "attn_mask": bools(3, 5)}, RIGHT),
    ("3-D", no_heads, RIGHT),
    ("3-D, mask", lambda: no_heads() | {"attn_mask": t(2, 3, 5)}, RIGHT),
    ("5-D", two_batches, RIGHT),
    ("5-D, mask 5-D", lambda: two_batches() | {"attn_mask": t(2, 1, 1, 3, 5)}, RIGHT),
    ("5-D, mask 4-D", lambda: two_batches() | {"attn_mask": bools(3, 4, 1, 5)}, RIGHT),
    ("6-D, no batch", lambda: {name: t(2, 0, 3, 4, 5, 8) for name in ("query", "key", "value")}, RIGHT),
    ("head_dim 1", lambda: dims(1), RIGHT),
    ("head_dim 256", lambda: dims(256), RIGHT),
    ("head_dim 257", lambda: dims(257), RIGHT),
    ("value's head_dim", lambda: dims(8, 5), RIGHT),
    ("grouped heads", lambda: grouped(2), RIGHT),
    ("one key head", lambda: grouped(1), RIGHT),
    ("float16", lambda: dims(8, dtype=F16), RIGHT),
    ("bfloat16", lambda: dims(8, dtype=BF16), RIGHT),
    ("float64", lambda: dims(8, dtype=F64), RIGHT),
    ("strided head_dim", lambda: {"query": t(2, 4, 8, 3).mT, "key": t(2, 4, 5, 16)[..., ::2]}, RIGHT),
    ("expanded", lambda: {"key": t(1, 1, 1, 8).expand(2, 4, 5, 8), "value": t(1, 4, 5, 1).expand(2, 4, 5, 8)}, RIGHT),
    ("flipped", lambda: {"query": t(2, 4, 3, 8).flip(2), "value": t(2, 4, 9, 8)[:, :, ::2]}, RIGHT),
    ("one tensor thrice", lambda: dict.fromkeys(("query", "key", "value"), t(2, 4, 5, 8)), RIGHT),
    ("mask scalar", lambda: {"attn_mask": t()}, RIGHT),
    ("mask 1-D", lambda: {"attn_mask": bools(5)}, RIGHT),
    ("mask 3-D", lambda: {"attn_mask": t(4, 1, 5)}, RIGHT),
    ("mask 4-D", lambda: {"attn_mask": t(2, 1, 3, 1)}, RIGHT),
    ("mask expanded", lambda: {"attn_mask": t(1, 1, 3, 1).expand(2, 4, 3, 5)}, RIGHT),
    ("mask strided", lambda: {"attn_mask": t(5, 3).mT}, RIGHT),
    ("mask float16", lambda: {"attn_mask": t(3, 5, dtype=F16)}, RIGHT),
    ("mask float64", lambda: {"attn_mask": t(3, 5, dtype=F64)}, RIGHT),
    ("mask with a gradient", lambda: {"attn_mask": t(4, 3, 5).requires_grad_()}, RIGHT),
    ("padding with a gradient", lambda: {"key_padding_mask": t(2, 5).requires_grad_()}, RIGHT),
    ("mask of one row", lambda: {"attn_mask": bools(3, 5, last=False)}, RIGHT),
    ("mask of everything", lambda: {"attn_mask": bools(3, 5) & False}, RIGHT),
    ("mask of -inf", lambda: {"attn_mask": torch.full((3, 5), -INF, device=DEVICE)}, RIGHT),
    ("mask of -1e38", lambda: {"attn_mask": torch.full((3, 5), -1e38, device=DEVICE)}, RIGHT),
    ("padding of everything", lambda: {"key_padding_mask": bools(2, 5) & False}, RIGHT),
    ("bool and float", lambda: {"attn_mask": t(3, 5), "key_padding_mask": bools(2, 5), "is_causal": True}, RIGHT),
    ("causal, more queries", lambda: sized(rows=7) | {"is_causal": True, "causal_alignment": "bottom-right"}, RIGHT),
    ("window of nothing", lambda: {"window": (0, 0)}, RIGHT),
    ("window open", lambda: {"window": [-1, None]}, RIGHT),
    ("window too large", lambda: {"window": (2**40, 2**70)}, RIGHT),
    ("window largest", lambda: {"window": (MAX, MAX), "causal_alignment": "bottom-right"}, RIGHT),
    ("scale 0", lambda: {"scale": 0.0}, RIGHT),
    ("scale 0, causal", lambda: {"scale": 0.0, "is_causal": True}, RIGHT),
    ("scale < 0", lambda: {"scale": -0.5, "is_causal": True}, RIGHT),
    ("scale int", lambda: {"scale": 1}, RIGHT),
    ("dropout 1", lambda: {"dropout_p": 1}, RIGHT),
    ("dropout 0", lambda: {"dropout_p": 0, "is_causal": 1, "need_weights": None}, RIGHT),
]  # fmt: skip


def expected(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None, window: Any = None, causal_alignment: str = "top-left", **_: Any,
) -> Tensor:  # fmt: skip
    """The definition in float64, for inputs of any rank and dropout 0 or 1; nothing of the library is called."""
    query, key, value = query.double(), key.double(), value.double()
    if enable_gqa:
        key, value = (tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], -3) for tensor in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    rows, columns = scores.shape[-2:]
    left, right = (INF if side in (None, -1) else side for side in window or (None, None))
    shift = columns - rows if causal_alignment == "bottom-right" else 0
    inside = [
        [-left <= column - row - shift <= (min(right, 0) if is_causal else right) for column in range(columns)]
        for row in range(rows)
    ]
    masks = [torch.tensor(inside, dtype=torch.bool, device=query.device).reshape(rows, columns), attn_mask]
    masks.append(None if key_padding_mask is None else key_padding_mask[:, None, None])
    for mask in masks:
        if mask is not None:
            scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask.double()
    empty = (scores == -INF).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ value * (1 - dropout_p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", ATTENTION, ids=[row[0] for row in ATTENTION])
def test_attention(row: tuple[Any, ...], backend: str) -> None:
    arguments = sized() | row[1]()
    if row[2] is not RIGHT:
        for function in (fastattn.scaled_dot_product_attention, fastattn.explain):
            with fastattn.backend(backend), pytest.raises(row[2], match=row[3]):
                function(**arguments)
        return
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
    masks = [arguments.get(name) for name in ("attn_mask", "key_padding_mask")]
    leaves += [mask for mask in masks if mask is not None and mask.requires_grad]
    refusal = None
    with fastattn.backend(backend):
        try:
            fastattn.explain(**arguments)
        except RuntimeError as error:
            refusal = str(error)
    # A forced backend may refuse what is out of its reach, and says so alike in both functions.
    with fastattn.backend(backend):
        if refusal is not None:
            assert refusal.startswith(f'fastattn.backend("{backend}") cannot serve this call: ')
            with pytest.raises(RuntimeError, match=re.escape(refusal)):
                fastattn.scaled_dot_product_attention(**arguments)
            return
        out = fastattn.scaled_dot_product_attention(**arguments)
    assert_right(out, expected(**arguments), leaves)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("value", [float("nan"), INF])
def test_a_bad_number_stays_in_its_row(value: float, backend: str) -> None:
    arguments = sized()
    good = expected(**arguments)
    arguments["query"][0, 0, 1, 0] = value
    with fastattn.backend(backend):
        if backend == "cpu" and DEVICE != "cpu":
            pytest.skip("the C++ kernels run on the CPU")
        out = fastattn.scaled_dot_product_attention(**arguments)
    assert not out[0, 0, 1].isfinite().any()
    others = torch.ones_like(out, dtype=torch.bool)
    others[0, 0, 1] = False
    assert_close(out[others], good[others])
