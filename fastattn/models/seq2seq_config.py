"""What a Seq2Seq model is made of."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.modules.memory import check_sizes

ATTENTIONS = ("additive", "dot", "general", "concat")
TIED = ("none", "output", "all")


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """Sizes and options of ``Seq2Seq``.

    Attributes:
        source_size: tokens of the source's vocabulary; features of a step where ``source_embedding`` is None.
        target_size: tokens of the target's vocabulary, the classes of the softmax.
        source_embedding: features of the source's embedding; None reads real features (B, S, source_size).
        target_embedding: features of the target's embedding; None feeds the decoder one-hot vectors of target_size.
        hidden_size: of the decoder's LSTM.
        encoder_size: hidden size of one direction of the encoder's; None is hidden_size, or half of it when
            bidirectional, so that encoder and decoder states have as many features.
        encoder_layers, decoder_layers: of the LSTMs.
        bidirectional: the encoder reads the source from its end, too.
        attention: "additive" (Bahdanau, Cho and Bengio 2015), "dot", "general" or "concat" (Luong, Pham and Manning
            2015), or None: the decoder knows the source by its first state alone (Sutskever, Vinyals and Le 2014).
        coverage: the scores know where attention has been (See, Liu and Manning 2017); of "additive" and "concat".
        input_feeding: the decoder's LSTM also reads what was attended to: with "additive" the context of this step,
            which the state before it asks for (Bahdanau et al., section A.2.2); else the attentional vector of the step
            before (Luong et al., section 3.3). Its steps then wait for each other.
        tie_embeddings: "none"; "output": the softmax has the matrix of the target's embedding (Press and Wolf 2017);
            "all": so has the source's embedding, and both languages one vocabulary.
        dropout: probability that an element of an embedding, between two layers, or before the softmax becomes zero in
            training.
        start_token: of the target's vocabulary, what the decoder reads first.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.
    """

    source_size: int
    target_size: int
    source_embedding: int | None = 256
    target_embedding: int | None = 256
    hidden_size: int = 512
    encoder_size: int | None = None
    encoder_layers: int = 1
    decoder_layers: int = 1
    bidirectional: bool = False
    attention: str | None = "general"
    coverage: bool = False
    input_feeding: bool = False
    tie_embeddings: str = "none"
    dropout: float = 0.0
    start_token: int = 0

    @classmethod
    def classic(cls, start_token: int = 0) -> Seq2SeqConfig:
        """The classic of the tutorials: 64 features -> LSTM(128); LSTM(128) from its last states -> softmax over 64.

        No embeddings, no attention: the source is (B, S, 64), one-hot or real, and the decoder reads one-hot vectors.
        It is trained with RMSprop (learning rate 0.001, decay 0.9) on the cross-entropy under full teacher forcing, in
        batches of 64, for 100 epochs, with the last 20 % of the pairs held out for validation;
        ``examples/classic_seq2seq.py`` does that.

        Raises ValueError where start_token is not one of the 64.
        """
        return cls(
            source_size=64, target_size=64, source_embedding=None, target_embedding=None, hidden_size=128,
            attention=None, start_token=start_token,
        )  # fmt: skip

    def __post_init__(self) -> None:
        sizes = {
            name: getattr(self, name)
            for name in ("source_size", "target_size", "hidden_size", "encoder_layers", "decoder_layers")
        }
        optional = ("source_embedding", "target_embedding", "encoder_size")
        check_sizes(**sizes, **{name: getattr(self, name) for name in optional if getattr(self, name) is not None})
        for name in ("bidirectional", "coverage", "input_feeding"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {type(getattr(self, name)).__name__}, expected a bool")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)):
            raise TypeError(f"dropout: got {type(self.dropout).__name__}, expected a number")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: got {self.dropout}, expected at least 0 and below 1")
        if isinstance(self.start_token, bool) or not isinstance(self.start_token, int):
            raise TypeError(f"start_token: got {type(self.start_token).__name__}, expected an integer")
        if not 0 <= self.start_token < self.target_size:
            raise ValueError(
                f"start_token: got {self.start_token}, expected 0 to {self.target_size - 1}, the target's vocabulary"
            )
        if self.bidirectional and self.encoder_size is None and self.hidden_size % 2:
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, expected an even number for two directions of half of it each, "
                "or an encoder_size"
            )
        self._check_attention()
        self._check_tied()

    def _check_attention(self) -> None:
        if self.attention is not None and self.attention not in ATTENTIONS:
            raise ValueError(
                f"attention: got {self.attention!r}, allowed are {', '.join(map(repr, ATTENTIONS))} and None"
            )
        if self.attention == "dot" and self.memory_size != self.hidden_size:
            raise ValueError(
                f"encoder_size: got {self.encoder_size}, which makes encoder states of {self.memory_size} features; "
                f"expected hidden_size = {self.hidden_size} for attention='dot'"
            )
        if self.coverage and self.attention not in ("additive", "concat"):
            raise ValueError(
                f"coverage: got True with attention={self.attention!r}, allowed with 'additive' and 'concat' only"
            )
        if self.input_feeding and self.attention is None:
            raise ValueError("input_feeding: got True with attention=None, expected an attention to feed")

    def _check_tied(self) -> None:
        if self.tie_embeddings not in TIED:
            raise ValueError(f"tie_embeddings: got {self.tie_embeddings!r}, allowed are {', '.join(map(repr, TIED))}")
        if self.tie_embeddings == "none":
            return
        if self.target_embedding is None:
            raise ValueError(
                f"target_embedding: got None, expected an embedding to tie for tie_embeddings={self.tie_embeddings!r}"
            )
        if self.tie_embeddings == "output":
            return
        if self.source_embedding != self.target_embedding:
            raise ValueError(
                f"source_embedding: got {self.source_embedding}, expected target_embedding = {self.target_embedding} "
                "for tie_embeddings='all'"
            )
        if self.source_size != self.target_size:
            raise ValueError(
                f"source_size: got {self.source_size}, expected target_size = {self.target_size}: one vocabulary for "
                "tie_embeddings='all'"
            )

    @property
    def directions(self) -> int:
        """Of the encoder."""
        return 2 if self.bidirectional else 1

    @property
    def direction_size(self) -> int:
        """Hidden size of one direction of the encoder."""
        return self.encoder_size or self.hidden_size // self.directions

    @property
    def memory_size(self) -> int:
        """Features of an encoder state, both directions together: what attention reads."""
        return self.direction_size * self.directions

    @property
    def context_first(self) -> bool:
        """Whether a step attends before the LSTM, from the state before it, as Bahdanau's does."""
        return self.input_feeding and self.attention == "additive"

    @property
    def readout_size(self) -> int:
        """Features the softmax layer reads: those of a tied embedding, else the decoder's."""
        if self.tie_embeddings == "none" or self.target_embedding is None:
            return self.hidden_size
        return self.target_embedding
