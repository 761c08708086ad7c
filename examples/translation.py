"""Numbers in words from English to French or German, by a Seq2Seq or a Transformer.

    python examples/translation.py train --model seq2seq --language fr
    python examples/translation.py train --model seq2seq --language fr --backend torch --stop 200
    python examples/translation.py compare --model seq2seq --language fr
    python examples/translation.py translate --model seq2seq --language fr "two hundred and five"

Each training is a folder under runs/, and goes on where it was interrupted. It is tested on numbers it never saw.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_line
import torch
from attention_maps import plot_maps
from number_words import LANGUAGES, LONGEST, Vocabulary, english, foreign, split
from plain_torch import plain_torch
from torch import Tensor
from torch.nn import functional
from training import Run, about_of, compare, generator, load_weights, side_by_side, train, warmup_linear

from fastattn.models import Seq2Seq, Seq2SeqConfig, Transformer, TransformerConfig, generate

MODELS = ("seq2seq", "transformer")
# German is written in characters, five times as many as French has words. With three times the rate, not twice the
# steps, it is learned as well, but two trainings that differ in a rounding then drift apart.
STEPS = {("seq2seq", "de"): 1200}
SHOWN = (205, 80_021, 999_999)  # whose attention is plotted


@dataclass(frozen=True)
class Settings:
    """What a training is, all of which its checkpoint keeps.

    Attributes:
        model, language: "seq2seq" or "transformer"; "fr" or "de".
        size: hidden size of the Seq2Seq, features of a token of the Transformer.
        layers: of the Transformer's encoder, and of its decoder.
        steps: of the schedule of the learning rate.
        rate: of learning, the highest.
        batch: pairs in a step.
        pairs: numbers to train on, at most, of each count of digits.
    """

    model: str
    language: str
    size: int = 128
    layers: int = 2
    steps: int = 600
    rate: float = 1e-3
    batch: int = 64
    pairs: int = 10_000
    seed: int = 0


class Pairs:
    """Numbers as rows of tokens, made once."""

    def __init__(self, numbers: Sequence[int], source: Vocabulary, target: Vocabulary) -> None:
        self.answers = [foreign(number, target.language) for number in numbers]
        self.source, self.target = source, target
        self.sources = [source.encode(english(number)) for number in numbers]
        self.targets = [[target.start, *target.encode(text), target.end] for text in self.answers]

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Sources (B, S), their lengths (B,), and targets (B, T) from start to end token."""
        source, lengths = self.source.pad_rows([self.sources[row] for row in rows])
        return source, lengths, self.target.pad_rows([self.targets[row] for row in rows])[0]


def build(settings: Settings, source: int, target: int) -> Seq2Seq | Transformer:
    """The model for vocabularies of so many tokens; its weights are drawn from the seed."""
    torch.manual_seed(settings.seed)
    if settings.model == "seq2seq":
        config = Seq2SeqConfig(
            source_size=source, target_size=target, source_embedding=64, target_embedding=64,
            hidden_size=settings.size, bidirectional=True, attention="general", start_token=1,
        )  # fmt: skip
        return Seq2Seq(config)
    # Not ReLU: its kink lets two trainings drift apart that differ in a rounding, be they of torch both.
    shape = TransformerConfig(
        vocab_size=target, source_vocab_size=source, dim=settings.size, num_heads=4, hidden_dim=4 * settings.size,
        encoder_layers=settings.layers, decoder_layers=settings.layers, norm_first=True, scale_embeddings=True,
        activation="gelu", tie_embeddings=False, dropout=0.0, start_token=1,
    )  # fmt: skip
    return Transformer(shape)


def loss_of(model: Seq2Seq | Transformer, pad: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The cross-entropy of every token of the targets but the start, the mean over all that are no padding."""

    def loss(source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        logits = model(source, target[:, :-1], lengths=lengths)
        return functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=pad)

    return loss


def answers(model: Seq2Seq | Transformer, pairs: Pairs, *, batch: int = 250) -> list[str]:
    """What the model writes for every pair's source, greedily."""
    written = []
    for first in range(0, len(pairs.sources), batch):
        source, lengths, _ = pairs.batch(range(first, min(first + batch, len(pairs.sources))))
        tokens = generate(
            model, source, lengths, max_new_tokens=LONGEST, end_token=pairs.target.end, pad_token=pairs.target.pad
        ).tokens
        written += [pairs.target.decode(row) for row in tokens.tolist()]
    return written


def exact(model: Seq2Seq | Transformer, pairs: Pairs) -> float:
    """The share of answers that are right to the letter."""
    written = answers(model, pairs)
    return sum(map(str.__eq__, written, pairs.answers)) / len(written)


def run_training(settings: Settings, folder: Path, *, backend: str = "auto", stop: int | None = None) -> None:
    """Train, or go on; then, where the schedule has ended, test on the held-out numbers and plot attention."""
    begin = time.perf_counter()
    numbers = split(settings.seed, training=settings.pairs)
    source = Vocabulary.of("en", map(english, numbers.training))
    target = Vocabulary.of(settings.language, (foreign(number, settings.language) for number in numbers.training))
    training, validation, held_out = (
        Pairs(part, source, target) for part in (numbers.training, numbers.validation, numbers.held_out)
    )
    model = build(settings, len(source), len(target))
    if backend == "torch":
        plain_torch(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{settings.model} of {count:,} parameters, {len(training.sources):,} pairs, in {folder}", file=sys.stderr)

    def next_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        drawn = torch.randint(len(training.sources), (settings.batch,), generator=generator(settings.seed, step))
        return training.batch(drawn.tolist())

    train(
        model,
        torch.optim.Adam(model.parameters(), settings.rate, betas=(0.9, 0.98)),
        next_batch,
        loss_of(model, target.pad),
        steps=settings.steps if stop is None else min(stop, settings.steps),
        folder=folder,
        seed=settings.seed,
        schedule=warmup_linear(settings.steps, warmup=max(1, settings.steps // 20)),
        save_every=100,
        validate=lambda: exact(model, validation),
        validate_every=500,
        about={
            "example": "translation", **vars(settings), "backend": backend, "source": source.pieces[3:],
            "target": target.pieces[3:],
        },
    )  # fmt: skip
    run = Run.read(folder)
    print(run.cost())
    if len(run.losses) == settings.steps:
        report(model, held_out, numbers.held_out)
        plot_maps(model, source, target, [english(number) for number in SHOWN], folder / "attention.png")
    print(f"all in all {(time.perf_counter() - begin) / 60:.1f} minutes; curve and plots in {folder}")


def report(model: Seq2Seq | Transformer, pairs: Pairs, numbers: Sequence[int]) -> None:
    """Print the share of right answers, for each count of digits, and some wrong ones."""
    written = answers(model, pairs)
    right = [mine == true for mine, true in zip(written, pairs.answers, strict=True)]
    by_digits: dict[int, list[bool]] = {}
    for number, good in zip(numbers, right, strict=True):
        by_digits.setdefault(len(str(number)), []).append(good)
    parts = ", ".join(f"{digits} digits {sum(part) / len(part):.1%}" for digits, part in sorted(by_digits.items()))
    print(f"held out: {sum(right)} of {len(right)} exact, {sum(right) / len(right):.1%} ({parts})")
    wrong = [place for place, good in enumerate(right) if not good]
    for place in wrong[:3]:
        print(f"  {numbers[place]}: {written[place]!r}, not {pairs.answers[place]!r}")


def load(folder: Path) -> tuple[Seq2Seq | Transformer, Vocabulary, Vocabulary]:
    """The model of a training with its vocabularies.

    Raises FileNotFoundError or ValueError: there is none, or it is damaged, of something else, or of other vocabularies
    than its weights are for.
    """
    about = about_of(folder, "translation", "a translation")
    settings = Settings(**{name: about[name] for name in Settings.__dataclass_fields__ if name in about})
    source, target = Vocabulary("en", about["source"]), Vocabulary(settings.language, about["target"])
    model = build(settings, len(source), len(target))
    load_weights(folder, model)
    return model.eval(), source, target


def in_turns(folder: Path) -> str:
    """The table of a step of this model and of that of plain torch, for a batch of the longest numbers."""
    (ours, source, target), (theirs, *_) = load(folder), load(folder)
    batch = Pairs(range(777_000, 777_064), source, target).batch(range(64))
    models = {"fastattn": ours, "torch": plain_torch(theirs)}
    return side_by_side(models, lambda model: loss_of(model, target.pad)(*batch))


def translate(model: Seq2Seq | Transformer, source: Vocabulary, target: Vocabulary, text: str) -> str:
    """The model's translation of one number in words."""
    tokens, lengths = source.pad_rows([source.encode(text)])
    written = generate(model, tokens, lengths, max_new_tokens=LONGEST, end_token=target.end).tokens
    return target.decode(written[0].tolist())


def parser() -> argparse.ArgumentParser:
    helps = {
        "train": "train, or go on with a training, and test it",
        "compare": "the table of a training and of that with --backend torch",
        "translate": "translate a number in words",
    }
    result, commands = command_line.parser(__doc__, helps, "runs/translation-LANGUAGE-MODEL[-torch]")
    for command in commands.values():
        command.add_argument("--model", choices=MODELS, default="seq2seq")
        command.add_argument("--language", choices=LANGUAGES, default="fr")
    training, positive = commands["train"], command_line.positive
    training.add_argument("--steps", type=positive, help="of the schedule of the learning rate; default: 600, or 1200")
    training.add_argument("--rate", type=float, default=1e-3, help="the highest of the schedule")
    training.add_argument("--stop", type=positive, help="stop after so many steps of the schedule")
    training.add_argument("--size", type=positive, default=128)
    training.add_argument("--layers", type=positive, default=2, help="of the Transformer's encoder and decoder")
    training.add_argument("--batch", type=positive, default=64)
    training.add_argument("--pairs", type=positive, default=10_000, help="to train on, of each count of digits")
    commands["translate"].add_argument("text", nargs="+")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    folder, plain = command_line.folders(args, Path("runs") / f"translation-{args.language}-{args.model}")
    try:
        _run(args, folder, plain)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"translation: {error}") from error


def _run(args: Any, folder: Path, plain: Path) -> None:
    if args.command == "train":
        args.steps = args.steps or STEPS.get((args.model, args.language), 600)
        settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
        run_training(settings, folder, backend=args.backend, stop=args.stop)
    elif args.command == "compare":
        print(compare(folder, plain))
        print(in_turns(folder))
    else:
        loaded = load(folder)
        for text in args.text:
            print(translate(*loaded, text))


if __name__ == "__main__":
    main()
