"""The shape of a Transformer, and the shapes of the models everybody knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ACTIVATIONS = ("relu", "gelu", "gelu_new")
_POSITIONS = ("sinusoidal", "learned")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What a Transformer is made of. With ``decoder_layers=0`` it is an encoder, with ``encoder_layers=0`` a decoder.

    Attributes:
        vocab_size: tokens are 0 to vocab_size - 1.
        dim: features of a token (d_model), a multiple of num_heads.
        num_heads: heads of every attention.
        encoder_layers, decoder_layers: at least one of them positive.
        hidden_dim: features between the two matrices of the MLP (d_ff).
        activation: "relu", "gelu" (exact) or "gelu_new" (its tanh approximation, as GPT-2).
        norm_first: pre-norm, x + f(norm(x)), with one more norm behind the last layer; else norm(x + f(x)).
        norm_eps: added to the variance in every norm.
        dropout: of embeddings, attention weights and what each sublayer adds, in training.
        attention_dropout: that of the attention weights, where it is another; None is ``dropout``.
        positions: "sinusoidal", of any length, or "learned", a table of max_positions.
        max_positions: longest sequence of learned positions.
        scale_embeddings: multiply tokens' embeddings by sqrt(dim) (Vaswani et al. 2017, section 3.4).
        norm_embeddings: a norm behind the sum of embeddings and positions, as BERT.
        token_types: size of BERT's table of segments; 0 is none.
        tie_embeddings: logits are products with the token embeddings (Press and Wolf 2017).
        source_vocab_size: of an encoder-decoder whose source has a vocabulary of its own; None is one vocabulary and
            one table for both.
        num_labels: of an encoder with BERT's classification head; 0 gives hidden states.
        start_token: what an encoder-decoder feeds its decoder first in ``generate``.

    Raises:
        TypeError, ValueError: naming the attribute, what was given and what is allowed.
    """

    vocab_size: int
    dim: int = 512
    num_heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    hidden_dim: int = 2048
    activation: str = "relu"
    norm_first: bool = False
    norm_eps: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float | None = None
    positions: str = "sinusoidal"
    max_positions: int = 512
    scale_embeddings: bool = False
    norm_embeddings: bool = False
    token_types: int = 0
    tie_embeddings: bool = True
    source_vocab_size: int | None = None
    num_labels: int = 0
    start_token: int = 0

    def __post_init__(self) -> None:
        _check_integers(
            1, vocab_size=self.vocab_size, dim=self.dim, num_heads=self.num_heads, hidden_dim=self.hidden_dim,
            max_positions=self.max_positions,
        )  # fmt: skip
        _check_integers(
            0, encoder_layers=self.encoder_layers, decoder_layers=self.decoder_layers, token_types=self.token_types,
            num_labels=self.num_labels, start_token=self.start_token,
        )  # fmt: skip
        if self.dim % self.num_heads != 0:
            raise ValueError(f"dim: got {self.dim}, expected a multiple of num_heads = {self.num_heads}")
        if self.encoder_layers + self.decoder_layers == 0:
            raise ValueError("encoder_layers, decoder_layers: got 0 and 0, expected at least one layer")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation: got {self.activation!r}, allowed are {', '.join(map(repr, _ACTIVATIONS))}")
        if self.positions not in _POSITIONS:
            raise ValueError(f"positions: got {self.positions!r}, allowed are {', '.join(map(repr, _POSITIONS))}")
        for name, probability in (("dropout", self.dropout), ("attention_dropout", self.attention_dropout)):
            if probability is not None and not 0.0 <= probability < 1.0:
                raise ValueError(f"{name}: got {probability}, expected at least 0 and less than 1")
        if not self.norm_eps > 0.0:
            raise ValueError(f"norm_eps: got {self.norm_eps}, expected more than 0")
        if self.source_vocab_size is not None:
            _check_integers(1, source_vocab_size=self.source_vocab_size)
            if self.encoder_layers == 0 or self.decoder_layers == 0:
                raise ValueError(
                    f"source_vocab_size: got {self.source_vocab_size}, expected None without encoder and decoder"
                )
        if self.num_labels and self.decoder_layers:
            raise ValueError(f"num_labels: got {self.num_labels}, expected 0 with a decoder")
        if self.start_token >= self.vocab_size:
            raise ValueError(f"start_token: got {self.start_token}, allowed are 0 to {self.vocab_size - 1}")

    @classmethod
    def bert_base(cls, vocab_size: int = 30522, num_labels: int = 2, **changes: Any) -> TransformerConfig:
        """BERT-base (Devlin et al. 2019) with a classification head; ``changes`` are other attributes."""
        shape: dict[str, Any] = {
            "dim": 768, "num_heads": 12, "encoder_layers": 12, "decoder_layers": 0, "hidden_dim": 3072,
            "activation": "gelu", "norm_eps": 1e-12, "positions": "learned", "max_positions": 512,
            "norm_embeddings": True, "token_types": 2,
        }  # fmt: skip
        return cls(vocab_size=vocab_size, num_labels=num_labels, **(shape | changes))

    @classmethod
    def gpt2_small(cls, vocab_size: int = 50257, **changes: Any) -> TransformerConfig:
        """GPT-2 small (Radford et al. 2019); ``changes`` are other attributes."""
        shape: dict[str, Any] = {
            "dim": 768, "num_heads": 12, "encoder_layers": 0, "decoder_layers": 12, "hidden_dim": 3072,
            "activation": "gelu_new", "norm_first": True, "positions": "learned", "max_positions": 1024,
        }  # fmt: skip
        return cls(vocab_size=vocab_size, **(shape | changes))

    @classmethod
    def vaswani_base(cls, vocab_size: int = 37000, **changes: Any) -> TransformerConfig:
        """The base model of Vaswani et al. 2017, table 3: 6 + 6 layers; ``changes`` are other attributes."""
        return cls(vocab_size=vocab_size, **({"scale_embeddings": True} | changes))


def _check_integers(least: int, **numbers: Any) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name}: got {type(number).__name__}, expected an integer")
        if number < least:
            raise ValueError(f"{name}: got {number}, expected at least {least}")
