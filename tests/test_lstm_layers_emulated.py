"""A stack of layers of the CUDA LSTM without a GPU: side by side and one after another (``csrc/cuda/waves.h``).

On the emulated device of ``test_lstm_emulated``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated_device import ops
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
    yield device
    device.device(8, 0)
    device.chunk_steps(64)


def Case(**options: Any) -> LstmCase:  # noqa: N802
    return LstmCase(**{"layers": 2, "steps": 7, **options})


# (case, blocks that run at once, steps of a chunk, persistent launches of a forward, of a backward). A layer of 9 units
# takes 2 blocks forward and 1 backward; K chunks of L layers are K + L - 1 launches.
CASES = [
    *[(Case(dtype=dtype), 8, 2, 5, 5) for dtype in (FP32, BF16, FP16)],
    *[(Case(dtype=dtype, layers=3, lengths=RAGGED), 8, 3, 5, 5) for dtype in (FP32, BF16, FP16)],
]  # fmt: skip


@pytest.mark.parametrize(("case", "blocks", "chunk", "forward", "backward"), CASES)
def test_results_stay_within_the_budget(
    emulated: Any, case: LstmCase, blocks: int, chunk: int, forward: int, backward: int
) -> None:
    emulated.device(blocks, 0)
    emulated.chunk_steps(chunk)
    before = emulated.launches()
    check(case, layers)
    assert emulated.launches() - before == forward + backward
