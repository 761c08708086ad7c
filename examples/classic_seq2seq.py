"""The classic encoder and decoder learns to write a sequence backwards: RMSprop, 100 epochs, 20 % for validation.

    python examples/classic_seq2seq.py [--backend torch]

Sequences of symbols, one-hot in 64 features, of which the first two are the start and the end. The decoder is trained
with the true symbols, and validated with its own.
"""

from __future__ import annotations

import argparse

import torch
from command_line import positive
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

import fastattn
from fastattn.models import Seq2Seq, Seq2SeqConfig, generate

START, END, FIRST = 0, 1, 2
BATCH = 64


def pairs(count: int, length: int, symbols: int) -> tuple[Tensor, Tensor]:
    """One-hot sources (count, length, 64), and targets (count, length + 2): start, the source reversed, end."""
    tokens = torch.randint(FIRST, FIRST + symbols, (count, length))
    edge = torch.ones(count, 1, dtype=torch.int64)
    return functional.one_hot(tokens, 64).float(), torch.cat([START * edge, tokens.flip(1), END * edge], 1)


@torch.no_grad()
def validate(model: Seq2Seq, source: Tensor, target: Tensor) -> tuple[float, float]:
    """The cross-entropy with the true symbols, and the share of sequences the model writes without a mistake."""
    model.eval()
    loss = model.loss(source, target).item()
    written = generate(model, source, max_new_tokens=target.shape[1] - 1).tokens
    model.train()
    return loss, (written == target[:, 1:]).all(1).float().mean().item()


def train(model: Seq2Seq, source: Tensor, target: Tensor, epochs: int) -> tuple[float, float]:
    """Train on the first 80 % of the pairs; the last validation on the others."""
    held_out = len(source) // 5
    training, validation = slice(0, len(source) - held_out), slice(len(source) - held_out, None)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.9)
    result = (float("nan"), float("nan"))
    progress = tqdm(range(epochs), unit="epoch")
    for _ in progress:
        order = torch.randperm(len(source[training]))
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            model.loss(source[rows], target[rows]).backward()
            optimizer.step()
        result = validate(model, source[validation], target[validation])
        progress.set_postfix_str(f"validation loss {result[0]:.3f}, exact {result[1]:.1%}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=positive, default=100)
    parser.add_argument("--pairs", type=int, default=4000, help="of which 20 %% are held out")
    parser.add_argument("--length", type=positive, default=5, help="symbols in a sequence")
    parser.add_argument("--symbols", type=positive, default=10, help="different ones, at most 62")
    parser.add_argument("--backend", default="auto", help="auto, cpu, cuda, torch or reference")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.pairs < 5:
        parser.error(f"--pairs: got {args.pairs}, expected at least 5, of which one is held out")
    if args.symbols > 62:
        parser.error(f"--symbols: got {args.symbols}, allowed are 1 to 62")
    torch.manual_seed(args.seed)
    source, target = pairs(args.pairs, args.length, args.symbols)
    model = Seq2Seq(Seq2SeqConfig.classic(start_token=START))
    with fastattn.backend(args.backend):
        loss, exact = train(model, source, target, args.epochs)
    print(f"held out: cross-entropy {loss:.4f}, {exact:.1%} of the sequences written without a mistake")


if __name__ == "__main__":
    main()
