"""PyTorch's own module tests, as they ship in the wheel, on fastattn.LSTM and fastattn.LSTMCell.

Samples, reference functions and error inputs come from torch.testing._internal.common_modules; the checks are those of
PyTorch's test/test_modules.py. What upstream marks as an expected failure on CUDA is run like everything else.
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
from torch import Tensor
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, ModuleInput, module_db
from torch.testing._internal.common_utils import freeze_rng_state

import fastattn

OURS = {torch.nn.LSTM: fastattn.LSTM, torch.nn.LSTMCell: fastattn.LSTMCell}
INFOS: list[ModuleInfo] = [info for info in module_db if info.module_cls in OURS]
ON_INFOS = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def samples(
    info: ModuleInfo, device: str, dtype: torch.dtype, training: bool, requires_grad: bool = False
) -> Iterator[tuple[Any, ModuleInput]]:
    """Each sample with our module built from its constructor arguments."""
    inputs = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=requires_grad, training=training)
    inputs = list(inputs)
    assert inputs
    for sample in inputs:
        arguments = sample.constructor_input
        module = OURS[info.module_cls](*arguments.args, **arguments.kwargs).to(device, dtype)
        yield module.train(training), sample


def call(module: Any, sample: ModuleInput) -> Any:
    return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def flatten(value: Any) -> list[Tensor]:
    """The tensors of nested tuples."""
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in flatten(item)]


def rebuild(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Nested tuples with other tensors."""
    return next(tensors) if isinstance(value, Tensor) else tuple(rebuild(item, tensors) for item in value)


def test_both_are_in_the_list() -> None:
    assert {info.module_cls for info in INFOS} == set(OURS)


@TRAINING
@ON_DEVICES
@DTYPES
@ON_INFOS
def test_forward(info: ModuleInfo, device: str, dtype: torch.dtype, training: bool) -> None:
    for module, sample in samples(info, device, dtype, training):
        with freeze_rng_state():
            outputs = call(module, sample)
        expected = sample.reference_fn(module, *sample.forward_input.args, **sample.forward_input.kwargs)
        torch.testing.assert_close(outputs, expected)


@TRAINING
@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@ON_INFOS
def test_forward_is_as_exact_as_torch(info: ModuleInfo, device: str, dtype: torch.dtype, training: bool) -> None:
    for module, sample in samples(info, device, dtype, training):
        arguments = sample.constructor_input
        theirs = info.module_cls(*arguments.args, **arguments.kwargs).to(device, dtype).train(training)
        theirs.load_state_dict(module.state_dict(), strict=True)
        exact = copy.deepcopy(theirs).double()
        inputs = sample.forward_input.args
        wanted = exact(*rebuild(inputs, (tensor.double() for tensor in flatten(inputs))))
        found = zip(flatten(call(module, sample)), flatten(call(theirs, sample)), flatten(wanted), strict=True)
        for got, plain, oracle in found:
            assert got.dtype == plain.dtype
            assert got.shape == plain.shape
            allowed = 2 * (plain - oracle).abs().max() + 4 * torch.finfo(dtype).eps
            assert (got - oracle).abs().max() <= allowed


@TRAINING
@ON_DEVICES
@ON_INFOS
def test_grad_and_gradgrad(info: ModuleInfo, device: str, training: bool) -> None:
    """Upstream expects both to fail on CUDA, where cuDNN has no second derivative and none at all in evaluation."""
    for module, sample in samples(info, device, torch.float64, training, requires_grad=True):
        names = list(dict(module.named_parameters()))
        inputs = flatten(sample.forward_input.args)

        def function(*values: Any, module: Any = module, sample: ModuleInput = sample, names: Any = names) -> Any:
            count = len(values) - len(names)
            named = dict(zip(names, values[count:], strict=True))
            given = rebuild(sample.forward_input.args, iter(values[:count]))
            return tuple(flatten(torch.func.functional_call(module, named, given, sample.forward_input.kwargs)))

        assert torch.autograd.gradcheck(function, (*inputs, *module.parameters()), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (*inputs, *module.parameters()), fast_mode=True)


@TRAINING
@ON_DEVICES
@DTYPES
@ON_INFOS
def test_non_contiguous(info: ModuleInfo, device: str, dtype: torch.dtype, training: bool) -> None:
    """Inputs and parameters; upstream skips it on CUDA."""
    for module, sample in samples(info, device, dtype, training):
        inputs = flatten(sample.forward_input.args)
        expected, grads = call(module, sample), []
        grads.append(torch.autograd.grad(sum(out.sum() for out in flatten(expected)), list(module.parameters())))
        spread = [torch.stack((tensor, tensor), -1)[..., 0] for tensor in inputs]
        assert not any(tensor.is_contiguous() for tensor in spread)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.data = torch.stack((parameter, parameter), -1)[..., 0]
        outputs = module(*rebuild(sample.forward_input.args, iter(spread)))
        torch.testing.assert_close(outputs, expected)
        grads.append(torch.autograd.grad(sum(out.sum() for out in flatten(outputs)), list(module.parameters())))
        torch.testing.assert_close(*grads)


@ON_DEVICES
@ON_INFOS
def test_factory_kwargs(info: ModuleInfo, device: str) -> None:
    for _, sample in samples(info, "cpu", torch.float32, True):
        arguments = sample.constructor_input
        module = OURS[info.module_cls](*arguments.args, **arguments.kwargs, device=device, dtype=torch.float64)
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            assert tensor.device.type == device
            assert tensor.dtype == torch.float64


@TRAINING
@ON_INFOS
def test_repr_pickle_deepcopy(info: ModuleInfo, training: bool) -> None:
    for module, sample in samples(info, "cpu", torch.float32, training):
        assert repr(module).startswith(f"{info.module_cls.__name__}(")
        expected = call(module, sample)
        for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            torch.testing.assert_close(call(copied, sample), expected, rtol=0, atol=0)


def test_train_and_eval_differ_only_by_dropout() -> None:
    assert next(info for info in INFOS if info.module_cls is torch.nn.LSTM).train_and_eval_differ
    module = fastattn.LSTM(3, 4, num_layers=2, dropout=0.5)
    x = torch.randn(4, 2, 3)
    assert not torch.equal(module.train()(x)[0], module.eval()(x)[0])
    module.dropout = 0.0
    torch.testing.assert_close(module.train()(x)[0], module.eval()(x)[0], rtol=0, atol=0)


@TRAINING
@ON_DEVICES
@ON_INFOS
def test_error_inputs(info: ModuleInfo, device: str, training: bool) -> None:
    """The same exceptions; for those of torch's C++ code the message is ours."""
    assert info.module_error_inputs_func is not None
    errors = list(
        info.module_error_inputs_func(info, device=device, dtype=torch.float32, requires_grad=False, training=training)
    )
    assert errors
    for error in errors:
        sample = error.module_error_input
        arguments = sample.constructor_input
        cls = OURS[info.module_cls]
        if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                cls(*arguments.args, **arguments.kwargs)
            continue
        module = cls(*arguments.args, **arguments.kwargs).to(device).train(training)
        with pytest.raises(error.error_type, match=error.error_regex):
            call(module, sample)
