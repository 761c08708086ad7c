"""patch and unpatch of nn.LSTM and nn.LSTMCell; see fastattn/patching.py."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from lstm_module_cases import HIDDEN, INPUTS, STEPS, TorchLSTM, TorchLSTMCell, assert_same, flat, packed, padded
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastattn


class Tagger(nn.Module):
    """Both kinds of module below a root, one of them shared."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = TorchLSTM(INPUTS, HIDDEN, num_layers=2, bidirectional=True)
        self.cell = TorchLSTMCell(2 * HIDDEN, HIDDEN)
        self.again = self.lstm

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        state = None
        for step in out:
            state = self.cell(step, state)
        return state[0] + self.again(x)[1][0][0]


class Harmless(nn.LSTM):
    """A subclass that adds to nn.LSTM without touching the computation."""

    def __init__(self, *args: Any, label: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label = label

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.bias_hh_l0.fill_(0.5)


class HarmlessCell(nn.LSTMCell):
    pass


class WithForward(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        out, state = super().forward(input, hx)
        return 2 * out, state


class WithChecks(nn.LSTM):
    def check_forward_args(self, *args: Any) -> None:
        super().check_forward_args(*args)


class CellWithForward(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input, hx)


def test_both_are_replaced_and_compute_the_same() -> None:
    model, x = Tagger(), padded()
    wanted = model(x)
    report = fastattn.patch(model)
    assert report.replaced == ["lstm", "cell"]
    assert report.skipped == {}
    assert type(model.lstm) is fastattn.LSTM
    assert type(model.cell) is fastattn.LSTMCell
    assert model.again is model.lstm
    assert isinstance(model.lstm, nn.RNNBase)
    # TorchDynamo refuses instances of that class.
    assert not isinstance(model.lstm, TorchLSTM)
    assert_same(model(x), wanted)


def test_unpatch_restores() -> None:
    model, x = Tagger(), padded()
    wanted, before = model(x), {name: dict(module.__dict__) for name, module in model.named_modules()}
    fastattn.patch(model)
    assert fastattn.unpatch(model) == ["lstm", "cell"]
    assert (type(model.lstm), type(model.cell)) == (TorchLSTM, TorchLSTMCell)
    assert {name: module.__dict__.keys() for name, module in model.named_modules()} == {
        name: entries.keys() for name, entries in before.items()
    }
    assert torch.equal(model(x), wanted)
    assert fastattn.unpatch(model) == []


def test_patching_again_changes_nothing() -> None:
    model = Tagger()
    fastattn.patch(model)
    again = fastattn.patch(model)
    assert (again.replaced, again.skipped) == ([], {"lstm": "already fastattn", "cell": "already fastattn"})
    assert fastattn.unpatch(model) == ["lstm", "cell"]


def test_modules_built_as_ours_stay() -> None:
    model = nn.ModuleList([fastattn.LSTM(2, 3), fastattn.LSTMCell(2, 3)])
    assert fastattn.patch(model).skipped == {"0": "already fastattn", "1": "already fastattn"}
    assert fastattn.unpatch(model) == []
    assert type(model[0]) is fastattn.LSTM


@pytest.mark.parametrize("cls", [TorchLSTM, TorchLSTMCell])
def test_the_root_itself(cls: Any) -> None:
    model = cls(INPUTS, HIDDEN)
    x = padded() if cls is TorchLSTM else padded()[0]
    wanted = model(x)
    assert fastattn.patch(model).replaced == [""]
    assert_same(model(x), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}, {"bias": False}, {"batch_first": True},
        {"dtype": torch.float64},
    ],
    ids=str,
)  # fmt: skip
def test_every_construction_option_survives(options: dict[str, Any]) -> None:
    model = TorchLSTM(INPUTS, HIDDEN, **options)
    dtype = options.get("dtype", torch.float32)
    inputs = [padded(dtype=dtype), packed(padded(dtype=dtype), (2, 6, 1))]
    wanted = [flat(model(x)) for x in inputs]
    fastattn.patch(model)
    assert_same([flat(model(x)) for x in inputs], wanted)


# Subclasses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Harmless(INPUTS, HIDDEN, label="x"), HarmlessCell(INPUTS, HIDDEN)])
def test_a_harmless_subclass_keeps_its_class(model: Any) -> None:
    model = copy.deepcopy(model)
    cls = type(model)
    ours = fastattn.LSTM if isinstance(model, TorchLSTM) else fastattn.LSTMCell
    x = padded() if isinstance(model, TorchLSTM) else padded()[0]
    wanted = model(x)
    assert fastattn.patch(model).replaced == [""]
    assert isinstance(model, cls)
    assert isinstance(model, ours)
    assert model.explain(x).backend in fastattn.dispatch.LSTM_BACKENDS
    assert_same(model(x), wanted)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(copied(x), wanted)
        assert fastattn.unpatch(copied) == [""]
        assert type(copied) is cls
    assert fastattn.unpatch(model) == [""]
    assert type(model) is cls


def test_a_subclass_method_of_its_own_stays_in_force() -> None:
    model = Harmless(INPUTS, HIDDEN)
    fastattn.patch(model)
    with torch.no_grad():
        model.bias_hh_l0.zero_()
    model.reset_parameters()
    assert torch.equal(model.bias_hh_l0, torch.full((4 * HIDDEN,), 0.5))


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (WithForward, "WithForward has its own forward"),
        (CellWithForward, "CellWithForward has its own forward"),
        (WithChecks, "WithChecks overrides check_forward_args, which may change what it computes"),
    ],
)
def test_what_is_skipped(cls: Any, reason: str) -> None:
    model = nn.Sequential(cls(INPUTS, HIDDEN))
    report = fastattn.patch(model)
    assert report.replaced == []
    assert report.skipped == {"0": reason}
    assert type(model[0]) is cls


def test_a_forward_set_on_the_instance_is_skipped() -> None:
    model = TorchLSTM(INPUTS, HIDDEN)
    model.forward = lambda x: x
    assert "on the instance" in fastattn.patch(model).skipped[""]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("cls", [TorchLSTM, TorchLSTMCell])
def test_a_scripted_module_is_skipped(cls: Any) -> None:
    report = fastattn.patch(nn.Sequential(torch.jit.script(cls(INPUTS, HIDDEN))))
    assert "TorchScript" in report.skipped["0"]


def test_other_recurrent_modules_are_left_alone() -> None:
    model = nn.ModuleList([nn.GRU(2, 3), nn.RNN(2, 3), nn.GRUCell(2, 3), nn.RNNCell(2, 3)])
    report = fastattn.patch(model)
    assert (report.replaced, report.skipped) == ([], {})


# State -------------------------------------------------------------------------------------------------------


def test_parameters_stay_the_same_objects_and_train() -> None:
    model, x = Tagger(), padded()
    parameters = dict(model.named_parameters())
    keys, optimizer = list(model.state_dict()), torch.optim.SGD(model.parameters(), lr=0.1)
    fastattn.patch(model)
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    first = model(x).square().mean()
    first.backward()
    optimizer.step()
    assert model(x).square().mean() < first


@pytest.mark.parametrize("patched_first", [True, False])
def test_parametrized_weights(patched_first: bool) -> None:
    model, x = TorchLSTM(INPUTS, HIDDEN), padded()
    if patched_first:
        fastattn.patch(model)
    parametrizations.weight_norm(model, "weight_hh_l0")
    wanted = flat(model(x))
    if not patched_first:
        assert fastattn.patch(model).replaced == [""]
    assert isinstance(model, fastattn.LSTM)
    assert_same(flat(model(x)), wanted)
    flat(model(x))[0].sum().backward()
    assert model.parametrizations.weight_hh_l0.original0.grad is not None


def test_copies_and_files() -> None:
    model, x = Tagger(), padded()
    fastattn.patch(model)
    wanted = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.lstm) is fastattn.LSTM
        assert torch.equal(copied(x), wanted)
        fastattn.unpatch(copied)
        assert type(copied.lstm) is TorchLSTM
        assert_same(copied(x), wanted)


def test_a_patched_model_compiles() -> None:
    torch._dynamo.reset()
    model, x = TorchLSTM(INPUTS, HIDDEN), padded()
    fastattn.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(flat(compiled(x)), flat(model(x)))


def test_need_weights_is_for_attention_alone() -> None:
    model = nn.ModuleList([TorchLSTM(INPUTS, HIDDEN), nn.MultiheadAttention(4, 2)])
    fastattn.patch(model, need_weights=False)
    assert "need_weights" not in model[0].__dict__
    assert model[1].need_weights is False
    assert flat(model[0](padded()))[0].shape[0] == STEPS
