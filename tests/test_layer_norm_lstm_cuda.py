"""The layer-normalised LSTM on a GPU: against the float64 oracle, run to run, in a CUDA graph, and as a module.

``tests/test_layer_norm_lstm_emulated.py`` runs the same kernels on a machine without one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_graphs import captured
from layer_norm_lstm_cases import Case, assert_as_the_definition, check, evaluate, make_problem
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fastattn
from fastattn import Backend, LayerNormLSTM, LayerNormLSTMCell
from fastattn.kernels.layer_norm_lstm.extension import KERNELS
from fastattn.profiling import lstm_doctor

pytestmark = pytest.mark.gpu

OPS = torch.ops.fastattn
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (FP32, BF16, FP16)


@pytest.fixture(autouse=True, scope="module")
def _built() -> None:
    # A wheel without the CUDA kernels is a failure here, not a skip: this is what the machine is for.
    reason = KERNELS["cuda"].why_unavailable()
    assert reason is None, reason


def to_cuda(problem: Any) -> list[Any]:
    """The same call with its tensors on the device; batch_sizes stay on the CPU."""

    def moved(part: Any) -> Any:
        if isinstance(part, list):
            return [moved(one) for one in part]
        return part.cuda() if isinstance(part, Tensor) else part

    input, batch_sizes, *rest = problem
    return [moved(input), batch_sizes, *moved(rest)]


def layer(*problem: Any) -> list[Tensor]:
    results = OPS.layer_norm_lstm_layer(*to_cuda(problem), True, True, "cuda")[:4]
    return [result.cpu() for result in results]


CASES = [
    # A warp for each row.
    Case(),
    Case(hidden=1),
    Case(steps=1, batch=1, inputs=1, hidden=1),
    Case(batch=1, hidden=33, directions=2),
    Case(steps=20, batch=19, directions=2, packed=True, hidden=128),
    Case(batch=7, hidden=20, packed=True, h_mask="variational", zoneout="mask"),
    Case(batch=7, hidden=20, directions=2, packed=True, h_mask="step", zoneout="expectation", bias=False),
    Case(steps=2, gains=60.0),
    # A block for each row.
    Case(steps=5, batch=33, hidden=129, directions=2, packed=True, zoneout="mask", h_mask="step"),
    Case(steps=10, batch=200, inputs=16, hidden=256),
    Case(steps=4, batch=64, inputs=64, hidden=1000, packed=True, h_mask="variational", zoneout="mask"),
    # More units than the threads keep.
    Case(steps=3, batch=5, hidden=1500, directions=2, packed=True, zoneout="mask", h_mask="step"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_stay_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype), layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [96, 512, 1500])
def test_every_run_gives_the_same_bits(hidden: int, dtype: torch.dtype) -> None:
    case = Case(steps=9, batch=50, hidden=hidden, directions=2, packed=True, h_mask="step", zoneout="mask", dtype=dtype)
    problem = make_problem(case)
    first = evaluate(layer, problem, dtype)
    for _ in range(5):
        again = evaluate(layer, problem, dtype)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_replay_in_a_cuda_graph(dtype: torch.dtype, packed: bool) -> None:
    case = Case(steps=30, batch=8, hidden=64, directions=2, packed=packed, h_mask="step", zoneout="mask", dtype=dtype)
    static, other = to_cuda(make_problem(case)), to_cuda(make_problem(case, seed=1))

    def work() -> list[Tensor]:
        *results, saved = OPS.layer_norm_lstm_layer(*static, True, True, "cuda")
        dinput, dh0, dc0, dweights = OPS.layer_norm_lstm_layer_backward(
            *results, results[0], saved, *static, True, "cuda"
        )
        return [*results, dinput, dh0, dc0, *dweights]

    graph, replayed = captured(work)
    for _ in range(2):
        static[2].copy_(other[2])  # h0
        static[0].mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        for first, second in zip(replayed, work(), strict=True):
            assert torch.equal(first, second)


def test_two_streams_do_not_disturb_one_another() -> None:
    problem = to_cuda(make_problem(Case(steps=100, batch=16, hidden=200, dtype=BF16)))
    expected = OPS.layer_norm_lstm_layer(*problem, False, False, "cuda")[0]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(OPS.layer_norm_lstm_layer(*problem, False, False, "cuda")[0])
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize(
    "case", [Case(directions=2, zoneout="mask", h_mask="step"), Case(packed=True, dtype=BF16)], ids=str
)
def test_opcheck(case: Case) -> None:
    problem = to_cuda(make_problem(case))
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if case.dtype == FP32 else {"rtol": 5e-2, "atol": 5e-2}
    for save, all_cells in ((False, False), (True, True)):
        torch.library.opcheck(OPS.layer_norm_lstm_layer, (*problem, save, all_cells, "cuda"), **tolerance)
    for index in (0, 2, 3):
        problem[index].requires_grad_()
    problem[4] = [weight.requires_grad_() for weight in problem[4]]
    torch.library.opcheck(OPS.layer_norm_lstm_layer, (*problem, True, True, "cuda"), **tolerance)


def test_tensors_of_two_devices_are_refused() -> None:
    problem = to_cuda(make_problem(Case(zoneout="mask", h_mask="step")))
    for place in (2, 5, 6):
        mixed = [*problem[:place], problem[place].cpu(), *problem[place + 1 :]]
        with pytest.raises(ValueError, match="expected a strided one on input's cuda"):
            OPS.layer_norm_lstm_layer(*mixed, True, True, "cuda")
    with pytest.raises(ValueError, match="expected one on cuda"):
        OPS.layer_norm_lstm_layer(*make_problem(Case()), True, True, "cuda")
    with pytest.raises(ValueError, match="expected the CPU"):
        OPS.layer_norm_lstm_layer(*problem, True, True, "cpu")


# The module --------------------------------------------------------------------------------------------------


def test_the_doctor_finds_both_lstms_right() -> None:
    """Padded and packed modules, outputs and all gradients, in each dtype."""
    verdicts, unavailable = lstm_doctor.self_check(torch.device("cuda"))
    assert Backend.CUDA not in unavailable
    ours = [verdict for verdict in verdicts if verdict.backend is Backend.CUDA]
    assert len(ours) == 3
    assert all(verdict.passed for verdict in ours), ours


def test_noise_follows_manual_seed_and_states_are_returned() -> None:
    module = LayerNormLSTM(3, 40, 2, bidirectional=True, zoneout=0.2, recurrent_dropout=0.3, dropout=0.2).cuda()
    packed = pack_sequence([torch.randn(length, 3, device="cuda") for length in (6, 4, 1)])
    assert_as_the_definition(module, packed, "cuda")


def test_second_derivatives_are_the_definition_s() -> None:
    module, input = LayerNormLSTM(3, 5).cuda(), torch.randn(4, 2, 3, device="cuda")
    found = []
    for name in ("cuda", "reference"):
        with fastattn.backend(name):
            loss = module(input)[0].square().sum()
        grads = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), list(module.parameters())))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_autocast_compiler_and_cell() -> None:
    module, input = LayerNormLSTM(3, 5).cuda(), torch.randn(4, 2, 3, device="cuda")
    cell = LayerNormLSTMCell(3, 5).cuda()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with fastattn.backend("cuda"):
        torch.testing.assert_close(compiled(input), module(input))
        h, c = cell(input[0])
        assert h.shape == c.shape == (2, 5)
        with torch.autocast("cuda", BF16):
            assert module(input)[0].dtype == BF16


def test_unverified_kernels_wait_to_be_asked_for() -> None:
    from fastattn.kernels.lstm import extension

    chosen = LayerNormLSTM(3, 4).cuda().explain(torch.randn(2, 1, 3, device="cuda"))
    assert chosen.backend is (Backend.CUDA if extension.verified() else Backend.REFERENCE)
