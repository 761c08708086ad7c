"""The C++ kernels of additive attention, every instruction set of them: against the float64 oracle, called directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from additive_cases import AdditiveCase, check

import fastattn
from fastattn.kernels.additive import extension

pytestmark = pytest.mark.skipif(
    extension.why_not("cpu", torch.float32) is not None, reason="needs the C++ extension"
)

OPS = torch.ops.fastattn
Case = AdditiveCase
CASES = {
    "plain": Case(),
    "tiles": Case(rows=70, columns=40, features=33),
    "splits": Case(batch=1, rows=130, columns=200, features=20, coverage="entries", padding=torch.bool),
    "decoder_step": Case(batch=5, rows=1, columns=70, features=48, padding=torch.bool),
    "coverage": Case(rows=20, columns=90, coverage="keys"),
    "coverage_of_other_type": Case(coverage="entries", coverage_dtype=torch.float64, padding=torch.bool),
    "holes": Case(columns=50, padding=torch.bool, padding_kind="holes", coverage="keys"),
    "nothing": Case(padding=torch.bool, padding_kind="all"),
    "one_feature": Case(features=1),
    "float16": Case(dtype=torch.float16, features=33, coverage="keys"),
    "bfloat16": Case(dtype=torch.bfloat16, features=64, rows=65),
    "transposed": Case(layout="transposed", coverage="entries", features=17),
    "expanded": Case(layout="expanded", batch=3, features=16),
    "saturated": Case(size=20.0),
    "near_zero": Case(size=1e-4),
}


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name: str) -> None:
    with fastattn.backend("cpu"):
        check(CASES[name], "cpu")


def _good(**changes: Any) -> dict[str, Any]:
    arguments = {
        "dscores": torch.randn(2, 3, 5), "query": torch.randn(2, 3, 9), "key": torch.randn(2, 5, 9),
        "weight": torch.randn(9), "coverage": torch.rand(2, 1, 5), "coverage_weight": torch.randn(9),
        "mask": torch.tensor([[True] * 5, [True, False, True, False, False]]), "wanted": True, "backend": "cpu",
    }  # fmt: skip
    assert changes.keys() <= arguments.keys()
    return arguments | changes


def test_bits_do_not_depend_on_threads() -> None:
    arguments = _good(
        dscores=torch.randn(1, 40, 300), query=torch.randn(1, 40, 50), key=torch.randn(1, 300, 50),
        weight=torch.randn(50), coverage=torch.rand(1, 40, 300), coverage_weight=torch.randn(50), mask=None,
    )  # fmt: skip
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            scores = OPS.additive_scores(*list(arguments.values())[1:7], "cpu")
            *grads, more = OPS.additive_scores_backward(*arguments.values())
            results.append((scores, *grads, *more))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_gradients_hold_no_partial_sums() -> None:
    """A gradient is memory of its own size: what was summed is not kept beside it."""
    *grads, more = OPS.additive_scores_backward(*_good(
        dscores=torch.randn(1, 40, 300), query=torch.randn(1, 40, 64), key=torch.randn(1, 300, 64),
        weight=torch.randn(64), coverage=torch.rand(1, 1, 300), coverage_weight=torch.randn(64), mask=None,
    ).values())  # fmt: skip
    for grad in (*grads, *more):
        assert grad.is_contiguous()
        assert grad.untyped_storage().nbytes() == grad.nbytes


def test_keys_that_take_no_part_are_skipped() -> None:
    """Whatever they and their gradients hold; queries do not matter where no key takes part."""
    mask = torch.zeros(2, 50, dtype=torch.bool)
    mask[0, 18:20] = True
    arguments = _good(
        dscores=torch.randn(2, 3, 50), key=torch.randn(2, 50, 9), coverage=torch.rand(2, 3, 50), mask=mask
    )
    *wanted, more = OPS.additive_scores_backward(*arguments.values())
    hidden = ~mask
    for name in ("dscores", "coverage"):
        arguments[name] = arguments[name].masked_fill(hidden.unsqueeze(1), torch.nan)
    arguments["key"] = arguments["key"].masked_fill(hidden.unsqueeze(2), torch.nan)
    arguments["query"][1] = torch.nan
    *found, others = OPS.additive_scores_backward(*arguments.values())
    for one, other in zip((*found, *others), (*wanted, *more), strict=True):
        assert torch.equal(one, other)
    assert found[1][hidden].eq(0).all()


BAD = {
    "query_dimensions": {"query": torch.randn(3, 9)},
    "query_dtype": {"query": torch.randn(2, 3, 9).double()},
    "query_integers": {"query": torch.ones(2, 3, 9, dtype=torch.int32)},
    "key_batch": {"key": torch.randn(1, 5, 9)},
    "key_features": {"key": torch.randn(2, 5, 8)},
    "key_dtype": {"key": torch.randn(2, 5, 9).half()},
    "key_dimensions": {"key": torch.randn(2, 5)},
    "weight_features": {"weight": torch.randn(8)},
    "weight_dimensions": {"weight": torch.randn(9, 1)},
    "weight_dtype": {"weight": torch.randn(9).half()},
    "coverage_rows": {"coverage": torch.rand(2, 2, 5)},
    "coverage_keys": {"coverage": torch.rand(2, 1, 4)},
    "coverage_dimensions": {"coverage": torch.rand(2, 5)},
    "coverage_integers": {"coverage": torch.ones(2, 1, 5, dtype=torch.int64)},
    "coverage_alone": {"coverage_weight": None},
    "coverage_weight_alone": {"coverage": None},
    "coverage_weight": {"coverage_weight": torch.randn(10)},
    "mask_shape": {"mask": torch.ones(2, 4, dtype=torch.bool)},
    "mask_dtype": {"mask": torch.ones(2, 5)},
}
BAD_BACKWARD = {
    "dscores_shape": {"dscores": torch.randn(2, 5, 3)},
    "dscores_dtype": {"dscores": torch.randn(2, 3, 5).double()},
}


@pytest.mark.parametrize("name", [*BAD, *BAD_BACKWARD])
def test_malformed_calls_of_the_operators_raise(name: str) -> None:
    bad = list(_good(**(BAD | BAD_BACKWARD)[name]).values())
    OPS.additive_scores_backward(*_good().values())
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)):
        OPS.additive_scores_backward(*bad)
    if name in BAD:
        with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)):
            OPS.additive_scores(*bad[1:7], "cpu")
