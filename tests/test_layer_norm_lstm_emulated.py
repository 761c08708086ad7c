"""The layer-normalised CUDA LSTM without a GPU: its host code and its kernels compiled for the host.

As ``test_lstm_emulated``: each thread is a fiber, each exchange within a warp and each barrier is the device's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated_device import ops
from layer_norm_lstm_cases import Case, assert_as_the_definition, check, evaluate, make_problem
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from fastattn import Backend, LayerNormLSTM
from fastattn import reference_layer_norm_lstm as reference
from fastattn.kernels.layer_norm_lstm.extension import KERNELS, saved_floats
from fastattn.profiling import lstm_doctor
from fastattn.profiling.verdict import judge

pytestmark = pytest.mark.slow  # the emulated library takes a minute to compile, once for each state of the sources

BF16, FP16 = torch.bfloat16, torch.float16


class Layer(torch.autograd.Function):
    """One layer on the emulated device: what the operator does on a real one."""

    @staticmethod
    def forward(ctx: Any, masks: tuple[Any, ...], batch_sizes: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        input, h0, c0, *weights = tensors
        problem = (input, batch_sizes, h0, c0, weights, *masks)
        *results, saved = torch.ops.fastattn_emulated.layer_norm_forward(*problem, True, True)
        ctx.set_materialize_grads(False)
        ctx.masks = masks
        ctx.save_for_backward(batch_sizes, results[0], saved, *tensors)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        batch_sizes, out, saved, input, h0, c0, *weights = ctx.saved_tensors
        problem = (input, batch_sizes, h0, c0, weights, *ctx.masks)
        dinput, dh0, dc0, dweights = torch.ops.fastattn_emulated.layer_norm_backward(*grads, out, saved, *problem, True)
        return None, None, dinput, dh0, dc0, *dweights


def layer(*problem: Any) -> tuple[Tensor, ...]:
    input, batch_sizes, h0, c0, weights, *masks = problem
    return Layer.apply(tuple(masks), batch_sizes, input, h0, c0, *weights)


@pytest.fixture(scope="module")
def emulated() -> Iterator[Any]:
    device = ops()
    yield device
    device.device(8, 0)


CASES = [
    # A warp for each row: all that a call can have.
    Case(),
    Case(hidden=1),
    Case(steps=1, batch=1, inputs=1, hidden=1),
    Case(batch=1, hidden=33, directions=2),
    Case(steps=7, batch=9, directions=2, packed=True),
    Case(batch=7, hidden=20, packed=True, h_mask="variational", zoneout="mask"),
    Case(batch=7, hidden=20, directions=2, packed=True, h_mask="step", zoneout="expectation", bias=False),
    Case(h_mask="variational", directions=2),
    Case(h_mask="step", zoneout="mask", directions=2),
    Case(zoneout="expectation"),
    Case(steps=2, gains=60.0),  # gates far into saturation
    Case(steps=2, batch=2, hidden=128, packed=True),
    Case(steps=12, batch=11, hidden=3),  # more than one chunk of rows in the column sums
    # A block for each row: one unit of a thread, and four.
    Case(steps=2, batch=3, hidden=129, directions=2, packed=True, zoneout="mask", h_mask="variational"),
    Case(steps=2, batch=1, hidden=1000),
    # More units than the threads keep.
    Case(steps=2, batch=2, inputs=2, hidden=1030, packed=True, zoneout="mask", h_mask="step"),
    *(
        replace(case, dtype=dtype)
        for dtype in (FP16, BF16)
        for case in (
            Case(batch=7, hidden=40, directions=2, packed=True, h_mask="variational", zoneout="mask"),
            Case(steps=3, hidden=16, h_mask="step", zoneout="expectation", bias=False),
            Case(steps=2, hidden=150),
        )
    ),
]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_stay_within_the_budget(case: Case) -> None:
    check(case, layer)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=9, hidden=40, directions=2, packed=True, h_mask="step", zoneout="mask"),
        Case(steps=3, batch=2, hidden=300, packed=True, h_mask="variational", zoneout="expectation"),
        Case(steps=2, batch=2, hidden=300, directions=2, dtype=BF16),
        Case(steps=2, batch=2, inputs=2, hidden=1030),
    ],
    ids=str,
)
def test_no_result_depends_on_the_order_of_threads(emulated: Any, case: Case) -> None:
    problem = make_problem(case)
    results = []
    for schedule in range(3):
        emulated.device(8, schedule)
        results.append(evaluate(layer, problem, case.dtype))
    emulated.device(8, 0)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("case", [Case(directions=2, packed=True, h_mask="step"), Case(hidden=130, steps=2)], ids=str)
def test_saving_changes_nothing_else(emulated: Any, case: Case) -> None:
    problem = make_problem(case)
    with_all, bare = (emulated.layer_norm_forward(*problem, keep, keep) for keep in (True, False))
    for place in (0, 2, 3):
        assert torch.equal(with_all[place], bare[place])
    assert bare[1].numel() == bare[4].numel() == 0
    rows = problem[0].shape[:-1].numel()
    assert with_all[4].shape == (case.directions * rows * saved_floats(case.hidden, "cuda"),)
    assert with_all[4].isfinite().all()  # all of it is written


def test_each_result_has_a_gradient_of_its_own(emulated: Any) -> None:
    """An absent gradient is zero."""
    case = Case(directions=2, packed=True, batch=4, zoneout="mask", h_mask="step")
    problem = make_problem(case)

    def alone(call: Callable[..., Any], place: int) -> Callable[..., Any]:
        def only(*problem: Any) -> Any:
            results = call(*problem)
            return [result if at == place else result.new_zeros(1) for at, result in enumerate(results)]

        return only

    for place in range(4):
        ours = evaluate(alone(layer, place), problem, torch.float32)
        expected = evaluate(alone(reference.layer, place), problem, torch.float64)
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name].double(), tensor.double(), rtol=1e-3, atol=1e-4)
    out, *_, saved = emulated.layer_norm_forward(*problem, True, False)
    grads = emulated.layer_norm_backward(torch.ones_like(out), None, None, None, out, saved, *problem, False)
    assert grads[0].numel() == 0
    assert torch.equal(
        grads[1], emulated.layer_norm_backward(torch.ones_like(out), None, None, None, out, saved, *problem, True)[1]
    )


@pytest.mark.parametrize("shape", [{"steps": 0}, {"batch": 0}], ids=str)
def test_nothing_to_do(emulated: Any, shape: dict[str, int]) -> None:
    problem = make_problem(replace(Case(directions=2, h_mask="step"), **shape))
    out, cells, h_n, c_n, saved = emulated.layer_norm_forward(*problem, True, True)
    assert torch.equal(h_n, problem[2])
    assert torch.equal(c_n, problem[3])
    _, dh0, dc0, dweights = emulated.layer_norm_backward(out, cells, h_n, c_n, out, saved, *problem, True)
    assert torch.equal(dh0, h_n)
    assert torch.equal(dc0, c_n)
    assert all(not grad.any() for grad in dweights)


def test_strides_are_free(emulated: Any) -> None:
    problem = make_problem(Case(directions=2, h_mask="variational", zoneout="mask"))
    expected = emulated.layer_norm_forward(*problem, True, True)

    def strided(tensor: Any) -> Any:
        return torch.stack((tensor, tensor), -1)[..., 0] if isinstance(tensor, Tensor) else tensor

    other = [[strided(weight) for weight in part] if isinstance(part, list) else strided(part) for part in problem]
    results = emulated.layer_norm_forward(*other, True, True)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)
    grads = [strided(result) for result in expected[:4]]
    found, wanted = (
        emulated.layer_norm_backward(*given, expected[0], expected[4], *args, True)
        for given, args in ((grads, other), (expected[:4], problem))
    )
    for result, gradient in zip((*found[:3], *found[3]), (*wanted[:3], *wanted[3]), strict=True):
        assert torch.equal(result, gradient)


@pytest.fixture
def in_the_module(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules and operators run the emulated device: as "cuda", which they take for no tensor here, and as "cpu"."""

    def forward(problem: Any, *rest: Any) -> Any:
        return emulated.layer_norm_forward(*problem, *rest)

    def backward(grads: Any, problem: Any, out: Tensor, saved: Tensor, wanted: bool) -> Any:
        return emulated.layer_norm_backward(*grads, out, saved, *problem, wanted)

    for kernels in KERNELS.values():
        monkeypatch.setattr(kernels, "why_unavailable", lambda: None)
        monkeypatch.setattr(kernels, "_forward", forward)
        monkeypatch.setattr(kernels, "_backward", backward)


@pytest.mark.usefixtures("in_the_module")
@pytest.mark.parametrize("case", [Case(directions=2, zoneout="mask", h_mask="step"), Case(packed=True)], ids=str)
def test_opcheck(case: Case) -> None:
    """Schema, shape rule and autograd of the operator hold for what this backend returns and saves."""
    problem = make_problem(case)
    for save, all_cells in ((False, False), (True, True)):
        torch.library.opcheck(torch.ops.fastattn.layer_norm_lstm_layer, (*problem, save, all_cells, "cuda"))
    for index in (0, 2, 3):
        problem[index].requires_grad_()
    problem[4] = [weight.requires_grad_() for weight in problem[4]]
    torch.library.opcheck(
        torch.ops.fastattn.layer_norm_lstm_layer, (*problem, True, True, "cuda"), rtol=1e-3, atol=1e-3
    )


@pytest.mark.usefixtures("in_the_module")
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_the_doctor_finds_the_module_right(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in lstm_doctor._CASES if case.module is LayerNormLSTM]
    assert len(cases) == 2
    monkeypatch.setattr(lstm_doctor, "_CASES", cases)
    verdict = judge(Backend.CPU, dtype, lstm_doctor._answers(Backend.CPU, dtype, torch.device("cpu")))
    assert verdict.passed, verdict


@pytest.mark.usefixtures("in_the_module")
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_in_the_module(enforce_sorted: bool) -> None:
    options: Any = {"num_layers": 2, "bidirectional": True, "zoneout": 0.2, "recurrent_dropout": 0.3}
    module = LayerNormLSTM(3, 5, **options)
    lengths = (6, 4, 4, 1) if enforce_sorted else (1, 4, 6, 4)
    packed = pack_sequence([torch.randn(length, 3) for length in lengths], enforce_sorted=enforce_sorted)
    assert_as_the_definition(module, packed, "cpu")


# Each row: the place of an argument, what takes its place, the exception, what its message says.
BAD = [
    (0, lambda p: p[0].double(), TypeError, "input: got dtype Double"),
    (0, lambda p: p[0].to("meta"), ValueError, "got a Strided tensor on cpu, expected a strided one on input's meta"),
    (4, lambda p: p[4][:-1], ValueError, "weights: got 6 tensors"),
    (4, lambda p: [*p[4][:4], p[4][2], *p[4][5:]], ValueError, r"weights\[4\]: got shape \[24\], expected \[6\]"),
    (4, lambda p: [*p[4][:2], p[4][2].to("meta"), *p[4][3:]], ValueError, r"weights\[2\]: got .* tensor on meta"),
    (5, lambda p: torch.ones(2, 1, 6), ValueError, "h_mask: got shape"),
    (6, lambda p: torch.ones(3, 1, 6, dtype=torch.bool), ValueError, "zoneout_h: got shape"),
    (7, lambda p: torch.ones(12, 1, 6), TypeError, "zoneout_c: got dtype Float, expected bool"),
    (9, lambda p: -0.5, ValueError, "zoneout_c: got the probability -0.5"),
    (10, lambda p: 0.0, ValueError, "eps: got 0, expected a positive number"),
]


@pytest.mark.parametrize("row", BAD, ids=[row[3] for row in BAD])
def test_bad_arguments(emulated: Any, row: Any) -> None:
    place, change, error, message = row
    problem = make_problem(Case())
    problem[place] = change(problem)
    with pytest.raises(error, match=message):
        emulated.layer_norm_forward(*problem, True, True)


def test_bad_arguments_of_the_backward(emulated: Any) -> None:
    problem = make_problem(Case())
    out, cells, h_n, c_n, saved = emulated.layer_norm_forward(*problem, True, True)
    good = [out, cells, h_n, c_n, out, saved]
    for place, value, error, message in (
        (0, out[0], ValueError, "grad_out: got shape"),
        (1, cells.double(), TypeError, "grad_cells: got dtype Double"),
        (5, saved[:-1], ValueError, "saved: got Float of shape"),
    ):
        given = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(error, match=message):
            emulated.layer_norm_backward(*given, *problem, True)
