"""Every verified architecture of transformers on fastattn against its own "eager", and the table of it in the docs.

The table in docs/huggingface.md is what is measured here, and a test fails when the file says something else. To
write it anew: FASTATTN_WRITE_DOCS=1 python -m pytest tests/test_huggingface_architectures.py
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch
from huggingface_models import (
    CASES,
    FORWARD,
    GRADIENT,
    NEW,
    Seen,
    build,
    feed,
    forward_and_backward,
    generated,
    minilm,
    patched,
    spying,
    weights,
)

import fastattn
from fastattn.integrations.huggingface import REFUSED, VERIFIED, architectures

DOCS = Path(__file__).parent.parent / "docs" / "huggingface.md"
BEGIN, END = "<!-- written by tests/test_huggingface_architectures.py -->", "<!-- end -->"

PAIRS = [(name, side) for name, case in CASES.items() for side in case.sides]
GENERATING = [(name, side) for name, side in PAIRS if CASES[name].generates]


def seen(name: str) -> Seen:
    """What reached the public function, in all of the runs of an architecture."""
    runs = [forward_and_backward(name, side)[2] for side in CASES[name].sides]
    runs += [generated(name, side)[2] for side in CASES[name].sides if CASES[name].generates]
    dense = [shape for run in runs for shape in run.dense]
    return Seen(set().union(*(run.features for run in runs)), dense, sum(run.calls for run in runs))


@pytest.mark.parametrize(("name", "side"), PAIRS)
def test_logits_and_every_gradient_are_those_of_eager(name: str, side: str) -> None:
    logits, (gradient, where), run = forward_and_backward(name, side)
    assert run.calls
    assert logits <= FORWARD
    assert gradient <= GRADIENT, where


@pytest.mark.parametrize(("name", "side"), GENERATING)
def test_greedy_generation_from_the_cache_gives_the_tokens_of_eager(name: str, side: str) -> None:
    wanted, got, run = generated(name, side)
    assert run.calls >= NEW
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_those_of_eager(name: str) -> None:
    assert weights(name) <= FORWARD


@pytest.mark.parametrize("name", CASES)
def test_training_with_dropout_in_half_precision(name: str) -> None:
    model = patched(build(name, dropout=0.3)).to(torch.bfloat16).train()
    inputs = feed(name, CASES[name].sides[-1])
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    with spying() as run:
        model(**inputs).logits.float().square().mean().backward()
    assert run.dropout == {0.3}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 10
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", CASES)
def test_the_mask_reaches_the_kernel_as_structure(name: str) -> None:
    assert seen(name).features == CASES[name].uses
    assert seen(name).dense == []


@pytest.mark.parametrize("name", CASES)
def test_patch_names_the_layers_and_unpatch_restores(name: str) -> None:
    model = build(name)
    inputs = feed(name, "none")
    with torch.no_grad():
        wanted = model(**inputs).logits
        report = fastattn.patch(model)
        assert {type(model.get_submodule(layer)).__name__ for layer in report.replaced} <= set(VERIFIED[name])
        assert fastattn.unpatch(model) == report.replaced
        assert torch.equal(model(**inputs).logits, wanted)
    assert not any(
        module.config._attn_implementation == "fastattn" for module in model.modules() if hasattr(module, "config")
    )


def test_every_verified_architecture_has_a_case_and_its_classes_exist() -> None:
    assert CASES.keys() == VERIFIED.keys()
    for name, layers in VERIFIED.items():
        assert set(layers) <= vars(importlib.import_module(architectures.home(name))).keys()
    assert not CASES.keys() & REFUSED.keys()


def test_the_real_minilm_is_that_of_eager() -> None:
    hidden, (gradient, where), attentions = minilm()
    assert hidden <= FORWARD
    assert gradient <= GRADIENT, where
    assert attentions <= FORWARD


# The table ------------------------------------------------------------------------------------------------------


def compared(*same: bool) -> list[str]:
    return ["equal" if one else "**differs**" for one in same]


def row(name: str) -> str:
    case = CASES[name]
    logits = all(forward_and_backward(name, side)[0] <= FORWARD for side in case.sides)
    gradients = all(forward_and_backward(name, side)[1][0] <= GRADIENT for side in case.sides)
    tokens = "does not generate"
    if case.generates:
        same = all(torch.equal(*generated(name, side)[:2]) for side in case.sides)
        tokens = "same tokens" if same else "**differs**"
    equal = compared(logits, gradients, weights(name) <= FORWARD)
    features = ", ".join(sorted(seen(name).features)) or "nothing is masked"
    cells = [case.title, f"`{case.model}`", ", ".join(case.sides), *equal, tokens, features]
    if seen(name).dense:
        cells[-1] += ", **dense mask**"
    return f"| {' | '.join(cells)} |"


def table() -> str:
    head = ["Architecture", "Tested as", "Padding", "Logits", "Gradients", "Weights", "Greedy `generate`", "Structure"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [row(name) for name in sorted(CASES, key=lambda name: CASES[name].title.lower())]
    hidden, (gradient, _), attentions = minilm()
    equal = compared(hidden <= FORWARD, gradient <= GRADIENT, attentions <= FORWARD)
    cells = ["MiniLM, the real one (a BERT)", "`BertModel`", "right", *equal, "does not generate", "padding"]
    lines += [f"| {' | '.join(cells)} |", "", "| Refused by name | Because it |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in sorted(REFUSED.items())]
    return "\n".join(lines)


def test_the_table_in_the_docs_is_what_was_measured() -> None:
    text = DOCS.read_text()
    before, written = text.split(BEGIN)
    written, after = written.split(END)
    if os.environ.get("FASTATTN_WRITE_DOCS") == "1":
        DOCS.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")
        return
    assert written.strip() == table(), "stale; this file's docstring says how to write it anew"
