"""The operators of the layer-normalised LSTM: against float64 on every instruction set, under torch's own checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import instruction_sets
import pytest
import torch
from layer_norm_lstm_cases import Case, check, evaluate, kernel, make_problem, plain

import fastattn  # noqa: F401 : defines the operators
from fastattn import reference_layer_norm_lstm as reference
from fastattn.kernels.attention import extension
from fastattn.kernels.layer_norm_lstm import extension as own_extension

OPS = torch.ops.fastattn
NEEDS_EXTENSION = pytest.mark.skipif(extension.UNAVAILABLE is not None, reason=str(extension.UNAVAILABLE))
BACKENDS = ["eager", pytest.param("cpu", marks=NEEDS_EXTENSION)]

CASES = [
    Case(),
    Case(batch=1, hidden=16),
    Case(hidden=1),
    Case(steps=1, hidden=17, h_mask="variational"),
    Case(steps=1, batch=5, hidden=16, directions=2, packed=True),
    Case(steps=6, batch=13, inputs=3, hidden=33, bias=False),
    Case(batch=30, inputs=8, hidden=64),
    Case(batch=5, hidden=150, directions=2),  # the recurrent product sums over more than one block of terms
    Case(steps=7, batch=9, directions=2, packed=True),
    Case(batch=7, hidden=20, packed=True, h_mask="variational", zoneout="mask"),
    Case(batch=7, hidden=20, directions=2, packed=True, h_mask="step", zoneout="expectation", bias=False),
    Case(h_mask="variational", directions=2),
    Case(h_mask="step", zoneout="mask"),
    Case(zoneout="mask", hidden=16, directions=2),
    Case(zoneout="expectation"),
    Case(steps=2, gains=60.0),  # gates far into saturation
    *(
        replace(case, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16)
        for case in (
            Case(batch=7, hidden=40, directions=2, packed=True, h_mask="variational", zoneout="mask"),
            Case(steps=3, hidden=16, h_mask="step", zoneout="expectation", bias=False),
        )
    ),
]


@pytest.fixture(params=instruction_sets.PLAIN)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from instruction_sets.chosen(request.param)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", CASES[:14:3], ids=str)
def test_eager_backend_is_the_definition(case: Case) -> None:
    def call(*problem: Any) -> Any:
        return OPS.layer_norm_lstm_layer(*problem, True, True, "eager")[:4]

    problem = make_problem(case)
    ours, expected = (evaluate(f, problem, torch.float64) for f in (call, reference.layer))
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        Case(directions=2, hidden=16, zoneout="mask", h_mask="step"),
        Case(packed=True, bias=False, dtype=torch.bfloat16),
        Case(steps=1, zoneout="expectation"),
    ],
    ids=str,
)
def test_opcheck(case: Case, backend: str) -> None:
    problem = make_problem(case)
    # The eager and the compiled run of a test draw gradients of their own; half precision rounds them apart.
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if case.dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for save, all_cells in ((False, False), (True, True)):
        torch.library.opcheck(OPS.layer_norm_lstm_layer, (*problem, save, all_cells, backend), **tolerance)
    out, _, h_n, c_n, saved = OPS.layer_norm_lstm_layer(*problem, True, True, backend)
    for input_grad in (False, True):
        torch.library.opcheck(
            OPS.layer_norm_lstm_layer_backward, (out, None, h_n, c_n, out, saved, *problem, input_grad, backend)
        )
    for index in (0, 2, 3):
        problem[index] = problem[index].detach().requires_grad_()
    problem[4] = [weight.detach().requires_grad_() for weight in problem[4]]
    torch.library.opcheck(OPS.layer_norm_lstm_layer, (*problem, True, True, backend), **tolerance)


@NEEDS_EXTENSION
@pytest.mark.parametrize("all_cells", [False, True])
def test_each_result_has_a_gradient_of_its_own(all_cells: bool) -> None:
    """An absent gradient is zero."""
    case = Case(directions=2, packed=True, batch=4, zoneout="mask")
    problem = make_problem(case)

    def operator(*problem: Any) -> Any:
        return OPS.layer_norm_lstm_layer(*problem, True, all_cells, "cpu")[:4]

    def alone(call: Any, place: int) -> Any:
        def only(*problem: Any) -> Any:
            results = call(*problem)
            return [result if at == place else result.new_zeros(1) for at, result in enumerate(results)]

        return only

    for place in (0, 1, 2, 3) if all_cells else (0, 2, 3):
        ours = evaluate(alone(operator, place), problem, torch.float32)
        expected = evaluate(alone(reference.layer, place), problem, torch.float64)
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name].double(), tensor.double(), rtol=1e-3, atol=1e-4)


@NEEDS_EXTENSION
def test_a_gradient_that_was_not_announced_is_computed() -> None:
    problem = make_problem(Case())
    ours = evaluate(lambda *p: OPS.layer_norm_lstm_layer(*p, False, True, "cpu")[:4], problem, torch.float32)
    expected = evaluate(plain, problem, torch.float32)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4)


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    "case",
    [Case(steps=9, batch=50, inputs=40, hidden=48), Case(steps=9, batch=6, inputs=64, hidden=128, packed=True)],
    ids=str,
)
def test_the_number_of_threads_changes_no_bit(case: Case) -> None:
    """Batches that are split by rows, and such whose units are. The products in torch are kept too small to split."""
    threads = torch.get_num_threads()
    problem = make_problem(case)
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(evaluate(kernel, problem, torch.float32))
    finally:
        torch.set_num_threads(threads)
    exact = [name for name in results[0] if name not in ("dinput", "dweights[0]", "dweights[1]")]
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in exact)
    assert all(torch.equal(results[0][name], results[-1][name]) for name in results[0])


@NEEDS_EXTENSION
def test_strides_are_free() -> None:
    problem = make_problem(Case(directions=2))
    expected = kernel(*problem)
    turned = [tensor.mT.contiguous().mT for tensor in (problem[0], problem[2], problem[3])]
    weights = [weight.mT.contiguous().mT if weight.dim() == 2 else weight for weight in problem[4]]
    strided = [turned[0], None, turned[1], turned[2], weights, *problem[5:]]
    for result, wanted in zip(kernel(*strided), expected, strict=True):
        torch.testing.assert_close(result, wanted)


@NEEDS_EXTENSION
def test_inputs_are_not_written() -> None:
    case = Case(hidden=16)  # no unit is added: states could be used where they stand
    problem = make_problem(case)
    kept = [tensor.clone() for tensor in (problem[0], problem[2], problem[3], *problem[4])]
    evaluate(kernel, problem, torch.float32)
    kernel(*problem)
    for tensor, before in zip((problem[0], problem[2], problem[3], *problem[4]), kept, strict=True):
        assert torch.equal(tensor, before)


# Each row: the place of an argument, what takes its place, the exception, what its message says.
BAD = [
    (0, lambda p: p[0][0], ValueError, "input: got shape"),
    (0, lambda p: p[0].double(), TypeError, "input: got dtype Double"),
    (0, lambda p: p[0].half(), TypeError, "h0: got dtype Float, expected input's Half"),
    (1, lambda p: torch.tensor([3, 3]), ValueError, "input: got shape"),
    (2, lambda p: p[2][0], ValueError, "h0: got shape"),
    (2, lambda p: p[2][:, :2], ValueError, "got shape"),
    (3, lambda p: p[3][..., :5], ValueError, "got"),
    (4, lambda p: p[4][:-1], ValueError, "weights: got 6 tensors"),
    (4, lambda p: [*p[4][:2], p[4][2][:-1], *p[4][3:]], ValueError, r"weights\[2\]: got shape"),
    (4, lambda p: [*p[4][:2], p[4][2].double(), *p[4][3:]], TypeError, r"weights\[2\]: got dtype Double"),
    (4, lambda p: [p[4][0][:-1], *p[4][1:]], ValueError, r"weights\[.*got shape"),
    (5, lambda p: torch.ones(2, 1, 6), ValueError, "h_mask: got shape"),
    (5, lambda p: torch.ones(3, 1, 6, dtype=torch.int64), TypeError, "h_mask: got dtype Long"),
    (6, lambda p: torch.ones(3, 1, 6, dtype=torch.bool), ValueError, "zoneout_h: got shape"),
    (7, lambda p: torch.ones(12, 1, 6), TypeError, "zoneout_c: got dtype Float, expected bool"),
    (8, lambda p: 1.5, ValueError, "zoneout_h: got the probability 1.5"),
    (9, lambda p: -0.5, ValueError, "zoneout_c: got the probability -0.5"),
    (10, lambda p: 0.0, ValueError, "eps: got 0, expected a positive number"),
    (10, lambda p: 1e-50, ValueError, "eps: got 1e-50, expected a positive number"),
]


@NEEDS_EXTENSION
@pytest.mark.parametrize("row", BAD, ids=[row[3] for row in BAD])
def test_bad_arguments(row: Any) -> None:
    place, change, error, message = row
    problem = make_problem(Case())
    problem[place] = change(problem)
    with pytest.raises(error, match=message):
        OPS.layer_norm_lstm_layer(*problem, True, True, "cpu")


@NEEDS_EXTENSION
def test_bad_arguments_of_the_backward() -> None:
    problem = make_problem(Case())
    out, cells, h_n, c_n, saved = OPS.layer_norm_lstm_layer(*problem, True, True, "cpu")
    good = [out, cells, h_n, c_n, out, saved]
    for place, value, error, message in (
        (0, out[0], ValueError, "grad_out: got shape"),
        (1, cells.double(), TypeError, "grad_cells: got dtype Double"),
        (2, h_n[..., :2], ValueError, "grad_h_n: got shape"),
        (3, c_n[0], ValueError, "grad_c_n: got shape"),
        (4, out[:1], ValueError, "out: got shape"),
        (5, saved[:-1], ValueError, "saved: got Float of shape"),
        (5, saved.double(), ValueError, "saved: got Double"),
        (5, torch.zeros(saved.numel() + 1)[1:], ValueError, "saved: got Float"),
    ):
        given = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(error, match=message):
            OPS.layer_norm_lstm_layer_backward(*given, *problem, True, "cpu")


@NEEDS_EXTENSION
def test_saved_floats_is_what_the_kernel_saves() -> None:
    for hidden in (1, 16, 17):
        case = Case(hidden=hidden, directions=2)
        saved = OPS.layer_norm_lstm_layer(*make_problem(case), True, False, "cpu")[4]
        assert saved.shape == (2 * case.steps * case.batch * own_extension.saved_floats(hidden, "cpu"),)


@pytest.mark.skipif(own_extension.KERNELS["cuda"].why_unavailable() is None, reason="CUDA kernels are here")
def test_a_backend_that_is_not_built_says_so() -> None:
    with pytest.raises(RuntimeError, match="backend: got 'cuda', but "):
        OPS.layer_norm_lstm_layer(*make_problem(Case()), True, True, "cuda")
