"""How good replies are: BLEU and chrF, distinct-1 and distinct-2, and two baselines that write nothing of their own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import corpus
import torch
from corpus import Pair

from fastattn.demo import minilm


@dataclass(frozen=True)
class Scores:
    """Of the replies to a set of prompts; all but BLEU's and chrF's 0 to 100 are shares of 1."""

    bleu: float
    chrf: float
    distinct_1: float
    distinct_2: float

    def __str__(self) -> str:
        return f"{self.chrf:>7.1f}{self.bleu:>7.1f}{self.distinct_1:>12.3f}{self.distinct_2:>12.3f}"


def score(replies: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Replies against all known replies to the same prompts, by sacrebleu, without regard to capitals.

    Raises ModuleNotFoundError without sacrebleu; ValueError for anything but as many sets of references as replies.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if len(replies) != len(references) or not all(references):
        raise ValueError(f"references: got {len(references)} sets, expected one, not empty, for each of {len(replies)}")
    # sacrebleu reads the references by column; where a prompt has fewer, None stands.
    columns = [
        [each[column] if column < len(each) else None for each in references]
        for column in range(max(map(len, references)))
    ]
    return Scores(
        # Smoothed exponentially, sacrebleu's own: a short test set may have no common four words at all.
        BLEU(lowercase=True).corpus_score(list(replies), columns).score,
        CHRF(lowercase=True).corpus_score(list(replies), columns).score,
        distinct(replies, 1),
        distinct(replies, 2),
    )


def distinct(replies: Sequence[str], length: int) -> float:
    """Different sequences of ``length`` words over all of them (Li et al. 2016): near 0, one reply fits all prompts."""
    counted = Counter(
        tuple(words[start : start + length])
        for words in (reply.lower().split() for reply in replies)
        for start in range(len(words) - length + 1)
    )
    return len(counted) / max(counted.total(), 1)


def most_frequent(training: Sequence[Pair]) -> str:
    """The reply that most prompts have; of several the first."""
    counted = Counter(corpus.key(pair.reply) for pair in training)
    often = counted.most_common(1)[0][0]
    return next(pair.reply for pair in training if corpus.key(pair.reply) == often)


def nearest(training: Sequence[Pair], prompts: Sequence[str]) -> list[str]:
    """The reply to the training prompt whose MiniLM embedding is nearest: retrieval, the older way to build a bot."""
    known = embed([pair.prompt for pair in training])
    places = (embed(list(prompts)) @ known.T).argmax(1)
    return [training[place].reply for place in places.tolist()]


@torch.no_grad()
def embed(texts: list[str]) -> torch.Tensor:
    """Sentence embeddings (N, 384) of length 1."""
    encoder = minilm.HuggingFaceEncoder(minilm.load_bert())
    made = [
        minilm.sentence_embedding(encoder(batch.tokens, batch.mask), batch.mask)
        for batch in minilm.batches(texts, 64, 64, torch.device("cpu"))
    ]
    return torch.cat(made)


def unigram_perplexity(training: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], vocabulary: int) -> float:
    """Of a model that knows how often each piece occurs (add-one smoothed), and nothing of the prompt or the order."""
    counted = Counter(number for text in training for number in text)
    total = counted.total() + vocabulary
    logs = [math.log((counted[number] + 1) / total) for text in held_out for number in text]
    return math.exp(-sum(logs) / len(logs))
