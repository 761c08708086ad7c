"""patch and unpatch on every kind of module tree; see fastattn/patching.py. State: test_patching_state.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from patching_model import BATCH, EMBED, HEADS, LENGTH, Block, assert_same, attention
from torch import Tensor, nn

import fastattn


class WithoutForward(nn.MultiheadAttention):
    """A subclass that adds to nn.MultiheadAttention without touching the computation."""

    def __init__(self, *args: object, label: str = "", **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.label = label

    def describe(self) -> str:
        return f"attention {self.label}"


class WithForward(nn.MultiheadAttention):
    def forward(self, *args: object, **kwargs: object) -> object:
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


class WithCall(nn.MultiheadAttention):
    def __call__(self, *args: object, **kwargs: object) -> object:
        return super().__call__(*args, **kwargs)


class WithMergeMasks(nn.MultiheadAttention):
    def merge_masks(self, *args: object) -> object:
        return super().merge_masks(*args)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, LENGTH, EMBED)


# The tree -------------------------------------------------------------------------------------------------------


def test_nested_modules_are_replaced_and_compute_the_same(x: Tensor) -> None:
    model = nn.Sequential(Block(), nn.ModuleDict({"inner": Block()})["inner"], nn.Sequential(Block()))
    wanted = model(x)
    report = fastattn.patch(model)
    assert report.replaced == ["0.attn", "1.attn", "2.0.attn"]
    assert report.skipped == {}
    assert all(type(model.get_submodule(name)) is fastattn.MultiheadAttention for name in report.replaced)
    assert_same(model(x), wanted)


def test_the_root_itself_is_replaced(x: Tensor) -> None:
    model = attention()
    wanted = model(x, x, x)
    assert fastattn.patch(model).replaced == [""]
    assert isinstance(model, fastattn.MultiheadAttention)
    assert_same(model(x, x, x), wanted)


def test_a_model_without_attention_is_left_alone() -> None:
    report = fastattn.patch(nn.Linear(2, 2))
    assert (report.replaced, report.skipped) == ([], {})


def test_a_shared_module_is_replaced_once_and_stays_shared(x: Tensor) -> None:
    attn = attention()
    model = nn.Sequential(Block(attn), Block(attn))
    wanted = model(x)
    assert fastattn.patch(model).replaced == ["0.attn"]
    assert model[0].attn is model[1].attn is attn
    assert_same(model(x), wanted)


def test_references_outside_the_tree_see_the_replacement() -> None:
    model = Block()
    held = [model.attn]
    fastattn.patch(model)
    assert held[0] is model.attn
    assert isinstance(held[0], fastattn.MultiheadAttention)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 10, "vdim": 12},
        {"batch_first": False}, {"dtype": torch.float64}, {"dropout": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_every_construction_option_survives(options: dict[str, object]) -> None:
    attn = attention(**options).eval()
    query, key, value = (
        torch.randn(BATCH, BATCH, size, dtype=attn.out_proj.weight.dtype) for size in (EMBED, attn.kdim, attn.vdim)
    )
    wanted = attn(query, key, value)
    fastattn.patch(attn)
    assert_same(attn(query, key, value), wanted)
    fastattn.unpatch(attn)
    assert_same(attn(query, key, value), wanted)


# What is skipped ------------------------------------------------------------------------------------------------


def test_a_subclass_with_its_own_forward_is_skipped(x: Tensor) -> None:
    model = Block(WithForward(EMBED, HEADS, batch_first=True))
    wanted = model(x)
    report = fastattn.patch(model)
    assert report.replaced == []
    assert report.skipped == {"attn": "WithForward has its own forward"}
    assert torch.equal(model(x), wanted)


def test_a_quantizable_module_is_skipped() -> None:
    report = fastattn.patch(Block(torch.ao.nn.quantizable.MultiheadAttention(EMBED, HEADS)))
    assert "own forward" in report.skipped["attn"]


def test_a_subclass_that_overrides_a_part_of_the_computation_is_skipped() -> None:
    model = nn.ModuleDict({"call": WithCall(EMBED, HEADS), "masks": WithMergeMasks(EMBED, HEADS)})
    report = fastattn.patch(model)
    assert report.replaced == []
    assert "WithCall overrides __call__" in report.skipped["call"]
    assert "merge_masks" in report.skipped["masks"]


def test_a_forward_set_on_the_instance_is_skipped() -> None:
    model = Block()
    model.attn.forward = lambda x, *_: (x, None)
    assert "on the instance" in fastattn.patch(model).skipped["attn"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_module_is_skipped() -> None:
    model = nn.Sequential(torch.jit.script(attention()))
    assert "TorchScript" in fastattn.patch(model).skipped["0"]


def test_a_harmless_subclass_is_replaced_and_keeps_its_methods(x: Tensor) -> None:
    model = Block(WithoutForward(EMBED, HEADS, batch_first=True, label="a"))
    wanted = model(x)
    assert fastattn.patch(model).replaced == ["attn"]
    assert isinstance(model.attn, WithoutForward)
    assert isinstance(model.attn, fastattn.MultiheadAttention)
    assert type(model.attn).forward is fastattn.MultiheadAttention.forward
    assert model.attn.describe() == "attention a"
    assert_same(model(x), wanted)
    assert type(Block(copy.deepcopy(model.attn)).attn) is type(model.attn)
    loaded = pickle.loads(pickle.dumps(model))
    assert isinstance(loaded.attn, fastattn.MultiheadAttention)
    assert_same(loaded(x), wanted)
    fastattn.unpatch(loaded)
    assert type(loaded.attn) is WithoutForward


# Idempotence, unpatch -------------------------------------------------------------------------------------------


def test_patching_twice_changes_nothing() -> None:
    model = Block()
    fastattn.patch(model)
    report = fastattn.patch(model)
    assert report.replaced == []
    assert report.skipped == {"attn": "already fastattn"}
    fastattn.unpatch(model)
    assert type(model.attn) is nn.MultiheadAttention


def test_unpatch_restores_the_original_object_and_leaves_no_trace(x: Tensor) -> None:
    model = Block()
    attn, before = model.attn, dict(model.attn.__dict__)
    wanted = model(x)
    fastattn.patch(model, need_weights=False)
    assert fastattn.unpatch(model) == ["attn"]
    assert model.attn is attn
    assert type(attn) is nn.MultiheadAttention
    assert attn.__dict__ == before
    assert torch.equal(model(x), wanted)
    assert fastattn.unpatch(model) == []


def test_unpatch_leaves_modules_built_as_ours() -> None:
    model = Block(fastattn.MultiheadAttention(EMBED, HEADS, batch_first=True))
    assert fastattn.patch(model, need_weights=False).skipped == {"attn": "already fastattn"}
    assert model.attn.need_weights is None
    assert fastattn.unpatch(model) == []
    assert isinstance(model.attn, fastattn.MultiheadAttention)


# Transformer layers ---------------------------------------------------------------------------------------------


def encoder(layers: int = 2) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


def counted(model: nn.Module) -> list[str]:
    """Names of fastattn modules whose forward ran, in order, without a hook (a hook would close torch's fast path)."""
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, fastattn.MultiheadAttention):
            original = module.forward

            def forward(*args: object, _name: str = name, _original: object = original, **kwargs: object) -> object:
                ran.append(_name)
                return _original(*args, **kwargs)

            module.forward = forward
    return ran


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", ["right", "left", "none"])
def test_an_encoder_runs_our_modules_in_every_mode(training: bool, padded: str, x: Tensor) -> None:
    model = encoder().train(training)
    plain = copy.deepcopy(model).train()  # training mode is torch's own reference path; dropout is 0
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    if padded == "right":
        padding[1, 4:] = True
    if padded == "left":
        padding[1, :3] = True
    fastattn.patch(model)
    ran = counted(model)
    with torch.no_grad():
        wanted = plain(x, src_key_padding_mask=padding)
        got = model(x, src_key_padding_mask=padding)
    assert ran == ["layers.0.self_attn", "layers.1.self_attn"]
    assert_same(got[~padding], wanted[~padding])


def test_an_encoder_keeps_the_padded_length_and_gets_its_flag_back(x: Tensor) -> None:
    model = encoder().eval()
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[:, -2:] = True
    assert model.use_nested_tensor
    fastattn.patch(model)
    assert not model.use_nested_tensor
    with torch.no_grad():
        assert model(x, src_key_padding_mask=padding).shape == x.shape
    fastattn.patch(model)
    fastattn.unpatch(model)
    assert model.use_nested_tensor


def test_an_encoder_without_patched_modules_keeps_its_flag() -> None:
    model = encoder()
    for layer in model.layers:
        layer.self_attn = WithForward(EMBED, HEADS, batch_first=True)
    fastattn.patch(model)
    assert model.use_nested_tensor


def test_a_whole_transformer_gives_the_same(x: Tensor) -> None:
    model = nn.Transformer(EMBED, HEADS, 1, 2, 32, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    options = {"tgt_mask": mask, "tgt_is_causal": True}
    wanted = model(x, x, **options)
    report = fastattn.patch(model)
    assert len(report.replaced) == 5
    assert_same(model(x, x, **options), wanted)


# need_weights, the report, errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [None, True, False])
def test_need_weights(need_weights: bool | None, x: Tensor) -> None:
    model = attention()
    out, weights = model(x, x, x)
    fastattn.patch(model, need_weights=need_weights)
    got, default = model(x, x, x)
    assert_same(got, out)
    if need_weights is False:
        assert default is None
    else:
        assert_same(default, weights)
    assert (model(x, x, x, need_weights=False)[1] is None) == (need_weights is not True)
    fastattn.unpatch(model)
    assert_same(model(x, x, x)[1], weights)


def test_patching_again_changes_need_weights(x: Tensor) -> None:
    model = attention()
    fastattn.patch(model, need_weights=False)
    fastattn.patch(model, need_weights=True)
    assert model(x, x, x)[1] is not None
    fastattn.patch(model)
    assert model(x, x, x)[1] is not None


def test_the_report_reads_well() -> None:
    model = nn.ModuleDict({"a": attention(), "b": WithForward(EMBED, HEADS)})
    assert str(fastattn.patch(model)) == (
        "replaced 1, skipped 1\n  replaced a\n  skipped  b: WithForward has its own forward"
    )
    assert "(the model itself)" in str(fastattn.patch(attention()))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"model: got dict, expected a torch\.nn\.Module"):
        fastattn.patch({})
    with pytest.raises(TypeError, match="model: got NoneType"):
        fastattn.unpatch(None)
    with pytest.raises(TypeError, match="need_weights: got str, expected True, False or None"):
        fastattn.patch(attention(), need_weights="no")
