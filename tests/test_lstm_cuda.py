"""The CUDA LSTM on a GPU: all of its paths against the float64 oracle, run to run, and inside a CUDA graph.

``tests/test_lstm_emulated.py`` and ``test_lstm_layers_emulated.py`` run the same code on a machine without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_graphs import captured
from torch import Tensor

from fastattn.kernels.lstm import autograd, extension
from fastattn.testing_lstm import Inputs, LstmCase, check, evaluate, make_inputs

pytestmark = pytest.mark.gpu

Case = LstmCase
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (FP32, BF16, FP16)
# Lengths between 1 and 40, more rows than one tile of the kernels.
RAGGED = (40, 40, 37, 30, 30, 22, 17, 17, 16, 9, 8, 8, 5, 3, 2, 1, 1, 1, 1)


@pytest.fixture(scope="module")
def built() -> Any:
    # A wheel without the CUDA kernels is a failure here, not a skip: this is what the machine is for.
    reason = extension.why_unavailable("cuda")
    assert reason is None, reason
    import fastattn._C

    return fastattn._C


@pytest.fixture(params=["persistent", "step by step"])
def path(request: pytest.FixtureRequest, built: Any) -> Iterator[str]:
    built.lstm_cuda_allow_persistent(request.param == "persistent")
    yield request.param
    built.lstm_cuda_allow_persistent(True)


def layer(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return autograd.extension_layer(
        "cuda", inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, *inputs.weights
    )


def stack(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return autograd.extension_layer(
        "cuda", inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, *inputs.weights, stacked=True
    )


IN_TURN = 1 << 30  # steps of a chunk


@pytest.fixture(params=[16, 64, IN_TURN], ids=["chunks of 16", "chunks of 64", "in turn"])
def chunk(request: pytest.FixtureRequest, built: Any) -> Iterator[int]:
    before = built.lstm_cuda_chunk_steps(request.param)
    yield request.param
    built.lstm_cuda_chunk_steps(before)


SHAPES = [
    Case(),
    Case(directions=2),
    Case(projection=4, directions=2),
    Case(bias=False, lengths=RAGGED),
    Case(directions=2, lengths=RAGGED),
    Case(directions=2, lengths=RAGGED, projection=5, bias=False),
    Case(steps=1, batch=1, hidden=1, inputs=1),
    Case(steps=0),
    Case(batch=0),
    Case(steps=3, batch=200, hidden=64),
    Case(steps=30, batch=16, hidden=256, inputs=64),
    Case(steps=6, batch=33, hidden=512, inputs=16, directions=2),
    Case(steps=4, batch=64, hidden=768, inputs=8),
    Case(steps=4, batch=16, hidden=1024, inputs=8, directions=2),
    Case(steps=3, batch=2, hidden=1500, inputs=8),  # more weights than the processors hold
    Case(directions=2, layout="transposed"),
    Case(layout="strided"),
    *[Case(directions=2, lengths=RAGGED, losses=(loss,)) for loss in ("out", "h_n", "c_n")],
]


STACKS = [
    Case(layers=2, steps=150, batch=8, hidden=64),
    Case(layers=3, lengths=RAGGED, hidden=40, bias=False),
    Case(layers=5, lengths=RAGGED, hidden=256),
    Case(layers=2, steps=70, batch=33, hidden=512, inputs=16),
    Case(layers=2, steps=20, batch=16, hidden=1024, inputs=8),  # of these no two fit
    Case(layers=4, steps=40, batch=1, hidden=1, inputs=1),
    *[Case(layers=2, lengths=RAGGED, losses=(loss,)) for loss in ("out", "h_n", "c_n")],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_results_stay_within_the_budget(path: str, case: LstmCase, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype), layer, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STACKS)
def test_stacks_stay_within_the_budget(chunk: int, case: LstmCase, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype), stack, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_change_no_bit(built: Any, dtype: torch.dtype) -> None:
    case = Case(layers=3, lengths=RAGGED, inputs=96, hidden=96, dtype=dtype)
    inputs = make_inputs(case, "cuda")
    # The input products of a chunk and of all rows may add in another order. Here each has one term.
    for place in range(0, len(inputs.weights), 4):
        inputs.weights[place] = torch.cat((torch.eye(96), torch.zeros(288, 96))).to(inputs.input) / 2
    results, before = [], built.lstm_cuda_chunk_steps(IN_TURN)
    try:
        for steps in (IN_TURN, 16, 7):
            built.lstm_cuda_chunk_steps(steps)
            results.append(evaluate(stack, case, inputs))
    finally:
        built.lstm_cuda_chunk_steps(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_layers_meant_to_run_side_by_side_do(built: Any) -> None:
    if torch.cuda.get_device_properties(0).multi_processor_count < 128:
        pytest.skip("a smaller device holds fewer weights")
    for dtype in DTYPES:
        assert built.lstm_cuda_layers_together(dtype, 2, 1024, 16, 512) == (2, 2)
        assert built.lstm_cuda_layers_together(dtype, 4, 1024, 16, 256) == (4, 4)
        assert built.lstm_cuda_layers_together(dtype, 4, 64, 16, 256) == (1, 1)  # too few steps to cut


@pytest.mark.parametrize("hidden", [256, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_meant_for_the_persistent_kernel_take_it(built: Any, dtype: torch.dtype, hidden: int) -> None:
    if torch.cuda.get_device_properties(0).multi_processor_count < 128:
        pytest.skip("a smaller device holds fewer weights")
    forward, backward = built.lstm_cuda_persistent(dtype, 2, 16, hidden, False)
    assert forward
    # In float32 the backward's weights need more shared memory than compute capability 8 has.
    assert backward or (dtype == FP32 and hidden > 512 and torch.cuda.get_device_capability()[0] < 9)
    assert built.lstm_cuda_persistent(dtype, 2, 16, hidden, True) == (False, False)
    assert built.lstm_cuda_persistent(dtype, 1, 16, 4096, False) == (False, False)


def test_tf32_only_where_torch_allows_it(built: Any) -> None:
    case = Case(steps=20, batch=16, hidden=256)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        rounded = evaluate(layer, case, make_inputs(case, "cuda"))
        torch.backends.cuda.matmul.allow_tf32 = False
        exact = evaluate(layer, case, make_inputs(case, "cuda"))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert not torch.equal(rounded["out"], exact["out"])
    assert (rounded["out"] - exact["out"]).abs().max() < 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_run_gives_the_same_bits(path: str, dtype: torch.dtype) -> None:
    for case in (Case(directions=2, lengths=RAGGED, hidden=96), Case(steps=200, batch=17, hidden=512)):
        every_run_is_the_same(layer, replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_run_of_a_stack_gives_the_same_bits(chunk: int, dtype: torch.dtype) -> None:
    every_run_is_the_same(stack, Case(layers=3, lengths=RAGGED, hidden=96, dtype=dtype))
    every_run_is_the_same(stack, Case(layers=2, steps=200, batch=17, hidden=512, dtype=dtype))


def every_run_is_the_same(call: Callable[[Inputs], tuple[Tensor, Tensor, Tensor]], case: LstmCase) -> None:
    inputs = make_inputs(case, "cuda")
    first = evaluate(call, case, inputs)
    for _ in range(20):
        again = evaluate(call, case, inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_replay_in_a_cuda_graph(
    path: str, dtype: torch.dtype, lengths: tuple[int, ...] | None
) -> None:
    case = Case(steps=40, batch=8, hidden=64, directions=2, lengths=lengths, dtype=dtype)
    replays(case, extension.forward["cuda"], extension.backward["cuda"])


@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stack_replays_in_a_cuda_graph(chunk: int, dtype: torch.dtype, lengths: tuple[int, ...] | None) -> None:
    case = Case(layers=3, steps=40, batch=8, hidden=64, lengths=lengths, dtype=dtype)
    replays(case, extension.layers_forward["cuda"], extension.layers_backward["cuda"])


def replays(case: LstmCase, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
    static, other = make_inputs(case, "cuda"), make_inputs(replace(case, seed=1), "cuda")
    grads = list(static.grads)

    def work() -> list[Tensor]:
        arguments = (static.input, static.batch_sizes, static.h0, static.c0, static.weights)
        out, h_n, c_n, *saved = forward(*arguments, True)
        dinput, dh0, dc0, dweights = backward(*grads, *arguments, out, *saved)
        return [out, h_n, c_n, dinput, dh0, dc0, *dweights]

    graph, replayed = captured(work)
    for values in (other, make_inputs(case, "cuda")):
        static.input.copy_(values.input)
        static.h0.copy_(values.h0)
        graph.replay()
        torch.cuda.synchronize()
        for first, second in zip(replayed, work(), strict=True):
            assert torch.equal(first, second)


def test_two_streams_do_not_disturb_one_another(path: str) -> None:
    case = Case(steps=100, batch=16, hidden=128, dtype=BF16)
    inputs = make_inputs(case, "cuda")
    expected = layer(inputs)[0]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(layer(inputs)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_tensors_of_two_devices_are_refused(built: Any) -> None:
    inputs = make_inputs(Case(), "cuda")
    inputs.h0 = inputs.h0.cpu()
    with pytest.raises(ValueError, match="h0"):
        layer(inputs)
    with pytest.raises(ValueError, match="expected one on cuda"):
        layer(make_inputs(Case()))
