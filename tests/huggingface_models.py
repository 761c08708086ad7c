"""One small random model of every verified architecture of transformers, and what it gives on fastattn and eager."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.demo import minilm as demo_minilm
from fastattn.demo import sentences
from fastattn.integrations.huggingface import calling

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

FORWARD, GRADIENT = 2e-5, 2e-4  # of the largest reference value
BATCH, LENGTH, VOCABULARY, HIDDEN, HEADS, NEW = 3, 11, 64, 32, 4, 8
WINDOW = 4

# The names that the configurations of the models share, in the dialects they have.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
# No token ends the generation. Tied embeddings would make a random model repeat its last token whatever it sees.
_TOKENS: dict[str, Any] = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False
}  # fmt: skip
_GROUPED = _SIZES | _TOKENS | {"num_key_value_heads": 2, "head_dim": 8}
_AUDIO = _SIZES | {
    "conv_dim": (8, 8), "conv_kernel": (6, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer",
    "do_stable_layer_norm": True, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
_IMAGE = {
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 48,
    "image_size": 16, "patch_size": 4, "num_labels": 5,
}  # fmt: skip
_MARIAN = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None, **_TOKENS,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One architecture: its model class and configuration, what it is fed, and what must reach the kernel."""

    title: str
    model: str
    config: dict[str, Any]
    inputs: str = "text"  # "text", "pair" (encoder and decoder), "speech", "audio" or "image"
    sides: tuple[str, ...] = ("none", "right", "left")
    uses: frozenset[str] = frozenset({"padding"})

    @property
    def generates(self) -> bool:
        return "causal" in self.uses


def _uses(*names: str) -> frozenset[str]:
    return frozenset(names)


_CAUSAL, _GQA = _uses("padding", "causal"), _uses("padding", "causal", "GQA")
_SLIDING = _GQA | {"window"}
CASES = {
    "bert": Case("BERT", "BertForMaskedLM", _SIZES),
    "roberta": Case("RoBERTa", "RobertaForMaskedLM", _SIZES),
    "xlm-roberta": Case("XLM-RoBERTa", "XLMRobertaForMaskedLM", _SIZES),
    "electra": Case("ELECTRA", "ElectraForMaskedLM", _SIZES | {"embedding_size": HIDDEN}),
    "distilbert": Case(
        "DistilBERT",
        "DistilBertForMaskedLM",
        {"vocab_size": VOCABULARY, "dim": HIDDEN, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 48,
         "max_position_embeddings": 64},
    ),
    "modernbert": Case(
        "ModernBERT",
        "ModernBertForMaskedLM",
        _SIZES | {"local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
                  "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        uses=_uses("padding", "window"),
    ),
    "gpt2": Case(
        "GPT-2",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 64} | _TOKENS,
        uses=_CAUSAL,
    ),
    "gpt_neox": Case("GPT-NeoX", "GPTNeoXForCausalLM", _SIZES | _TOKENS, uses=_CAUSAL),
    "opt": Case(
        "OPT", "OPTForCausalLM", _SIZES | _TOKENS | {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}, uses=_CAUSAL
    ),
    "llama": Case("Llama", "LlamaForCausalLM", _GROUPED, uses=_GQA),
    "qwen2": Case("Qwen2", "Qwen2ForCausalLM", _GROUPED, uses=_GQA),
    "qwen3_moe": Case(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        uses=_GQA,
    ),
    "gemma": Case("Gemma", "GemmaForCausalLM", _GROUPED, uses=_GQA),
    "mistral": Case("Mistral", "MistralForCausalLM", _GROUPED | {"sliding_window": WINDOW}, uses=_SLIDING),
    "mixtral": Case(
        "Mixtral", "MixtralForCausalLM", _GROUPED | {"sliding_window": WINDOW, "num_local_experts": 4}, uses=_SLIDING
    ),
    "phi3": Case("Phi-3", "Phi3ForCausalLM", _GROUPED | {"sliding_window": WINDOW}, uses=_SLIDING),
    "qwen3": Case(
        "Qwen3",
        "Qwen3ForCausalLM",
        _GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        uses=_SLIDING,
    ),
    "gemma2": Case(
        "Gemma 2",
        "Gemma2ForCausalLM",
        _GROUPED | {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 12},
        uses=_SLIDING | {"softcap"},
    ),
    "gpt_oss": Case(
        "gpt-oss",
        "GptOssForCausalLM",
        _GROUPED | {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        uses=_SLIDING | {"sinks"},
    ),
    "marian": Case("Marian (translation)", "MarianMTModel", _MARIAN, inputs="pair", uses=_CAUSAL),
    "bart": Case("BART (summarisation)", "BartForConditionalGeneration", _MARIAN, inputs="pair", uses=_CAUSAL),
    "mbart": Case("mBART (translation)", "MBartForConditionalGeneration", _MARIAN, inputs="pair", uses=_CAUSAL),
    "t5": Case(
        "T5",
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": HEADS,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 2}
        | _TOKENS,
        inputs="pair",
        uses=_CAUSAL | {"bias"},
    ),
    "whisper": Case(
        "Whisper (speech)",
        "WhisperForConditionalGeneration",
        _MARIAN | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32},
        inputs="speech",
        uses=_CAUSAL,
    ),
    "wav2vec2": Case("Wav2Vec2 (speech)", "Wav2Vec2ForCTC", _AUDIO, inputs="audio", sides=("none", "right")),
    "hubert": Case("HuBERT (speech)", "HubertForCTC", _AUDIO, inputs="audio", sides=("none", "right")),
    "vit": Case("ViT (images)", "ViTForImageClassification", _IMAGE, inputs="image", sides=("none",), uses=_uses()),
    "deit": Case("DeiT (images)", "DeiTForImageClassification", _IMAGE, inputs="image", sides=("none",), uses=_uses()),
}  # fmt: skip


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length))


def padding(side: str, length: int = LENGTH, most: int | None = None) -> Tensor:
    """(B, L), 1 at real tokens; the last row has no padding."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    for row, missing in enumerate((length - 4 if most is None else most, 2)):
        if side == "right":
            mask[row, length - missing :] = 0
        if side == "left":
            mask[row, :missing] = 0
    return mask


def build(name: str, dropout: float | None = None) -> Any:
    """The model on "eager", with weights large enough that it matters what each token attends to."""
    case = CASES[name]
    torch.manual_seed(0)
    cls = getattr(transformers, case.model)
    config = cls.config_class(**case.config, attn_implementation="eager")
    for option in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout_rate"):
        if dropout is not None and hasattr(config, option):
            setattr(config, option, dropout)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in parameter_name or "sinks" in parameter_name:
                parameter.normal_(0.0, 0.2 if parameter.dim() > 1 else 0.5)
    return model


def patched(model: Any) -> Any:
    ours = copy.deepcopy(model)
    report = fastattn.patch(ours)
    assert report.replaced
    assert not report.skipped
    return ours


def feed(name: str, side: str) -> dict[str, Tensor]:
    """What one forward pass takes."""
    torch.manual_seed(1)
    kind = CASES[name].inputs
    if kind == "image":
        return {"pixel_values": torch.randn(BATCH, 3, 16, 16)}
    if kind == "audio":
        return {"input_values": torch.randn(BATCH, 90), "attention_mask": padding(side, 90)}
    if kind == "speech":
        decoder = {"decoder_input_ids": tokens(9), "decoder_attention_mask": padding(side, 9)}
        return {"input_features": torch.randn(BATCH, 8, 24), **decoder}
    text = {"input_ids": tokens(), "attention_mask": padding(side)}
    if kind == "pair":
        text |= {"decoder_input_ids": tokens(9), "decoder_attention_mask": padding(side, 9)}
    return text


def real(name: str, model: Any, inputs: dict[str, Tensor]) -> Tensor | slice:
    """Which of the output's rows belong to tokens."""
    kind = CASES[name].inputs
    if kind == "image":
        return slice(None)
    if kind == "audio":
        frames = model(**inputs).logits.shape[1]
        mask: Tensor = model._get_feature_vector_attention_mask(frames, inputs["attention_mask"])
        return mask.bool()
    return inputs["attention_mask" if kind == "text" else "decoder_attention_mask"].bool()


@dataclass
class Seen:
    """What reached the public function."""

    features: set[str] = field(default_factory=set)
    dense: list[tuple[int, ...]] = field(default_factory=list)
    calls: int = 0
    dropout: set[float] = field(default_factory=set)


@contextmanager
def spying() -> Iterator[Seen]:
    seen, original = Seen(), calling.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Any:
        seen.calls += 1
        seen.dropout.add(options["dropout_p"])
        given = {"padding": "key_padding_mask", "window": "window", "softcap": "softcap", "sinks": "sinks"}
        seen.features |= {feature for feature, option in given.items() if options[option] is not None}
        seen.features |= {"causal"} if options["is_causal"] else set()
        seen.features |= {"GQA"} if options["enable_gqa"] else set()
        if attn_mask is not None:
            # A bias is one for the whole batch; a mask of tokens would be one per row.
            bias = attn_mask.is_floating_point() and attn_mask.shape[:2] == (1, HEADS)
            seen.features |= {"bias"} if bias else set()
            seen.dense += [] if bias else [tuple(attn_mask.shape)]
        return original(query, key, value, attn_mask, **options)

    calling.scaled_dot_product_attention = spy
    try:
        yield seen
    finally:
        calling.scaled_dot_product_attention = original


def error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest reference value."""
    assert got.shape == wanted.shape
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def gradient_error(got: Any, wanted: Any) -> tuple[float, str]:
    """The largest share over the parameters, and where. What is 1 % of the model's largest gradient counts in full.

    Below that it is measured against this 1 %: a key's bias has no gradient but rounding.
    """
    reference = {name: p.grad for name, p in wanted.named_parameters() if p.grad is not None}
    own = {name: p.grad for name, p in got.named_parameters() if p.grad is not None}
    assert reference.keys() == own.keys()
    floor = 0.01 * max(float(grad.abs().max()) for grad in reference.values())
    shares = (
        (float((own[name] - grad).abs().max()) / max(float(grad.abs().max()), floor), name)
        for name, grad in reference.items()
    )
    return max(shares)


@functools.cache
def forward_and_backward(name: str, side: str) -> tuple[float, tuple[float, str], Seen]:
    """Errors of the logits and of the gradients (and whose it is), and what reached the public function."""
    eager = build(name)
    ours = patched(eager)
    inputs = feed(name, side)
    rows = real(name, eager, inputs)
    with spying() as seen:
        results = [model(**inputs).logits[rows] for model in (eager, ours)]
    torch.manual_seed(2)
    weight = torch.randn_like(results[0])
    for result in results:
        (result * weight).sum().backward()
    return error(results[1], results[0]), gradient_error(ours, eager), seen


@functools.cache
def minilm() -> tuple[float, tuple[float, str], float]:
    """The real MiniLM on real sentences: errors of the hidden states, of the gradients, of the weights."""
    eager = demo_minilm.load_bert()
    eager.set_attn_implementation("eager")
    ours = patched(eager)
    batch = demo_minilm.batches(sentences.load(8), 8, 64, torch.device("cpu"))[0]
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask}
    wanted, got = (model(**inputs, output_attentions=True) for model in (eager, ours))
    for output in (wanted, got):
        demo_minilm.sentence_embedding(output.last_hidden_state, batch.mask).sum().backward()
    pairs = [(got.last_hidden_state[batch.mask], wanted.last_hidden_state[batch.mask])]
    pairs += [
        tuple(layer.transpose(1, 2)[batch.mask] for layer in layers)
        for layers in zip(got.attentions, wanted.attentions, strict=True)
    ]
    errors = [error(*pair) for pair in pairs]
    return errors[0], gradient_error(ours, eager), max(errors[1:])


@functools.cache
def weights(name: str) -> float:
    """The largest error of any attention weights, in the rows of tokens."""
    eager = build(name)
    inputs = feed(name, CASES[name].sides[-1])
    wanted, got = (model(**inputs, output_attentions=True) for model in (eager, patched(eager)))
    errors = []
    for kind in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        rows = inputs.get(
            "attention_mask" if kind in ("attentions", "encoder_attentions") else "decoder_attention_mask"
        )
        for mine, theirs in zip(getattr(got, kind, None) or (), getattr(wanted, kind, None) or (), strict=True):
            if rows is not None and rows.shape[1] == mine.shape[2]:
                mine, theirs = (weights.transpose(1, 2)[rows.bool()] for weights in (mine, theirs))
            errors.append(error(mine, theirs))
    return max(errors)


@functools.cache
def generated(name: str, side: str, **options: Any) -> tuple[Tensor, Tensor, Seen]:
    """The tokens of greedy generation by eager and by us, and what reached the public function."""
    eager = build(name)
    ours = patched(eager)
    inputs, kind = feed(name, side), CASES[name].inputs
    if kind == "pair" or (kind == "speech" and side == "none"):  # the decoder begins with its own first token
        inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    elif side == "right":
        # The next token comes from a padded position: it must see a token, or "eager" attends to everything.
        which = "attention_mask" if kind == "text" else "decoder_attention_mask"
        inputs[which] = padding(side, inputs[which].shape[1], most=WINDOW - 1)
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 1} | options
    with spying() as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Whisper's own generate() takes no padded prompt; the one it builds on does.
        base = transformers.GenerationMixin if "decoder_input_ids" in inputs else type(eager)
        wanted, got = (base.generate(model, **inputs, **options) for model in (eager, ours))
    return wanted, got, seen
