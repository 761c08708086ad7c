"""Real sentences of very different lengths, from the package chatterbot-corpus."""

from __future__ import annotations

import importlib.resources
import random

_SEED = 0


def load(count: int) -> list[str]:
    """``count`` different English sentences, the same ones in the same order every time.

    Raises ModuleNotFoundError without chatterbot-corpus, ValueError when the corpus has fewer sentences.
    """
    import yaml

    folder = importlib.resources.files("chatterbot_corpus") / "data" / "english"
    found: dict[str, None] = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            # YAML reads some lines ("Yes", "42") as something else than text.
            found.update((" ".join(line.split()), None) for line in conversation if isinstance(line, str))
    sentences = list(found)
    if not 0 < count <= len(sentences):
        raise ValueError(f"count: got {count}, expected 1 to {len(sentences)}")
    return random.Random(_SEED).sample(sentences, count)
