"""fastattn's LSTM against torch's: nn.LSTM (oneDNN on the CPU, cuDNN on CUDA), nn.LSTMCell in a loop, and for the layer
normalised one the same equations as a loop of torch's operators.

    pytest benchmarks/test_lstm.py --benchmark-only [--record FILE] [--seconds-left N]

Rows stand in order of importance. Every row asserts that both answers agree. The work of a call is counted as two
operations for each weight and row of the input, whether the weight stands before x or h; training is three times that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from measure import OURS, Call, compare
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastattn
from fastattn import reference_layer_norm_lstm
from fastattn.profiling.environment import default_device

DEVICE = default_device()
CUDA = DEVICE.type == "cuda"
PEER = "nn.LSTM"
# (steps, batch, input features, hidden units)
SHAPES = [(20, 64, 64, 128), (100, 32, 256, 256), (100, 32, 512, 512), (200, 1, 512, 512), (128, 8, 1024, 1024)]
if CUDA:
    SHAPES = [(1024, batch, hidden, hidden) for hidden in (256, 512, 768, 1024) for batch in (1, 16, 64, 128)]
IN_TURN = 1 << 30  # steps of a chunk (csrc/cuda/waves.h)
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
ON_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=str)
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Kind:
    """What a row asks of the layers beside its shape."""

    name: str
    dtype: torch.dtype = torch.float32
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    projected: bool = False


KINDS = [
    Kind("float32"),
    Kind("bfloat16", torch.bfloat16),
    Kind("packed", packed=True),
    Kind("stacked", layers=2, bidirectional=True),
    Kind("projected", projected=True),
    Kind("float16", torch.float16),
]
if CUDA:  # layers that our kernels run side by side, as cuDNN does
    KINDS.insert(2, Kind("two layers", torch.bfloat16, layers=2))


def lengths_of(steps: int, batch: int) -> Tensor:
    """Uniform in [T / 10, T], descending."""
    drawn = torch.randint(max(1, steps // 10), steps + 1, (batch,), generator=torch.Generator().manual_seed(0))
    return drawn.sort(descending=True)[0]


def make(kind: Kind, shape: Shape) -> tuple[nn.LSTM, fastattn.LSTM, Tensor, Tensor | None]:
    """torch's module, ours with its weights, the data and the batch sizes of a packed sequence."""
    steps, batch, features, hidden = shape
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "num_layers": kind.layers, "bidirectional": kind.bidirectional, "proj_size": hidden // 2 * kind.projected,
        "device": DEVICE, "dtype": kind.dtype,
    }  # fmt: skip
    theirs, ours = nn.LSTM(features, hidden, **options), fastattn.LSTM(features, hidden, **options)
    ours.load_state_dict(theirs.state_dict())
    data = torch.randn(steps, batch, features, device=DEVICE, dtype=kind.dtype)
    if not kind.packed:
        return theirs, ours, data, None
    packed = pack_padded_sequence(data, lengths_of(steps, batch))
    return theirs, ours, packed.data, packed.batch_sizes


def bound(module: nn.Module, data: Tensor, batch_sizes: Tensor | None, training: bool) -> Call:
    """Output and last states; in training the output and all gradients."""
    leaf = data.clone().requires_grad_(training)
    given = leaf if batch_sizes is None else PackedSequence(leaf, batch_sizes)
    parameters = list(module.parameters())

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(training):
            out, (h_n, c_n) = module(given)
            out = out if batch_sizes is None else out.data
            if not training:
                return [out, h_n, c_n]
            return [out, *torch.autograd.grad(out, [leaf, *parameters], torch.ones_like(out))]

    return call


def in_turn(call: Call) -> Call:
    """``call`` with the layers of our CUDA kernels one after another."""
    from fastattn._C import lstm_cuda_chunk_steps

    def alone() -> list[Tensor]:
        before = lstm_cuda_chunk_steps(IN_TURN)
        try:
            return list(call())
        finally:
            lstm_cuda_chunk_steps(before)

    return alone


def flops_of(module: nn.Module, rows: int, training: bool) -> float:
    weights = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
    return 2.0 * rows * weights * (3.0 if training else 1.0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@TRAINING
@ON_SHAPES
def test_layers(benchmark: Any, keep: Any, shape: Shape, training: bool, kind: Kind) -> None:
    theirs, ours, data, batch_sizes = make(kind, shape)
    calls = {
        OURS: bound(ours.train(training), data, batch_sizes, training),
        PEER: bound(theirs.train(training), data, batch_sizes, training),
    }
    if CUDA:

        def forced() -> list[Tensor]:
            with fastattn.backend("cuda"):
                return list(calls[OURS]())

        calls["fastattn, cuda"] = forced
        if kind.layers > 1 and not kind.bidirectional:
            calls["fastattn, cuda, layers in turn"] = in_turn(forced)
    exact = None
    if kind.dtype != torch.float32:  # torch's bfloat16 gradients are wrong in some rows
        exact = bound(copy.deepcopy(theirs).float(), data.float(), batch_sizes, training)
    flops = flops_of(ours, data.numel() // data.shape[-1], training)
    keep(compare(benchmark, calls, DEVICE, flops=flops, exact=exact), DEVICE)


@TRAINING
@ON_SHAPES
def test_cell(benchmark: Any, keep: Any, shape: Shape, training: bool) -> None:
    """Ten steps: torch's cell, and ours, in a Python loop."""
    _, batch, features, hidden = shape
    torch.manual_seed(0)
    theirs = nn.LSTMCell(features, hidden, device=DEVICE)
    ours = fastattn.LSTMCell(features, hidden, device=DEVICE)
    ours.load_state_dict(theirs.state_dict())
    data = torch.randn(10, batch, features, device=DEVICE)

    def loop(cell: nn.LSTMCell) -> Call:
        parameters = list(cell.parameters())

        def call() -> list[Tensor]:
            with torch.set_grad_enabled(training):
                state = None
                for step in data:
                    state = cell(step, state)
                assert state is not None
                return [*state, *(torch.autograd.grad(state[0].sum(), parameters) if training else ())]

        return call

    calls = {OURS: loop(ours), "nn.LSTMCell": loop(theirs)}
    keep(compare(benchmark, calls, DEVICE, flops=flops_of(ours, 10 * batch, training)), DEVICE)


@TRAINING
@ON_SHAPES
def test_layer_norm(benchmark: Any, keep: Any, shape: Shape, training: bool) -> None:
    """Five steps of the answer are compared: over a hundred both drift from float64 by a thousandth."""
    steps, batch, features, hidden = shape
    torch.manual_seed(0)
    module = fastattn.LayerNormLSTM(features, hidden, device=DEVICE).train(training)
    data = torch.randn(steps, batch, features, device=DEVICE, requires_grad=training)
    weights = list(module.parameters())
    zeros = torch.zeros(1, batch, hidden, device=DEVICE)
    cotangent = torch.zeros(steps, batch, hidden, device=DEVICE)
    cotangent[:5] = 1.0

    def ours() -> Tensor:
        return module(data)[0]

    def eager() -> Tensor:
        nothing = (None, None, None, 0.0, 0.0)
        return reference_layer_norm_lstm.layer(data, None, zeros, zeros, weights, *nothing, module.eps)[0]

    def evaluated(run: Callable[[], Tensor]) -> Call:
        def call() -> list[Tensor]:
            with torch.set_grad_enabled(training):
                out = run()
                return [out[:5], *(torch.autograd.grad(out, [data, *weights], cotangent) if training else ())]

        return call

    calls = {OURS: evaluated(ours), "a loop of torch's operators": evaluated(eager)}
    keep(compare(benchmark, calls, DEVICE, flops=flops_of(module, steps * batch, training)), DEVICE)
