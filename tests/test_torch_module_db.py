"""PyTorch's own module tests, as they ship in the wheel, on fastattn.MultiheadAttention.

Samples, reference functions and error inputs come from torch.testing._internal.common_modules; the checks are those
of PyTorch's test/test_modules.py.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import ON_DEVICES
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db
from torch.testing._internal.common_utils import freeze_rng_state

import fastattn

INFO: ModuleInfo = next(info for info in module_db if info.module_cls is torch.nn.MultiheadAttention)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def samples(
    device: str, dtype: torch.dtype, training: bool, requires_grad: bool = False
) -> Iterator[tuple[Any, ModuleInput]]:
    """Each sample with our module built from its constructor arguments."""
    inputs = INFO.module_inputs_func(INFO, device=device, dtype=dtype, requires_grad=requires_grad, training=training)
    assert inputs
    for sample in inputs:
        arguments = sample.constructor_input
        module = fastattn.MultiheadAttention(*arguments.args, **arguments.kwargs).to(device, dtype)
        yield module.train(training), sample


def call(module: Any, sample: ModuleInput) -> Any:
    return module(*sample.forward_input.args, **sample.forward_input.kwargs)


@TRAINING
@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward(device: str, dtype: torch.dtype, training: bool) -> None:
    for module, sample in samples(device, dtype, training):
        with freeze_rng_state():
            outputs = call(module, sample)
        expected = sample.reference_fn(module, *sample.forward_input.args, **sample.forward_input.kwargs)
        torch.testing.assert_close(outputs, expected)


@TRAINING
@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_forward_is_as_exact_as_torch(device: str, dtype: torch.dtype, training: bool) -> None:
    for module, sample in samples(device, dtype, training):
        arguments = sample.constructor_input
        theirs = INFO.module_cls(*arguments.args, **arguments.kwargs).to(device, dtype).train(training)
        theirs.load_state_dict(module.state_dict(), strict=True)
        exact = copy.deepcopy(theirs).double()
        inputs = sample.forward_input.args
        wanted = exact(*(tensor.double() for tensor in inputs), **sample.forward_input.kwargs)
        # A rounding moves a result by eps times the largest number that goes into it.
        rounding = torch.finfo(dtype).eps * max(tensor.abs().max().item() for tensor in inputs)
        for got, plain, oracle in zip(call(module, sample), call(theirs, sample), wanted, strict=True):
            assert got.dtype == plain.dtype
            assert got.shape == plain.shape
            assert (got - oracle).abs().max() <= 2 * (plain - oracle).abs().max() + 4 * rounding


@TRAINING
@ON_DEVICES
def test_grad(device: str, training: bool) -> None:
    for module, sample in samples(device, torch.float64, training, requires_grad=True):
        names = list(dict(module.named_parameters()))
        inputs = sample.forward_input.args

        def function(*values: Any, module: Any = module, sample: ModuleInput = sample, names: Any = names) -> Any:
            count = len(values) - len(names)
            named = dict(zip(names, values[count:], strict=True))
            return torch.func.functional_call(module, named, values[:count], sample.forward_input.kwargs)

        assert torch.autograd.gradcheck(function, (*inputs, *module.parameters()), fast_mode=True)


@TRAINING
@ON_DEVICES
def test_non_contiguous(device: str, training: bool) -> None:
    for module, sample in samples(device, torch.float64, training):
        expected = call(module, sample)
        spread = [torch.stack((tensor, tensor), -1)[..., 0] for tensor in sample.forward_input.args]
        assert not any(tensor.is_contiguous() for tensor in spread)
        torch.testing.assert_close(module(*spread, **sample.forward_input.kwargs), expected)


@ON_DEVICES
def test_factory_kwargs(device: str) -> None:
    for _, sample in samples("cpu", torch.float32, True):
        arguments = sample.constructor_input
        module = fastattn.MultiheadAttention(*arguments.args, **arguments.kwargs, device=device, dtype=torch.float64)
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            assert tensor.device.type == device
            assert tensor.dtype == torch.float64


@TRAINING
def test_repr_pickle_deepcopy(training: bool) -> None:
    for module, sample in samples("cpu", torch.float32, training):
        assert repr(module).startswith("MultiheadAttention(")
        expected = call(module, sample)
        for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            torch.testing.assert_close(call(copied, sample), expected, rtol=0, atol=0)


def test_train_and_eval_differ_only_by_dropout() -> None:
    assert INFO.train_and_eval_differ
    module = fastattn.MultiheadAttention(8, 2, dropout=0.5)
    x = torch.randn(4, 2, 8)
    assert not torch.equal(module.train()(x, x, x)[0], module.eval()(x, x, x)[0])


@TRAINING
def test_error_inputs(training: bool) -> None:
    if INFO.module_error_inputs_func is None:
        pytest.skip("torch ships none for MultiheadAttention; tests/test_attention_module.py has a table")
    for error in INFO.module_error_inputs_func(
        INFO, device="cpu", dtype=torch.float32, requires_grad=False, training=training
    ):
        sample = error.module_error_input
        with pytest.raises(error.error_type):
            _build_and_call(sample, training)


def _build_and_call(sample: ModuleInput, training: bool) -> None:
    arguments = sample.constructor_input
    call(fastattn.MultiheadAttention(*arguments.args, **arguments.kwargs).train(training), sample)
