"""The real MiniLM on real sentences, as BertModel and as nn.TransformerEncoder, against its own "eager"."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from huggingface_models import FORWARD, GRADIENT
from torch import Tensor

import fastattn
from fastattn.demo import minilm, sentences


def assert_within(got: Tensor, wanted: Tensor, share: float, what: str = "output") -> None:
    assert (got - wanted).abs().max() <= share * wanted.abs().max(), what


@pytest.fixture(scope="module")
def real_bert() -> Any:
    model = minilm.load_bert()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def batch() -> minilm.Batch:
    return minilm.batches(sentences.load(8), 8, 64, torch.device("cpu"))[0]


def test_minilm_embeds_real_sentences_the_same_with_gradients(real_bert: Any, batch: minilm.Batch) -> None:
    eager, ours = real_bert, copy.deepcopy(real_bert)
    assert len(fastattn.patch(ours).replaced) == 6
    assert not batch.mask.all()
    outputs = []
    for model in (eager, ours):
        model.zero_grad()
        hidden = minilm.HuggingFaceEncoder(model)(batch.tokens, batch.mask)
        minilm.sentence_embedding(hidden, batch.mask).sum().backward()
        outputs.append(hidden[batch.mask])
    assert_within(outputs[1], outputs[0], FORWARD)
    # Relative to the largest gradient of the model: a key bias has none but rounding.
    largest = max(p.grad.abs().max() for p in eager.parameters() if p.grad is not None)
    for (name, mine), theirs in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if theirs.grad is not None:
            assert (mine.grad - theirs.grad).abs().max() <= GRADIENT * largest, name


def test_the_plain_encoder_is_the_same_network(real_bert: Any, batch: minilm.Batch) -> None:
    plain = minilm.PlainEncoder(real_bert)
    report = fastattn.patch(plain, need_weights=False)
    assert len(report.replaced) == 6
    with torch.no_grad():
        wanted = minilm.HuggingFaceEncoder(real_bert)(batch.tokens, batch.mask)[batch.mask]
        got = plain(batch.tokens, batch.mask)[batch.mask]
    assert_within(got, wanted, FORWARD)
