"""One model before and after ``patch``: same embeddings, speed, memory, backend."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastattn.demo.minilm import Batch, sentence_embedding
from fastattn.dispatch import Explanation
from fastattn.functional import explain
from fastattn.patching import PatchReport, patch
from fastattn.profiling.memory import peak_memory
from fastattn.profiling.timing import interleaved


@dataclass(frozen=True)
class Comparison:
    """``model`` unpatched and patched on the same sentences."""

    model: str
    report: PatchReport
    sentences: int
    largest_difference: float  # of the hidden states at real tokens
    smallest_cosine: float  # between the two embeddings of a sentence
    sentences_per_second: tuple[float, float]  # before, after
    peak_bytes: tuple[int, int]  # before, after
    explanation: Explanation

    def record(self) -> dict[str, Any]:
        """The figures alone, as JSON takes them."""
        return {
            "model": self.model,
            "replaced": len(self.report.replaced),
            "skipped": len(self.report.skipped),
            "sentences": self.sentences,
            "largest_difference": self.largest_difference,
            "smallest_cosine": self.smallest_cosine,
            "sentences_per_second": list(self.sentences_per_second),
            "peak_bytes": list(self.peak_bytes),
            "backend": str(self.explanation.backend),
            "because": self.explanation.because,
        }


@torch.no_grad()
def compare(name: str, model: nn.Module, batches: list[Batch], attention_shape: tuple[int, int]) -> Comparison:
    """Embed ``batches`` with a copy of ``model`` and with ``model`` patched; ``attention_shape`` is (heads, D)."""
    before, after = copy.deepcopy(model), model
    report = patch(after, need_weights=False)
    difference, cosine = 0.0, 1.0
    for batch in tqdm(batches, desc=f"{name}: same embeddings", unit="batch", leave=False):
        expected, got = before(batch.tokens, batch.mask), after(batch.tokens, batch.mask)
        difference = max(difference, float((expected - got)[batch.mask].abs().max()))
        first, second = (sentence_embedding(hidden, batch.mask).double() for hidden in (expected, got))
        cosine = min(cosine, float(nn.functional.cosine_similarity(first, second, dim=-1).min()))
    device = batches[0].tokens.device
    calls = {"before": partial(_embed_all, before, batches), "after": partial(_embed_all, after, batches)}
    seconds = interleaved(calls, device, rounds=2, seconds=0.0)
    largest = max(batches, key=lambda batch: batch.tokens.numel())
    peaks = [peak_memory(partial(one, largest.tokens, largest.mask), device) for one in (before, after)]
    count = sum(batch.tokens.shape[0] for batch in batches)
    return Comparison(
        name,
        report,
        count,
        difference,
        cosine,
        (count / seconds["before"], count / seconds["after"]),
        (peaks[0], peaks[1]),
        _explain(largest, attention_shape),
    )


def _embed_all(model: nn.Module, batches: list[Batch]) -> list[Tensor]:
    return [sentence_embedding(model(batch.tokens, batch.mask), batch.mask) for batch in batches]


def _explain(batch: Batch, attention_shape: tuple[int, int]) -> Explanation:
    """What serves the attention calls of the patched model for this batch."""
    heads, head_dim = attention_shape
    rows, length = batch.tokens.shape
    query = torch.empty(rows, heads, length, head_dim, device=batch.tokens.device)
    return explain(query, query, query, key_padding_mask=batch.mask)
