"""The Transformer (Vaswani et al. 2017): encoder, decoder or both, in training and with a KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import MultiheadAttention as TorchMultiheadAttention
from torch.nn import functional

from fastattn.models import checkpoint, checks, huggingface_weights
from fastattn.models.transformer_config import TransformerConfig
from fastattn.models.transformer_layers import Embeddings, LayerCache, TransformerLayer
from fastattn.modules.attention import MultiheadAttention


@dataclass(frozen=True)
class TransformerState:
    """What decoding N rows remembers: a cache for each layer, the tokens in it (N,), the source's lengths (N,)."""

    layers: tuple[LayerCache, ...]
    lengths: Tensor
    memory_lengths: Tensor | None


class Transformer(nn.Module):
    """Encoder, decoder or both, as ``config`` says. Decode from one with a decoder by ``fastattn.models.generate``.

    Padding is given as lengths, causality as a flag: there is never a mask of the size of the scores. Matrices start
    as Glorot and Bengio 2010 draw them, embeddings as N(0, 1 / dim), so that tied logits start with unit variance.

    Args:
        config: a TransformerConfig, of your own or TransformerConfig.bert_base(), gpt2_small() or vaswani_base().
        attention: the class of every attention: nn.MultiheadAttention's constructor, parameters and forward, with an
            ``is_causal`` that needs no mask. For comparisons.

    Raises:
        TypeError: ``config`` is something else.
    """

    def __init__(
        self, config: TransformerConfig, *, attention: type[TorchMultiheadAttention] = MultiheadAttention
    ) -> None:
        super().__init__()
        if not isinstance(config, TransformerConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a TransformerConfig")
        self.config = config
        self.embeddings = Embeddings(config, config.vocab_size)
        self.source_embeddings: Embeddings | None = None
        if config.source_vocab_size is not None:
            self.source_embeddings = Embeddings(config, config.source_vocab_size)
        cross = config.encoder_layers > 0
        self.encoder = nn.ModuleList(TransformerLayer(config, False, attention) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(TransformerLayer(config, cross, attention) for _ in range(config.decoder_layers))
        self.encoder_norm = self._last_norm(config.encoder_layers)
        self.decoder_norm = self._last_norm(config.decoder_layers)
        self.pooler = nn.Linear(config.dim, config.dim) if config.num_labels else None
        self.classifier = nn.Linear(config.dim, config.num_labels) if config.num_labels else None
        self.output: nn.Linear | None = None
        if config.decoder_layers and not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(_initialise)

    @classmethod
    def from_bert(cls, state_dict: Mapping[str, Tensor], *, num_heads: int, **options: Any) -> Transformer:
        """A Hugging Face BERT: arguments and errors as ``huggingface_weights.bert``; in eval mode, as from_pretrained.

        Without labels, the hidden states are BertModel's last_hidden_state.
        """
        return cls._loaded(*huggingface_weights.bert(state_dict, num_heads=num_heads, **options))

    @classmethod
    def from_gpt2(cls, state_dict: Mapping[str, Tensor], *, num_heads: int, **options: Any) -> Transformer:
        """A Hugging Face GPT-2: arguments and errors as ``huggingface_weights.gpt2``; in eval mode, as from_pretrained.

        The logits are GPT2LMHeadModel's.
        """
        return cls._loaded(*huggingface_weights.gpt2(state_dict, num_heads=num_heads, **options))

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        map_location: torch.device | str = "cpu",
        *,
        config: TransformerConfig | None = None,
    ) -> Transformer:
        """The model that ``save`` wrote, in eval mode. Runs no code from the file (weights_only=True).

        Args:
            path: of the file.
            map_location: the device of the parameters.
            config: what the file has to hold, such as the size of a tokenizer's vocabulary; None takes what it holds.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, no checkpoint of a Transformer, or of another config; the message says which.
        """
        saved, weights = checkpoint.load_model(
            path, TransformerConfig, config, kind=cls.__name__, map_location=map_location
        )
        try:
            model = cls._loaded(saved, weights)
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"path: got {path}, whose weights do not fit its config: {error}") from error
        return model.to(map_location)

    def save(self, path: str | PathLike[str]) -> None:
        """Write config and weights to ``path``, whole or not at all: an interruption leaves what was there."""
        checkpoint.save(
            path, kind=type(self).__name__, config=dataclasses.asdict(self.config), weights=self.state_dict()
        )  # fmt: skip

    def forward(
        self,
        tokens: Tensor,
        target: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """What the model predicts at every token.

        Args:
            tokens: (B, S), int64 or int32: the source; of a decoder-only model what it continues.
            target: (B, T), of an encoder-decoder alone: what the decoder is fed, beginning with the start token and
                padded on the right. It needs no lengths: a causal row never sees the padding behind it.
            lengths: (B,), int64 or int32, real tokens of each sequence, which is padded on the right.
            key_padding_mask: (B, S), boolean, True at real tokens, instead of ``lengths``: for padding anywhere. A
                position is then the number of real tokens before it, so that the side of the padding changes nothing.
            token_types: (B, S), int64 or int32, segments, for a config with token_types; None is all 0.

        Returns:
            Logits (B, T, V) of the next token; of an encoder, its hidden states (B, S, E), or with num_labels logits
            (B, num_labels), whose argmax is the predicted label. What stands at padding means nothing.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        config = self.config
        both = config.encoder_layers > 0 and config.decoder_layers > 0
        if both != (target is not None):
            wanted = "the decoder's tokens" if both else "None without an encoder and a decoder"
            raise ValueError(f"target: got {'None' if target is None else 'a tensor'}, expected {wanted}")
        x, padding = self._embed_source("tokens", tokens, lengths, key_padding_mask, token_types)
        if not config.encoder_layers:
            # What is padded on the right stands behind every real row's triangle.
            return self._decode(x, padding if lengths is None else None)
        x = self._encode(x, padding)
        if target is not None:
            checks.check_tokens("target", target, config.vocab_size, tokens.shape[0])
            self._check_positions("target", target.shape[1])
            positions = torch.arange(target.shape[1], device=target.device)
            return self._decode(self.embeddings(target, positions), None, x, padding)
        if self.pooler is None or self.classifier is None:
            return x
        if key_padding_mask is None:
            first = x[:, 0]
        else:
            # The first real token, wherever the padding is.
            first = x[torch.arange(x.shape[0], device=x.device), key_padding_mask.to(torch.uint8).argmax(1)]
        logits: Tensor = self.classifier(self.dropout(torch.tanh(self.pooler(first))))
        return logits

    def start(self, source: Tensor, lengths: Tensor, max_new_tokens: int) -> tuple[Tensor, TransformerState]:
        """Read the source, or the prompt: see ``fastattn.models.generation.Generator``."""
        if not self.decoder:
            raise ValueError("model: got an encoder without a decoder, which generates nothing")
        rows = torch.zeros_like(lengths)
        if self.encoder:
            x, padding = self._embed_source("source", source, lengths, None, None)
            self._check_positions("max_new_tokens", max_new_tokens)
            memory = self._encode(x, padding)
            layers = tuple(layer.open_cache(len(rows), max_new_tokens, memory) for layer in self._decoder_layers())
            first = torch.full_like(rows, self.config.start_token)
            return self.step(first, TransformerState(layers, rows, lengths))
        checks.check_tokens("source", source, self.config.vocab_size)
        checks.check_lengths("lengths", lengths, source)
        room = source.shape[1] + max_new_tokens - 1
        self._check_positions("source, max_new_tokens", room)
        layers = tuple(layer.open_cache(len(rows), room, None) for layer in self._decoder_layers())
        hidden = self._advance(source, TransformerState(layers, rows, None))
        last = hidden[torch.arange(len(rows), device=source.device), lengths - 1]
        # Padding was cached as well: what is written next overwrites it, and no length reaches over it.
        return self._logits(last), TransformerState(layers, lengths, None)

    def step(self, tokens: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """Logits (N, V) after one more token (N,) a row: see ``fastattn.models.generation.Generator``."""
        hidden = self._advance(tokens.unsqueeze(1), state)
        return self._logits(hidden[:, 0]), dataclasses.replace(state, lengths=state.lengths + 1)

    def reorder(self, state: TransformerState, index: Tensor) -> TransformerState:
        """The state of rows ``index``: see ``fastattn.models.generation.Generator``."""
        memory_lengths = None if state.memory_lengths is None else state.memory_lengths[index]
        return TransformerState(
            tuple(cache.rows(index) for cache in state.layers), state.lengths[index], memory_lengths
        )  # fmt: skip

    @classmethod
    def _loaded(cls, config: TransformerConfig, weights: Mapping[str, Tensor]) -> Transformer:
        model = cls(config)
        model.load_state_dict(weights)
        return model.eval()

    def _last_norm(self, layers: int) -> nn.LayerNorm | None:
        """Pre-norm leaves the sum of all layers as it is; the last one is normed here."""
        return nn.LayerNorm(self.config.dim, eps=self.config.norm_eps) if self.config.norm_first and layers else None

    def _embed_source(
        self,
        name: str,
        tokens: Tensor,
        lengths: Tensor | None,
        key_padding_mask: Tensor | None,
        token_types: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens, checked under ``name`` and embedded (B, S, E), and their padding (B, S), True at padding, or None."""
        embeddings = self.embeddings if self.source_embeddings is None else self.source_embeddings
        checks.check_tokens(name, tokens, embeddings.tokens.num_embeddings)
        self._check_positions(name, tokens.shape[1])
        if token_types is not None:
            if not self.config.token_types:
                raise ValueError("token_types: got a tensor, expected None for a config with token_types=0")
            checks.check_tokens("token_types", token_types, self.config.token_types)
            if token_types.shape != tokens.shape:
                got, wanted = tuple(token_types.shape), tuple(tokens.shape)
                raise ValueError(f"token_types: got shape {got}, expected the tokens' {wanted}")
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        padding = None
        if lengths is not None and key_padding_mask is not None:
            raise ValueError("key_padding_mask: got a tensor beside lengths, expected one of the two")
        if lengths is not None:
            checks.check_lengths("lengths", lengths, tokens)
            padding = positions >= lengths[:, None]
        elif key_padding_mask is not None:
            checks.check_padding_mask("key_padding_mask", key_padding_mask, tokens)
            padding = ~key_padding_mask
            positions = (key_padding_mask.cumsum(1) - 1).clamp(min=0)
        return embeddings(tokens, positions, token_types), padding

    def _encode(self, x: Tensor, padding: Tensor | None) -> Tensor:
        for layer in self.encoder:
            x = layer(x, False, padding)
        return _normed(x, self.encoder_norm)

    def _decode(
        self, x: Tensor, padding: Tensor | None, memory: Tensor | None = None, memory_padding: Tensor | None = None
    ) -> Tensor:
        for layer in self.decoder:
            x = layer(x, True, padding, memory, memory_padding)
        return self._logits(_normed(x, self.decoder_norm))

    def _advance(self, tokens: Tensor, state: TransformerState) -> Tensor:
        """Hidden states (N, T, E) of tokens (N, T) behind those in the cache."""
        checks.check_tokens("tokens", tokens, self.config.vocab_size)
        positions = state.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x: Tensor = self.embeddings(tokens, positions)
        for layer, cache in zip(self._decoder_layers(), state.layers, strict=True):
            x = layer.step(x, cache, state.lengths, state.memory_lengths)
        return _normed(x, self.decoder_norm)

    def _decoder_layers(self) -> list[TransformerLayer]:
        return cast("list[TransformerLayer]", list(self.decoder))

    def _logits(self, hidden: Tensor) -> Tensor:
        weight = self.embeddings.tokens.weight if self.output is None else self.output.weight
        return functional.linear(hidden, weight)

    def _check_positions(self, name: str, count: int) -> None:
        if self.config.positions == "learned" and count > self.config.max_positions:
            raise ValueError(f"{name}: got {count} positions, allowed are {self.config.max_positions}, max_positions")


def _normed(x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    normed: Tensor = x if norm is None else norm(x)
    return normed


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
