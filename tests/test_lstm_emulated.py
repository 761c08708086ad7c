"""The CUDA LSTM without a GPU: its host code and its kernels, the persistent ones too, compiled for the host.

Every thread of the device is a fiber here, and a tensor-core instruction is what the PTX manual says of its fragments
(``tests/emulated/cuda_emulator.h``): layouts, ownership, barriers and the order of steps are those of the device. What
a GPU adds is its memory model, its own rounding and its speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated_device import ops, tf32
from torch import Tensor

from fastattn.testing_lstm import Inputs, LstmCase, check, evaluate, make_inputs

pytestmark = pytest.mark.slow  # a minute to compile, once for each state of the sources

Case = LstmCase
STEP_BY_STEP = 0  # blocks at once
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RAGGED = (5, 4, 4, 1)


class Layer(torch.autograd.Function):
    """One layer on the emulated device."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        input, batch_sizes, h0, c0, *weights = tensors
        out, h_n, c_n, gates, cells = torch.ops.fastattn_emulated.forward(input, batch_sizes, h0, c0, weights, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, gates, cells)
        return out, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, batch_sizes, h0, c0, *weights, out, gates, cells = ctx.saved_tensors
        dinput, dh0, dc0, dweights = torch.ops.fastattn_emulated.backward(
            *grads, input, batch_sizes, h0, c0, weights, out, gates, cells
        )
        return dinput, None, dh0, dc0, *dweights


def layer(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return Layer.apply(inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, *inputs.weights)


@pytest.fixture(scope="module")
def emulated() -> Iterator[Any]:
    device = ops()
    yield device
    device.device(8, 0)


def run(case: LstmCase) -> dict[str, Tensor]:
    return evaluate(layer, case, make_inputs(case))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# (case, blocks that run at once, persistent launches of a forward and a backward)
CASES = [
    # Step by step: everything, in each dtype.
    (Case(directions=2), STEP_BY_STEP, 0),
    (Case(directions=2, lengths=RAGGED, projection=3), STEP_BY_STEP, 0),
    (Case(directions=2, projection=3, bias=False, dtype=BF16), STEP_BY_STEP, 0),
    (Case(directions=2, lengths=RAGGED, bias=False, dtype=FP16), STEP_BY_STEP, 0),
    # The persistent kernels: each dtype, both directions in one launch, then one after the other.
    *[(Case(directions=2, lengths=RAGGED, dtype=dtype), 8, 2) for dtype in (FP32, BF16, FP16)],
    (Case(directions=2, lengths=RAGGED), 2, 3),
    # Rows up to the last of 8, 16, 32 and beyond; one group, and several.
    (Case(steps=3, batch=37, hidden=24), 3, 2),
    (Case(hidden=24, lengths=(3,) * 17 + (2,) * 9 + (1,) * 11, bias=False), 12, 2),
    (Case(hidden=8, lengths=(3,) * 40 + (2,) * 20 + (1,) * 10, dtype=BF16), 1, 2),
    (Case(hidden=9, lengths=(3,) * 9 + (1,) * 10, directions=2, dtype=FP16), 64, 2),
    # Both directions would fit, but with more rows in a group than are wanted: then one after the other.
    (Case(steps=2, batch=200, hidden=8, directions=2), 2, 4),
    # The depth beyond one round of the warps, with weights in shared memory.
    (Case(steps=2, batch=2, hidden=273, inputs=1), 35, 2),
    (Case(steps=2, batch=9, hidden=520, inputs=1, dtype=BF16), 65, 2),
    # One step, one row, one unit; what does not fit, and projections, run step by step.
    (Case(steps=1, batch=1, hidden=1, inputs=1), 8, 2),
    (Case(projection=2), 8, 0),
    (Case(hidden=30), 1, 0),
    # Any strides; absent gradients; nothing to do.
    *[(Case(directions=2, layout=layout), blocks, 2 if blocks else 0)
      for layout in ("transposed", "strided") for blocks in (STEP_BY_STEP, 8)],
    *[(Case(directions=2, lengths=RAGGED, losses=(loss,)), blocks, 2 if blocks else 0)
      for loss in ("out", "h_n", "c_n") for blocks in (STEP_BY_STEP, 8)],
    (Case(batch=0, directions=2), 8, 0),
]  # fmt: skip


@pytest.mark.parametrize(("case", "blocks", "launches"), CASES)
def test_results_stay_within_the_budget(emulated: Any, case: LstmCase, blocks: int, launches: int) -> None:
    emulated.device(blocks, 0)
    before = emulated.launches()
    check(case, layer)
    assert emulated.launches() - before == launches


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        (Case(lengths=(4,) * 6 + (3, 2, 2, 1, 1), hidden=20, directions=2), 24),
        (Case(lengths=(4,) * 6 + (3, 2, 2, 1, 1), hidden=20, directions=2, dtype=BF16), 24),
        (Case(steps=2, batch=100, hidden=9), 2),  # many tiles of rows: partial sums are written while others are read
    ],
)
def test_no_result_depends_on_the_order_of_threads(emulated: Any, case: LstmCase, blocks: int) -> None:
    results = []
    for schedule in range(3):
        emulated.device(blocks, schedule)
        results.append(run(case))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_tf32_only_where_torch_allows_it(emulated: Any) -> None:
    case = Case(hidden=40)
    emulated.device(8, 0)
    with tf32(False):
        exact = run(case)
    with tf32(True):
        rounded = run(case)
    for name, tensor in exact.items():
        difference = (rounded[name] - tensor).abs().max() / tensor.abs().max()
        assert difference < 2e-3, name  # tf32 has 10 bits: each product moves by up to 2**-10
    assert (rounded["out"] - exact["out"]).abs().max() > 1e-6


@pytest.mark.parametrize("blocks", [STEP_BY_STEP, 8])
def test_saving_changes_nothing_else(emulated: Any, blocks: int) -> None:
    inputs = make_inputs(Case(directions=2, lengths=RAGGED))
    arguments = (inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights)
    emulated.device(blocks, 0)
    saved, bare = emulated.forward(*arguments, True), emulated.forward(*arguments, False)
    assert all(torch.equal(first, second) for first, second in zip(saved[:3], bare[:3], strict=True))
    assert bare[3].numel() == bare[4].numel() == 0


def test_no_steps_leave_the_state(emulated: Any) -> None:
    case = Case(steps=0, directions=2)
    inputs, results = make_inputs(case), run(case)
    expected = {"h_n": inputs.h0, "c_n": inputs.c0, "dh0": inputs.grads[1], "dc0": inputs.grads[2]}
    for name, tensor in expected.items():
        assert torch.equal(results[name], tensor), name
    assert all(not results[name].any() for name in results if name.startswith("dweights"))


def test_more_steps_than_one_upload_holds(emulated: Any) -> None:
    emulated.device(STEP_BY_STEP, 0)
    check(Case(lengths=(482, 3), hidden=3, inputs=2, directions=2), layer)
