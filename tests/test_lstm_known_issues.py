"""One test per pytorch/pytorch issue that fastattn.LSTM cures, by its number.

"torch 2.13 fails" was tried with torch.nn.LSTM in the same test, on the CPU. Where an issue is one of cuDNN, the same
question is asked of the CPU too.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import ON_DEVICES
from lstm_module_cases import BATCH, HIDDEN, INPUTS, STEPS, TorchLSTM, assert_same, flat, packed, padded, pair
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastattn
from fastattn.kernels.lstm import extension

NEEDS_EXTENSION = pytest.mark.skipif(extension.why_unavailable("cpu") is not None, reason="needs the C++ extension")


def ratio(first: Callable[[], Any], second: Callable[[], Any], rounds: int = 15) -> float:
    """Time of the first over that of the second, median of rounds that take turns."""

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    for call in (first, second):
        call()
    return statistics.median(seconds(first) / seconds(second) for _ in range(rounds))


def trained(module: nn.Module, x: Any) -> None:
    flat(module(x))[0].sum().backward()


# Speed -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@NEEDS_EXTENSION
@pytest.mark.parametrize("training", [False, True])
def test_149194_packed_is_no_slower_than_padded(training: bool) -> None:
    """A PackedSequence was 5 to 100 times slower than the padded batch of the same lengths."""
    module = fastattn.LSTM(64, 64)
    x = torch.randn(200, 16, 64)
    equal = pack_padded_sequence(x, torch.full((16,), 200))
    with torch.set_grad_enabled(training):
        run = trained if training else nn.Module.__call__
        # Equal but for the noise of a busy machine.
        assert ratio(lambda: run(module, equal), lambda: run(module, x)) < 1.3


@pytest.mark.slow
@NEEDS_EXTENSION
@pytest.mark.parametrize("training", [False, True])
def test_81634_packed_sequences_on_the_cpu(training: bool) -> None:
    """On the CPU sequences of different lengths cost more than padding them all. torch 2.13 fails."""
    module = fastattn.LSTM(64, 64)
    x = torch.randn(200, 32, 64)
    lengths = pack_padded_sequence(x, torch.linspace(200, 20, 32).long())
    with torch.set_grad_enabled(training):
        run = trained if training else nn.Module.__call__
        assert ratio(lambda: run(module, lengths), lambda: run(module, x)) < 1.0


@pytest.mark.slow
@NEEDS_EXTENSION
@pytest.mark.parametrize("options", [{"proj_size": 64}, {"dtype": torch.float16}], ids=str)
def test_94457_as_fast_as_elsewhere_on_the_cpu(options: dict[str, Any]) -> None:
    """An LSTM on the CPU is slower than in other frameworks: what oneDNN does not have is a loop over the steps."""
    theirs, ours = TorchLSTM(64, 128, **options), fastattn.LSTM(64, 128, **options)
    x = torch.randn(50, 32, 64, dtype=options.get("dtype"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections")
        assert ratio(lambda: trained(ours, x), lambda: trained(theirs, x)) < 1.0


# Derivatives -------------------------------------------------------------------------------------------------


def gradient_penalty(module: Any, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    return list(torch.autograd.grad((grad.norm() - 1).square(), list(module.parameters())))


@ON_DEVICES
def test_5261_double_backward(device: str) -> None:
    """cuDNN has no second derivative: a gradient penalty raises."""
    theirs, ours = pair(num_layers=2)
    wanted = gradient_penalty(theirs.double(), padded(dtype=torch.float64).fill_(0.5))
    got = gradient_penalty(ours.to(device), torch.full((STEPS, BATCH, INPUTS), 0.5, device=device))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=1e-4, atol=1e-4)


@ON_DEVICES
def test_2691_double_backward_of_packed_sequences(device: str) -> None:
    """The same for a PackedSequence, in both directions."""
    ours = fastattn.LSTM(INPUTS, HIDDEN, bidirectional=True).to(device)
    exact = fastattn.LSTM(INPUTS, HIDDEN, bidirectional=True).double()
    exact.load_state_dict(ours.state_dict())
    x = padded()

    def penalty(module: Any, x: Tensor) -> list[Tensor]:
        def over(x: Tensor) -> Any:
            return module(packed(x, (2, 6, 1)))[1]

        return gradient_penalty(_Wrapped(module, over), x)

    for one, other in zip(penalty(ours, x.to(device)), penalty(exact, x.double()), strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=1e-4, atol=1e-4)


class _Wrapped(nn.Module):
    def __init__(self, module: nn.Module, call: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Any:
        return self.call(x)


# Randomness, warnings ----------------------------------------------------------------------------------------


@ON_DEVICES
def test_104697_dropout_follows_the_seed(device: str) -> None:
    """cuDNN's dropout had a state of its own that manual_seed did not reset."""
    module = fastattn.LSTM(2, 4, num_layers=2, dropout=0.5).to(device)
    for x in (torch.ones(10, 3, 2, device=device), packed(torch.ones(6, 3, 2, device=device), (2, 6, 1))):
        torch.manual_seed(42)
        first, second = flat(module(x)), flat(module(x))
        assert not torch.equal(first[0], second[0])
        torch.manual_seed(42)
        torch.testing.assert_close(flat(module(x)), first, rtol=0, atol=0)
        torch.testing.assert_close(flat(module(x)), second, rtol=0, atol=0)


@ON_DEVICES
def test_24155_no_warning_about_weights_in_pieces(device: str) -> None:
    """Weights that are computed, replaced or copied are not one piece of memory, and every call warned."""
    module = fastattn.LSTM(INPUTS, HIDDEN, num_layers=2).to(device)
    x = padded().to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().clone())
        flat(module(x))[0].sum().backward()
        named = {name: parameter.detach() * 2 for name, parameter in module.named_parameters()}
        torch.func.functional_call(module, named, (x,))
        normed = nn.utils.parametrizations.weight_norm(module, "weight_ih_l1")
        flat(normed(x))[0].sum().backward()
        with torch.no_grad():
            normed.eval()(x)


# Compilers ---------------------------------------------------------------------------------------------------


@ON_DEVICES
def test_158007_compiles(device: str) -> None:
    """torch.compile cannot compile a model with a basic LSTM. torch 2.13 fails."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(INPUTS, INPUTS), fastattn.LSTM(INPUTS, HIDDEN)).to(device)
    x = padded().to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(flat(compiled(x)), flat(model(x)))


def test_141184_what_follows_the_lstm_is_compiled() -> None:
    """The graph broke at the LSTM, and what came after it was never compiled. torch 2.13 fails."""
    torch._dynamo.reset()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(INPUTS, INPUTS), nn.Linear(2 * HIDDEN, 2)
            self.lstm = fastattn.LSTM(INPUTS, HIDDEN, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.lstm(self.before(x).relu())
            return self.after(out[:, -1]).softmax(-1)

    model, counter = Model(), CompileCounterWithBackend("eager")
    x = padded(batch_first=True)
    assert_same(torch.compile(model, backend=counter)(x), model(x))
    assert counter.frame_count == 1
    assert any("softmax" in str(node.target) for node in counter.graphs[0].graph.nodes)


# Export ------------------------------------------------------------------------------------------------------


def test_112044_packing_in_an_exported_model() -> None:
    """A model that packs its input cannot be exported. torch 2.13 fails.

    pad_packed_sequence, and pack_padded_sequence with enforce_sorted, stay what torch itself cannot export.
    """

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fastattn.LSTM(INPUTS, HIDDEN, bidirectional=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            out, state = self.lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
            return out.data, state

    model = Model().eval()
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    shapes = {"x": {0: steps, 1: batch}, "lengths": {0: batch}}
    program = torch.export.export(model, (padded(), torch.tensor([2, 6, 1])), dynamic_shapes=shapes, strict=False)
    for lengths in ([2, 6, 1], [5, 8, 8, 3]):
        x = torch.randn(max(lengths), len(lengths), INPUTS)
        assert_same(program.module()(x, torch.tensor(lengths)), model(x, torch.tensor(lengths)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}], ids=str)
def test_126339_export_keeps_the_length_free(options: dict[str, Any], strict: bool) -> None:
    """Export unrolls the LSTM over the length of the example, which is then the only one. torch 2.13 fails."""
    module = fastattn.LSTM(INPUTS, HIDDEN, batch_first=True, **options).eval()
    steps = torch.export.Dim("steps")
    program = torch.export.export(
        module, (padded(batch_first=True),), dynamic_shapes={"input": {1: steps}}, strict=strict
    )
    for length in (2, STEPS, 31):
        x = torch.randn(BATCH, length, INPUTS)
        assert_same(program.module()(x), module(x))
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("lstm_layer" in operator for operator in operators) == module.num_layers


@pytest.mark.parametrize("strict", [False, True])
def test_127153_export_of_given_states_and_a_packed_input(strict: bool) -> None:
    """States that go in and out, beside the parts of a PackedSequence. torch 2.13 fails."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fastattn.LSTM(INPUTS, HIDDEN)

        def forward(self, data: Tensor, batch_sizes: Tensor, h: Tensor, c: Tensor) -> Any:
            out, state = self.lstm(PackedSequence(data, batch_sizes), (h, c))
            return out.data, state

    model = Model().eval()
    rows, steps, batch = (torch.export.Dim(name) for name in ("rows", "steps", "batch"))
    shapes = {"data": {0: rows}, "batch_sizes": {0: steps}, "h": {1: batch}, "c": {1: batch}}

    def inputs(lengths: list[int]) -> tuple[Tensor, ...]:
        x = pack_padded_sequence(torch.randn(lengths[0], len(lengths), INPUTS), torch.tensor(lengths))
        return x.data, x.batch_sizes, *torch.randn(2, 1, len(lengths), HIDDEN)

    program = torch.export.export(model, inputs([6, 4, 1]), dynamic_shapes=shapes, strict=strict)
    for lengths in ([6, 4, 1], [9, 7, 7, 2]):
        given = inputs(lengths)
        assert_same(program.module()(*given), model(*given))


# bfloat16 ----------------------------------------------------------------------------------------------------


@ON_DEVICES
@pytest.mark.parametrize("training", [False, True])
def test_88136_a_bfloat16_model(device: str, training: bool) -> None:
    """model.to(torch.bfloat16) raised: "could not create a primitive descriptor" on some CPUs, no kernel on GPUs."""
    theirs, ours = pair(num_layers=2, bidirectional=True)
    ours = ours.to(device, torch.bfloat16)
    x = padded()
    with torch.set_grad_enabled(training):
        got = flat(ours(x.to(device, torch.bfloat16)))
    assert all(part.dtype == torch.bfloat16 for part in got)
    assert_same([part.float().cpu() for part in got], flat(theirs(x)), 0.05)
    if training:
        got[0].sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


@ON_DEVICES
def test_116925_bfloat16_under_autocast(device: str) -> None:
    """Under autocast to bfloat16 the fused cell was not implemented."""
    theirs, ours = pair()
    ours = ours.to(device)
    for x in (padded(), packed(padded(), (2, 6, 1))):
        with torch.autocast(device, dtype=torch.bfloat16):
            got = flat(ours(x.to(device)))
        got[0].float().sum().backward()
        assert_same([part.float().cpu() for part in got], flat(theirs(x)), 0.05)
