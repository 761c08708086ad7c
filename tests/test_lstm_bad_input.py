"""Bad and borderline calls of the LSTM modules and operators: each raises an error that helps, or is right.

An error names the argument, what was given and what is allowed. The exceptions of the modules are torch's, except that
an argument of another type is a TypeError where torch's is an AttributeError. The operators are public to callers from
C++ too: their own checks are in csrc, so these calls go straight to the extension.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_input import BF16, C64, F16, F32, F64, I64, RE, TE, VE
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastattn
from fastattn.kernels.lstm import extension

T, B, I, H, P = 5, 3, 6, 4, 2  # noqa: E741  the names of csrc/lstm.h
NEEDS_EXTENSION = pytest.mark.skipif(extension.why_unavailable("cpu") is not None, reason="needs the C++ extension")


def rows(table: list[tuple[Any, ...]], names: tuple[str, ...]) -> Any:
    """The rows of a table as cases; the first column is the name."""
    return pytest.mark.parametrize(names, [row[1:] for row in table], ids=[row[0] for row in table])


def t(*shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def state(*shape: int, cell: int = H) -> tuple[Tensor, Tensor]:
    return t(*shape), t(*shape[:-1], cell)


def lstm(**options: Any) -> fastattn.LSTM:
    return fastattn.LSTM(I, H, **options)


def packed(lengths: tuple[int, ...] = (5, 3, 2), **options: Any) -> PackedSequence:
    return pack_padded_sequence(t(T, len(lengths), options.pop("features", I)), torch.tensor(lengths), **options)


def with_weight(name: str, weight: Any) -> fastattn.LSTM:
    module = lstm()
    module.register_parameter(name, nn.Parameter(weight))
    return module


def check(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error) as caught:
        call()
    # A subclass, as NotImplementedError is of RuntimeError, would say that something else happened.
    assert caught.type is error
    assert re.search(match, str(caught.value)), str(caught.value)


# The module --------------------------------------------------------------------------------------------------

CONSTRUCTOR: list[tuple[Any, ...]] = [
    ("no sizes", lambda: fastattn.LSTM(), TE, "input_size"),
    ("no hidden size", lambda: fastattn.LSTM(3), TE, "hidden_size"),
    ("mode of RNNBase", lambda: fastattn.LSTM("LSTM", 3, 4), TE, "input_size should be of type int, got: str"),
    ("input_size 0", lambda: fastattn.LSTM(0, 4), VE, "input_size must be greater than zero"),
    ("input_size float", lambda: fastattn.LSTM(2.0, 4), TE, "input_size should be of type int, got: float"),
    ("hidden_size 0", lambda: fastattn.LSTM(2, 0), VE, "hidden_size must be greater than zero"),
    ("hidden_size None", lambda: fastattn.LSTM(2, None), TE, "hidden_size should be of type int, got: NoneType"),
    ("num_layers 0", lambda: lstm(num_layers=0), VE, "num_layers must be greater than zero"),
    ("bias int", lambda: lstm(bias=1), TE, "bias should be of type bool, got: int"),
    ("batch_first str", lambda: lstm(batch_first="yes"), TE, "batch_first should be of type bool, got: str"),
    ("dropout 1.5", lambda: lstm(dropout=1.5), VE, r"dropout should be a number in range \[0, 1\]"),
    ("dropout -1", lambda: lstm(dropout=-1), VE, r"dropout should be a number in range \[0, 1\]"),
    ("dropout bool", lambda: lstm(dropout=True), VE, "dropout should be a number"),
    ("proj_size -1", lambda: lstm(proj_size=-1), VE, "proj_size should be a positive integer or zero"),
    ("proj_size H", lambda: lstm(proj_size=H), VE, "proj_size has to be smaller than hidden_size"),
    ("typo", lambda: lstm(bidirectonal=True), TE, "unexpected keyword argument 'bidirectonal'"),
    ("cell's hidden size", lambda: fastattn.LSTMCell(3), TE, "hidden_size"),
    ("cell's negative size", lambda: fastattn.LSTMCell(3, -1), RE, "negative dimension"),
]

MODULE: list[tuple[Any, ...]] = [
    # The input.
    ("input None", lambda: lstm()(None), TE, "input: got NoneType, expected a torch.Tensor or a PackedSequence"),
    ("input list", lambda: lstm()([[1.0]]), TE, "input: got list, expected a torch.Tensor or a PackedSequence"),
    ("input numpy", lambda: lstm()(t(T, B, I).numpy()), TE, "input: got ndarray, expected a torch.Tensor"),
    ("input tuple", lambda: lstm()((t(T, B, I), None)), TE, "input: got tuple, expected a torch.Tensor"),
    ("input scalar", lambda: lstm()(t()), VE, "Expected input to be 2D or 3D, got 0D instead"),
    ("input 1-D", lambda: lstm()(t(I)), VE, "Expected input to be 2D or 3D, got 1D instead"),
    ("input 4-D", lambda: lstm()(t(1, T, B, I)), VE, "Expected input to be 2D or 3D, got 4D instead"),
    ("input features", lambda: lstm()(t(T, B, I + 1)), RE, r"input.size\(-1\) .* input_size. Expected 6, got 7"),
    ("input no features", lambda: lstm()(t(T, B, 0)), RE, "Expected 6, got 0"),
    ("input no steps", lambda: lstm()(t(0, B, I)), RE, "got 0 steps, Expected sequence length to be larger than 0"),
    ("input no steps, batch first", lambda: lstm(batch_first=True)(t(B, 0, I)), RE, "larger than 0 in RNN"),
    ("input no steps unbatched", lambda: lstm()(t(0, I)), RE, "larger than 0 in RNN"),
    ("input int64", lambda: lstm()(t(T, B, I, dtype=I64)), VE, r"input dtype \(torch.int64\) .* \(torch.float32\)"),
    ("input float64", lambda: lstm()(t(T, B, I, dtype=F64)), VE, r"input dtype \(torch.float64\) .* weight dtype"),
    ("input bfloat16", lambda: lstm()(t(T, B, I, dtype=BF16)), VE, r"model: model.to\(torch.bfloat16\)"),
    ("input complex", lambda: lstm()(t(T, B, I, dtype=C64)), VE, r"input dtype \(torch.complex64\)"),
    ("input meta", lambda: lstm()(t(T, B, I, device="meta"), state(1, B, H)), RE, "got device cpu, .* meta"),
    ("input meta alone", lambda: lstm()(t(T, B, I, device="meta")), RE, "weight_ih_l0: got device cpu, .* meta"),
    ("input sparse", lambda: lstm()(t(T, B, I).to_sparse()), VE, "input: got layout torch.sparse_coo"),
    ("input nested", lambda: lstm()(torch.nested.nested_tensor([t(T, I)])), VE, "input: got a nested tensor"),
    ("packed features", lambda: lstm()(packed(features=I + 1)), RE, "Expected 6, got 7"),
    ("packed float64", lambda: lstm(dtype=F64)(packed()), VE, r"input dtype \(torch.float32\)"),
    ("packed 3-D", lambda: lstm()(PackedSequence(t(3, 2, I), torch.tensor([2, 1]))), RE, "2 dimensions, got 3"),
    # The states.
    ("hx one tensor", lambda: lstm()(t(T, B, I), t(1, B, H)), TE, "hx: got Tensor, expected a tuple of two tensors"),
    ("hx three", lambda: lstm()(t(T, B, I), (t(1, B, H),) * 3), VE, "hx: got 3 items, expected two tensors"),
    ("hx None inside", lambda: lstm()(t(T, B, I), (t(1, B, H), None)), TE, r"hx\[1\]: got NoneType"),
    ("hx dict", lambda: lstm()(t(T, B, I), {"h": 1, "c": 2}), TE, "hx: got dict, expected a tuple"),
    ("hx layers", lambda: lstm()(t(T, B, I), state(2, B, H)), RE, r"hidden\[0\] size \(1, 3, 4\), got \[2, 3, 4\]"),
    ("hx batch", lambda: lstm()(t(T, B, I), state(1, 2, H)), RE, r"hidden\[0\] size \(1, 3, 4\), got \[1, 2, 4\]"),
    ("hx features", lambda: lstm()(t(T, B, I), state(1, B, 5)), RE, r"hidden\[0\] size \(1, 3, 4\), got \[1, 3, 5\]"),
    ("cx features", lambda: lstm()(t(T, B, I), state(1, B, H, cell=5)), RE, r"hidden\[1\] size \(1, 3, 4\), got"),
    ("hx batch first", lambda: lstm(batch_first=True)(t(B, T, I), state(B, 1, H)), RE, r"hidden\[0\] size \(1, 3, 4\)"),
    ("hx 2-D", lambda: lstm()(t(T, B, I), state(B, H)), RE, r"hx and cx should also be 3-D but got \(2-D, 2-D\)"),
    ("hx 3-D unbatched", lambda: lstm()(t(T, I), state(1, 1, H)), RE, r"should also be 2-D but got \(3-D, 3-D\)"),
    ("hx unbatched layers", lambda: lstm()(t(T, I), state(2, H)), RE, r"hidden\[0\] size \(1, 1, 4\)"),
    ("hx projected", lambda: lstm(proj_size=P)(t(T, B, I), state(1, B, H)), RE, r"hidden\[0\] size \(1, 3, 2\)"),
    ("hx float64", lambda: lstm()(t(T, B, I), (t(1, B, H, dtype=F64), t(1, B, H))), RE, r"hidden\[0\]: got dtype"),
    ("cx float16", lambda: lstm()(t(T, B, I), (t(1, B, H), t(1, B, H, dtype=F16))), RE, r"hidden\[1\]: got dtype"),
    ("hx meta", lambda: lstm()(t(T, B, I), (t(1, B, H, device="meta"), t(1, B, H))), RE, r"hidden\[0\]: got device"),
    ("packed hx batch", lambda: lstm()(packed(), state(1, 2, H)), RE, r"hidden\[0\] size \(1, 3, 4\), got \[1, 2, 4\]"),
    ("packed hx 2-D", lambda: lstm()(packed(), state(B, H)), RE, r"hidden\[0\] to be 3-D, got 2-D"),
    # The weights.
    ("weight dtype", lambda: with_weight("weight_hh_l0", t(16, 4, dtype=F64))(t(T, B, I)), RE, "weight_hh_l0: got"),
    ("weight device", lambda: with_weight("bias_hh_l0", t(16, device="meta"))(t(T, B, I)), RE, "bias_hh_l0: got dev"),
    # The cell.
    ("cell None", lambda: fastattn.LSTMCell(I, H)(None), TE, "input: got NoneType, expected a torch.Tensor"),
    ("cell 3-D", lambda: fastattn.LSTMCell(I, H)(t(T, B, I)), VE, "Expected input to be 1D or 2D, got 3D instead"),
    ("cell features", lambda: fastattn.LSTMCell(I, H)(t(B, 7)), RE, "inconsistent input_size: got 7 expected 6"),
    ("cell unbatched features", lambda: fastattn.LSTMCell(I, H)(t(7)), RE, "inconsistent input_size: got 7"),
    ("cell hx tensor", lambda: fastattn.LSTMCell(I, H)(t(B, I), t(B, H)), TE, "hx: got Tensor, expected a tuple"),
    ("cell hx one", lambda: fastattn.LSTMCell(I, H)(t(B, I), (t(B, H),)), VE, "hx: got 1 items, expected two"),
    ("cell hx 3-D", lambda: fastattn.LSTMCell(I, H)(t(B, I), state(1, B, H)), VE, r"hx\[0\] to be 1D or 2D, got 3D"),
    ("cell hx batch", lambda: fastattn.LSTMCell(I, H)(t(B, I), state(2, H)), RE, "Input batch size 3 doesn't match"),
    ("cell hx features", lambda: fastattn.LSTMCell(I, H)(t(B, I), state(B, 5)), RE, "hidden0 has inconsistent"),
    ("cell cx features", lambda: fastattn.LSTMCell(I, H)(t(B, I), state(B, H, cell=5)), RE, "hidden1 has inconsistent"),
    ("cell hx 1-D", lambda: fastattn.LSTMCell(I, H)(t(B, I), state(H)), RE, "hidden0: got shape"),
    ("cell hx dtype", lambda: fastattn.LSTMCell(I, H)(t(B, I), (t(B, H, dtype=F16), t(B, H))), RE, r"hx\[0\]: got"),
    ("cell input dtype", lambda: fastattn.LSTMCell(I, H)(t(B, I, dtype=F64)), RE, "weight_ih: got dtype torch.float32"),
    ("cell input meta", lambda: fastattn.LSTMCell(I, H)(t(B, I, device="meta")), RE, "weight_ih: got device cpu"),
    ("cell sparse", lambda: fastattn.LSTMCell(I, H)(t(B, I).to_sparse()), VE, "input: got layout torch.sparse_coo"),
    # patch, backend.
    ("patch no module", lambda: fastattn.patch(fastattn.LSTM), TE, "model: got type, expected a torch.nn.Module"),
    ("backend typo", lambda: fastattn.backend("cudnn").__enter__(), VE, "backend: got 'cudnn', allowed are 'auto'"),
]  # fmt: skip


@rows(CONSTRUCTOR, ("call", "error", "match"))
def test_constructor(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    check(call, error, match)


@pytest.mark.parametrize("name", ["auto", "torch", "reference"])
@rows(MODULE, ("call", "error", "match"))
def test_module(call: Callable[[], Any], error: type[Exception], match: str, name: str) -> None:
    with fastattn.backend(name):
        check(call, error, match)


# The operators -----------------------------------------------------------------------------------------------


def arguments(packed: bool = False, **changes: Any) -> dict[str, Any]:
    """A good call of lstm_layer, and what differs from it."""
    good: dict[str, Any] = {
        "input": t(6, I) if packed else t(T, B, I),
        "batch_sizes": torch.tensor([3, 2, 1]) if packed else None,
        "h0": t(1, B, H), "c0": t(1, B, H), "weights": weights(),
    }  # fmt: skip
    assert not changes.keys() - good.keys()
    return good | changes


def weights(projection: int = 0, directions: int = 1, **changes: Tensor) -> list[Tensor]:
    """Weights of one layer with biases; ``changes`` names them w0, w1, ... by their place."""
    good = [t(4 * H, I), t(4 * H, projection or H), t(4 * H), t(4 * H)] + ([t(projection, H)] if projection else [])
    good *= directions
    for name, weight in changes.items():
        good[int(name[1:])] = weight
    return good


def sizes(*rows: int, dtype: torch.dtype = I64) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


OPERATOR: list[tuple[Any, ...]] = [
    # The input.
    ("input 2-D", {"input": t(T, I)}, VE, r"input: got shape \[5, 6\], expected \(T, B, I\)"),
    ("input scalar", {"input": t()}, VE, r"input: got shape \[\], expected \(T, B, I\)"),
    ("input 4-D", {"input": t(1, T, B, I)}, VE, "input: got shape .*1, 5, 3, 6"),
    ("input float64", {"input": t(T, B, I, dtype=F64)}, TE, "input: got dtype Double, expected float32, float16"),
    ("input int64", {"input": t(T, B, I, dtype=I64)}, TE, "input: got dtype Long, expected float32"),
    ("input complex", {"input": t(T, B, I, dtype=C64)}, TE, "input: got dtype ComplexFloat, expected float32"),
    ("input batch", {"input": t(T, 2, I)}, VE, r"input: got shape \[5, 2, 6\], expected \[5, 3, 6\]"),
    ("input float16", {"input": t(T, B, I, dtype=F16)}, TE, "h0: got dtype Float, expected input's Half"),
    ("input features", {"input": t(T, B, 7)}, VE, r"weights\[0 \+ 0\]: got shape \[16, 6\], expected \[16, 7\]"),
    ("input sparse", {"input": t(T, B, I).to_sparse()}, VE, "input: got a Sparse tensor"),
    # The states.
    ("h0 2-D", {"h0": t(B, H)}, VE, r"h0: got shape \[3, 4\], expected \(D, B, P\)"),
    ("h0 no direction", {"h0": t(0, B, H), "c0": t(0, B, H)}, VE, r"h0: .*D 1 or 2"),
    ("h0 three directions", {"h0": t(3, B, H), "c0": t(3, B, H)}, VE, r"h0: .*D 1 or 2"),
    ("c0 2-D", {"c0": t(B, H)}, VE, r"c0: got shape \[3, 4\], expected \(D, B, H\)"),
    ("c0 directions", {"c0": t(2, B, H)}, VE, r"c0: got shape \[2, 3, 4\], expected \[1, 3, 4\]"),
    ("c0 batch", {"c0": t(1, 2, H)}, VE, r"c0: got shape \[1, 2, 4\], expected \[1, 3, 4\]"),
    ("c0 dtype", {"c0": t(1, B, H, dtype=BF16)}, TE, "c0: got dtype BFloat16, expected input's Float"),
    ("h0 dtype", {"h0": t(1, B, H, dtype=F64)}, TE, "h0: got dtype Double, expected input's Float"),
    ("h0 meta", {"h0": t(1, B, H, device="meta")}, VE, "h0: got a .*meta, expected"),
    ("h0 features", {"h0": t(1, B, 2)}, VE, "h0: got 2 features, expected c0's 4, for there is no projection"),
    ("no hidden units", {"h0": t(1, B, 0), "c0": t(1, B, 0)}, VE, "h0, c0: got no hidden units"),
    # The weights.
    ("no weights", {"weights": []}, VE, "weights: got 0 tensors for 1 directions, expected 2, 3, 4 or 5"),
    ("one weight", {"weights": weights()[:1]}, VE, "weights: got 1 tensors"),
    ("six weights", {"weights": weights() + weights()[:2]}, VE, "weights: got 6 tensors"),
    ("weights for one direction", {"h0": t(2, B, H), "c0": t(2, B, H), "weights": weights()[:3]}, VE, "weights: got 3"),
    ("W_ih rows", {"weights": weights(w0=t(12, I))}, VE, r"weights\[0 \+ 0\]: got shape \[12, 6\], expected \[16, 6\]"),
    ("W_ih transposed", {"weights": weights(w0=t(I, 4 * H))}, VE, r"weights\[0 \+ 0\]: got shape \[6, 16\]"),
    ("W_hh columns", {"weights": weights(w1=t(4 * H, 5))}, VE, r"weights\[0 \+ 1\]: got shape \[16, 5\], expected"),
    ("b_ih size", {"weights": weights(w2=t(H))}, VE, r"weights\[0 \+ 2\]: got shape \[4\], expected \[16\]"),
    ("b_hh 2-D", {"weights": weights(w3=t(16, 1))}, VE, r"weights\[0 \+ 3\]: got shape \[16, 1\], expected \[16\]"),
    ("b_hh dtype", {"weights": weights(w3=t(16, dtype=F64))}, TE, r"weights\[0 \+ 3\]: got dtype Double"),
    ("W_ih meta", {"weights": weights(w0=t(16, I, device="meta"))}, VE, r"weights\[0 \+ 0\]: got a .*meta"),
    ("W_ih sparse", {"weights": weights(w0=t(16, I).to_sparse())}, VE, r"weights\[0 \+ 0\]: got a Sparse"),
    ("W_hr size", {"h0": t(1, B, P), "weights": weights(P, w4=t(3, H))}, VE, r"weights\[0 \+ 4\]: got shape \[3, 4\]"),
    ("second direction", {"h0": t(2, B, H), "c0": t(2, B, H), "weights": weights(directions=2, w5=t(16, 3))}, VE,
     r"weights\[4 \+ 1\]: got shape \[16, 3\], expected \[16, 4\]"),
    # batch_sizes.
    ("sizes 2-D", {"packed": True, "batch_sizes": sizes(3, 2, 1)[None]}, VE, r"batch_sizes: got shape \[1, 3\]"),
    ("sizes none", {"packed": True, "batch_sizes": sizes()}, VE, r"batch_sizes: got shape \[0\].*T >= 1"),
    ("sizes int32", {"packed": True, "batch_sizes": sizes(3, 2, 1, dtype=torch.int32)}, TE, "sizes: got dtype Int"),
    ("sizes float", {"packed": True, "batch_sizes": sizes(3, 2, 1, dtype=F32)}, TE, "batch_sizes: got dtype Float"),
    ("sizes growing", {"packed": True, "batch_sizes": sizes(2, 3, 1)}, VE, "sizes: got 3 at step 1, expected 1 to 2"),
    ("sizes zero", {"packed": True, "batch_sizes": sizes(3, 3, 0)}, VE, "sizes: got 0 at step 2, expected 1 to 3"),
    ("sizes negative", {"packed": True, "batch_sizes": sizes(3, 3, -1)}, VE, "batch_sizes: got -1 at step 2"),
    ("sizes huge", {"packed": True, "batch_sizes": sizes(2**62, 2, 1)}, VE, "batch_sizes: got 4611686018427387904"),
    ("sizes beyond h0", {"packed": True, "batch_sizes": sizes(4, 1, 1)}, VE, r"at step 0, expected 1 to 3 \(h0's"),
    ("sizes below h0", {"packed": True, "batch_sizes": sizes(2, 2, 2)}, VE, "batch_sizes: got 2 at step 0, .* 3"),
    ("sizes of more rows", {"packed": True, "batch_sizes": sizes(3, 3, 1)}, VE, "input: got 6 rows, .*batch_sizes, 7"),
    ("sizes of fewer rows", {"packed": True, "batch_sizes": sizes(3, 1, 1)}, VE, "input: got 6 rows, .*batch_sizes, 5"),
    ("sizes beside padded", {"batch_sizes": sizes(3, 2, 1)}, VE, r"input: got shape .* expected \(N, I\) beside"),
    ("sizes meta", {"packed": True, "batch_sizes": sizes(3, 2, 1).to("meta")}, VE, "batch_sizes: got device meta"),
]  # fmt: skip


@NEEDS_EXTENSION
@pytest.mark.parametrize("save", [True, False])
@rows(OPERATOR, ("changes", "error", "match"))
def test_extension(changes: dict[str, Any], error: type[Exception], match: str, save: bool) -> None:
    """Straight to C++, past every check of Python's."""
    given = arguments(**changes)
    check(lambda: extension.forward["cpu"](*given.values(), save), error, match)


@NEEDS_EXTENSION
@rows(OPERATOR, ("changes", "error", "match"))
def test_extension_backward(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    given = arguments(**changes)
    saved = (t(T, B, H), t(T * B, 1, 64), t(T * B, 1, 16))
    check(lambda: extension.backward["cpu"](None, None, None, *given.values(), *saved), error, match)


@NEEDS_EXTENSION
def test_all_on_another_device() -> None:
    """Tensors that agree with one another, but not with the kernels."""
    given = arguments()
    meta = [value.to("meta") if isinstance(value, Tensor) else value for value in given.values()]
    meta[-1] = [weight.to("meta") for weight in given["weights"]]
    check(lambda: extension.forward["cpu"](*meta, True), VE, "input: got .*meta")


SAVED: list[tuple[Any, ...]] = [
    ("grad_out shape", {"grad_out": t(T, B, 5)}, VE, r"grad_out: got shape \[5, 3, 5\], expected \[5, 3, 4\]"),
    ("grad_out dtype", {"grad_out": t(T, B, H, dtype=F16)}, TE, "grad_out: got dtype Half, expected input's Float"),
    ("grad_h_n shape", {"grad_h_n": t(B, H)}, VE, r"grad_h_n: got shape \[3, 4\], expected \[1, 3, 4\]"),
    ("grad_h_n device", {"grad_h_n": t(1, B, H, device="meta")}, VE, "grad_h_n: got a .*meta"),
    ("grad_c_n shape", {"grad_c_n": t(1, B, 5)}, VE, r"grad_c_n: got shape \[1, 3, 5\], expected \[1, 3, 4\]"),
    ("grad_c_n dtype", {"grad_c_n": t(1, B, H, dtype=F64)}, TE, "grad_c_n: got dtype Double"),
    ("out shape", {"out": t(T * B, H)}, VE, r"out: got shape \[15, 4\], expected \[5, 3, 4\]"),
    ("out dtype", {"out": t(T, B, H, dtype=BF16)}, TE, "out: got dtype BFloat16"),
    ("gates of no save", {"gates": t(0)}, VE, r"gates: got shape \[0\], expected \[15, 1, 64\]"),
    ("gates not padded", {"gates": t(15, 1, 16)}, VE, r"gates: got shape \[15, 1, 16\], expected \[15, 1, 64\]"),
    ("gates dtype", {"gates": t(15, 1, 64, dtype=F64)}, TE, "gates: got dtype Double"),
    ("gates strided", {"gates": t(15, 1, 128)[..., ::2]}, VE, "gates, cells: expected the forward's own results"),
    ("cells of no save", {"cells": t(0)}, VE, r"cells: got Float of shape \[0\].*float32 \(15, 1, 16\)"),
    ("cells dtype", {"cells": t(15, 1, 16, dtype=F16)}, VE, "cells: got Half"),
    ("cells meta", {"cells": t(15, 1, 16, device="meta")}, VE, "cells: got Float .*meta"),
]  # fmt: skip


@NEEDS_EXTENSION
@rows(SAVED, ("changes", "error", "match"))
def test_what_the_backward_is_given(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    given = arguments()
    out, _, _, gates, cells = extension.forward["cpu"](*given.values(), True)
    good: dict[str, Any] = {"grad_out": t(T, B, H), "grad_h_n": None, "grad_c_n": None}
    call = good | given | {"out": out, "gates": gates, "cells": cells} | changes
    check(lambda: extension.backward["cpu"](*call.values()), error, match)


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("place", "value"), [*itertools.product(range(5), ("x", 1.5)), *((place, None) for place in (0, 2, 3, 4)), (5, "x")]
)
def test_arguments_of_another_type(place: int, value: Any) -> None:
    """pybind11 refuses them."""
    given = [*arguments().values(), True]
    given[place] = value
    with pytest.raises(TypeError, match="incompatible function arguments"):
        extension.forward["cpu"](*given)


OP = [("input str", 0, "x"), ("weights tensor", 4, 1), ("save str", 5, "x"), ("backend None", 6, None)]


@rows(OP, ("place", "value"))
def test_dispatcher(place: int, value: Any) -> None:
    given = [*arguments().values(), True, "torch"]
    given[place] = value
    with pytest.raises(RuntimeError, match="fastattn::lstm_layer"):
        torch.ops.fastattn.lstm_layer(*given)


def test_a_good_call_is_good() -> None:
    """What the rows above change is nothing that is wrong by itself."""
    lstm()(t(T, B, I), state(1, B, H))
    lstm()(packed(), state(1, B, H))
    fastattn.LSTMCell(I, H)(t(B, I), state(B, H))
    if extension.why_unavailable("cpu") is None:
        for is_packed in (False, True):
            extension.forward["cpu"](*arguments(packed=is_packed).values(), True)
        extension.forward["cpu"](*arguments(h0=t(1, B, P), weights=weights(P)).values(), True)
