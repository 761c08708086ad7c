"""The LSTM operators: error against the float64 oracle, derivatives, torch's own checks, compilers."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from backends import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from lstm_op_cases import leaves_of, penalty
from threads import at_once
from torch import Tensor

import fastattn
from fastattn import reference_lstm, testing_lstm
from fastattn.kernels.lstm import autograd, extension
from fastattn.kernels.lstm import layer as kernels
from fastattn.testing_lstm import Inputs, LstmCase

OPS = torch.ops.fastattn
BUILT = [name for name in ("cpu", "cuda") if extension.why_unavailable(name) is None]
# The CUDA kernels are run where there is a device; the C++ ones everywhere.
BACKENDS = [pytest.param(name, marks=[pytest.mark.gpu] if name == "cuda" else []) for name in (*BUILT, "torch")]
NEEDS_EXTENSION = pytest.mark.skipif("cpu" not in BUILT, reason="needs the C++ extension")


def device_of(backend: str) -> str:
    return "cpu" if backend == "cpu" else DEVICE


def operator(backend: str, save: bool = True) -> Any:
    """The operator through the dispatcher."""

    def call(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        out, h_n, c_n, _, _ = OPS.lstm_layer(
            inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights, save, backend
        )
        return out, h_n, c_n

    return call


def eager(backend: str) -> Any:
    """The same past the dispatcher."""

    def call(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        arguments = (inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0)
        if backend == "torch":
            # The node for cuDNN, here on the CPU too.
            return autograd.torch_layers(1, *arguments, *inputs.weights)
        return kernels.lstm_layer(backend, *arguments, inputs.weights)

    return call


def reference(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return reference_lstm.lstm_layer(inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "one of each": {"steps": 1, "batch": 1, "inputs": 1, "hidden": 1},
    "both directions": {"directions": 2},
    "no bias": {"bias": False},
    "projection": {"projection": 4},
    "projection, both directions, no bias": {"projection": 5, "directions": 2, "bias": False},
    "whole vectors": {"inputs": 16, "hidden": 32, "batch": 16},
    "beyond one tile": {"steps": 3, "batch": 21, "inputs": 33, "hidden": 67, "directions": 2},
    "one row": {"steps": 12, "batch": 1, "inputs": 31, "hidden": 48},
    "empty batch": {"batch": 0},
    "packed": {"lengths": (6, 4, 4, 1)},
    "packed, both directions": {"lengths": (7, 3, 2, 2, 1), "directions": 2},
    "packed, projection, both directions": {"lengths": (5, 5, 2), "directions": 2, "projection": 3, "hidden": 20},
    "packed, equal lengths": {"lengths": (4, 4, 4), "directions": 2},
    "packed, one row": {"lengths": (9,), "directions": 2},
    "packed, one step": {"lengths": (1, 1, 1)},
    "transposed": {"layout": "transposed", "directions": 2},
    "strided": {"layout": "strided", "projection": 4},
    "packed, strided": {"layout": "strided", "lengths": (5, 2, 1), "directions": 2},
    "large gates": {"scale": 30.0, "directions": 2},
    "output only": {"losses": ("out",), "directions": 2},
    "states only": {"losses": ("h_n", "c_n"), "lengths": (5, 3, 1), "directions": 2},
    "last cell only": {"losses": ("c_n",), "projection": 3},
}


# The error budget --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_error_budget(name: str, dtype: torch.dtype, backend: str) -> None:
    testing_lstm.check(LstmCase(dtype=dtype, **SHAPES[name]), eager(backend), device_of(backend))


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_error_budget_of_the_definition(name: str, dtype: torch.dtype) -> None:
    testing_lstm.check(LstmCase(dtype=dtype, **SHAPES[name]), reference)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("name", ["both directions", "packed, projection, both directions", "states only"])
def test_error_budget_through_the_dispatcher(name: str, save: bool, backend: str) -> None:
    testing_lstm.check(LstmCase(**SHAPES[name]), operator(backend, save), device_of(backend))


@st.composite
def lstm_cases(draw: st.DrawFn) -> LstmCase:
    """Any call of the layer, small enough for the definition."""
    hidden = draw(st.one_of(st.integers(1, 20), st.sampled_from((15, 16, 17, 31, 33, 64, 65))))
    lengths = draw(st.one_of(st.none(), st.lists(st.integers(1, 8), min_size=1, max_size=20)))
    return LstmCase(
        steps=draw(st.integers(1, 6)),
        batch=draw(st.one_of(st.integers(0, 14), st.sampled_from((16, 23, 65)))),
        inputs=draw(st.one_of(st.integers(1, 20), st.sampled_from((31, 64, 65)))),
        hidden=hidden,
        projection=draw(st.integers(0, hidden - 1)),
        directions=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        lengths=None if lengths is None else tuple(sorted(lengths, reverse=True)),
        dtype=draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))),
        layout=draw(st.sampled_from(("contiguous", "transposed", "strided"))),
        losses=draw(st.sampled_from((("out",), ("h_n",), ("c_n",), ("out", "c_n"), ("out", "h_n", "c_n")))),
        scale=draw(st.sampled_from((1.0, 1.0, 0.01, 5.0))),
        seed=draw(st.integers(0, 2**31)),
    )


@NEEDS_EXTENSION
@given(case=lstm_cases())
def test_any_case_in_the_error_budget(case: LstmCase) -> None:
    testing_lstm.check(case, eager("cpu"))


@pytest.mark.gpu
@given(case=lstm_cases())
def test_any_case_in_the_error_budget_on_cuda(case: LstmCase) -> None:
    testing_lstm.check(case, eager("cuda"), "cuda")


@NEEDS_EXTENSION
@pytest.mark.parametrize("batch", [1, 3, 8, 12])
def test_a_single_step_with_the_weights_as_they_are(batch: int) -> None:
    """Few rows: nothing is packed, and weights in half precision are read as such."""
    for dtype in extension.DTYPES:
        for hidden in (33, 70):
            testing_lstm.check(LstmCase(dtype=dtype, steps=1, batch=batch, inputs=75, hidden=hidden), eager("cpu"))
        testing_lstm.check(LstmCase(dtype=dtype, steps=1, batch=batch, inputs=64, hidden=64, bias=False), eager("cpu"))


@NEEDS_EXTENSION
def test_every_instruction_set_in_the_error_budget() -> None:
    from fastattn.kernels.attention.extension import instruction_sets, use_instruction_set

    names = instruction_sets()
    try:
        for name in names:
            use_instruction_set(name)
            for dtype in extension.DTYPES:
                testing_lstm.check(LstmCase(dtype=dtype, lengths=(5, 3, 1), directions=2, hidden=33), eager("cpu"))
                testing_lstm.check(LstmCase(dtype=dtype, batch=17, projection=5), eager("cpu"))
                testing_lstm.check(LstmCase(dtype=dtype, steps=3, batch=1, inputs=40, hidden=370), eager("cpu"))
                for batch in (1, 2, 3, 4, 6, 18):
                    testing_lstm.check(LstmCase(dtype=dtype, steps=1, batch=batch, inputs=75, hidden=33), eager("cpu"))
    finally:
        use_instruction_set(names[0])


@NEEDS_EXTENSION
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("batch", [3, 20])
@pytest.mark.parametrize("inputs", [37, 64])
def test_subnormal_weights_in_half_precision_count(inputs: int, batch: int) -> None:
    """Below 2^-14 they are no float32 on the way: the threads of the LSTM take subnormal ones for zero."""
    cell = torch.nn.LSTMCell(inputs, 5, dtype=torch.float16)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.copy_(torch.rand_like(parameter.float()) * 5e-5)
        ours = fastattn.LSTMCell(inputs, 5, dtype=torch.float16)
        ours.load_state_dict(cell.state_dict())
        x = (torch.rand(batch, inputs) * 500).half()
        got, expected = ours(x)[1], cell.double()(x.double())[1]
    torch.testing.assert_close(got.double(), expected, atol=2e-4, rtol=1e-3)


# Determinism, threads ----------------------------------------------------------------------------------------


def everything(backend: str, case: LstmCase) -> dict[str, Tensor]:
    return testing_lstm.evaluate(eager(backend), case, testing_lstm.make_inputs(case, device_of(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_at_every_run(backend: str) -> None:
    case = LstmCase(steps=9, batch=19, inputs=33, hidden=40, directions=2)
    first = everything(backend, case)
    for _ in range(3):
        torch.testing.assert_close(everything(backend, case), first, rtol=0, atol=0)


@NEEDS_EXTENSION
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for lengths in (None, (12, 12, 7, 3, 1)):
            testing_lstm.check(LstmCase(steps=12, batch=37, hidden=70, directions=2, lengths=lengths), eager("cpu"))
    finally:
        torch.set_num_threads(before)


@NEEDS_EXTENSION
def test_two_python_threads_at_once() -> None:
    case = LstmCase(steps=20, batch=8, hidden=32, directions=2)
    wanted = everything("cpu", case)
    found = at_once(lambda: [everything("cpu", case) for _ in range(5)], 2)
    assert [len(results) for results in found] == [5, 5]
    for results in itertools.chain.from_iterable(found):
        torch.testing.assert_close(results, wanted, rtol=0, atol=0)


# Derivatives -------------------------------------------------------------------------------------------------


PENALTY_CASES = {
    "padded": {"directions": 2},
    "packed": {"lengths": (4, 2, 1), "directions": 2, "projection": 3},
}


@pytest.mark.parametrize("backend", [*BUILT, "torch"])
@pytest.mark.parametrize("dispatched", [True, False])
@pytest.mark.parametrize("name", PENALTY_CASES)
def test_second_derivative(name: str, dispatched: bool, backend: str) -> None:
    case = LstmCase(**PENALTY_CASES[name])
    call = operator(backend) if dispatched else eager(backend)
    found = penalty(call, case, torch.float32)
    for one, wanted in zip(found, penalty(reference, case, torch.float64), strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [*BUILT, "torch"])
def test_second_backward_through_the_same_graph(backend: str) -> None:
    inputs, tensors = leaves_of(LstmCase(directions=2))
    loss = sum(result.square().sum() for result in eager(backend)(inputs))
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, tensors), first, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [*BUILT, "torch"])
def test_an_input_that_depends_on_another(backend: str) -> None:
    """h0 is made of the input: a derivative of a derivative must not follow it twice."""

    def gradients(call: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = testing_lstm.make_inputs(LstmCase()).map(lambda tensor: tensor.to(dtype))
        x = inputs.input.requires_grad_()
        inputs.h0 = x.mean().tanh() * inputs.h0
        out, _, _ = call(inputs)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), x))

    found = gradients(eager(backend), torch.float32)
    torch.testing.assert_close(found[0].double(), gradients(reference, torch.float64)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needed", ["input", "h0", "c0", "weights"])
@pytest.mark.parametrize("backend", [*BUILT, "torch"])
def test_gradient_of_one_input_alone(backend: str, needed: str) -> None:
    def gradient(call: Any) -> Tensor:
        inputs = testing_lstm.make_inputs(LstmCase(lengths=(4, 2), directions=2))
        leaf = inputs.weights[1] if needed == "weights" else getattr(inputs, needed)
        leaf.requires_grad_()
        out, h_n, c_n = call(inputs)
        (grad,) = torch.autograd.grad(out.sum() + h_n.sum() + c_n.sum(), leaf)
        return grad

    torch.testing.assert_close(gradient(eager(backend)), gradient(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [*BUILT, "torch"])
def test_nothing_is_kept_after_the_backward(backend: str) -> None:
    inputs, tensors = leaves_of(LstmCase())
    results = eager(backend)(inputs)
    node = results[0].grad_fn
    graph = weakref.ref(node.graph[1][0]) if backend == "torch" else None
    torch.autograd.grad(results[0].sum(), tensors)
    gc.collect()
    if graph is not None:
        assert graph() is None
    else:
        with pytest.raises(RuntimeError, match="saved"):
            _ = node.saved_tensors


@NEEDS_EXTENSION
def test_no_graph_where_none_is_wanted() -> None:
    inputs, _ = leaves_of(LstmCase())
    with torch.no_grad():
        results = eager("cpu")(inputs)
    assert not any(result.requires_grad for result in results)
    with torch.inference_mode():
        assert eager("cpu")(inputs)[0].is_inference()


@NEEDS_EXTENSION
@pytest.mark.parametrize("save", [True, False])
@DTYPES
def test_what_the_forward_keeps(dtype: torch.dtype, save: bool) -> None:
    inputs = testing_lstm.make_inputs(LstmCase(hidden=17, directions=2, lengths=(3, 2), dtype=dtype))
    arguments = (inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights)
    _, _, _, gates, cells = OPS.lstm_layer(*arguments, save, "cpu")
    assert (gates.dtype, cells.dtype) == (dtype, torch.float32)
    assert tuple(gates.shape) == ((5, 2, 4 * 32) if save else (0,))
    assert tuple(cells.shape) == ((5, 2, 32) if save else (0,))


# torch's own checks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BUILT, "torch"])
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("name", ["both directions", "packed, projection, both directions", "no bias"])
def test_opcheck(name: str, save: bool, backend: str) -> None:
    inputs, _ = leaves_of(LstmCase(**SHAPES[name]))
    arguments = (inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights)
    torch.library.opcheck(OPS.lstm_layer, (*arguments, save, backend), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        out, _, _, gates, cells = OPS.lstm_layer(*arguments, True, backend)
    plain = (inputs.input.detach(), inputs.batch_sizes, inputs.h0.detach(), inputs.c0.detach())
    weights = [weight.detach() for weight in inputs.weights]
    for grads in (inputs.grads, (inputs.grads[0], None, None), (None, *inputs.grads[1:])):
        torch.library.opcheck(OPS.lstm_layer_backward, (*grads, *plain, weights, out, gates, cells, backend))


def test_tags_and_schema() -> None:
    for name in ("lstm_layer", "lstm_layer_backward"):
        overload = getattr(OPS, name).default
        assert torch.Tag.pt2_compliant_tag in overload.tags
        assert not overload._schema.is_mutable


@pytest.mark.parametrize("backend", [*BUILT, "torch"])
def test_saved_tensor_hooks_and_checkpoint(backend: str) -> None:
    inputs, tensors = leaves_of(LstmCase(directions=2))
    wanted = torch.autograd.grad(sum(result.sum() for result in eager(backend)(inputs)), tensors)

    def function(*tensors: Tensor) -> Tensor:
        given = Inputs(tensors[0], None, tensors[1], tensors[2], list(tensors[3:]), inputs.grads)
        return sum(result.sum() for result in eager(backend)(given))

    loss = torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, tensors), wanted)
    with torch.autograd.graph.save_on_cpu():
        loss = function(*tensors)
    torch.testing.assert_close(torch.autograd.grad(loss, tensors), wanted)


@pytest.mark.parametrize("name", ["cudnn", "cuda", ""])
def test_kernels_of_another_device_are_refused(name: str) -> None:
    inputs = testing_lstm.make_inputs(LstmCase())
    with pytest.raises(ValueError, match=f"backend: got '{name}' for tensors on cpu, allowed are 'cpu' and 'torch'"):
        operator(name)(inputs)


def test_kernels_that_are_not_built_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_NOT_BUILT", "the C++ extension is not built")
    inputs = testing_lstm.make_inputs(LstmCase())
    with pytest.raises(RuntimeError, match="backend: got 'cpu', but the C\\+\\+ extension is not built"):
        operator("cpu")(inputs)
