"""A stack of layers of the CUDA LSTM without a GPU: side by side and one after another (``csrc/cuda/waves.h``).

On the emulated device of ``test_lstm_emulated``.
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

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RAGGED = (7, 6, 4, 4, 1)
IN_TURN = 1 << 30  # steps of a chunk


class Layers(torch.autograd.Function):
    """A stack on the emulated device."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        input, batch_sizes, h0, c0, *weights = tensors
        out, h_n, c_n, *saved = torch.ops.fastattn_emulated.layers_forward(input, batch_sizes, h0, c0, weights, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, *saved)
        return out, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, batch_sizes, h0, c0, *weights, out, gates, cells, states = ctx.saved_tensors
        dinput, dh0, dc0, dweights = torch.ops.fastattn_emulated.layers_backward(
            *grads, input, batch_sizes, h0, c0, weights, out, gates, cells, states
        )
        return dinput, None, dh0, dc0, *dweights


def layers(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return Layers.apply(inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, *inputs.weights)


@pytest.fixture
def emulated() -> Iterator[Any]:
    device = ops()
    before = device.chunk_steps(IN_TURN)
    yield device
    device.device(8, 0)
    device.chunk_steps(before)


def Case(**options: Any) -> LstmCase:  # noqa: N802
    return LstmCase(**{"layers": 2, "steps": 7, **options})


# (case, blocks that run at once, steps of a chunk, persistent launches of a forward, of a backward). A layer of 9 units
# takes 2 blocks forward and 1 backward; K chunks of L layers side by side are K + L - 1 launches.
CASES = [
    # Each dtype, padded and packed. 7 steps in chunks of 2 leave one of 1.
    *[(Case(dtype=dtype), 8, 2, 5, 5) for dtype in (FP32, BF16, FP16)],
    *[(Case(dtype=dtype, layers=3, lengths=RAGGED), 8, 3, 5, 5) for dtype in (FP32, BF16, FP16)],
    # Rows that end in any chunk, chunks of one step, rows of one step.
    (Case(lengths=(7, 6, 5, 4, 3, 2, 1)), 8, 1, 8, 8),
    (Case(lengths=(7, 6, 5, 4, 3, 2, 1, 1, 1), dtype=BF16), 8, 2, 5, 5),
    (Case(lengths=(7, 1, 1, 1)), 8, 4, 3, 3),
    # Several groups of rows, which end in different chunks; many rows in a group.
    (Case(layers=2, hidden=24, lengths=(7,) * 9 + (5, 5, 4, 3, 3, 2, 1, 1)), 24, 2, 5, 5),
    (Case(layers=2, hidden=8, lengths=(5,) * 40 + (3,) * 20 + (1,) * 10, dtype=BF16), 2, 2, 4, 4),
    # Layers in several launches: 3 + 2, of which 5 would fit; 1 + 1 + 1 forward, where none but one fits; 2 + 1.
    (Case(layers=5), 16, 3, 5 + 4, 5 + 4),
    (Case(layers=3, bias=False), 2, 3, 3, 4 + 1),
    (Case(layers=3, lengths=RAGGED), 4, 3, 4 + 1, 5),
    # One after another: a sequence of one chunk, no persistent kernels, one layer, more units than fit.
    (Case(layers=3), 8, 7, 3, 3),
    (Case(layers=3, lengths=RAGGED), 0, 2, 0, 0),
    (Case(layers=1), 8, 2, 1, 1),
    (Case(hidden=30), 1, 2, 0, 0),
    # As long as a chunk is without a test's word: 44, 44 and 42 steps.
    (Case(steps=130, batch=2, hidden=3, inputs=2), 8, 64, 4, 4),
    # Weights in shared memory.
    (Case(steps=3, batch=2, hidden=273, inputs=1), 70, 2, 3, 3),
    # Any strides; absent gradients; nothing to do.
    *[(Case(layout=layout), 8, 3, 4, 4) for layout in ("transposed", "strided")],
    *[(Case(lengths=RAGGED, losses=(loss,)), 8, 3, 4, 4) for loss in ("out", "h_n", "c_n")],
    (Case(batch=0), 8, 2, 0, 0),
]


@pytest.mark.parametrize(("case", "blocks", "chunk", "forward", "backward"), CASES)
def test_results_stay_within_the_budget(
    emulated: Any, case: LstmCase, blocks: int, chunk: int, forward: int, backward: int
) -> None:
    emulated.device(blocks, 0)
    emulated.chunk_steps(chunk)
    before = emulated.launches()
    check(case, layers)
    assert emulated.launches() - before == forward + backward


def run(emulated: Any, case: LstmCase, chunk: int) -> dict[str, Tensor]:
    emulated.chunk_steps(chunk)
    return evaluate(layers, case, make_inputs(case))


@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [(FP32, False), (FP32, True), (BF16, False), (FP16, False)],
    ids=["fp32", "tf32", "bf16", "fp16"],
)
@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["padded", "packed"])
def test_chunks_change_no_bit(
    emulated: Any, lengths: tuple[int, ...] | None, dtype: torch.dtype, rounded: bool
) -> None:
    """What passes from launch to launch is whole: cells in float32, states where the next step reads them."""
    case = Case(layers=3, lengths=lengths, inputs=9, dtype=dtype)
    inputs = make_inputs(case)
    # The input products of a chunk and of all rows may add in another order. Here each has one term.
    for place in range(0, len(inputs.weights), 4):
        inputs.weights[place] = torch.cat((torch.eye(9), torch.zeros(27, 9))).to(dtype) / 2
    results = []
    for chunk in (IN_TURN, 3, 2, 1):
        emulated.chunk_steps(chunk)
        together = 1 if chunk == IN_TURN else 3
        assert emulated.layers_together(dtype, 3, case.steps, 5, 9) == (together, together)
        with tf32(rounded):
            results.append(evaluate(layers, case, inputs))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_no_result_depends_on_the_order_of_threads(emulated: Any, dtype: torch.dtype) -> None:
    case = Case(layers=3, lengths=(7,) * 6 + (5, 3, 2, 1, 1), hidden=20, dtype=dtype)
    results = []
    for schedule in range(3):
        emulated.device(24, schedule)
        results.append(run(emulated, case, 2))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)
