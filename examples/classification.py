"""MiniLM learns to tell which topic of chatterbot-corpus a sentence comes from: BERT's fine-tuning, with 21 labels.

    python examples/classification.py train
    python examples/classification.py train --backend torch
    python examples/classification.py compare
    python examples/classification.py classify "Who wrote Hamlet?"

The pretrained encoder gets BERT's head (the first token's state, a dense layer, tanh, a linear layer that starts as
zeros), and all of it is trained. Every sentence is cut and padded to one length, and the padding is told by lengths.
There is no dropout: the two backends draw it differently, and would otherwise be two trainings instead of one.

Held out is a fifth of the different sentences. The corpus has 7 of them about health and 533 of a quiz, so that
accuracy is printed beside the share of the largest topic, and beside the mean over the topics. A sentence and its reply
may lie on either side of the split: what is measured is recognising the topic, not a new conversation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_line
import corpus
import torch
from plain_torch import plain_torch
from torch import Tensor, nn
from torch.nn import functional
from training import Run, about_of, compare, generator, load_weights, side_by_side, train, warmup_linear

from fastattn.demo import minilm
from fastattn.models import Transformer, TransformerConfig

Labelled = tuple[str, str]  # a sentence and its topic

HELD_OUT = 0.2
# With 2e-4 for both, all sentences were taken for the largest topic after three epochs.
RATE, HEAD_RATE = 5e-5, 1e-3
BATCH = 32
EPOCHS = 5
MAX_LENGTH = 24  # pieces, with BERT's [CLS] and [SEP]; 1 sentence in 25 is longer, and cut
HEADS = 12  # MiniLM's


@dataclass(frozen=True)
class Sentences:
    """Tokens (N, max_length), lengths (N,) and the numbers of the topics (N,)."""

    tokens: Tensor
    lengths: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens[rows], self.lengths[rows], self.labels[rows]


def split(sentences: Sequence[Labelled]) -> tuple[list[Labelled], list[Labelled]]:
    """Sentences to train on and held-out ones, of every topic some: none is in both, however it is spelt."""
    training, held_out = [], []
    for topic in sorted({topic for _, topic in sentences}):
        drawn = sorted((corpus.draw(text), text) for text, of in sentences if of == topic)
        count = max(1, round(len(drawn) * HELD_OUT))
        held_out += [(text, topic) for _, text in drawn[:count]]
        training += [(text, topic) for _, text in drawn[count:]]
    return training, held_out


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
    """Tokens (N, max_length), cut and padded on the right, and the number of real ones (N,)."""
    coded = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
    )  # fmt: skip
    return coded["input_ids"], coded["attention_mask"].sum(1)


def prepare(tokenizer: Any, sentences: Sequence[Labelled], topics: Sequence[str], max_length: int) -> Sentences:
    tokens, lengths = tokenize(tokenizer, [text for text, _ in sentences], max_length)
    return Sentences(tokens, lengths, torch.tensor([topics.index(topic) for _, topic in sentences]))


def build(bert: nn.Module, labels: int, *, backend: str = "auto") -> Transformer:
    """MiniLM with a head for so many labels; "torch": the same weights around torch's own attention."""
    model = Transformer.from_bert(bert.state_dict(), num_heads=HEADS, num_labels=labels, dropout=0.0)
    return plain_torch(model) if backend == "torch" else model


def loss_of(model: Transformer) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda tokens, lengths, labels: functional.cross_entropy(model(tokens, lengths=lengths), labels)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """What is pretrained, and the head, which has further to go."""
    head = {name for name, _ in model.named_parameters() if name.startswith(("pooler.", "classifier."))}
    parts = [
        [weight for name, weight in model.named_parameters() if (name in head) == wanted] for wanted in (False, True)
    ]
    return [{"params": part, "lr": rate} for part, rate in zip(parts, (RATE, HEAD_RATE), strict=True)]


@torch.no_grad()
def predict(model: Transformer, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The number of the likeliest topic of each row."""
    model.eval()
    parts = zip(tokens.split(64), lengths.split(64), strict=True)
    return torch.cat([model(part, lengths=real).argmax(1) for part, real in parts])


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).float().mean().item()


def topic_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The mean over the topics of the share of their sentences that is recognised: each topic counts alike."""
    present = labels.unique()
    return sum(accuracy(predicted[labels == topic], labels[labels == topic]) for topic in present) / len(present)


def run_training(folder: Path, *, backend: str, epochs: int, batch: int, max_length: int, seed: int) -> None:
    """Fine-tune, or go on; then report on the held-out sentences."""
    begin = time.perf_counter()
    sentences = corpus.sentences()
    topics = sorted({topic for _, topic in sentences})
    tokenizer = minilm.load_tokenizer()
    training, held_out = (prepare(tokenizer, part, topics, max_length) for part in split(sentences))
    torch.manual_seed(seed)
    model = build(minilm.load_bert(), len(topics), backend=backend)
    epoch_steps = -(-len(training) // batch)
    steps = epochs * epoch_steps
    print(f"{len(training)} sentences, {len(topics)} topics, {steps} steps, in {folder}", file=sys.stderr)

    def next_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        # Every sentence once an epoch, in an order of the epoch's own.
        order = torch.randperm(len(training), generator=generator(seed, step // epoch_steps))
        place = step % epoch_steps * batch
        return training.batch(order[place : place + batch])

    train(
        model,
        torch.optim.AdamW(_groups(model), weight_decay=0.01),
        next_batch,
        loss_of(model),
        steps=steps,
        folder=folder,
        seed=seed,
        schedule=warmup_linear(steps, warmup=max(1, steps // 10)),
        save_every=epoch_steps,
        about={
            "example": "classification", "backend": backend, "topics": topics, "max_length": max_length,
            "batch": batch, "epochs": epochs, "seed": seed, "config": dict(vars(model.config)),
        },
    )  # fmt: skip
    print(Run.read(folder).cost())
    print(report(model, held_out, training, topics))
    print(f"all in all {(time.perf_counter() - begin) / 60:.1f} minutes; curve and checkpoint in {folder}")


def report(model: Transformer, held_out: Sentences, training: Sentences, topics: Sequence[str]) -> str:
    """Accuracy beside that of always naming the largest topic, and the confusions that are most frequent."""
    predicted = predict(model, held_out.tokens, held_out.lengths)
    largest = training.labels.bincount(minlength=len(topics)).argmax()
    confused = Counter(
        (topics[truth], topics[named])
        for truth, named in zip(held_out.labels.tolist(), predicted.tolist(), strict=True)
        if truth != named
    )
    listed = ", ".join(f"{truth} as {named} {count}" for (truth, named), count in confused.most_common(5))
    right = int((predicted == held_out.labels).sum())
    return (
        f"held out: {right} of {len(held_out)} right, {accuracy(predicted, held_out.labels):.1%}; mean over topics "
        f"{topic_accuracy(predicted, held_out.labels):.1%}; always {topics[int(largest)]!r} "
        f"{(held_out.labels == largest).float().mean().item():.1%}\n"
        f"taken for another: {listed or 'none'}"
    )


def load(folder: Path) -> tuple[Transformer, list[str], int]:
    """The model of a training, its topics and its max_length.

    Raises FileNotFoundError or ValueError: there is none, or it is damaged or of something else.
    """
    if not (folder / "checkpoint.pt").exists():
        raise FileNotFoundError(f"{folder} holds no trained model: first python examples/classification.py train")
    about = about_of(folder, "classification", "of topics")
    model = Transformer(TransformerConfig(**about["config"]))
    load_weights(folder, model)
    return model.eval(), about["topics"], about["max_length"]


def in_turns(folder: Path) -> str:
    """The table of a step of this model and of that of plain torch, for a batch of the corpus."""
    (ours, topics, max_length), (theirs, *_) = load(folder), load(folder)
    batch = prepare(minilm.load_tokenizer(), corpus.sentences()[:BATCH], topics, max_length).batch(torch.arange(BATCH))
    models = {"fastattn": ours, "torch": plain_torch(theirs)}
    return side_by_side(models, lambda model: loss_of(model)(*batch))


def classify(model: Transformer, topics: Sequence[str], max_length: int, texts: Sequence[str]) -> list[str]:
    """The likeliest topic of each text. ValueError for one without a word."""
    if not texts or not all(text.strip() for text in texts):
        raise ValueError("text: got an empty one, expected at least one word")
    return [topics[number] for number in predict(model, *tokenize(minilm.load_tokenizer(), texts, max_length)).tolist()]


def parser() -> argparse.ArgumentParser:
    helps = {
        "train": "fine-tune, or go on with it, and test it on held-out sentences",
        "compare": "the table of a training and of that with --backend torch",
        "classify": "tell the topic of sentences",
    }
    result, commands = command_line.parser(__doc__, helps, "runs/classification[-torch]")
    commands["train"].add_argument("--epochs", type=command_line.positive, default=EPOCHS)
    commands["train"].add_argument("--batch", type=command_line.positive, default=BATCH)
    commands["train"].add_argument("--max-length", type=command_line.positive, default=MAX_LENGTH)
    commands["classify"].add_argument("text", nargs="+")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args: Any = parser().parse_args(arguments)
    folder, plain = command_line.folders(args, Path("runs") / "classification")
    try:
        if args.command == "train":
            run_training(
                folder, backend=args.backend, epochs=args.epochs, batch=args.batch, max_length=args.max_length,
                seed=args.seed,
            )  # fmt: skip
        elif args.command == "compare":
            print(compare(folder, plain))
            print(in_turns(folder))
        else:
            for text, topic in zip(args.text, classify(*load(folder), args.text), strict=True):
                print(f"{topic}: {text}")
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        raise SystemExit(f"classification: {error}") from error


if __name__ == "__main__":
    main()
