"""The English part of chatterbot-corpus as distinct pairs of prompt and reply, and as sentences with their topics.

Twenty-one files of YAML, a topic each, hold 2,026 conversations, but 1,050 of them are ten questions to a help desk
with their ten answers, over and over. Split as they stand, half of what is held out would be copies of what was trained
on, so that everything here is distinct, and what is held out is chosen by the text and not by the place.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

# The first line is the prompt, and all the others are answers to it that say the same or the opposite.
_ALTERNATIVES = ("computers", "emotion")
# Question, answer, question, answer: an answer is no prompt for the next question.
_QUIZZES = ("trivia",)

Conversation = tuple[str, list[str]]


@dataclass(frozen=True)
class Pair:
    """Something said, what was answered, and the topic: the name of the file."""

    prompt: str
    reply: str
    topic: str


def conversations() -> list[Conversation]:
    """Every conversation with its topic, in the order of the files; programs between ``` are left out of its lines.

    Raises ModuleNotFoundError without chatterbot-corpus or PyYAML.
    """
    import yaml

    folder = importlib.resources.files("chatterbot_corpus") / "data" / "english"
    found = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        topic = file.name.removesuffix(".yml")
        for lines in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            found.append((topic, [clean(line) for line in lines if isinstance(line, str) and clean(line)]))
    return found


def clean(text: str) -> str:
    """On one line, up to the first program: what follows it repeats the promise for another language."""
    return " ".join(text.split("```")[0].split())


def key(text: str) -> str:
    """What two spellings of a sentence have in common: its words, small, without punctuation but that of C++ and C#."""
    return " ".join(re.findall(r"[\w+#]+", text.casefold())) or text


def pairs(found: Iterable[Conversation] | None = None) -> list[Pair]:
    """The distinct pairs of the conversations, in their order; None reads the corpus."""
    distinct: dict[tuple[str, str], Pair] = {}
    for topic, lines in conversations() if found is None else found:
        for prompt, reply in _exchanges(topic, lines):
            distinct.setdefault((key(prompt), key(reply)), Pair(prompt, reply, topic))
    return list(distinct.values())


def sentences(found: Iterable[Conversation] | None = None) -> list[tuple[str, str]]:
    """The distinct sentences and their topics; "Yes." and the few others that stand in several topics are left out."""
    distinct: dict[str, tuple[str, set[str]]] = {}
    for topic, lines in conversations() if found is None else found:
        for line in lines:
            distinct.setdefault(key(line), (line, set()))[1].add(topic)
    return [(line, min(topics)) for line, topics in distinct.values() if len(topics) == 1]


def draw(text: str, *, salt: str = "") -> float:
    """A number in [0, 1) that depends on the words of the text alone: the same in every run, on every machine.

    Held out is what draws less than a share. Two spellings of one prompt, and all replies to it, fall together.
    """
    digest = hashlib.sha256(f"{salt}:{key(text)}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _exchanges(topic: str, lines: list[str]) -> list[tuple[str, str]]:
    if topic in _ALTERNATIVES:
        return [(lines[0], reply) for reply in lines[1:]]
    if topic in _QUIZZES:
        return list(zip(lines[::2], lines[1::2], strict=False))
    return list(pairwise(lines))
