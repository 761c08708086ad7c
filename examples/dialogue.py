"""A Seq2Seq or a Transformer learns to reply, from the real dialogues of chatterbot-corpus.

    python examples/dialogue.py train --model seq2seq
    python examples/dialogue.py train --model seq2seq --backend torch
    python examples/dialogue.py compare --model seq2seq
    python examples/dialogue.py chat --model seq2seq

What 2,000 dialogues can teach. Of the 2,026, less than half are different ones, and three quarters of their pairs of
prompt and reply are trained on: some ten thousand words. They teach which words are frequent, the order of a short
English sentence, the manner of this bot, and replies that follow from the form of a prompt ("can you write a queue in
Python?", "Here's a queue:"). They cannot teach facts, since the answer to a held-out question of a quiz stands nowhere
else, nor what a word means that is in no prompt, nor to stay on a topic: only the last line typed is read. A held-out
prompt mostly gets a frequent sentence of a fitting kind, or of no kind. The baselines are the most frequent reply, and
retrieval: the reply to the nearest known prompt, which with so few dialogues scores higher than what a model writes.
The words start with MiniLM's embeddings, which know from other texts that "sad" is near "unhappy".

Held out is a share of the prompts, with all their replies; the split depends on the words of a prompt alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import command_line
import corpus
import dialogue_report
import torch
from corpus import Pair
from plain_torch import plain_torch
from torch import Tensor, nn
from torch.nn import functional
from training import Run, about_of, compare, generator, load_weights, side_by_side, train, warmup_linear
from word_pieces import END, PAD, START, UNKNOWN, WordPieces

from fastattn.demo import minilm
from fastattn.models import Seq2Seq, Seq2SeqConfig, Transformer, TransformerConfig, generate

MODELS = ("seq2seq", "transformer")
# With more, the validation perplexity rises. Replies get livelier, since more of them are known by heart.
STEPS = {"seq2seq": 250, "transformer": 200}
RATES = {"seq2seq": 2e-3, "transformer": 1e-3}
SMOOTHING = 0.1  # of the labels (Szegedy et al. 2016): so few pairs are soon known by heart, and believed in too much
BATCH = 32
LONGEST = 30  # pieces of a prompt or a reply; of a longer one the beginning counts
EMBEDDING = 384  # MiniLM's
HELD_OUT, VALIDATION = 0.15, 0.1  # shares of the prompts

LIMITS = (
    "About a thousand pairs teach the words and the manner of this bot, and replies that follow from the form of a "
    "prompt.\nThey teach no facts, and no topic is kept: expect sense for prompts like those of the corpus alone."
)


@dataclass(frozen=True)
class Split:
    """Pairs to train on, to watch and to test on; no prompt is in two of them, however it is spelt."""

    training: list[Pair]
    validation: list[Pair]
    held_out: list[Pair]


def split(pairs: Sequence[Pair]) -> Split:
    parts = Split([], [], [])
    for pair in pairs:
        drawn = corpus.draw(pair.prompt)
        tested = drawn < HELD_OUT
        watched = drawn < HELD_OUT + VALIDATION
        (parts.held_out if tested else parts.validation if watched else parts.training).append(pair)
    return parts


def vocabulary(training: Sequence[Pair]) -> WordPieces:
    return WordPieces.of(text for pair in training for text in (pair.prompt, pair.reply))


def build(kind: str, words: WordPieces) -> Seq2Seq | Transformer:
    """The model as it starts: random, but for MiniLM's embeddings of the pieces, where source and target share them."""
    return _with_embeddings(_build(kind, len(words), EMBEDDING), words.embeddings(minilm.load_bert()))


def _build(kind: str, vocab_size: int, embedding: int) -> Seq2Seq | Transformer:
    if kind == "seq2seq":
        return Seq2Seq(
            Seq2SeqConfig(
                source_size=vocab_size, target_size=vocab_size, source_embedding=embedding, target_embedding=embedding,
                hidden_size=256, bidirectional=True, attention="general", tie_embeddings="all", dropout=0.4,
                start_token=START,
            )
        )  # fmt: skip
    # No dropout of the attention weights: the two backends draw it differently. All other dropout is torch's own. And
    # not ReLU, whose kink lets two trainings drift apart that differ in a rounding.
    return Transformer(
        TransformerConfig(
            vocab_size=vocab_size, dim=embedding, num_heads=6, encoder_layers=2, decoder_layers=2, hidden_dim=768,
            norm_first=True, activation="gelu", dropout=0.4, attention_dropout=0.0, scale_embeddings=True,
            start_token=START,
        )
    )  # fmt: skip


@torch.no_grad()
def _with_embeddings(model: Seq2Seq | Transformer, embeddings: Tensor) -> Seq2Seq | Transformer:
    table = model.decoder.embedding if isinstance(model, Seq2Seq) else model.embeddings.tokens
    assert isinstance(table, nn.Embedding)
    # An LSTM hardly notices features as small as a Transformer's, which are multiplied before the first layer.
    table.weight.copy_(embeddings * (4.0 if isinstance(model, Seq2Seq) else 1.0))
    return model


# Training ------------------------------------------------------------------------------------------------------


def reply_numbers(words: WordPieces, reply: str) -> list[int]:
    """What the model has to write: the reply's beginning, and the end."""
    return [*words.encode(reply)[:LONGEST], END]


def batch_of(words: WordPieces, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts (B, S) with lengths (B,), and replies (B, T), from the start to the end token, with lengths (B,)."""
    # A prompt without a piece, such as of control characters, would have no length.
    source, lengths = words.pad([words.encode(pair.prompt) or [UNKNOWN] for pair in pairs], LONGEST)
    target, target_lengths = words.pad([[START, *reply_numbers(words, pair.reply)] for pair in pairs], LONGEST + 2)
    return source, lengths, target, target_lengths


def loss_of(model: Seq2Seq | Transformer, smoothing: float = 0.0) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mean cross-entropy of a batch's real tokens, under teacher forcing."""

    def loss(source: Tensor, lengths: Tensor, target: Tensor, target_lengths: Tensor) -> Tensor:
        logits = model(source, target[:, :-1], lengths=lengths)
        return functional.cross_entropy(
            logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD, label_smoothing=smoothing
        )

    return loss


@torch.no_grad()
def perplexity(model: Seq2Seq | Transformer, words: WordPieces, pairs: Sequence[Pair]) -> float:
    """exp of the mean cross-entropy of a piece of the true replies, ends included."""
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(pairs), 64):
        batch = batch_of(words, pairs[first : first + 64])
        pieces = int((batch[3] - 1).sum())
        total += loss_of(model)(*batch).item() * pieces
        count += pieces
    return math.exp(total / count)


def replies(model: Seq2Seq | Transformer, words: WordPieces, prompts: Sequence[str]) -> list[str]:
    """What the model answers to each prompt: the likeliest piece at every step."""
    written: list[str] = []
    for first in range(0, len(prompts), 64):
        encoded = [words.encode(prompt) or [UNKNOWN] for prompt in prompts[first : first + 64]]
        source, lengths = words.pad(encoded, LONGEST)
        tokens = generate(
            model, source, lengths, max_new_tokens=LONGEST, end_token=END, pad_token=PAD
        ).tokens  # fmt: skip
        written += [words.decode(row) for row in tokens.tolist()]
    return written


def run_training(
    kind: str, folder: Path, *, backend: str = "auto", steps: int, batch: int = BATCH, seed: int = 0
) -> None:
    """Train, or go on; then report on the held-out prompts."""
    if find_spec("sacrebleu") is None:  # which the report needs, minutes later
        raise ModuleNotFoundError("sacrebleu is missing: pip install sacrebleu")
    print(LIMITS, file=sys.stderr)
    parts = split(corpus.pairs())
    words = vocabulary(parts.training)
    torch.manual_seed(seed)
    model = build(kind, words)
    if backend == "torch":
        plain_torch(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{kind} of {count:,} parameters, {len(parts.training)} pairs, {len(words)} pieces, in {folder}")

    def next_batch(step: int) -> tuple[Tensor, ...]:
        drawn = torch.randint(len(parts.training), (batch,), generator=generator(seed, step))
        return batch_of(words, [parts.training[place] for place in drawn.tolist()])

    train(
        model,
        torch.optim.AdamW(model.parameters(), RATES[kind], weight_decay=0.01),
        next_batch,
        loss_of(model, SMOOTHING),
        steps=steps,
        folder=folder,
        seed=seed,
        schedule=warmup_linear(steps, warmup=max(1, steps // 10)),
        save_every=50,
        validate=lambda: perplexity(model, words, parts.validation),
        about={
            "example": "dialogue", "model": kind, "backend": backend, "steps": steps, "batch": batch, "seed": seed,
            "embedding": EMBEDDING, "pieces": words.pieces,
        },
    )  # fmt: skip
    run = Run.read(folder)
    best, lowest = min(run.validations, key=lambda each: each[1])
    print(f"validation perplexity: {run.validations[-1][1]:.0f}, lowest {lowest:.0f} after {best:.0f} steps")
    print(run.cost())
    print(report(model, words, parts))


def report(model: Seq2Seq | Transformer, words: WordPieces, parts: Split) -> str:
    """The model on the held-out prompts, the baselines on the same, and some replies."""
    references: dict[str, list[str]] = {}
    prompts: dict[str, str] = {}
    for pair in parts.held_out:
        references.setdefault(corpus.key(pair.prompt), []).append(pair.reply)
        prompts.setdefault(corpus.key(pair.prompt), pair.prompt)
    asked = list(prompts.values())
    known = {corpus.key(pair.reply) for pair in parts.training}
    copied = sum(corpus.key(pair.reply) in known for pair in parts.held_out)
    training, held_out = (
        [reply_numbers(words, pair.reply) for pair in part] for part in (parts.training, parts.held_out)
    )
    answers = {
        "model": replies(model, words, asked),
        "most frequent": [dialogue_report.most_frequent(parts.training)] * len(asked),
        "nearest prompt": dialogue_report.nearest(parts.training, asked),
    }
    perplexities = {
        "model": perplexity(model, words, parts.held_out),
        "frequencies": dialogue_report.unigram_perplexity(training, held_out, len(words)),
    }
    lines = [
        f"held out: {len(asked)} prompts with {len(parts.held_out)} replies, of which {copied} answer a "
        "training prompt as well",
        f"perplexity of a piece: model {perplexities['model']:.0f}, frequencies of pieces alone "
        f"{perplexities['frequencies']:.0f}; of the training's pairs {perplexity(model, words, parts.training):.0f}",
        f"{'':16}{'chrF':>7}{'BLEU':>7}{'distinct-1':>12}{'distinct-2':>12}",
    ]
    # Spelt alike: a model writes small letters, and spaces where the pieces have them.
    spelt = [[words.decode(words.encode(each)) for each in references[corpus.key(prompt)]] for prompt in asked]
    for name, answered in answers.items():
        written = [words.decode(words.encode(each)) for each in answered]
        lines.append(f"{name:16}{dialogue_report.score(written, spelt)}")
    known_replies = [words.decode(words.encode(pair.reply)) for pair in parts.training]
    verbatim = sum(answer in set(known_replies) for answer in answers["model"])
    lines.append(f"{verbatim} of the model's {len(asked)} replies are a training reply to the letter")
    shown = range(0, len(asked), max(1, len(asked) // 6))
    lines += [f"  {asked[place]}\n    -> {answers['model'][place]}" for place in shown]
    return "\n".join([*lines, LIMITS])


# Conversation --------------------------------------------------------------------------------------------------


def load(folder: Path) -> tuple[Seq2Seq | Transformer, WordPieces]:
    """The model of a training, and its words.

    Raises FileNotFoundError or ValueError: there is none, or it is damaged, of something else, or of another vocabulary
    than its weights are for.
    """
    if not (folder / "checkpoint.pt").exists():
        raise FileNotFoundError(f"{folder} holds no trained model: first python examples/dialogue.py train")
    about = about_of(folder, "dialogue", "of dialogue")
    words = WordPieces(about["pieces"])
    model = _build(about["model"], len(words), about["embedding"])
    load_weights(folder, model)
    return model.eval(), words


def in_turns(folder: Path) -> str:
    """The table of a step of this model and of that of plain torch, for a batch of the corpus."""
    (ours, words), (theirs, _) = load(folder), load(folder)
    batch = batch_of(words, split(corpus.pairs()).training[:BATCH])
    models = {"fastattn": ours, "torch": plain_torch(theirs)}
    return side_by_side(models, lambda model: loss_of(model, SMOOTHING)(*batch))


def answer(model: Seq2Seq | Transformer, words: WordPieces, line: str) -> str:
    """The reply to one line; an empty one, and characters that no training text has, are remarked on."""
    if not line.strip():
        return "(Say something; an empty line has no answer.)"
    encoded = words.encode(line)
    reply = replies(model, words, [line])[0] or "..."
    if UNKNOWN in encoded or not encoded:
        reply += "  (It holds characters that the training had not.)"
    return reply


def chat(model: Seq2Seq | Transformer, words: WordPieces, ask: Callable[[str], str] = input) -> None:
    """Converse until the end of the input, Ctrl-C, or "quit"."""
    print(f'{LIMITS}\n"quit" or Ctrl-D ends the conversation.')
    while True:
        try:
            line = ask("you> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip().lower() in ("quit", "exit"):
            return
        print(f"bot> {answer(model, words, line)}")


def parser() -> argparse.ArgumentParser:
    helps = {
        "train": "train, or go on with a training, and report on held-out prompts",
        "compare": "the table of a training and of that with --backend torch",
        "chat": "a conversation in the terminal",
    }
    result, commands = command_line.parser(__doc__, helps, "runs/dialogue-MODEL[-torch]")
    for command in commands.values():
        command.add_argument("--model", choices=MODELS, default="seq2seq")
    commands["train"].add_argument("--steps", type=command_line.positive, help=f"default: {STEPS}")
    commands["train"].add_argument("--batch", type=command_line.positive, default=BATCH)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args: Any = parser().parse_args(arguments)
    folder, plain = command_line.folders(args, Path("runs") / f"dialogue-{args.model}")
    try:
        if args.command == "train":
            run_training(
                args.model, folder, backend=args.backend, steps=args.steps or STEPS[args.model], batch=args.batch,
                seed=args.seed,
            )  # fmt: skip
        elif args.command == "compare":
            print(compare(folder, plain))
            print(in_turns(folder))
        else:
            chat(*load(folder))
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        raise SystemExit(f"dialogue: {error}") from error


if __name__ == "__main__":
    main()
