"""The operator of a stack of layers, on CUDA alone: here the emulated device stands in for one.

Derivatives, torch's own checks, a compiler, what ``LSTM`` hands to it, and bad input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated_device import ops
from lstm_op_cases import leaves_of, loss_of, penalty
from torch import Tensor, nn

import fastattn
from fastattn import lstm_dispatch, testing_lstm
from fastattn.dispatch import Backend
from fastattn.kernels.lstm import extension
from fastattn.kernels.lstm import layer as kernels
from fastattn.testing_lstm import Inputs, LstmCase

pytestmark = pytest.mark.slow  # a minute to compile, once for each state of the sources

OPS = torch.ops.fastattn
I, H, L, T, B = 5, 4, 2, 6, 3  # noqa: E741
CASES = {
    "padded": LstmCase(layers=3, steps=5),
    "packed": LstmCase(layers=2, lengths=(5, 3, 1), bias=False),
    "one layer": LstmCase(layers=1),
}
ON_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The CUDA kernels of the host, for tensors on the CPU."""
    device = ops()
    device.device(8, 0)
    before = device.chunk_steps(2)
    monkeypatch.setitem(extension.forward, "cuda", device.forward)
    monkeypatch.setitem(extension.backward, "cuda", lambda *args: device.backward(*args[:11]))
    monkeypatch.setitem(extension.layers_forward, "cuda", device.layers_forward)
    monkeypatch.setitem(extension.layers_backward, "cuda", device.layers_backward)
    monkeypatch.setattr(extension, "layers_together", device.layers_together)
    with torch.library._scoped_library("fastattn", "IMPL") as library:
        library.impl("lstm_layers", lambda *args: device.layers_forward(*args[:-1]), "CPU")
        library.impl("lstm_layers_backward", lambda *args: device.layers_backward(*args[:-1]), "CPU")
        yield device
    device.chunk_steps(before)


def operator(save: bool) -> testing_lstm.Call:
    def call(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        arguments = (inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights)
        out, h_n, c_n, *_ = OPS.lstm_layers(*arguments, save, "cuda")
        return out, h_n, c_n

    return call


def eager(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.lstm_layers(
        "cuda", inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights
    )


CALLS = {"eager": eager, "operator": operator(True), "operator without save": operator(False)}
ON_CALLS = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


# Derivatives -------------------------------------------------------------------------------------------------


@ON_CALLS
@ON_CASES
def test_error_budget(case: LstmCase, call: testing_lstm.Call) -> None:
    testing_lstm.check(case, call)


@ON_CASES
def test_no_graph_where_none_is_wanted(case: LstmCase) -> None:
    inputs, leaves = leaves_of(case)
    with torch.no_grad():
        results = eager(inputs)
    assert not any(result.requires_grad for result in results)
    torch.testing.assert_close(results, eager(inputs), rtol=0, atol=0)
    loss = eager(inputs)[0].sum()
    torch.autograd.grad(loss, leaves)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


# (frozen layers below, launches of a backward through the others: 3 chunks and one for each layer but the first; a
# single layer is one launch)
@ON_CALLS
@pytest.mark.parametrize(("frozen", "launches"), [(0, 5), (1, 4), (2, 1)])
@pytest.mark.parametrize("lengths", [None, (5, 3, 1)], ids=["padded", "packed"])
def test_frozen_layers_below_are_left_out(
    emulated: Any, lengths: tuple[int, ...] | None, frozen: int, launches: int, call: testing_lstm.Call
) -> None:
    inputs, leaves = leaves_of(LstmCase(layers=3, steps=5, lengths=lengths))
    trained = inputs.weights[4 * frozen :]
    wanted = torch.autograd.grad(loss_of(inputs, testing_lstm.eager(inputs)), trained)
    for leaf in leaves[: len(leaves) - len(trained)]:
        leaf.requires_grad_(False)
    inputs.weights[-1].requires_grad_(False)
    loss = loss_of(inputs, call(inputs))
    if call is CALLS["operator without save"]:
        launches += 5  # the forward, computed again
    before = emulated.launches()
    found = torch.autograd.grad(loss, trained[:-1])
    assert emulated.launches() - before == launches
    torch.testing.assert_close(found, wanted[:-1], rtol=1e-4, atol=1e-5)


def test_frozen_layers_of_an_empty_batch() -> None:
    inputs, leaves = leaves_of(LstmCase(layers=2, batch=0))
    for leaf in leaves[:7]:
        leaf.requires_grad_(False)
    found = torch.autograd.grad(loss_of(inputs, eager(inputs)), inputs.weights[4:])
    assert not any(grad.any() for grad in found)


@ON_CALLS
@ON_CASES
def test_second_derivative(case: LstmCase, call: testing_lstm.Call) -> None:
    wanted = penalty(testing_lstm.eager, case, torch.float64)
    for found, expected in zip(penalty(call, case, torch.float32), wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@ON_CALLS
def test_a_batch_of_gradients(call: testing_lstm.Call) -> None:
    inputs, leaves = leaves_of(CASES["padded"])
    out = call(inputs)[0]
    many = torch.randn(3, *out.shape)
    found = torch.autograd.grad(out, leaves, many, is_grads_batched=True, retain_graph=True)
    for place, one in enumerate(many):
        wanted = torch.autograd.grad(out, leaves, one, retain_graph=True)
        for grads, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(grads[place], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needed", ["input", "h0", "c0", "weights"])
@ON_CALLS
def test_gradient_of_one_input_alone(call: testing_lstm.Call, needed: str) -> None:
    def gradient(call: testing_lstm.Call) -> Tensor:
        inputs = testing_lstm.make_inputs(CASES["packed"])
        leaf = inputs.weights[3] if needed == "weights" else getattr(inputs, needed)
        leaf.requires_grad_()
        return torch.autograd.grad(loss_of(inputs, call(inputs)), leaf)[0]

    torch.testing.assert_close(gradient(call), gradient(testing_lstm.eager), rtol=1e-4, atol=1e-5)


# torch's own checks, and a compiler --------------------------------------------------------------------------


@pytest.mark.parametrize("save", [True, False])
@ON_CASES
def test_opcheck(case: LstmCase, save: bool) -> None:
    case = replace(case, hidden=16)  # with fewer units what is kept has padding, which nothing writes
    inputs, _ = leaves_of(case)
    arguments = (inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights)
    torch.library.opcheck(OPS.lstm_layers, (*arguments, save, "cuda"), rtol=1e-4, atol=1e-4)
    inputs = testing_lstm.make_inputs(case)
    arguments = (inputs.input, inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights)
    out, _, _, *saved = OPS.lstm_layers(*arguments, True, "cuda")
    for grads in (inputs.grads, (inputs.grads[0], None, None), (None, *inputs.grads[1:])):
        torch.library.opcheck(OPS.lstm_layers_backward, (*grads, *arguments, out, *saved, "cuda"))


def test_tags_and_schema() -> None:
    for name in ("lstm_layers", "lstm_layers_backward"):
        overload = getattr(OPS, name).default
        assert torch.Tag.pt2_compliant_tag in overload.tags
        assert not overload._schema.is_mutable


def test_a_compiler_sees_one_operator(on_cuda: None) -> None:
    module, x = fastattn.LSTM(I, H, L), torch.randn(T, B, I, requires_grad=True)
    leaves = [x, *module.parameters()]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x)[0].square().sum(), leaves)
    wanted = torch.autograd.grad(module(x)[0].square().sum(), leaves)
    torch.testing.assert_close(found, wanted)


# The module --------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lstm_dispatch, "choose", lambda *_: Backend.CUDA)


def launches_of(emulated: Any, call: Callable[[], Any]) -> int:
    before = emulated.launches()
    call()
    return int(emulated.launches() - before)


# (options, whether in training, launches of 6 steps in chunks of 2, why the layers run one after another)
MODULES: list[tuple[dict[str, Any], bool, int, str | None]] = [
    ({"num_layers": 2}, True, 4, None),
    ({"num_layers": 3, "bias": False}, True, 5, None),
    ({"num_layers": 2, "dropout": 0.5}, False, 4, None),
    ({"num_layers": 2, "dropout": 0.5}, True, 2, "dropout stands between them"),
    ({"num_layers": 2, "bidirectional": True}, True, 2, "each reads both ends of the one below"),
    ({"num_layers": 2, "proj_size": 2}, True, 0, "projections run step by step"),
    ({"num_layers": 1}, True, 1, None),
]


@pytest.mark.parametrize(("options", "training", "launches", "why"), MODULES)
def test_which_stacks_run_side_by_side(
    emulated: Any, on_cuda: None, options: dict[str, Any], training: bool, launches: int, why: str | None
) -> None:
    module = fastattn.LSTM(I, H, **options).train(training)
    theirs = nn.LSTM(I, H, **options).train(training)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(T, B, I)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 4, 1]))
    assert launches_of(emulated, lambda: module(x)) == launches
    because = module.explain(x).because
    assert module.explain(packed).because == because
    if why is not None:
        assert because.endswith(f"; layers one after another: {why}")
    elif module.num_layers > 1:
        many = module.num_layers
        assert because.endswith(f"; layers side by side, {many} of {many} in the forward and {many} in the backward")
    else:
        assert "layers" not in because
    if module.dropout == 0.0 or not training:
        for given in (x, packed):
            (found, states), (wanted, others) = module(given), theirs(given)
            torch.testing.assert_close(
                (getattr(found, "data", found), *states), (getattr(wanted, "data", wanted), *others)
            )


def test_explain_of_stacks_that_do_not_fit(emulated: Any, on_cuda: None) -> None:
    module = fastattn.LSTM(I, 20, 2)
    emulated.device(3, 0)  # of 20 units each layer takes 3 blocks forward, 2 backward
    reason = "layers one after another: too few steps to cut, or no two fit on this device"
    assert module.explain(torch.randn(T, B, I)).because.endswith(reason)
    emulated.device(4, 0)
    assert module.explain(torch.randn(T, B, I)).because.endswith("1 of 2 in the forward and 2 in the backward")
    for steps, batch in ((2, B), (T, 0)):
        assert module.explain(torch.randn(steps, batch, I)).because.endswith(reason)


# Bad input ---------------------------------------------------------------------------------------------------


def weights(layers: int = L, each: int = 4, **changes: Tensor) -> list[Tensor]:
    shapes = [(4 * H, I), (4 * H, H), (4 * H,), (4 * H,), (H, H)][:each]
    shapes += [(4 * H, H), *shapes[1:]] * (layers - 1)
    return [changes.get(f"w{place}", torch.randn(shape)) for place, shape in enumerate(shapes)]


def arguments(**changes: Any) -> dict[str, Any]:
    state = {"h0": torch.randn(L, B, H), "c0": torch.randn(L, B, H)}
    return {"input": torch.randn(T, B, I), "batch_sizes": None, **state, "weights": weights(), **changes}


t = torch.randn
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("input 2-D", {"input": t(T, I)}, ValueError, r"input: got shape \[6, 5\], expected \(T, B, I\)"),
    ("input float64", {"input": t(T, B, I).double()}, TypeError, "input: got dtype Double"),
    ("input elsewhere", {"input": t(T, B, I, device="meta")}, ValueError, "input: got a .*meta"),
    ("no layers", {"h0": t(0, B, H)}, ValueError, r"h0: got shape \[0, 3, 4\], expected \(L, B, H\), L at least 1"),
    ("h0 of more layers", {"h0": t(4, B, H)}, ValueError, r"c0: got shape \[2, 3, 4\], expected \[4, 3, 4\]"),
    ("c0 2-D", {"c0": t(B, H)}, ValueError, r"c0: got shape \[3, 4\], expected \(L, B, H\)"),
    ("c0 dtype", {"c0": t(L, B, H).half()}, TypeError, "c0: got dtype Half, expected input's Float"),
    ("projected", {"h0": t(L, B, 3)}, ValueError, "h0: got 3 features, expected c0's 4, for there is no projection"),
    ("weights of one layer", {"weights": weights(1)}, ValueError, r"weights\[2 \+ 0\]: got shape \[16\]"),
    ("weights missing", {"weights": weights()[:-1]}, ValueError, "weights: got 7 tensors for 2 layers, .* 2 or 4"),
    ("with projections", {"weights": weights(each=5)}, ValueError, "weights: got 10 tensors for 2 layers"),
    ("upper W_ih", {"weights": weights(w4=t(16, I))}, ValueError, r"weights\[4 \+ 0\]: got shape \[16, 5\].*\[16, 4\]"),
    ("upper b_hh", {"weights": weights(w7=t(15))}, ValueError, r"weights\[4 \+ 3\]: got shape \[15\], expected \[16\]"),
    ("sizes", {"input": t(4, I), "batch_sizes": torch.tensor([3, 2])}, ValueError, "input: got 4 rows, .* 5"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "match"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    given = arguments(**changes)
    with pytest.raises(error, match=match):
        extension.layers_forward["cuda"](*given.values(), True)
    saved = (t(T, B, H), t(L, T * B, 64), t(L, T * B, 16), t(L - 1, T * B, H))
    with pytest.raises(error, match=match):
        extension.layers_backward["cuda"](None, None, None, *given.values(), *saved)


SAVED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("grad_out", {"grad_out": t(T, B, 5)}, ValueError, r"grad_out: got shape \[6, 3, 5\], expected \[6, 3, 4\]"),
    ("grad_h_n", {"grad_h_n": t(1, B, H)}, ValueError, r"grad_h_n: got shape \[1, 3, 4\], expected \[2, 3, 4\]"),
    ("grad_c_n", {"grad_c_n": t(L, B, H).half()}, TypeError, "grad_c_n: got dtype Half"),
    ("gates", {"gates": t(0)}, ValueError, r"gates: got shape \[0\], expected \[2, 18, 64\]"),
    ("cells", {"cells": t(18, L, 16)}, ValueError, r"cells: got Float .*expected float32 \(2, 18, 16\)"),
    ("states", {"states": t(L, 18, H)}, ValueError, r"states: got shape \[2, 18, 4\], expected \[1, 18, 4\]"),
    ("states dtype", {"states": t(1, 18, H).half()}, TypeError, "states: got dtype Half"),
]


@pytest.mark.parametrize(("changes", "error", "match"), [row[1:] for row in SAVED], ids=[row[0] for row in SAVED])
def test_what_the_backward_is_given(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    given = arguments()
    out, _, _, gates, cells, states = extension.layers_forward["cuda"](*given.values(), True)
    good = {"grad_out": t(T, B, H), "grad_h_n": None, "grad_c_n": None, **given}
    call = good | {"out": out, "gates": gates, "cells": cells, "states": states} | changes
    with pytest.raises(error, match=match):
        extension.layers_backward["cuda"](*call.values())
