"""LayerNormLSTM and LayerNormLSTMCell: what they mean, gradients, noise, compilers and containers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, unpack_sequence

import fastattn
from fastattn import LayerNormLSTM, LayerNormLSTMCell
from fastattn.kernels.attention import extension

F64 = torch.float64
BACKENDS = ["reference", *(["cpu"] if extension.UNAVAILABLE is None else [])]


def by_hand(module: LayerNormLSTM, input: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction from the papers' equations, evaluation mode: input (T, B, I), states (B, H)."""

    def normalised(x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + module.eps).sqrt()

    def get(name: str) -> Any:
        return getattr(module, f"{name}_l0", 0.0)

    out = []
    for x in input:
        sums = get("layer_norm_ih_weight") * normalised(x @ get("weight_ih").T)
        sums = sums + get("layer_norm_hh_weight") * normalised(h @ get("weight_hh").T) + get("bias")
        i, f, g, o = sums.chunk(4, -1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * (get("layer_norm_c_weight") * normalised(new_c) + get("layer_norm_c_bias")).tanh()
        h = module.zoneout[0] * h + (1.0 - module.zoneout[0]) * new_h
        c = module.zoneout[1] * c + (1.0 - module.zoneout[1]) * new_c
        out.append(h)
    return torch.stack(out), h, c


def scrambled(module: nn.Module) -> Any:
    """The module with gains and biases that are not their initial ones."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_is_what_the_papers_say(backend: str, bias: bool) -> None:
    dtype = F64 if backend == "reference" else torch.float32
    module = scrambled(LayerNormLSTM(3, 5, bias=bias, zoneout=(0.2, 0.3), dtype=dtype)).eval()
    input, h, c = (torch.randn(shape, dtype=dtype) for shape in ((4, 2, 3), (1, 2, 5), (1, 2, 5)))
    with fastattn.backend(backend):
        out, (h_n, c_n) = module(input, (h, c))
    expected = by_hand(module, input, h[0], c[0])
    for result, wanted in zip((out, h_n[0], c_n[0]), expected, strict=True):
        torch.testing.assert_close(result, wanted)


def test_parameters_are_named_and_drawn_as_those_of_torch() -> None:
    module = LayerNormLSTM(3, 4, num_layers=2, bidirectional=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes["weight_ih_l0"] == (16, 3)
    assert shapes["weight_ih_l1_reverse"] == (16, 8)
    assert shapes["weight_hh_l1"] == shapes["weight_hh_l0_reverse"] == (16, 4)
    assert shapes["bias_l0"] == shapes["layer_norm_ih_weight_l0"] == shapes["layer_norm_hh_weight_l1_reverse"] == (16,)
    assert shapes["layer_norm_c_weight_l0"] == shapes["layer_norm_c_bias_l1"] == (4,)
    assert len(shapes) == 28
    assert [len(group) for group in module.all_weights] == [7] * 4
    assert all(parameter.abs().max() <= 0.5 for name, parameter in module.named_parameters() if "norm" not in name)
    assert all((parameter == float("weight" in name)).all() for name, parameter in module.named_parameters()
               if "norm" in name)  # fmt: skip
    assert not [name for name, _ in LayerNormLSTM(3, 4, bias=False).named_parameters() if "bias" in name]
    forgetful = LayerNormLSTM(3, 4, forget_bias=1.5)
    assert (forgetful.bias_l0[4:8] == 1.5).all()
    assert (forgetful.bias_l0[:4] != 1.5).all()


def _loss(results: Any) -> Tensor:
    """A number that depends on every result."""
    out, (h, c), *cells = results
    parts = [part.data if isinstance(part, PackedSequence) else part for part in (out, h, c, *cells)]
    return sum(((number + 1) * part.square()).sum() for number, part in enumerate(parts))  # type: ignore[return-value]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_first_and_second_derivatives(packed: bool, bias: bool) -> None:
    options: Any = {"num_layers": 2, "bidirectional": packed, "bias": bias, "zoneout": 0.2, "recurrent_dropout": 0.2}
    module = scrambled(LayerNormLSTM(2, 2, **options, dtype=F64))
    names, parameters = zip(*module.named_parameters(), strict=True)
    states = 4 if packed else 2
    rows = (5, 2) if packed else (3, 2, 2)
    tensors = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in (rows, (states, 2, 2), (states, 2, 2))]

    def call(input: Tensor, h: Tensor, c: Tensor, *values: Tensor) -> Any:
        torch.manual_seed(0)
        given: Any = PackedSequence(input, torch.tensor([2, 2, 1])) if packed else input
        named = dict(zip(names, values, strict=True))
        return _loss(functional_call(module, named, (given, (h, c)), {"return_all_states": True}))

    assert torch.autograd.gradcheck(call, (*tensors, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (*tensors, *parameters), fast_mode=True)


@pytest.mark.skipif("cpu" not in BACKENDS, reason=str(extension.UNAVAILABLE))
def test_second_derivative_of_the_kernel() -> None:
    module = scrambled(LayerNormLSTM(3, 4, zoneout=0.3))
    module.double()
    wide = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    input = torch.randn(4, 2, 3, dtype=F64)
    found = []
    for dtype in (torch.float32, F64):
        module.to(dtype).load_state_dict({name: value.to(dtype) for name, value in wide.items()})
        torch.manual_seed(1)
        parameters = list(module.parameters())
        grads = torch.autograd.grad(_loss(module(input.to(dtype))), parameters, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_equals_each_sequence_alone(backend: str, enforce_sorted: bool) -> None:
    dtype = F64 if backend == "reference" else torch.float32
    lengths = (6, 4, 4, 1) if enforce_sorted else (1, 4, 6, 4)
    options: Any = {"num_layers": 2, "bidirectional": True, "zoneout": 0.1, "recurrent_dropout": 0.5, "dropout": 0.5}
    module = scrambled(LayerNormLSTM(3, 5, **options, dtype=dtype)).eval()
    sequences = [torch.randn(length, 3, dtype=dtype) for length in lengths]
    packed = pack_sequence(sequences, enforce_sorted=enforce_sorted)
    h, c = torch.randn(2, 4, 4, 5, dtype=dtype)
    with fastattn.backend(backend):
        out, (h_n, c_n), cells = module(packed, (h, c), return_all_states=True)
        unpacked = zip(unpack_sequence(out), unpack_sequence(cells), strict=True)
        for row, (sequence, found) in enumerate(zip(sequences, unpacked, strict=True)):
            expected = module(sequence, (h[:, row], c[:, row]), return_all_states=True)
            results = (found[0], (h_n[:, row], c_n[:, row]), found[1])
            torch.testing.assert_close(results, expected)
    assert torch.equal(out.batch_sizes, packed.batch_sizes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_agree(backend: str) -> None:
    dtype = F64 if backend == "reference" else torch.float32
    module = scrambled(LayerNormLSTM(3, 5, 2, bidirectional=True, dtype=dtype))
    batch_first = LayerNormLSTM(3, 5, 2, bidirectional=True, batch_first=True, dtype=dtype)
    batch_first.load_state_dict(module.state_dict())
    input = torch.randn(4, 2, 3, dtype=dtype)
    with fastattn.backend(backend):
        out, (h, c), cells = module(input, return_all_states=True)
        turned, states, turned_cells = batch_first(input.transpose(0, 1), return_all_states=True)
        torch.testing.assert_close((turned.transpose(0, 1), states, turned_cells.transpose(0, 1)), (out, (h, c), cells))
        alone, (h_1, c_1), cells_1 = module(input[:, 1], return_all_states=True)
        torch.testing.assert_close((out[:, 1], h[:, 1], c[:, 1], cells[:, 1]), (alone, h_1, c_1, cells_1))
        assert torch.equal(batch_first(input[:, 1])[0], module(input[:, 1])[0])
    torch.testing.assert_close(cells[-1, :, :5], c[2])
    torch.testing.assert_close(cells[0, :, 5:], c[3])
    assert h.shape == (4, 2, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_cell_is_one_step(backend: str, bias: bool) -> None:
    dtype = F64 if backend == "reference" else torch.float32
    layer = scrambled(LayerNormLSTM(3, 5, bias=bias, zoneout=(0.1, 0.2), dtype=dtype)).eval()
    cell = LayerNormLSTMCell(3, 5, bias=bias, zoneout=(0.1, 0.2), dtype=dtype).eval()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    input, h, c = torch.randn(4, 2, 3, dtype=dtype), torch.zeros(2, 5, dtype=dtype), torch.zeros(2, 5, dtype=dtype)
    with fastattn.backend(backend):
        out, (h_n, c_n) = layer(input)
        assert all(map(torch.equal, cell(input[0]), cell(input[0], (h, c))))
        for step, x in enumerate(input):
            alone = cell(x[1], (h[1], c[1]))
            h, c = cell(x, (h, c))
            torch.testing.assert_close(h, out[step])
            torch.testing.assert_close(alone, (h[1], c[1]))
    torch.testing.assert_close(c, c_n[0])
    assert torch.equal(h_n[0], out[-1])


# Noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["variational", "step"])
def test_noise_follows_manual_seed(backend: str, mode: str) -> None:
    module = LayerNormLSTM(
        3, 16, 2, dropout=0.3, zoneout=0.2, recurrent_dropout=0.3, recurrent_dropout_mode=mode, bidirectional=True
    )
    input = torch.randn(5, 4, 3)
    with fastattn.backend(backend):
        results = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            results.append(module(input)[0])
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])
        module.eval()
        assert torch.equal(module(input)[0], module(input)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_zoneout_keeps_states_with_its_probability(backend: str) -> None:
    module = LayerNormLSTM(3, 64, zoneout=(0.3, 0.1))
    with fastattn.backend(backend):
        out, _, cells = module(torch.randn(10, 32, 3), return_all_states=True)
    for states, probability in ((out, 0.3), (cells, 0.1)):
        kept = (states[1:] == states[:-1]).double().mean().item()
        deviation = (probability * (1.0 - probability) / (9 * 32 * 64)) ** 0.5
        assert abs(kept - probability) < 5.0 * deviation
    module = LayerNormLSTM(3, 64, zoneout=1.0)
    h, c = torch.randn(2, 1, 2, 64)
    with fastattn.backend(backend):
        out, states = module(torch.randn(3, 2, 3), (h, c))
    torch.testing.assert_close(states, (h, c), rtol=0.0, atol=0.0)
    assert torch.equal(out, h.expand(3, -1, -1))


@pytest.mark.parametrize("mode", ["variational", "step"])
def test_recurrent_dropout_zeroes_what_w_hh_reads(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its masks: one for all steps or one each, with the right mean, zero or 1 / (1 - p); none in evaluation."""
    drawn = []
    from fastattn.modules import layer_norm_lstm

    layer = layer_norm_lstm.layer

    def spying(*args: Any) -> Any:
        drawn.append(args[5])
        return layer(*args)

    monkeypatch.setattr(layer_norm_lstm, "layer", spying)
    module = LayerNormLSTM(3, 64, 2, bidirectional=True, recurrent_dropout=0.25, recurrent_dropout_mode=mode)
    module(torch.randn(10, 32, 3))
    assert len(drawn) == 2
    for noise in drawn:
        rows = 32 if mode == "variational" else 320
        assert noise.h_mask.shape == (rows, 2, 64)
        assert ((noise.h_mask == 0.0) | (noise.h_mask == 1.0 / 0.75)).all()
        dropped = (noise.h_mask == 0.0).double().mean().item()
        assert abs(dropped - 0.25) < 5.0 * (0.25 * 0.75 / (rows * 128)) ** 0.5
        assert noise[1:] == (None, None, 0.0, 0.0)
    module.eval()(torch.randn(2, 1, 3))
    assert drawn[-1] == (None, None, None, 0.0, 0.0)
    # With everything dropped the hidden state does not reach the sums.
    module = LayerNormLSTM(3, 4, recurrent_dropout=1.0, recurrent_dropout_mode=mode)
    input, h = torch.randn(1, 2, 3), torch.randn(2, 1, 2, 4)
    c = torch.randn(1, 2, 4)
    assert torch.equal(module(input, (h[0], c))[0], module(input, (h[1], c))[0])


def test_dropout_acts_between_layers_in_training_only() -> None:
    with pytest.warns(UserWarning, match="num_layers = 1"):
        LayerNormLSTM(3, 4, dropout=0.5)
    module = LayerNormLSTM(3, 4, 2, dropout=1.0)
    torch.testing.assert_close(module(torch.randn(3, 2, 3))[0], module(torch.randn(3, 2, 3))[0])
    module.eval()
    assert not torch.equal(module(torch.randn(3, 2, 3))[0], module(torch.randn(3, 2, 3))[0])


# Dtypes, compilers, containers -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    module = scrambled(LayerNormLSTM(3, 5, 2, bidirectional=True, zoneout=0.1, recurrent_dropout=0.1, dtype=dtype))
    input = torch.randn(4, 2, 3, dtype=dtype)
    out, (h, c), cells = module(input, return_all_states=True)
    assert {tensor.dtype for tensor in (out, h, c, cells)} == {dtype}
    _loss(module(input)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    module.eval()
    for backend in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16), fastattn.backend(backend):
            out, (h, c) = module(input)
            cell = LayerNormLSTMCell(3, 5, dtype=dtype)(input[0])
        expected = F64 if dtype == F64 else torch.bfloat16
        assert {tensor.dtype for tensor in (out, h, c, *cell)} == {expected}
    torch.testing.assert_close(out.double(), module(input)[0].double(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_whole_and_once_for_all_lengths(backend: str, compiler: str) -> None:
    torch._dynamo.reset()
    module = scrambled(LayerNormLSTM(3, 5, 2, bidirectional=True, zoneout=0.1)).eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=compiler)
    parameters = list(module.parameters())
    with fastattn.backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for length in (11, 14, 19):
            input = torch.randn(length, 7, 3)
            results = compiled(input, return_all_states=True)
            expected = module(input, return_all_states=True)
            torch.testing.assert_close(results, expected)
            grads = torch.autograd.grad(_loss(results), parameters)
            wanted = torch.autograd.grad(_loss(expected), parameters)
            torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_packed_input_and_the_cell(backend: str) -> None:
    torch._dynamo.reset()
    module = scrambled(LayerNormLSTM(3, 5, bidirectional=True))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    packed = pack_sequence([torch.randn(length, 3) for length in (2, 5, 4)], enforce_sorted=False)
    cell = LayerNormLSTMCell(3, 5)
    with fastattn.backend(backend):
        out, states = compiled(packed)
        expected, expected_states = module(packed)
        torch.testing.assert_close((out.data, states), (expected.data, expected_states))
        step = torch.compile(cell, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(step(packed.data), cell(packed.data))


def test_copies_pickles_and_loads() -> None:
    module = scrambled(LayerNormLSTM(3, 4, 2, zoneout=(0.1, 0.2), recurrent_dropout=0.1)).eval()
    input = torch.randn(3, 2, 3)
    expected = module(input)[0]
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = LayerNormLSTM(3, 4, 2, zoneout=(0.1, 0.2)).eval()
    loaded.load_state_dict(torch.load(buffer))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(input)[0], expected)
    halved = {name: parameter / 2 for name, parameter in module.named_parameters()}
    assert not torch.equal(functional_call(module, halved, (input,))[0], expected)
    assert repr(module) == (
        "LayerNormLSTM(3, 4, num_layers=2, zoneout=(0.1, 0.2), recurrent_dropout=0.1, "
        "recurrent_dropout_mode='variational')"
    )
    assert repr(LayerNormLSTMCell(3, 4, bias=False)) == "LayerNormLSTMCell(3, 4, bias=False)"
    cell = LayerNormLSTMCell(3, 4, zoneout=0.1)
    torch.manual_seed(0)
    expected = cell(input[0])[0]
    torch.manual_seed(0)
    assert torch.equal(pickle.loads(pickle.dumps(cell))(input[0])[0], expected)


def test_transforms_of_torch_func() -> None:
    module = scrambled(LayerNormLSTM(3, 4)).eval()
    parameters = dict(module.named_parameters())
    inputs = torch.randn(5, 6, 2, 3)

    def loss(values: dict[str, Tensor], input: Tensor) -> Tensor:
        return _loss(functional_call(module, values, (input,)))

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, inputs)
    for number, input in enumerate(inputs):
        expected = torch.autograd.grad(loss(parameters, input), list(parameters.values()))
        for (name, grads), wanted in zip(found.items(), expected, strict=True):
            torch.testing.assert_close(grads[number], wanted, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: n + text)


def test_trains_in_float32() -> None:
    module = LayerNormLSTM(2, 24, zoneout=0.05)
    head = nn.Linear(24, 1)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.02)
    input = torch.randn(6, 64, 2)
    target = input[:, :, 0].cumsum(0).tanh()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (head(module(input)[0]).squeeze(-1) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    module = LayerNormLSTM(3, 4, 2, bidirectional=True)
    with fastattn.backend(backend):
        out, (h, c), cells = module(torch.randn(5, 0, 3), return_all_states=True)
        assert (out.shape, h.shape, c.shape, cells.shape) == ((5, 0, 8), (4, 0, 4), (4, 0, 4), (5, 0, 8))
        out.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in module.parameters())


def test_padding_after_a_sequence_changes_nothing() -> None:
    module = scrambled(LayerNormLSTM(3, 5)).eval()
    packed = pack_sequence([torch.randn(length, 3) for length in (5, 3)])
    out, lengths = pad_packed_sequence(module(packed)[0])
    padded, _ = pad_packed_sequence(packed)
    torch.testing.assert_close(out[: lengths[1], 1], module(padded)[0][: lengths[1], 1])
