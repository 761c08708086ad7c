"""MiniLM's WordPiece with a vocabulary cut down to what the training texts use.

Why pieces and not words: many a word of a held-out reply stands nowhere in a thousand others. A vocabulary of words
calls each of them unknown, which no reply can be made of and which is easy to predict: the perplexity would flatter.
The pieces kept are those of the training texts, and all single characters, so that any word can still be spelt; the
30,522 that MiniLM has would be a softmax of which nine tenths never see a gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fastattn.demo import minilm

PAD, START, END, UNKNOWN = 0, 1, 2, 3
_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")  # as MiniLM calls them, in the order of the numbers above


class WordPieces:
    """Texts to numbers and back. ``pieces`` is the vocabulary; a piece that begins with ## continues a word."""

    def __init__(self, pieces: list[str]) -> None:
        from tokenizers import Tokenizer, normalizers, pre_tokenizers
        from tokenizers.models import WordPiece

        if tuple(pieces[: len(_SPECIAL)]) != _SPECIAL:
            raise ValueError(f"pieces: got {pieces[: len(_SPECIAL)]} first, expected {list(_SPECIAL)}")
        self.pieces = pieces
        numbers = {piece: number for number, piece in enumerate(pieces)}
        self._tokenizer = Tokenizer(WordPiece(numbers, unk_token="[UNK]"))
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    @classmethod
    def of(cls, texts: Iterable[str]) -> WordPieces:
        """The pieces MiniLM's tokenizer cuts these texts into, and MiniLM's single characters."""
        tokenizer = minilm.load_tokenizer()
        used = {piece for text in texts for piece in tokenizer.tokenize(text)}
        characters = {
            piece for piece in tokenizer.get_vocab() if len(piece.removeprefix("##")) == 1 and piece.isascii()
        }
        return cls([*_SPECIAL, *sorted((used | characters) - set(_SPECIAL))])

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's pieces, without start and end."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, numbers: Iterable[int]) -> str:
        """The text, up to the first end: small letters, and punctuation where a typist has it."""
        words: list[str] = []
        for number in numbers:
            if number == END:
                break
            piece = self.pieces[number]
            if piece.startswith("##") and words:
                words[-1] += piece[2:]
            elif number not in (PAD, START):
                words.append(piece)
        text = " ".join(words)
        text = re.sub(r" ([.,!?;:)\]])", r"\1", text)
        return re.sub(r"(\w) (['\u2019-]) (\w)", r"\1\2\3", re.sub(r"([(\[]) ", r"\1", text))

    def pad(self, texts: Iterable[list[int]], longest: int) -> tuple[Tensor, Tensor]:
        """Numbers (B, L) padded on the right, and lengths (B,): texts cut to ``longest``; L is the longest here."""
        cut = [torch.tensor(text[:longest], dtype=torch.int64) for text in texts]
        return pad_sequence(cut, batch_first=True, padding_value=PAD), torch.tensor([len(text) for text in cut])

    def embeddings(self, bert: Any) -> Tensor:
        """MiniLM's embeddings of the pieces (V, 384), of mean 0 and length 1: words alike begin as neighbours.

        The mean, which all of MiniLM's have in common, tells nothing, and as a softmax prefers some pieces to others.
        """
        vocabulary = minilm.load_tokenizer().get_vocab()
        rows = torch.tensor([vocabulary[piece] for piece in self.pieces])
        chosen = bert.embeddings.word_embeddings.weight.detach()[rows]
        return functional.normalize(chosen - chosen.mean(0), dim=1)
