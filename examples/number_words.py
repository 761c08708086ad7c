"""Numbers from 0 to 999,999 in English, and in French or German: exact pairs, their split, and their tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from num2words import num2words
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PAD, START, END = "<pad>", "<start>", "<end>"
_SPECIAL = (PAD, START, END)
LANGUAGES = ("fr", "de")
LONGEST = 80  # tokens to allow an answer; the longest number has 66, with its end


@dataclass(frozen=True)
class Numbers:
    """What is trained on, what is watched in training, and what is tested; no number is in two of them."""

    training: list[int]
    validation: list[int]
    held_out: list[int]


def split(seed: int = 0, *, training: int = 10_000, validation: int = 50, held_out: int = 250) -> Numbers:
    """Draw so many numbers, at most, of each count of digits.

    All numbers of one and two digits are trained on: they hold the words. Above, each count of digits is tested alike;
    drawn from the whole range, nine in ten would have six digits.
    """
    draw = torch.Generator().manual_seed(seed)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for digits in range(1, 7):
        least = 10 ** (digits - 1) if digits > 1 else 0
        order = (least + torch.randperm(10**digits - least, generator=draw)).tolist()
        tested = held_out if digits > 2 else 0
        watched = validation if digits > 2 else 0
        parts[2].extend(order[:tested])
        parts[1].extend(order[tested : tested + watched])
        parts[0].extend(order[tested + watched :][:training])
    return Numbers(*parts)


def english(number: int) -> str:
    return str(num2words(number))


def foreign(number: int, language: str) -> str:
    return str(num2words(number, lang=language))


def split_english(text: str) -> list[str]:
    """The words alone: hyphens and commas say nothing more."""
    return re.findall(r"[a-z]+", text.lower())


def split_french(text: str) -> list[str]:
    """Words, and hyphens, which are not where English has them."""
    return re.findall(r"[^\W\d_]+|-", text)


def join_french(pieces: Iterable[str]) -> str:
    return " ".join(pieces).replace(" - ", "-")


def split_german(text: str) -> list[str]:
    """Characters: a German number is one word, and most are in no list of words."""
    return list(text)


def join_german(pieces: Iterable[str]) -> str:
    return "".join(pieces)


SPLIT: dict[str, Callable[[str], list[str]]] = {"en": split_english, "fr": split_french, "de": split_german}
JOIN: dict[str, Callable[[Iterable[str]], str]] = {"fr": join_french, "de": join_german}


class Vocabulary:
    """The pieces of one language as tokens 0, 1, ...; the first three are padding, start and end.

    Args:
        language: "en", "fr" or "de": how texts are split.
        pieces: all, in the order of their tokens, without the first three.
    """

    def __init__(self, language: str, pieces: Sequence[str]) -> None:
        self.language = language
        self.pieces = [*_SPECIAL, *pieces]
        self.tokens = {piece: token for token, piece in enumerate(self.pieces)}
        self.pad, self.start, self.end = (self.tokens[piece] for piece in _SPECIAL)

    @classmethod
    def of(cls, language: str, texts: Iterable[str]) -> Vocabulary:
        """The pieces of these texts, sorted."""
        return cls(language, sorted({piece for text in texts for piece in SPLIT[language](text)}))

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text. Raises ValueError where it has no piece, or one that is not in the vocabulary."""
        pieces = SPLIT[self.language](text)
        unknown = sorted({piece for piece in pieces if piece not in self.tokens})
        if unknown or not pieces:
            got = ", ".join(map(repr, unknown)) if unknown else repr(text)
            raise ValueError(f"text: got {got}, expected a number in words: {', '.join(self.pieces[len(_SPECIAL) :])}")
        return [self.tokens[piece] for piece in pieces]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens up to the end token. A start or padding token in it stays visible: it is a mistake."""
        pieces = []
        for token in tokens:
            if token == self.end:
                break
            pieces.append(self.pieces[token])
        return JOIN[self.language](pieces)

    def pad_rows(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows of tokens as one tensor (B, longest), padded on the right, and their lengths (B,)."""
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        padded = pad_sequence(tensors, batch_first=True, padding_value=self.pad)
        return padded, torch.tensor([len(row) for row in rows])
