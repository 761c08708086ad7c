"""fastattn.LSTM and fastattn.LSTMCell in the place of torch's: results, gradients, dtypes, autocast."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from lstm_module_cases import (
    BATCH,
    HIDDEN,
    INPUTS,
    OPTIONS,
    SORTED,
    STEPS,
    UNSORTED,
    TorchLSTMCell,
    assert_same,
    flat,
    gradients,
    packed,
    padded,
    pair,
    states,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import fastattn
from fastattn.dispatch import Backend
from fastattn.kernels.lstm import extension

BACKENDS = ["auto", "torch", "reference"]
BUILT = extension.why_unavailable("cpu") is None
NEEDS_EXTENSION = pytest.mark.skipif(not BUILT, reason="needs the C++ extension")
# oneDNN has no projection and says so once; ours says nothing.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


# Results and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options: dict[str, Any], backend: str) -> None:
    theirs, ours = pair(**options)
    for lengths, batch_first, given in itertools.product((None, SORTED, UNSORTED), (False, True), (False, True)):
        theirs.batch_first = ours.batch_first = batch_first
        leaf = padded(batch_first).requires_grad_()
        x = leaf if lengths is None else packed(leaf, lengths, batch_first)
        hx = states(theirs) if given else None
        wanted = theirs(x, hx)
        with fastattn.backend(backend):
            got = ours(x, hx)
        assert_same(flat(got), flat(wanted))
        if lengths is not None:
            assert all(a is b or torch.equal(a, b) for a, b in zip(got[0][1:], wanted[0][1:], strict=True))
        grads = gradients(got, [leaf, *ours.parameters()], retain_graph=True)
        assert_same(grads, gradients(wanted, [leaf, *theirs.parameters()]), 1e-4)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 3, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(options: dict[str, Any], batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first, **options)
    x = torch.randn(STEPS, INPUTS)
    for hx in (None, states(theirs, batch=None)):
        assert_same(flat(ours(x, hx)), flat(theirs(x, hx)))


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (3, 1, 1)], ids=str)
def test_sequences_of_one_step(lengths: tuple[int, ...]) -> None:
    theirs, ours = pair(bidirectional=True, num_layers=2)
    x = pack_sequence([torch.randn(length, INPUTS) for length in lengths])
    assert_same(flat(ours(x)), flat(theirs(x)))


def test_a_packed_output_unpacks_into_the_caller_s_order() -> None:
    theirs, ours = pair(bidirectional=True)
    x = packed(padded(), UNSORTED)
    out, lengths = pad_packed_sequence(ours(x)[0])
    assert lengths.tolist() == list(UNSORTED)
    assert_same(out, pad_packed_sequence(theirs(x)[0])[0])
    assert type(ours(x)[0]) is PackedSequence


def test_gradients_of_the_states() -> None:
    theirs, ours = pair(num_layers=2, bidirectional=True)
    hx = [state.requires_grad_() for state in states(theirs)]
    for x in (padded(), packed(padded(), UNSORTED)):
        assert_same(gradients(ours(x, tuple(hx)), hx), gradients(theirs(x, tuple(hx)), hx))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}], ids=str)
def test_nothing_in_the_batch(options: dict[str, Any]) -> None:
    theirs, ours = pair(**options)
    x = torch.randn(STEPS, 0, INPUTS)
    assert [part.shape for part in flat(ours(x))] == [part.shape for part in flat(theirs(x))]
    with torch.no_grad():
        assert [part.shape for part in flat(ours(x))] == [part.shape for part in flat(theirs(x))]


@pytest.mark.parametrize("layout", ["expanded", "strided", "transposed"])
def test_layouts(layout: str) -> None:
    theirs, ours = pair(bidirectional=True)
    x = padded()
    if layout == "expanded":
        x = x[:, :1].expand(-1, BATCH, -1)
    elif layout == "strided":
        x = torch.stack((x, x), -1)[..., 0]
    else:
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert not x.is_contiguous()
    assert_same(flat(ours(x)), flat(theirs(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 3}], ids=str)
def test_dtypes(options: dict[str, Any], dtype: torch.dtype) -> None:
    theirs, ours = pair(dtype, **options)
    exact, _ = pair(torch.float64, **options)
    exact.load_state_dict(theirs.state_dict())
    for lengths in (None, UNSORTED):
        x = padded(dtype=dtype)
        plain, wide = (x, x.double()) if lengths is None else (packed(x, lengths), packed(x.double(), lengths))
        results = zip(flat(ours(plain)), flat(theirs(plain)), flat(exact(wide)), strict=True)
        for got, torchs, oracle in results:
            assert got.dtype == dtype
            allowed = 2 * (torchs - oracle).abs().max() + 4 * torch.finfo(dtype).eps
            assert (got - oracle).abs().max() <= allowed
        for grad, parameter in zip(gradients(ours(plain), list(ours.parameters())), ours.parameters(), strict=True):
            assert (grad.dtype, grad.shape) == (dtype, parameter.shape)


# The derivatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, SORTED, UNSORTED], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options: dict[str, Any], lengths: tuple[int, ...] | None) -> None:
    module = fastattn.LSTM(2, 3, **options | {"proj_size": 2 if options["proj_size"] else 0}, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    x = torch.randn(STEPS, BATCH, 2, dtype=torch.float64, requires_grad=True)
    hx = [state.requires_grad_() for state in states(module, dtype=torch.float64)]

    def function(*tensors: Tensor) -> Any:
        x, h0, c0, *weights = tensors
        given = x if lengths is None else packed(x, lengths)
        named = dict(zip(names, weights, strict=True))
        return tuple(flat(torch.func.functional_call(module, named, (given, (h0, c0)))))

    inputs = (x, *hx, *module.parameters())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_the_cell(bias: bool) -> None:
    cell = fastattn.LSTMCell(2, 3, bias=bias, dtype=torch.float64)
    names = [name for name, _ in cell.named_parameters()]

    def function(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Any:
        return torch.func.functional_call(cell, dict(zip(names, weights, strict=True)), (x, (h, c)))

    shapes = ((4, 2), (4, 3), (4, 3))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(function, (*inputs, *cell.parameters()))
    assert torch.autograd.gradgradcheck(function, (*inputs, *cell.parameters()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_in_float32(backend: str) -> None:
    def penalty(module: Any, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), [x, *module.parameters()]))

    theirs, ours = pair(num_layers=2, bidirectional=True)
    x = padded()
    with fastattn.backend(backend):
        got = penalty(ours, x)
    assert_same([grad.double() for grad in got], penalty(theirs.double(), x.double()), 1e-4)


# Transforms --------------------------------------------------------------------------------------------------


def test_gradients_per_sample() -> None:
    """vmap over grad: plain PyTorch serves it."""
    ours = fastattn.LSTM(INPUTS, HIDDEN, bidirectional=True)
    named = dict(ours.named_parameters())
    x = torch.randn(BATCH, STEPS, INPUTS)

    def loss(named: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(ours, named, (x,))[0].square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(named, x)
    for row in range(BATCH):
        wanted = torch.autograd.grad(ours(x[row])[0].square().sum(), list(named.values()))
        assert_same([grads[name][row] for name in named], list(wanted))
    out, tangent = torch.func.jvp(lambda x: ours(x)[0], (x[0],), (torch.ones_like(x[0]),))
    assert out.shape == tangent.shape == (STEPS, 2 * HIDDEN)


# The cell ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_the_cell(batched: bool, bias: bool, backend: str) -> None:
    theirs, ours = TorchLSTMCell(INPUTS, HIDDEN, bias), fastattn.LSTMCell(INPUTS, HIDDEN, bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    rows = (BATCH,) if batched else ()
    x = torch.randn(*rows, INPUTS, requires_grad=True)
    for hx in (None, (torch.randn(*rows, HIDDEN), torch.randn(*rows, HIDDEN))):
        results = []
        for module, name in ((ours, backend), (theirs, "auto")):
            with fastattn.backend(name):
                state = hx
                for _ in range(3):
                    state = module(x, state)
            loss = state[0].square().sum() + state[1].sum()
            results.append([*state, *torch.autograd.grad(loss, [x, *module.parameters()])])
        assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_the_cell(dtype: torch.dtype) -> None:
    theirs, ours = TorchLSTMCell(INPUTS, HIDDEN, dtype=dtype), fastattn.LSTMCell(INPUTS, HIDDEN, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x, h, c = (torch.randn(BATCH, size, dtype=dtype) for size in (INPUTS, HIDDEN, HIDDEN))
    results = ours(x, (h, c)), theirs(x, (h, c)), copy.deepcopy(theirs).double()(x.double(), (h.double(), c.double()))
    for got, plain, oracle in zip(*results, strict=True):
        assert got.dtype == dtype
        assert (got - oracle).abs().max() <= 2 * (plain - oracle).abs().max() + 4 * torch.finfo(dtype).eps


# Autocast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"proj_size": 3}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_autocast_gives_torch_s_dtypes(options: dict[str, Any], weights: torch.dtype, dtype: torch.dtype) -> None:
    theirs, ours = pair(weights, **options)
    kinds = (torch.float64,) if weights == torch.float64 else (torch.float32, torch.bfloat16)
    states_of = (None, *kinds)
    for kind, state, lengths, grad in itertools.product(kinds, states_of, (None, SORTED), (False, True)):
        x = padded(dtype=kind) if lengths is None else packed(padded(dtype=kind), lengths)
        hx = None if state is None else states(theirs, dtype=state)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype):
            try:
                wanted = flat(theirs(x, hx))
            except RuntimeError:
                continue  # oneDNN has no such kernel; ours serves it
            got = flat(ours(x, hx))
        for one, torchs in zip(got, wanted, strict=True):
            assert one.dtype == torchs.dtype
            assert_same(one.float(), torchs.float(), 0.05)


def test_autocast_in_training() -> None:
    ours = fastattn.LSTM(INPUTS, HIDDEN, num_layers=2, dropout=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours(padded())[0].float().sum()
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in ours.parameters())


@pytest.mark.parametrize("hx", [torch.float32, torch.bfloat16, None], ids=str)
def test_autocast_of_the_cell_gives_torch_s_dtypes(hx: torch.dtype | None) -> None:
    theirs, ours = TorchLSTMCell(INPUTS, HIDDEN), fastattn.LSTMCell(INPUTS, HIDDEN)
    ours.load_state_dict(theirs.state_dict())
    state = None if hx is None else (torch.randn(BATCH, HIDDEN).to(hx), torch.randn(BATCH, HIDDEN).to(hx))
    for kind in (torch.float32, torch.bfloat16):
        x = torch.randn(BATCH, INPUTS).to(kind)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for one, torchs in zip(ours(x, state), theirs(x, state), strict=True):
                assert one.dtype == torchs.dtype
                assert_same(one.float(), torchs.float(), 0.05)


# Dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, UNSORTED], ids=str)
@pytest.mark.parametrize("dropout", [0.3, 1.0])
def test_dropout_draws_torch_s_numbers(dropout: float, lengths: tuple[int, ...] | None) -> None:
    theirs, ours = pair(num_layers=3, bidirectional=True, dropout=dropout)
    x = padded() if lengths is None else packed(padded(), lengths)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(7)
        results.append(flat(module(x)))
    assert_same(*results)
    assert_same(flat(ours.eval()(x)), flat(theirs.eval()(x)))


# What serves a call ------------------------------------------------------------------------------------------


@NEEDS_EXTENSION
def test_explain() -> None:
    ours, x = fastattn.LSTM(INPUTS, HIDDEN), padded()
    chosen = ours.explain(x)
    assert chosen.backend is Backend.CPU
    assert "device cpu" in chosen.why_not[Backend.CUDA]
    assert "cpu is preferred" in chosen.why_not[Backend.TORCH]
    assert ours.explain(packed(x, UNSORTED)).backend is Backend.CPU
    wide = fastattn.LSTM(INPUTS, HIDDEN, dtype=torch.float64).explain(x.double())
    assert wide.backend is Backend.TORCH
    assert "dtype torch.float64" in wide.why_not[Backend.CPU]
    with fastattn.backend("torch"):
        assert "forced" in str(ours.explain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastattn.LSTMCell(INPUTS, HIDDEN).explain(x[0]).backend is Backend.CPU
    with pytest.raises(RuntimeError, match="Expected 5, got 4"):
        ours.explain(x[..., :4])


@pytest.mark.parametrize("name", ["sdpa", "triton"])
def test_a_backend_of_attention_refuses(name: str) -> None:
    with (
        fastattn.backend(name),
        pytest.raises(RuntimeError, match=rf'backend\("{name}"\) cannot serve this call: it serves attention'),
    ):
        fastattn.LSTM(INPUTS, HIDDEN)(padded())


@pytest.mark.parametrize("name", ["torch", "cuda"])
def test_a_backend_of_the_lstm_refuses_attention(name: str) -> None:
    q = torch.randn(1, 1, 2, 4)
    with fastattn.backend(name), pytest.raises(RuntimeError, match="cannot serve this call: it serves an LSTM"):
        fastattn.scaled_dot_product_attention(q, q, q)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own LSTM serves the call, and explain says why."""
    monkeypatch.setattr(extension, "_NOT_BUILT", "the C++ extension fastattn._C is not built")
    theirs, ours = pair(num_layers=2)
    x = padded()
    assert ours.explain(x).backend is Backend.TORCH
    assert "not built" in ours.explain(x).why_not[Backend.CPU]
    assert_same(flat(ours(x)), flat(theirs(x)))
    with fastattn.backend("cpu"), pytest.raises(RuntimeError, match="cannot serve this call: the C\\+\\+ extension"):
        ours(x)


def test_an_extension_without_the_lstm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_NOT_BUILT", None)
    monkeypatch.setitem(extension.forward, "cpu", None)
    assert "built without the LSTM" in fastattn.LSTM(2, 3).explain(torch.randn(1, 1, 2)).why_not[Backend.CPU]


def test_a_cuda_build_is_not_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that no real device has verified wait to be asked for."""
    from fastattn import lstm_dispatch

    monkeypatch.setattr(extension, "why_unavailable", lambda _: None)
    chosen = lstm_dispatch.explain("cuda", torch.float16)
    assert chosen.backend is (Backend.CUDA if extension.verified() else Backend.TORCH)
    if not extension.verified():
        assert "not verified on this device" in chosen.why_not[Backend.CUDA]


def test_the_module_is_torch_s_to_a_reader() -> None:
    theirs, ours = pair(num_layers=2, dropout=0.1, batch_first=True, proj_size=2, bidirectional=True, bias=False)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, nn.RNNBase)
    assert [len(weights) for weights in ours.all_weights] == [len(weights) for weights in theirs.all_weights]
    assert isinstance(fastattn.LSTMCell(2, 3), TorchLSTMCell)
