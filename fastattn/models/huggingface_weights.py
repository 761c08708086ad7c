"""Hugging Face's BERT and GPT-2 state_dicts, under the names that fastattn.models.Transformer has."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastattn.models.transformer_config import TransformerConfig

Loaded = tuple[TransformerConfig, dict[str, Tensor]]

# Heads of other tasks, and buffers that old versions of transformers stored.
_BERT_UNUSED = ("cls.", "pooler.", "classifier.", "embeddings.position_ids", "qa_outputs.")
_GPT2_UNUSED = (".attn.bias", ".attn.masked_bias")


def bert(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    num_labels: int | None = None,
    vocab_size: int | None = None,
    activation: str = "gelu",
    dropout: float = 0.1,
) -> Loaded:
    """Config and weights of a BertModel or BertFor... (Devlin et al. 2019).

    Args:
        state_dict: the model's; names may begin with "bert.".
        num_heads: the config's num_attention_heads, which no weight tells.
        num_labels: None is as many as the state_dict's classifier has, 0 without one. With labels but no classifier in
            the state_dict, it starts as zeros: every label is as likely before training.
        vocab_size: the tokenizer's, to be checked.
        activation: the config's hidden_act.
        dropout: in training.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    source = _Source(state_dict, "bert.", "BertModel")
    tokens = source.take("embeddings.word_embeddings.weight")
    positions = source.take("embeddings.position_embeddings.weight")
    types = source.take("embeddings.token_type_embeddings.weight")
    _check_vocab(vocab_size, tokens)
    weights = {
        "embeddings.tokens.weight": tokens,
        "embeddings.positions.weight": positions,
        "embeddings.types.weight": types,
    }
    weights |= source.linear("embeddings.LayerNorm", "embeddings.norm")
    layers = source.count("encoder.layer.")
    for number in range(layers):
        theirs, mine = f"encoder.layer.{number}", f"encoder.{number}"
        for kind in ("weight", "bias"):
            parts = [source.take(f"{theirs}.attention.self.{name}.{kind}") for name in ("query", "key", "value")]
            weights[f"{mine}.self_attn.in_proj_{kind}"] = torch.cat(parts)
        for their_name, my_name in (
            ("attention.output.dense", "self_attn.out_proj"), ("attention.output.LayerNorm", "self_norm"),
            ("intermediate.dense", "linear1"), ("output.dense", "linear2"), ("output.LayerNorm", "mlp_norm"),
        ):  # fmt: skip
            weights |= source.linear(f"{theirs}.{their_name}", f"{mine}.{my_name}")
    classifier = source.tensors.get("classifier.weight")
    if num_labels is None:
        num_labels = 0 if classifier is None else classifier.shape[0]
    if num_labels:
        weights |= source.linear("pooler.dense", "pooler")
        if classifier is None:
            weights["classifier.weight"] = tokens.new_zeros(num_labels, tokens.shape[1])
            weights["classifier.bias"] = tokens.new_zeros(num_labels)
        elif classifier.shape[0] != num_labels:
            raise ValueError(f"num_labels: got {num_labels}, expected the state_dict's {classifier.shape[0]}, or None")
        else:
            weights |= source.linear("classifier", "classifier")
    source.check_all_taken(lambda name: name.startswith(_BERT_UNUSED))
    config = TransformerConfig.bert_base(
        tokens.shape[0], num_labels, dim=tokens.shape[1], num_heads=num_heads, encoder_layers=layers,
        hidden_dim=weights["encoder.0.linear1.weight"].shape[0], activation=activation, dropout=dropout,
        max_positions=positions.shape[0], token_types=types.shape[0],
    )  # fmt: skip
    return config, weights


def gpt2(
    state_dict: Mapping[str, Tensor], *, num_heads: int, vocab_size: int | None = None, dropout: float = 0.1
) -> Loaded:
    """Config and weights of a GPT2Model or GPT2LMHeadModel (Radford et al. 2019).

    Args:
        state_dict: the model's; names may begin with "transformer.".
        num_heads: the config's n_head, which no weight tells.
        vocab_size: the tokenizer's, to be checked.
        dropout: in training.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    source = _Source(state_dict, "transformer.", "GPT2Model")
    tokens, positions = source.take("wte.weight"), source.take("wpe.weight")
    _check_vocab(vocab_size, tokens)
    weights = {"embeddings.tokens.weight": tokens, "embeddings.positions.weight": positions}
    weights |= source.linear("ln_f", "decoder_norm")
    layers = source.count("h.")
    for number in range(layers):
        theirs, mine = f"h.{number}", f"decoder.{number}"
        weights |= source.linear(f"{theirs}.ln_1", f"{mine}.self_norm")
        weights |= source.linear(f"{theirs}.ln_2", f"{mine}.mlp_norm")
        # GPT-2 keeps its matrices as (in, out).
        weights[f"{mine}.self_attn.in_proj_weight"] = source.take(f"{theirs}.attn.c_attn.weight").T
        weights[f"{mine}.self_attn.in_proj_bias"] = source.take(f"{theirs}.attn.c_attn.bias")
        for their_name, my_name in (
            ("attn.c_proj", "self_attn.out_proj"), ("mlp.c_fc", "linear1"), ("mlp.c_proj", "linear2")
        ):  # fmt: skip
            weights[f"{mine}.{my_name}.weight"] = source.take(f"{theirs}.{their_name}.weight").T
            weights[f"{mine}.{my_name}.bias"] = source.take(f"{theirs}.{their_name}.bias")
    head = source.tensors.get("lm_head.weight")
    tied = head is None or torch.equal(head, tokens)
    if not tied:
        weights["output.weight"] = source.take("lm_head.weight")
    source.check_all_taken(lambda name: name == "lm_head.weight" or name.endswith(_GPT2_UNUSED))
    config = TransformerConfig.gpt2_small(
        tokens.shape[0], dim=tokens.shape[1], num_heads=num_heads, decoder_layers=layers, dropout=dropout,
        hidden_dim=weights["decoder.0.linear1.weight"].shape[0], max_positions=positions.shape[0],
        tie_embeddings=tied,
    )  # fmt: skip
    return config, weights


class _Source:
    """A state_dict without its prefix, and which of its tensors were taken."""

    def __init__(self, state_dict: Mapping[str, Tensor], prefix: str, model: str) -> None:
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: got {type(state_dict).__name__}, expected that of a Hugging Face {model}")
        self.model = model
        self.tensors = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
        self.taken: set[str] = set()

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            some = ", ".join(list(self.tensors)[:3]) or "nothing"
            raise ValueError(
                f"state_dict: got {some}, ... without {name!r}, expected that of a Hugging Face {self.model}"
            )
        self.taken.add(name)
        return self.tensors[name]

    def linear(self, theirs: str, mine: str) -> dict[str, Tensor]:
        return {f"{mine}.{kind}": self.take(f"{theirs}.{kind}") for kind in ("weight", "bias")}

    def count(self, prefix: str) -> int:
        """How many layers are named ``prefix`` and a number."""
        numbers = {name[len(prefix) :].split(".")[0] for name in self.tensors if name.startswith(prefix)}
        if not numbers:
            self.take(f"{prefix}0")
        return len(numbers)

    def check_all_taken(self, may_stay: Callable[[str], bool]) -> None:
        left = [name for name in self.tensors if name not in self.taken and not may_stay(name)]
        if left:
            raise ValueError(
                f"state_dict: got {len(left)} tensors that a {self.model} has no place for: {', '.join(left[:3])}"
            )


def _check_vocab(vocab_size: int | None, tokens: Tensor) -> None:
    if vocab_size is not None and tokens.shape[0] != vocab_size:
        raise ValueError(f"vocab_size: got {vocab_size}, expected the state_dict's {tokens.shape[0]}")
