"""Numbers at the edge in the C++ attention: NaN, infinities, scores so low that their exponential is 0."""

from __future__ import annotations

import pytest
import torch
from test_extension import problem

from fastattn.kernels.attention import extension

pytestmark = pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE))


@pytest.mark.usefixtures("instruction_set")
def test_softcaps_beyond_float() -> None:
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    uncapped, one, none = (
        extension.attention_with_weights(query, key, key, None, *problem(softcap=cap), False)[2]
        for cap in (0.0, 1e-300, 1e300)
    )
    torch.testing.assert_close(none, uncapped)
    torch.testing.assert_close(one, torch.full_like(one, 1 / 7))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_nan_of_any_payload_is_nan(bits: int) -> None:
    """The exponent is added to the bits of a number: those of some NaN became finite."""
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 40, 8)
    query[0, 1, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out, _, weights = extension.attention_with_weights(query, key, key, None, *problem(), False)
    assert out[0, 1, 3].isnan().all()
    assert weights[0, 1, 3].isnan().all()
    assert out.isnan().sum() == 8


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("keys", [40, 1100, 2500])
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_a_row_whose_scores_are_nan_is_not_an_empty_row(rows: int, keys: int) -> None:
    query, key = torch.randn(1, 2, rows, 8), torch.randn(1, 2, keys, 8)
    query[0, 1, 0] = torch.nan
    out, lse = extension.attention(query, key, key, None, *problem())
    assert out[0, 1, 0].isnan().all()
    assert out.isnan().sum() == 8
    assert torch.equal(lse[0].isnan(), query.isnan().all(-1))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("average", [False, True])
def test_weights_of_low_scores_behind_blocks_without_a_key(average: bool) -> None:
    """No key in the first block, and a maximum of -89: exp(89), which nothing may be multiplied with, was NaN."""
    query, key = torch.zeros(1, 2, 4, 8), torch.randn(1, 2, 300, 8)
    arguments = problem(
        alibi_slopes=torch.full((1, 2), 89.0 / 198), segment_query=torch.tensor([[0, 0, 1, 1]]),
        segment_key=(torch.arange(300) >= 200).long()[None],
    )  # fmt: skip
    _, lse, weights = extension.attention_with_weights(query, key, key, None, *arguments, average)
    torch.testing.assert_close(weights, extension.attention_weights(query, key, lse, *arguments, average))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("keys", [40, 1100, 2500])
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_an_infinite_sink_leaves_nothing_to_the_keys(rows: int, keys: int) -> None:
    query, key = torch.randn(1, 2, rows, 8), torch.randn(1, 2, keys, 8)
    out, lse = extension.attention(query, key, key, torch.tensor([torch.inf, 0.0]), *problem())
    assert out[0, 0].eq(0).all()
    assert lse[0, 0, 0].eq(torch.inf).all()
    assert out[0, 1].ne(0).any()
    given = (torch.ones_like(out), None, query, key, key, out, lse, *problem(), False, False)
    grads = extension.attention_backward(*given)[:3]
    assert all(grad.isfinite().all() and grad[0, 0].eq(0).all() for grad in grads)
