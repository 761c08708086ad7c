"""fastattn.LSTM where modules are used: state, copies, parametrizations, compilers, export, data parallel training."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lstm_module_cases import (
    BATCH,
    HIDDEN,
    INPUTS,
    SORTED,
    STEPS,
    UNSORTED,
    TorchLSTM,
    assert_same,
    flat,
    gradients,
    packed,
    padded,
    pair,
    states,
)
from threads import at_once
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastattn

RICH: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "proj_size": 3}


# State -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, RICH, {"bias": False}], ids=str)
def test_state_dicts_load_both_ways(options: dict[str, Any]) -> None:
    theirs, ours = TorchLSTM(INPUTS, HIDDEN, **options), fastattn.LSTM(INPUTS, HIDDEN, **options)
    assert [*theirs.state_dict()] == [*ours.state_dict()]
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(flat(ours(x := padded())), flat(theirs(x)))


def test_the_same_seed_gives_the_same_weights() -> None:
    made = []
    for cls in (TorchLSTM, fastattn.LSTM):
        torch.manual_seed(3)
        made.append(cls(INPUTS, HIDDEN, **RICH).state_dict())
    torch.testing.assert_close(*made, rtol=0, atol=0)


def test_flat_weights_follow_the_parameters() -> None:
    ours = fastattn.LSTM(INPUTS, HIDDEN, **RICH)
    ours.flatten_parameters()
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert [[*weights] for weights in ours.all_weights] == [
        [getattr(ours, name) for name in names] for names in ours._all_weights
    ]
    ours.double()
    assert all(weight.dtype == torch.float64 for weight in ours._flat_weights)
    assert flat(ours(padded(dtype=torch.float64)))[0].dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("module", [fastattn.LSTM(INPUTS, HIDDEN, **RICH), fastattn.LSTMCell(INPUTS, HIDDEN)])
def test_copies(module: Any, copied: Any) -> None:
    module = copy.deepcopy(module)
    x = padded() if isinstance(module, fastattn.LSTM) else padded()[0]
    other = copied(module)
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)
    with torch.no_grad():
        other.weight_ih_l0.zero_() if isinstance(module, fastattn.LSTM) else other.weight_ih.zero_()
    assert not torch.equal(other(x)[0], module(x)[0])


def test_assigned_and_optimized_weights_are_seen() -> None:
    theirs, ours = pair()
    x = padded()
    for module in (theirs, ours):
        module(x)
        module.weight_hh_l0 = nn.Parameter(torch.ones_like(module.weight_hh_l0))
        with torch.no_grad():
            module.bias_ih_l0.add_(1.0)
            module.weight_ih_l0.data = module.weight_ih_l0.data * 0.5
    assert_same(flat(ours(x)), flat(theirs(x)))


def test_functional_call() -> None:
    theirs, ours = pair(**RICH)
    named = {name: torch.randn_like(parameter) for name, parameter in ours.named_parameters()}
    results = [flat(torch.func.functional_call(module, named, (padded_x,))) for module in (ours, theirs)
               for padded_x in [torch.ones(STEPS, BATCH, INPUTS)]]  # fmt: skip
    assert_same(*results)


def weight_normed(module: Any) -> Any:
    return parametrizations.weight_norm(module, "weight_hh_l0")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def old_weight_normed(module: Any) -> Any:
    return nn.utils.weight_norm(module, "weight_hh_l0")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("normed", [weight_normed, old_weight_normed])
def test_weight_norm(normed: Any) -> None:
    ours = normed(fastattn.LSTM(INPUTS, HIDDEN))
    plain = fastattn.LSTM(INPUTS, HIDDEN)
    x = padded()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    for _ in range(2):
        result = ours(x)
        for name in plain._flat_weights_names:
            setattr(plain, name, nn.Parameter(getattr(ours, name).detach().clone()))
        assert_same(flat(result), flat(plain(x)))
        optimizer.zero_grad()
        result[0].square().sum().backward()
        assert all(parameter.grad is not None for parameter in ours.parameters())
        optimizer.step()


def test_tied_weights() -> None:
    theirs, ours = pair()
    x = padded()
    for module in (theirs, ours):
        module.bias_hh_l0 = module.bias_ih_l0
    wanted, got = gradients(theirs(x), [theirs.bias_ih_l0]), gradients(ours(x), [ours.bias_ih_l0])
    assert_same(got, wanted)
    first, second = fastattn.LSTM(HIDDEN, HIDDEN), fastattn.LSTM(HIDDEN, HIDDEN)
    second.weight_hh_l0 = first.weight_hh_l0
    model = nn.ModuleList([first, second])
    assert len(list(model.parameters())) == 7
    second(first(torch.randn(2, 1, HIDDEN))[0])[0].sum().backward()
    assert first.weight_hh_l0.grad is not None


def test_hooks_and_frozen_weights() -> None:
    ours = fastattn.LSTM(INPUTS, HIDDEN)
    ours.weight_hh_l0.requires_grad_(False)
    seen = []
    ours.register_forward_hook(lambda *_: seen.append(1))
    ours(padded())[0].sum().backward()
    assert (len(seen), ours.weight_hh_l0.grad) == (1, None)
    assert ours.weight_ih_l0.grad is not None


def test_meta_and_lazy_materialization() -> None:
    with torch.device("meta"):
        ours = fastattn.LSTM(INPUTS, HIDDEN, **RICH)
    out, (h_n, _) = ours(torch.empty(STEPS, BATCH, INPUTS, device="meta"))
    assert (out.shape, h_n.shape) == ((STEPS, BATCH, 6), (4, BATCH, 3))
    ours = ours.to_empty(device="cpu")
    ours.reset_parameters()
    assert flat(ours(padded()))[0].isfinite().all()


def test_torch_s_name_bound_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "LSTM", fastattn.LSTM)
    monkeypatch.setattr(nn, "LSTMCell", fastattn.LSTMCell)
    assert flat(nn.LSTM(INPUTS, HIDDEN)(padded()))[0].shape == (STEPS, BATCH, HIDDEN)
    assert nn.LSTMCell(INPUTS, HIDDEN)(padded()[0])[0].shape == (BATCH, HIDDEN)


def test_threads_share_a_module() -> None:
    ours, x = fastattn.LSTM(INPUTS, HIDDEN, bidirectional=True), padded()
    wanted, found = flat(ours(x)), at_once(lambda: flat(ours(x)), 4)
    assert len(found) == 4
    for got in found:
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_no_warning() -> None:
    ours = fastattn.LSTM(INPUTS, HIDDEN, **RICH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (padded(), packed(padded(), UNSORTED)):
            flat(ours(x))[0].sum().backward()


# Compilers ---------------------------------------------------------------------------------------------------


def inputs_of(kind: str, length: int, dtype: torch.dtype) -> Any:
    x = torch.randn(length, BATCH, INPUTS, dtype=dtype)
    if kind == "padded":
        return x
    lengths = (length, 3, 2) if kind == "sorted" else (2, length, 3)
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=kind == "sorted")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["padded", "sorted", "unsorted"])
@pytest.mark.parametrize("options", [{}, RICH], ids=str)
def test_compiles_once_for_all_lengths(options: dict[str, Any], kind: str, given: bool, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    ours = fastattn.LSTM(INPUTS, HIDDEN, **options, dtype=dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    first = None
    # Beyond the other sizes: equal sizes share a symbol.
    for length in range(11, 17):
        x = inputs_of(kind, length, dtype)
        hx = states(ours, dtype=dtype) if given else None
        got, wanted = compiled(x, hx), ours(x, hx)
        assert_same(flat(got), flat(wanted))
        assert_same(gradients(got, [*ours.parameters()]), gradients(wanted, [*ours.parameters()]))
        with torch.no_grad():
            assert_same(flat(ours(x, hx)), flat(wanted))
        # The probability of dropout, a Python number, may make it compile the first frame twice.
        first = counter.frame_count if first is None else first
    assert counter.frame_count == first


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(INPUTS, INPUTS), fastattn.LSTM(INPUTS, HIDDEN))
    x = padded()
    got = torch.compile(model, fullgraph=True)(x)
    assert_same(flat(got), flat(model(x)))
    assert_same(gradients(got, [*model.parameters()]), gradients(model(x), [*model.parameters()]))


def test_the_cell_compiles() -> None:
    torch._dynamo.reset()
    cell = fastattn.LSTMCell(INPUTS, HIDDEN)

    def loop(x: Tensor) -> Tensor:
        state = None
        for step in range(3):
            state = cell(x[step], state)
        return state[0]

    x = padded()
    got = torch.compile(loop, fullgraph=True, backend="aot_eager")(x)
    assert_same(got, loop(x))
    assert_same(*(torch.autograd.grad(out.sum(), [*cell.parameters()]) for out in (got, loop(x))))


def test_compiles_under_autocast() -> None:
    torch._dynamo.reset()
    ours, x = fastattn.LSTM(INPUTS, HIDDEN), padded()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = torch.compile(ours, fullgraph=True, backend="aot_eager")(x), ours(x)
    assert [part.dtype for part in flat(got)] == [part.dtype for part in flat(wanted)]
    torch.testing.assert_close(got, wanted)


def test_packing_inside_breaks_the_graph_and_stays_right() -> None:
    """TorchDynamo refuses pack_padded_sequence; around that break the results are right."""
    torch._dynamo.reset()
    ours, x = fastattn.LSTM(INPUTS, HIDDEN), padded()

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return ours(pack_padded_sequence(x * 2, lengths, enforce_sorted=False))[1][0]

    lengths = torch.tensor(UNSORTED)
    assert_same(torch.compile(function, backend="aot_eager")(x, lengths), function(x, lengths))


# Export ------------------------------------------------------------------------------------------------------


class Unpacked(nn.Module):
    """An LSTM of a PackedSequence whose parts are the inputs."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm = fastattn.LSTM(INPUTS, HIDDEN, **options)

    def forward(self, *parts: Tensor) -> Any:
        out, state = self.lstm(PackedSequence(*parts))
        return out.data, state


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{}, RICH], ids=str)
def test_export_padded(options: dict[str, Any], strict: bool) -> None:
    ours = fastattn.LSTM(INPUTS, HIDDEN, **options).eval()
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    program = torch.export.export(ours, (padded(),), dynamic_shapes={"input": {0: steps, 1: batch}}, strict=strict)
    for shape in ((STEPS, BATCH, INPUTS), (11, 2, INPUTS)):
        x = torch.randn(shape)
        assert_same(program.module()(x), ours(x))
    program.run_decompositions()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("lengths", [SORTED, UNSORTED], ids=str)
@pytest.mark.parametrize("options", [{}, RICH], ids=str)
def test_export_packed(options: dict[str, Any], lengths: tuple[int, ...], strict: bool) -> None:
    module = Unpacked(**options).eval()
    parts = [part for part in packed(padded(), lengths) if part is not None]
    rows, steps, batch = (torch.export.Dim(name) for name in ("rows", "steps", "batch"))
    dims = [{0: rows}, {0: steps}, {0: batch}, {0: batch}][: len(parts)]
    program = torch.export.export(module, tuple(parts), dynamic_shapes={"parts": tuple(dims)}, strict=strict)
    x = torch.randn(8, 4, INPUTS)
    other = packed(x, (8, 7, 3, 2) if lengths is SORTED else (3, 8, 1, 8))
    for given in (parts, [part for part in other if part is not None]):
        assert_same(program.module()(*given), module(*given))


# Data parallel -----------------------------------------------------------------------------------------------


def test_distributed_data_parallel() -> None:
    theirs, ours = pair(**RICH)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(ours)
        x = padded()
        flat(wrapped(x))[0].square().sum().backward()
        flat(theirs(x))[0].square().sum().backward()
        for got, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_same(got.grad, wanted.grad)
    finally:
        dist.destroy_process_group()
