"""transformers' BERT on fastattn against its own "eager", tiny and random; the real MiniLM: test_minilm.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from huggingface_models import FORWARD, GRADIENT
from torch import Tensor, nn

import fastattn
from fastattn.integrations import huggingface
from fastattn.integrations.huggingface import calling

transformers = pytest.importorskip("transformers")

BATCH, LENGTH, VOCABULARY = 3, 11, 50
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip


def bert(cls: str = "BertModel", **options: Any) -> Any:
    config = transformers.BertConfig(**SIZES, attn_implementation="eager", **options)
    return getattr(transformers, cls)(config).eval()


def padding(side: str) -> Tensor:
    """(B, L), 1 at real tokens."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if side == "right":
        mask[0, 4:] = 0
        mask[1, 9:] = 0
    if side == "left":
        mask[0, :7] = 0
        mask[1, :2] = 0
    return mask


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, VOCABULARY, (BATCH, LENGTH))


def pair(model: Any) -> tuple[Any, Any]:
    """The model on "eager", and a patched copy of it."""
    patched = copy.deepcopy(model)
    fastattn.patch(patched)
    assert patched.config._attn_implementation == "fastattn"
    assert model.config._attn_implementation == "eager"
    return model, patched


def assert_within(got: Tensor, wanted: Tensor, share: float, what: str = "output") -> None:
    assert got.shape == wanted.shape, what
    limit = share * wanted.abs().max().clamp_min(1e-6)
    assert (got - wanted).abs().max() <= limit, f"{what}: {(got - wanted).abs().max()} > {limit}"


def assert_same_gradients(got: nn.Module, wanted: nn.Module) -> None:
    """Relative to the largest gradient of the model: a key bias has none but rounding."""
    largest = max(float(parameter.grad.abs().max()) for parameter in wanted.parameters() if parameter.grad is not None)
    for (name, mine), theirs in zip(got.named_parameters(), wanted.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert (mine.grad - theirs.grad).abs().max() <= GRADIENT * largest, name


# Numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_forward_and_gradients_are_those_of_eager(side: str, tokens: Tensor) -> None:
    eager, ours = pair(bert())
    mask = padding(side)
    outputs = [model(input_ids=tokens, attention_mask=mask).last_hidden_state for model in (eager, ours)]
    real = mask.bool()
    assert_within(outputs[1][real], outputs[0][real], FORWARD)
    for out in outputs:
        out[real].square().sum().backward()
    assert_same_gradients(ours, eager)


@pytest.mark.parametrize("side", ["right", "left"])
def test_output_attentions_per_head(side: str, tokens: Tensor) -> None:
    eager, ours = pair(bert())
    wanted, got = (
        model(input_ids=tokens, attention_mask=padding(side), output_attentions=True) for model in (eager, ours)
    )
    assert len(got.attentions) == 2
    for layer, (mine, theirs) in enumerate(zip(got.attentions, wanted.attentions, strict=True)):
        assert mine.shape == (BATCH, 4, LENGTH, LENGTH)
        assert_within(mine, theirs, FORWARD, f"weights of layer {layer}")
    assert ours(input_ids=tokens).attentions is None


def test_output_attentions_asked_for_by_the_configuration(tokens: Tensor) -> None:
    ours = pair(bert(output_attentions=True))[1]
    assert ours(input_ids=tokens).attentions[0].shape == (BATCH, 4, LENGTH, LENGTH)


@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "BertForMaskedLM", "BertForTokenClassification"])
def test_models_with_a_head(cls: str, tokens: Tensor) -> None:
    eager, ours = pair(bert(cls))
    wanted, got = (model(input_ids=tokens, attention_mask=padding("right")).logits for model in (eager, ours))
    assert_within(got[1:], wanted[1:], FORWARD)


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_a_decoder_is_causal(side: str, tokens: Tensor) -> None:
    eager, ours = pair(bert("BertLMHeadModel", is_decoder=True))
    mask = padding(side)
    wanted, got = (model(input_ids=tokens, attention_mask=mask).logits for model in (eager, ours))
    assert_within(got[mask.bool()], wanted[mask.bool()], FORWARD)


def test_a_decoder_generates_the_same_tokens_from_its_cache(tokens: Tensor) -> None:
    eager, ours = pair(bert("BertLMHeadModel", is_decoder=True))
    mask = padding("left")
    wanted, got = (
        model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False) for model in (eager, ours)
    )
    assert torch.equal(got, wanted)


def test_cross_attention_honours_the_encoder_mask(tokens: Tensor) -> None:
    eager, ours = pair(bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True))
    states = torch.randn(BATCH, 5, 32)
    mask = torch.ones(BATCH, 5, dtype=torch.long)
    mask[1, 2:] = 0
    wanted, got = (
        model(input_ids=tokens, encoder_hidden_states=states, encoder_attention_mask=mask).logits
        for model in (eager, ours)
    )
    assert_within(got, wanted, FORWARD)


@pytest.mark.parametrize("kind", ["float", "bool"])
def test_a_mask_of_the_callers_own_in_four_dimensions(kind: str, tokens: Tensor) -> None:
    eager, ours = pair(bert())
    allowed = torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.6
    allowed |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    wanted = eager(input_ids=tokens, attention_mask=additive).last_hidden_state
    got = ours(input_ids=tokens, attention_mask=additive if kind == "float" else allowed).last_hidden_state
    assert_within(got, wanted, FORWARD)


def test_a_sentence_without_a_real_token_stays_finite(tokens: Tensor) -> None:
    ours = pair(bert())[1]
    mask = padding("none")
    mask[1] = 0
    out = ours(input_ids=tokens, attention_mask=mask).last_hidden_state
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


def test_dropout_is_active_in_training_and_reproducible(tokens: Tensor) -> None:
    ours = pair(bert(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0))[1].train()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(ours(input_ids=tokens).last_hidden_state)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_autocast(tokens: Tensor) -> None:
    eager, ours = pair(bert())
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = (
            model(input_ids=tokens, attention_mask=padding("right")).last_hidden_state for model in (eager, ours)
        )
    assert got.dtype == wanted.dtype
    assert_within(got[1:].float(), wanted[1:].float(), 2e-2)


def test_a_compiled_model_is_one_graph(tokens: Tensor) -> None:
    eager, ours = pair(bert())
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    mask = padding("right")
    with torch.no_grad():
        wanted = eager(input_ids=tokens, attention_mask=mask).last_hidden_state
        got = compiled(input_ids=tokens, attention_mask=mask).last_hidden_state
    assert_within(got[mask.bool()], wanted[mask.bool()], FORWARD)
    torch._dynamo.reset()


# The mask as structure ------------------------------------------------------------------------------------------


def seen_masks(model: Any, monkeypatch: pytest.MonkeyPatch, **inputs: Any) -> list[dict[str, Any]]:
    """The masks of every call of our function while the model runs."""
    calls: list[dict[str, Any]] = []
    original = calling.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Any:
        calls.append({"attn_mask": attn_mask, **options})
        return original(query, key, value, attn_mask, **options)

    monkeypatch.setattr(calling, "scaled_dot_product_attention", spy)
    model(**inputs)
    assert len(calls) == 2
    return calls


def test_padding_reaches_the_kernel_in_two_dimensions(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = padding("right")
    for call in seen_masks(pair(bert())[1], monkeypatch, input_ids=tokens, attention_mask=mask):
        assert call["attn_mask"] is None
        assert call["is_causal"] is False
        assert torch.equal(call["key_padding_mask"], mask.bool())


def test_no_mask_where_nothing_is_padded(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = seen_masks(pair(bert())[1], monkeypatch, input_ids=tokens, attention_mask=padding("none"))
    assert all(call["attn_mask"] is None and call["key_padding_mask"] is None for call in calls)


def test_an_unpadded_decoder_is_causal_without_a_mask(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = seen_masks(pair(bert("BertLMHeadModel", is_decoder=True))[1], monkeypatch, input_ids=tokens)
    assert all(call["attn_mask"] is None and call["is_causal"] for call in calls)


def test_a_caller_who_needs_a_mask_to_combine_gets_a_dense_one() -> None:
    config = bert().config
    config._attn_implementation = "fastattn"
    huggingface.register()
    mask = transformers.masking_utils.create_bidirectional_mask(
        config=config,
        inputs_embeds=torch.empty(BATCH, LENGTH, 32),
        attention_mask=padding("right"),
        allow_is_bidirectional_skip=False,
    )
    assert mask.shape == (BATCH, 1, LENGTH, LENGTH)


# Nothing is dropped ---------------------------------------------------------------------------------------------


def direct(**options: Any) -> Any:
    module = bert().encoder.layer[0].attention.self
    heads = torch.randn(BATCH, 4, LENGTH, 8)
    return huggingface.attention(module, heads, heads, heads, options.pop("attention_mask", None), **options)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx", "something_new"])
def test_an_argument_that_cannot_be_honoured_raises(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name}: passed by BertSelfAttention"):
        direct(**{name: 1})


def test_arguments_without_effect_or_value_are_accepted() -> None:
    out, weights = direct(softcap=None, sliding_window=None, use_cache=False, position_ids=torch.arange(LENGTH))
    assert out.shape == (BATCH, LENGTH, 4, 8)
    assert weights is None


def test_a_window_without_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="sliding_window: got 0, expected a positive number or None"):
        direct(sliding_window=0)


def test_a_mask_of_three_dimensions_is_refused(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(3, 11, 11\)"):
        direct(attention_mask=torch.ones(BATCH, LENGTH, LENGTH, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(3, 11, 11\)"):
        pair(bert())[1](input_ids=tokens, attention_mask=torch.ones(BATCH, LENGTH, LENGTH))


# Registration, patch, unpatch -----------------------------------------------------------------------------------


def test_register_may_be_repeated_and_refuses_a_name_in_use() -> None:
    huggingface.register()
    huggingface.register()
    huggingface.register("fastattn-under-another-name")
    with pytest.raises(ValueError, match="'sdpa' is already another attention"):
        huggingface.register("sdpa")
    with pytest.raises(ValueError, match="expected a non-empty string"):
        huggingface.register("")


def test_a_registered_name_loads_like_any_other(tokens: Tensor) -> None:
    huggingface.register()
    config = transformers.BertConfig(**SIZES, attn_implementation="fastattn")
    model = transformers.BertModel(config).eval()
    assert model(input_ids=tokens).last_hidden_state.isfinite().all()
    assert fastattn.patch(model).skipped == {"": 'already uses attention "fastattn"'}
    assert fastattn.unpatch(model) == []


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_patch_reports_the_layers_and_unpatch_restores_the_implementation(before: str) -> None:
    model = bert("BertForSequenceClassification")
    model.set_attn_implementation(before)
    names = ["bert.encoder.layer.0.attention.self", "bert.encoder.layer.1.attention.self"]
    attributes = set(model.__dict__)
    assert fastattn.patch(model).replaced == names
    assert fastattn.patch(model).replaced == []
    assert fastattn.unpatch(model) == names
    assert model.config._attn_implementation == before
    assert set(model.__dict__) == attributes
    assert fastattn.unpatch(model) == []


def test_a_model_inside_another_module_is_found() -> None:
    model = nn.ModuleDict({"text": bert(), "own": nn.MultiheadAttention(8, 2)})
    report = fastattn.patch(model)
    assert report.replaced == ["own", "text.encoder.layer.0.attention.self", "text.encoder.layer.1.attention.self"]
    fastattn.unpatch(model)
    assert model["text"].config._attn_implementation == "eager"


def test_a_patched_copy_is_unpatched_alone(tokens: Tensor) -> None:
    ours = pair(bert())[1]
    other = copy.deepcopy(ours)
    fastattn.unpatch(other)
    assert (ours.config._attn_implementation, other.config._attn_implementation) == ("fastattn", "eager")


def test_a_saved_model_loads_without_us(tmp_path: Any, tokens: Tensor) -> None:
    ours = pair(bert())[1]
    ours.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path, local_files_only=True).eval()
    assert loaded.config._attn_implementation == "sdpa"
    assert_within(loaded(input_ids=tokens).last_hidden_state, ours(input_ids=tokens).last_hidden_state, FORWARD)


def olmo() -> Any:
    """An architecture that asks for a registered attention, and is not verified."""
    return transformers.OlmoForCausalLM(transformers.OlmoConfig(**SIZES, pad_token_id=0, eos_token_id=1)).eval()


def test_another_architecture_is_reported_and_left_alone(tokens: Tensor) -> None:
    model = olmo()
    before = model.config._attn_implementation
    wanted = model(input_ids=tokens).logits
    report = fastattn.patch(model)
    assert report.replaced == []
    assert report.skipped == {"": "OlmoForCausalLM: architecture 'olmo' not verified yet"}
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids=tokens).logits, wanted)


def test_another_architecture_switched_by_hand_is_refused(tokens: Tensor) -> None:
    huggingface.register()
    model = olmo()
    model.set_attn_implementation("fastattn")
    with pytest.raises(NotImplementedError, match="architecture 'olmo' not verified yet; verified are 'bart', 'bert'"):
        model(input_ids=tokens)


@pytest.mark.parametrize("name", huggingface.REFUSED)
def test_an_architecture_with_attention_of_its_own_is_refused_with_the_reason(name: str, tokens: Tensor) -> None:
    cls = transformers.MODEL_MAPPING[transformers.CONFIG_MAPPING[name]] if name != "bark" else transformers.BarkModel
    with torch.device("meta"):
        shell = nn.Module()
        shell.model = cls.__new__(cls)
    nn.Module.__init__(shell.model)
    shell.model.config = transformers.CONFIG_MAPPING[name]()
    report = fastattn.patch(shell)
    assert report.replaced == []
    assert report.skipped["model"].endswith(f"architecture {name!r} {huggingface.REFUSED[name]}")
    with pytest.raises(NotImplementedError, match=f"architecture {name!r} "):
        huggingface.mask(1, 4, 4, config=shell.model.config)


@pytest.mark.parametrize(("name", "error"), [("mpnet", NotImplementedError), ("bloom", NotImplementedError)])
def test_a_model_that_adds_the_mask_never_gets_ours(name: str, error: type[Exception], tokens: Tensor) -> None:
    huggingface.register()
    sizes = {"mpnet": {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
             "bloom": {"n_layer": 1, "n_head": 4}}[name]  # fmt: skip
    config = transformers.CONFIG_MAPPING[name](vocab_size=VOCABULARY, hidden_size=32, **sizes)
    model = transformers.MODEL_MAPPING[type(config)](config).eval()
    model.config._attn_implementation = "fastattn"
    with pytest.raises(error, match="adds the mask"):
        model(input_ids=tokens, attention_mask=padding("right"))


def test_an_encoder_decoder_of_two_berts(tokens: Tensor) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        parts = bert(), bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
        return transformers.EncoderDecoderModel(encoder=parts[0], decoder=parts[1]).eval()

    eager, ours = build(), build()
    report = fastattn.patch(ours)
    assert len(report.replaced) == 2 + 2 * 2
    assert "EncoderDecoderModel" in report.skipped[""]
    inputs = {"input_ids": tokens, "attention_mask": padding("right"), "decoder_input_ids": tokens.flip(1)}
    assert_within(ours(**inputs).logits, eager(**inputs).logits, FORWARD)
    assert len(fastattn.unpatch(ours)) == 6
    assert_within(ours(**inputs).logits, eager(**inputs).logits, FORWARD)
    configs = [module.config for module in ours.modules() if hasattr(module, "config")]
    assert not any(config._attn_implementation == "fastattn" for config in configs)
