"""Small Transformers of every kind, and a small GPT-2 of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.models import Transformer, TransformerConfig

SMALL: dict[str, Any] = {"vocab_size": 13, "dim": 16, "num_heads": 2, "hidden_dim": 32, "dropout": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "encoder": {"encoder_layers": 2, "decoder_layers": 0},
    "decoder": {"encoder_layers": 0, "decoder_layers": 2, "norm_first": True, "positions": "learned"},
    "both": {"encoder_layers": 2, "decoder_layers": 2, "scale_embeddings": True},
    "labels": {"encoder_layers": 1, "decoder_layers": 0, "num_labels": 3, "token_types": 2, "norm_embeddings": True},
}


def small(kind: str = "both", **changes: Any) -> Transformer:
    return Transformer(TransformerConfig(**(SMALL | KINDS[kind] | changes))).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape)


def tiny_gpt2(**changes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=13, n_embd=16, n_layer=2, n_head=2, n_positions=20, initializer_range=0.5, **changes)
    return GPT2LMHeadModel(config).eval()
