"""What a patched model shares with the one before: parameters, hooks, parametrisations, copies, files, wrappers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from patching_model import BATCH, EMBED, LENGTH, Block, assert_same
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize

import fastattn


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, LENGTH, EMBED)


# State: parameters, optimizers, hooks, parametrisations ---------------------------------------------------------


def test_parameters_and_state_dict_are_the_same_objects() -> None:
    model = Block()
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    fastattn.patch(model)
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_made_before_patching_trains_as_without(
    optimizer_class: type[torch.optim.Optimizer], x: Tensor
) -> None:
    plain = nn.Sequential(Block(), Block()).double()
    patched = copy.deepcopy(plain)
    for model in (plain, patched):
        optimizer = optimizer_class(model.parameters(), lr=1e-2)
        if model is patched:
            fastattn.patch(model)
        for _ in range(4):
            optimizer.zero_grad()
            model(x.double()).square().mean().backward()
            optimizer.step()
    for (name, wanted), got in zip(plain.named_parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7, msg=name)


def test_frozen_parameters_stay_frozen(x: Tensor) -> None:
    model = Block()
    model.attn.in_proj_weight.requires_grad_(False)
    fastattn.patch(model)
    model(x).sum().backward()
    assert model.attn.in_proj_weight.grad is None
    assert model.attn.in_proj_bias.grad is not None


def test_tied_parameters_stay_tied(x: Tensor) -> None:
    model = nn.Sequential(Block(), Block())
    model[1].attn.in_proj_weight = model[0].attn.in_proj_weight
    plain = copy.deepcopy(model)
    fastattn.patch(model)
    assert model[1].attn.in_proj_weight is model[0].attn.in_proj_weight
    for one in (model, plain):
        one(x).sum().backward()
    assert_same(model[0].attn.in_proj_weight.grad, plain[0].attn.in_proj_weight.grad)


def test_hooks_and_their_handles_keep_working(x: Tensor) -> None:
    model = Block()
    x.requires_grad_()
    calls: list[str] = []
    handles = [
        model.attn.register_forward_pre_hook(lambda *_: calls.append("before")),
        model.attn.register_forward_hook(lambda *_: calls.append("after")),
        model.attn.register_full_backward_hook(lambda *_: calls.append("backward")),
        model.attn.out_proj.weight.register_hook(lambda grad: calls.append("gradient")),
    ]
    fastattn.patch(model)
    model(x).sum().backward()
    assert set(calls) == {"before", "after", "backward", "gradient"}
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x).sum().backward()
    assert calls == []


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias"])
def test_a_parametrisation_made_before_patching_still_applies(name: str, x: Tensor) -> None:
    model = Block()
    parametrize.register_parametrization(model.attn, name, Doubled())
    wanted = model(x)
    assert fastattn.patch(model).replaced == ["attn"]
    assert isinstance(model.attn, fastattn.MultiheadAttention)
    assert_same(model(x), wanted)
    assert_same(copy.deepcopy(model)(x), wanted)
    parametrize.remove_parametrizations(model.attn, name)
    assert type(model.attn) is fastattn.MultiheadAttention
    assert_same(model(x), wanted)
    fastattn.unpatch(model)
    assert type(model.attn) is nn.MultiheadAttention
    assert_same(model(x), wanted)


def test_a_parametrisation_made_after_patching_survives_unpatch(x: Tensor) -> None:
    model = Block()
    fastattn.patch(model)
    parametrize.register_parametrization(model.attn, "in_proj_weight", Doubled())
    wanted = model(x)
    fastattn.unpatch(model)
    assert not isinstance(model.attn, fastattn.MultiheadAttention)
    assert parametrize.is_parametrized(model.attn, "in_proj_weight")
    assert_same(model(x), wanted)
    parametrize.remove_parametrizations(model.attn, "in_proj_weight")
    assert type(model.attn) is nn.MultiheadAttention


def test_weight_norm_of_the_output_projection_still_applies(x: Tensor) -> None:
    model = Block()
    parametrizations.weight_norm(model.attn.out_proj)
    wanted = model(x)
    fastattn.patch(model)
    assert_same(model(x), wanted)


# Copies, files, devices, wrappers -------------------------------------------------------------------------------


def test_a_deep_copy_is_patched_and_can_be_unpatched_alone(x: Tensor) -> None:
    model = Block()
    wanted = model(x)
    fastattn.patch(model)
    other = copy.deepcopy(model)
    fastattn.unpatch(other)
    assert type(other.attn) is nn.MultiheadAttention
    assert isinstance(model.attn, fastattn.MultiheadAttention)
    assert_same(other(x), wanted)


def test_a_pickled_model_comes_back_patched_and_can_be_unpatched(x: Tensor) -> None:
    model = Block()
    wanted = model(x)
    fastattn.patch(model, need_weights=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded.attn, fastattn.MultiheadAttention)
    assert loaded.attn(x, x, x)[1] is None
    assert_same(loaded(x), wanted)
    fastattn.unpatch(loaded)
    assert type(loaded.attn) is nn.MultiheadAttention


def test_state_dicts_load_both_ways(x: Tensor) -> None:
    plain, patched = Block(), Block()
    fastattn.patch(patched)
    patched.load_state_dict(plain.state_dict(), strict=True)
    assert_same(patched(x), plain(x))
    Block().load_state_dict(patched.state_dict(), strict=True)


def test_a_model_on_the_meta_device_is_patched_before_it_is_materialised(x: Tensor) -> None:
    plain = Block()
    with torch.device("meta"):
        model = Block()
    assert fastattn.patch(model).replaced == ["attn"]
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    assert_same(model(x), plain(x))


@pytest.mark.gpu
def test_a_model_on_the_gpu_is_patched_in_place() -> None:
    model = Block().cuda()
    x = torch.randn(BATCH, LENGTH, EMBED, device="cuda")
    wanted = model(x)
    fastattn.patch(model)
    torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)


def test_moving_and_casting_after_patching(x: Tensor) -> None:
    model = Block()
    fastattn.patch(model)
    assert model.double()(x.double()).dtype == torch.float64


@pytest.fixture
def process_group(tmp_path: object) -> object:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap_first", [True, False])
def test_distributed_data_parallel(wrap_first: bool, x: Tensor) -> None:
    plain = Block()
    model = copy.deepcopy(plain)
    if wrap_first:
        model = DistributedDataParallel(model)
        assert fastattn.patch(model).replaced == ["module.attn"]
    else:
        fastattn.patch(model)
        model = DistributedDataParallel(model)
    for one in (plain, model):
        one(x).square().sum().backward()
    for wanted, got in zip(plain.parameters(), model.parameters(), strict=True):
        assert_same(got.grad, wanted.grad)


def test_a_compiled_model_recompiles_to_the_patched_one(x: Tensor) -> None:
    model = Block()
    compiled = torch.compile(model, backend="eager")
    wanted = compiled(x)
    assert fastattn.patch(compiled).replaced == ["_orig_mod.attn"]
    assert_same(compiled(x), wanted)
    masked = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    masked[0] = True
    assert not model.attn(x, x, x, key_padding_mask=masked)[0].isnan().any()
    torch._dynamo.reset()
