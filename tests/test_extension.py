"""The C++ attention, every instruction set of it: against the float64 oracle, and called directly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.kernels.attention import extension
from fastattn.philox import dropout_keep
from fastattn.testing import AttentionCase, Inputs, check, evaluate, make_inputs

pytestmark = pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE))

OPS = torch.ops.fastattn
Case = AttentionCase
CASES = [
    Case(),
    Case(layout="heads_first"),
    Case(layout="packed"),
    Case(rows=1, columns=1, head_dim=1),
    Case(rows=1, columns=300, head_dim=64),
    Case(rows=130, columns=260, head_dim=64),
    Case(rows=200, columns=1100, head_dim=32),  # several splits in the backward
    Case(rows=60, columns=2200, head_dim=24),  # the higher row tile of the forward with weights
    Case(rows=70, columns=65, head_dim=256),
    Case(rows=1, columns=2100, head_dim=64, heads=4, key_heads=2),  # splits of the keys
    Case(rows=3, columns=1100, head_dim=48, heads=5, key_heads=5, sinks=True, padding=torch.bool, batch=2),
    Case(rows=9, columns=1200, head_dim=40, heads=4, key_heads=1, mask=torch.float32, window=(900, 3)),
    Case(batch=3, heads=4, key_heads=2, rows=100, columns=1100, head_dim=64),  # a few packed planes at a time
    Case(head_dim=33),
    Case(heads=6),
    Case(heads=4, key_heads=1, causal=True),
    Case(rows=150, columns=200, causal=True),
    Case(rows=200, columns=150, causal=True),  # the last rows see all
    Case(rows=150, columns=200, window=(20, 30)),
    Case(rows=300, columns=50, window=(20, -5)),  # rows without a key at both ends
    Case(rows=20, columns=300, window=(-250, None)),  # keys that no row sees
    Case(window=(-10_000_000_000, None)),
    Case(batch=3, rows=80, columns=400, padding=torch.bool),
    Case(batch=3, rows=80, columns=400, padding=torch.bool, padding_kind="left"),
    Case(batch=2, padding=torch.float32),
    Case(batch=2, padding=torch.float64, dropout_p=0.2),
    Case(batch=2, padding=torch.float16, heads=4, key_heads=2),
    Case(batch=2, mask=torch.bool, columns=100),
    Case(batch=2, mask=torch.bool, mask_broadcast=(True, True, False, False), padding=torch.bool, window=(None, 5)),
    Case(batch=2, mask=torch.float32, mask_broadcast=(True, True, False, False)),
    Case(batch=2, mask=torch.float64, mask_broadcast=(True, False, False, False), padding=torch.bool),
    Case(batch=2, mask=torch.float16, mask_broadcast=(False, True, True, False)),
    Case(batch=2, mask=torch.bfloat16, mask_broadcast=(False, False, False, True)),
    Case(batch=2, mask=torch.float32, mask_broadcast=(False, False, True, True), padding=torch.float32),
    Case(heads=4, mask=torch.float32, padding=torch.float32, dropout_p=0.5),
    Case(batch=3, columns=600, mask=torch.float32, mask_broadcast=(True, True, False, False), window=(3, None)),
    Case(rows=100, columns=150, dropout_p=0.9, causal=True),
    Case(dropout_p=1.0),
    Case(softcap=2.0, scale=1.0, rows=100, columns=150),
    Case(softcap=0.1, scale=3.0),  # almost every score at the cap
    Case(softcap=1e4),  # no score near it
    Case(softcap=1.0, mask=torch.float32, padding=torch.float32, batch=2, rows=40, columns=150),
    Case(alibi=True, heads=4, rows=100, columns=170),
    Case(alibi=True, causal=True, alignment="bottom-right", rows=100, columns=170),
    Case(sinks=True, rows=100, columns=170),
    Case(sinks=True, columns=0),
    Case(sinks=True, batch=2, rows=300, columns=50, window=(20, -5), padding=torch.bool),
    Case(segments="sorted", batch=2, rows=300, columns=700),
    Case(segments="mixed", batch=2, rows=130, columns=170, causal=True),
    Case(segments="sorted", batch=3, rows=200, columns=300, padding=torch.bool, mask=torch.float32),
    *(
        replace(case, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16)
        for case in (
            Case(rows=100, columns=170, head_dim=64),
            Case(heads=4, head_dim=40, padding=torch.bool, mask=dtype, dropout_p=0.1),
            Case(mask=torch.float32, mask_broadcast=(False, True, False, True), causal=True, layout="sliced"),
            Case(softcap=3.0, alibi=True, sinks=True, segments="sorted", rows=100, columns=170, dropout_p=0.2),
        )
    ),
]


def describe(case: Case) -> str:
    changed = {name: value for name, value in vars(case).items() if value != getattr(Case(), name)}
    return ",".join(f"{name}={value}" for name, value in changed.items()).replace("torch.", "") or "plain"


def problem(**changes: Any) -> tuple[Any, ...]:
    """The arguments that the operators share, in their order."""
    arguments = {
        "attn_mask": None, "key_padding_mask": None, "alibi_slopes": None, "segment_query": None, "segment_key": None,
        "seed": None, "dropout_p": 0.0, "scale": 1.0, "softcap": 0.0, "shift": 0, "lower": None, "upper": None,
    }  # fmt: skip
    assert changes.keys() <= arguments.keys()
    return tuple((arguments | changes).values())


def problem_of(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    torch.manual_seed(case.seed)
    segment_query, segment_key = inputs.segment_ids or (None, None)
    lower, upper = case.band
    return problem(
        attn_mask=inputs.attn_mask, key_padding_mask=inputs.key_padding_mask,
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes[None], segment_query=segment_query,
        segment_key=segment_key, seed=torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64),
        dropout_p=case.dropout_p, scale=case.scale or case.head_dim**-0.5, softcap=case.softcap or 0.0,
        shift=case.shift, lower=lower, upper=upper,
    )  # fmt: skip


Results = tuple[Tensor, Tensor, Tensor]


def one_pass(case: Case, inputs: Inputs) -> Results:
    """Output, LSE and weights together."""
    arguments = problem_of(case, inputs)
    out, logsumexp, weights = OPS.attention_with_weights(
        inputs.query, inputs.key, inputs.value, inputs.sinks, *arguments, case.average, "cpu"
    )
    return out, logsumexp[0], weights


def two_passes(case: Case, inputs: Inputs) -> Results:
    """The weights from the logsumexp."""
    arguments = problem_of(case, inputs)
    out, logsumexp = OPS.attention(inputs.query, inputs.key, inputs.value, inputs.sinks, *arguments, "cpu")
    weights = OPS.attention_weights(inputs.query, inputs.key, logsumexp, *arguments, case.average, "cpu")
    assert out.transpose(1, 2).is_contiguous()
    assert weights.is_contiguous()
    return out, logsumexp[0], weights


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small problems on busy cores: there, waiting for the other threads takes longer than the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("call", [one_pass, two_passes])
@pytest.mark.parametrize("case", CASES, ids=describe)
def test_matches_float64(case: Case, call: Any) -> None:
    for average in (True, False):
        check(replace(case, average=average), call)
    check(replace(case, loss=("out",)), call)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("rows", "keys"), [(37, 53), (1, 8), (9, 100), (200, 130)])
def test_dropout_is_philox(rows: int, keys: int) -> None:
    query, key, seed = torch.randn(2, 3, rows, 8), torch.randn(2, 3, keys, 8), torch.tensor([-(2**40) - 12345])
    arguments = problem(seed=seed, dropout_p=0.4)
    _, _, weights = extension.attention_with_weights(query, key, key, None, *arguments, False)
    assert torch.equal(weights != 0, dropout_keep(seed, 0.4, 2, 3, rows, keys))


@pytest.mark.usefixtures("instruction_set")
def test_keys_of_other_segments_are_not_read() -> None:
    """NaN marks what is read: the tiles of the first two of three segments end before the third's keys."""
    ids = torch.tensor([5, -(2**40), 2**40]).repeat_interleave(256)[None]
    query, key, value = (torch.randn(1, 2, 768, 8) for _ in range(3))
    poisoned = [tensor.clone() for tensor in (key, value)]
    for tensor in poisoned:
        tensor[:, :, 512:] = float("nan")
    arguments = problem(segment_query=ids, segment_key=ids)
    results = []
    for keys in ((key, value), poisoned):
        out, logsumexp, weights = extension.attention_with_weights(query, *keys, None, *arguments, True)
        given = (torch.ones_like(out), None, query, *keys, out, logsumexp)
        dquery, *_ = extension.attention_backward(*given, *arguments, False, False)
        results.append([tensor[..., :448, :] for tensor in (out, logsumexp[0, ..., None], weights, dquery)])
    for clean, tensor in zip(*results, strict=True):
        assert torch.equal(tensor, clean)


def test_segments_without_a_partner_are_empty_rows() -> None:
    query, key = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 4, 8)
    arguments = problem(
        segment_query=torch.tensor([[7, 0, 7], [1, 1, 9]]), segment_key=torch.tensor([[0, 0, 3, 3], [7, 9, 7, 9]])
    )
    _, logsumexp, weights = extension.attention_with_weights(query, key, key, None, *arguments, True)
    sees = torch.tensor([[[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]]]).bool()
    assert torch.equal(weights > 0, sees)
    assert torch.equal(logsumexp[0] > float("-inf"), sees.any(-1)[:, None])


def test_dtypes_and_strides_of_the_small_arguments() -> None:
    case = Case(batch=2, sinks=True, alibi=True, segments="mixed")
    inputs = make_inputs(case)
    assert inputs.segment_ids is not None
    assert inputs.sinks is not None
    assert inputs.alibi_slopes is not None
    sinks = inputs.sinks.to(torch.bfloat16)
    slopes = torch.stack([inputs.alibi_slopes, 2.0 * inputs.alibi_slopes])
    ids = dict(zip(("segment_query", "segment_key"), inputs.segment_ids, strict=True))
    tensors = inputs.query, inputs.key, inputs.value
    expected = [
        extension.attention(
            *(tensor[b : b + 1] for tensor in tensors), sinks.float(),
            *problem(alibi_slopes=slopes[b : b + 1], **{name: tensor[b : b + 1] for name, tensor in ids.items()}),
        )[0]
        for b in range(2)
    ]  # fmt: skip
    scattered = slopes.t().contiguous().t(), {name: tensor.int().t().contiguous().t() for name, tensor in ids.items()}
    for dtype in (torch.bfloat16, torch.float64):
        given = problem(alibi_slopes=scattered[0], **scattered[1])
        out, _ = extension.attention(*tensors, sinks.to(dtype).repeat_interleave(2)[::2], *given)
        assert torch.equal(out, torch.cat(expected))


@pytest.mark.parametrize(
    "case",
    [
        Case(heads=1, key_heads=1, rows=300, columns=700, window=(None, 100), dropout_p=0.1, softcap=3.0),
        Case(
            batch=2, heads=4, rows=200, columns=600, mask=torch.float32, mask_broadcast=(True, True, False, False),
            padding=torch.float32, segments="sorted",
        ),
    ],
    ids=describe,
)  # fmt: skip
def test_bitwise_independent_of_threads(case: Case) -> None:
    first = evaluate(two_passes, case, make_inputs(case))
    for count in (2, 3):
        torch.set_num_threads(count)
        for name, tensor in evaluate(two_passes, case, make_inputs(case)).items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("call", [one_pass, two_passes])
@pytest.mark.parametrize(
    "shape",
    [
        {"rows": 0}, {"columns": 0}, {"batch": 0}, {"heads": 0, "key_heads": 0}, {"rows": 0, "columns": 0},
        {"heads": 0, "batch": 2, "padding": torch.float32},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_there(shape: dict[str, Any], call: Any) -> None:
    case = Case(**shape)
    inputs = make_inputs(case)
    results = evaluate(call, case, inputs)
    assert (results.pop("lse") == float("-inf")).all()
    assert results["out"].shape == results["dquery"].shape == inputs.query.shape
    assert results["dkey"].shape == results["dvalue"].shape == inputs.key.shape
    assert results["weights"].shape == (case.batch, case.rows, case.columns)
    for tensor in results.values():
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -2.0])], ids=["", "sinks"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_rows_without_a_key(dtype: torch.dtype, sinks: Tensor | None) -> None:
    query, key, value = (torch.randn(2, 2, 5, 8) for _ in range(3))
    keep = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    keep[..., 2, :] = False
    padding = torch.tensor([[True] * 5, [False] * 5])
    empty = ~keep.any(-1).expand(2, 2, 5) | ~padding.any(-1)[:, None, None]
    masks = [m if dtype == torch.bool else torch.zeros_like(m, dtype=dtype).masked_fill(~m, -torch.inf)
             for m in (keep, padding)]  # fmt: skip
    arguments = problem(attn_mask=masks[0], key_padding_mask=masks[1], softcap=2.0)
    out, lse, weights = extension.attention_with_weights(query, key, value, sinks, *arguments, False)
    nothing = torch.full((2,), -torch.inf) if sinks is None else sinks
    assert torch.equal(lse[0] == nothing[:, None], empty)
    assert (lse[1][empty] == 0).all()
    assert (out[empty] == 0).all()
    assert (weights[empty] == 0).all()
    ones = torch.ones(2, 2, 2, 5)
    wanted = (dtype != torch.bool,) * 2
    first = extension.attention_backward(torch.ones_like(out), ones, query, key, value, out, lse, *arguments, *wanted)
    second = extension.attention_weights_backward(torch.ones_like(weights), query, key, lse, *arguments, False, *wanted)
    for grad in (*first[:3], *first[3], *second[:3], *second[3]):
        assert grad.isfinite().all()
    assert (first[0][empty] == 0).all()
    assert (second[0][empty] == 0).all()


@pytest.mark.parametrize("lowest", [-1e9, torch.finfo(torch.float32).min])
def test_rows_of_the_lowest_number_stay_uniform(lowest: float) -> None:
    """Adding the lowest float to every key leaves a uniform row, also where it comes again from the logsumexp."""
    query, key = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 5, 8)
    arguments = problem(attn_mask=torch.full((1, 1, 3, 5), lowest), scale=0.01)
    _, lse, weights = extension.attention_with_weights(query, key, key, None, *arguments, True)
    again = extension.attention_weights(query, key, lse, *arguments, True)
    for found in (weights, again):
        torch.testing.assert_close(found, torch.full((1, 3, 5), 0.2), atol=1e-6 if lowest < -1e10 else 0.02, rtol=0)
    torch.testing.assert_close(weights, again, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_stride(dtype: torch.dtype) -> None:
    """The last axis need not be contiguous, nor a gradient be more than one number."""
    dense = [torch.randn(2, 2, 37, 16).to(dtype) for _ in range(3)]
    one = torch.ones(1, 1, 1, 1)
    results = []
    for query, key, value in (dense, [tensor.mT.contiguous().mT for tensor in dense]):
        out, lse = extension.attention(query, key, value, None, *problem())
        for grads in ((one.expand_as(out), one.expand_as(lse)), (torch.ones_like(out), torch.ones_like(lse))):
            given = (*grads, query, key, value, out, lse, *problem(), False, False)
            results.append((out, lse, *extension.attention_backward(*given)[:3]))
    for other in results[1:]:
        assert all(torch.equal(tensor, expected) for tensor, expected in zip(other, results[0], strict=True))


def test_no_gradient_of_the_output() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    out, lse = extension.attention(query, key, value, None, *problem())
    given = (None, torch.ones_like(lse), query, key, value, out, lse)
    dquery, _, dvalue, _ = extension.attention_backward(*given, *problem(), False, False)
    assert (dvalue == 0).all()
    assert (dquery != 0).any()


IDS = {"segment_query": torch.zeros(2, 3, dtype=torch.int64), "segment_key": torch.zeros(2, 4, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 2, 3)}, "query: got shape"),
        ({"query": torch.zeros(2, 2, 3, 8, dtype=torch.int64)}, "query: got dtype"),
        ({"key": torch.zeros(2, 2, 4, 7)}, "key: got shape"),
        ({"key": torch.zeros(2, 3, 4, 8)}, "key: got 3 heads"),
        ({"key": torch.zeros(2, 2, 4, 8).half()}, "key: got dtype"),
        ({"value": torch.zeros(2, 2, 5, 8)}, "value: got shape"),
        ({"value": torch.zeros(2, 2, 4, 8, device="meta")}, "value: got a"),
        ({"sinks": torch.zeros(3)}, "sinks: got shape"),
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, "sinks: got dtype"),
        ({"attn_mask": torch.zeros(3, 4)}, "attn_mask: got shape"),
        ({"attn_mask": torch.zeros(1, 1, 3, 4, dtype=torch.int32)}, "attn_mask: got dtype"),
        ({"key_padding_mask": torch.zeros(2, 3)}, "key_padding_mask: got shape"),
        ({"alibi_slopes": torch.zeros(2)}, "alibi_slopes: got shape"),
        ({"alibi_slopes": torch.zeros(3, 2)}, "alibi_slopes: got shape"),
        ({"alibi_slopes": torch.zeros(1, 2).double()}, "alibi_slopes: got dtype"),
        ({"segment_query": IDS["segment_query"]}, "segment_query, segment_key: got one"),
        (IDS | {"segment_query": torch.zeros(2, 4, dtype=torch.int64)}, "segment_query: got shape"),
        (IDS | {"segment_query": torch.zeros(2, 3)}, "segment_query: got dtype"),
        (IDS | {"segment_key": torch.zeros(1, 4, dtype=torch.int64)}, "segment_key: got shape"),
        (IDS | {"segment_key": torch.zeros(2, 4, dtype=torch.int32)}, "segment_key: got dtype"),
        ({"softcap": -1.0}, "softcap: got -1"),
        ({"softcap": float("nan")}, "softcap: got nan"),
        ({"dropout_p": 1.5}, "dropout_p: got 1.5"),
        ({"dropout_p": 0.5}, "seed: got None"),
        ({"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, "seed: got shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    tensors: dict[str, Any] = {
        "query": torch.zeros(2, 2, 3, 8), "key": torch.zeros(2, 2, 4, 8), "value": torch.zeros(2, 2, 4, 8),
        "sinks": None,
    }  # fmt: skip
    arguments = problem(**{name: value for name, value in change.items() if name not in tensors})
    tensors |= {name: value for name, value in change.items() if name in tensors}
    with pytest.raises((TypeError, ValueError), match=message):
        extension.attention(*tensors.values(), *arguments)
