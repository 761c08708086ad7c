"""Bad calls of LayerNormLSTM and LayerNormLSTMCell: torch's exception types, messages that name the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import fastattn
from fastattn import LayerNormLSTM, LayerNormLSTMCell
from fastattn.kernels.attention import extension

BACKENDS = ["reference", *(["cpu"] if extension.UNAVAILABLE is None else [])]

CONSTRUCTOR: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_size": 0}, ValueError, "input_size: got 0, expected at least 1"),
    ({"hidden_size": 2.5}, TypeError, "hidden_size: got float, expected an integer"),
    ({"hidden_size": -1}, ValueError, "hidden_size: got -1"),
    ({"num_layers": 0}, ValueError, "num_layers: got 0"),
    ({"bias": 1}, TypeError, "bias: got int, expected True or False"),
    ({"batch_first": "yes"}, TypeError, "batch_first: got str"),
    ({"bidirectional": None}, TypeError, "bidirectional: got NoneType"),
    ({"dropout": 1.5}, ValueError, r"dropout: got 1.5, allowed is \[0, 1\]"),
    ({"dropout": "0.1"}, TypeError, r"dropout: got str, expected a float in \[0, 1\]"),
    ({"dropout": True}, TypeError, "dropout: got bool"),
    ({"zoneout": -0.1}, ValueError, "zoneout: got -0.1"),
    ({"zoneout": (0.1, 0.2, 0.3)}, ValueError, "zoneout: got 3 numbers"),
    ({"zoneout": "0.1"}, TypeError, "zoneout: got str"),
    ({"zoneout": (0.1, float("nan"))}, ValueError, "zoneout: got nan"),
    ({"recurrent_dropout": 2}, ValueError, "recurrent_dropout: got 2"),
    ({"recurrent_dropout_mode": "always"}, ValueError, "recurrent_dropout_mode: got 'always', expected 'variational'"),
    ({"eps": 0.0}, ValueError, "eps: got 0.0, expected a positive float"),
    ({"eps": None}, TypeError, "eps: got NoneType"),
    ({"forget_bias": "1"}, TypeError, "forget_bias: got str"),
    ({"proj_size": 2}, TypeError, "unexpected keyword argument 'proj_size'"),
]


@pytest.mark.parametrize("row", CONSTRUCTOR, ids=[row[2] for row in CONSTRUCTOR])
def test_bad_constructor(row: Any) -> None:
    options, error, message = row
    with pytest.raises(error, match=message):
        LayerNormLSTM(**({"input_size": 3, "hidden_size": 4} | options))


X = torch.zeros(5, 2, 3)
S = torch.zeros(1, 2, 4)
CALLS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((None,), AttributeError, "input: got NoneType, expected a torch.Tensor or a PackedSequence"),
    (([1.0],), AttributeError, "input: got list"),
    ((X[0, 0],), ValueError, "input: got 1 dimensions, expected 3, or 2 without a batch"),
    ((X[None],), ValueError, "input: got 4 dimensions"),
    ((X[..., :2],), RuntimeError, "input: got 2 features, expected input_size = 3"),
    ((X.double(),), ValueError, "input: got dtype torch.float64, expected the parameters' torch.float32"),
    ((X.long(),), ValueError, "input: got dtype torch.int64"),
    ((X.to("meta"),), RuntimeError, "input: got device meta, expected the parameters' cpu"),
    ((X[:0],), RuntimeError, "input: got a sequence of 0 steps"),
    ((X, S), TypeError, "hx: got Tensor, expected a pair of tensors"),
    ((X, (S,)), TypeError, "hx: got 1 elements"),
    ((X, (S, None)), TypeError, "hx: got .*expected a pair of tensors"),
    ((X, (S[0], S[0])), RuntimeError, "hx: got a state of 2 dimensions, expected 3"),
    ((X[:, 0], (S, S)), RuntimeError, "hx: got a state of 3 dimensions, expected 2"),
    ((X, (S[..., :3], S)), RuntimeError, r"hx: got a hidden state of shape \(1, 2, 3\), expected \(1, 2, 4\)"),
    ((X, (S, S[:, :1])), RuntimeError, r"hx: got a cell state of shape \(1, 1, 4\)"),
    ((X, (S.expand(2, -1, -1), S)), RuntimeError, r"hx: got a hidden state of shape \(2, 2, 4\)"),
    ((X, (S.double(), S)), RuntimeError, "hx: got a hidden state of dtype torch.float64"),
    ((X, (S, S.to("meta"))), RuntimeError, "hx: got a cell state on meta"),
    ((X, None, "yes"), TypeError, "return_all_states: got str"),
    ((PackedSequence(X, torch.tensor([2])),), RuntimeError, "input: got packed data of 3 dimensions"),
    ((PackedSequence(X[0, :, :2], torch.tensor([2])),), RuntimeError, "input: got 2 features"),
    ((PackedSequence(X[0], torch.tensor([2])), (S[:, :1], S)), RuntimeError, "hx: got a hidden state of shape"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", CALLS, ids=[row[2] for row in CALLS])
def test_bad_call(row: Any, backend: str) -> None:
    arguments, error, message = row
    with fastattn.backend(backend), pytest.raises(error, match=message):
        LayerNormLSTM(3, 4)(*arguments)


CELL_CALLS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((None,), AttributeError, "input: got NoneType, expected a torch.Tensor"),
    ((X,), ValueError, "input: got 3 dimensions, expected 2, or 1 without a batch"),
    ((X[0, :, :2],), RuntimeError, "input: got 2 features, expected input_size = 3"),
    ((X[0].half(),), ValueError, "input: got dtype torch.float16"),
    ((X[0], S[0]), TypeError, "hx: got Tensor"),
    ((X[0], (S, S)), RuntimeError, "hx: got a state of 3 dimensions, expected 2"),
    ((X[0], (S[0, :1], S[0])), RuntimeError, r"hx: got a hidden state of shape \(1, 4\), expected \(2, 4\)"),
    ((X[0], (S[0], S[0].double())), RuntimeError, "hx: got a cell state of dtype torch.float64"),
    ((PackedSequence(X[0], torch.tensor([2])),), AttributeError, "input: got PackedSequence"),
]


@pytest.mark.parametrize("row", CELL_CALLS, ids=[row[2] for row in CELL_CALLS])
def test_bad_call_of_the_cell(row: Any) -> None:
    arguments, error, message = row
    with pytest.raises(error, match=message):
        LayerNormLSTMCell(3, 4)(*arguments)


def test_a_backend_that_cannot_serve_the_call_says_so() -> None:
    module, wide = LayerNormLSTM(3, 4), LayerNormLSTM(3, 4, dtype=torch.float64)
    with fastattn.backend("triton"), pytest.raises(RuntimeError, match='backend\\("triton"\\) cannot serve'):
        module(X)
    with fastattn.backend("cpu"), pytest.raises(RuntimeError, match="float64"):
        wide(X.double())
