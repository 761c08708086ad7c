"""``python -m fastattn demo | doctor | profile``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastattn.profiling.environment import default_device, describe
from fastattn.profiling.sequence import DEFAULT_LENGTHS, profile
from fastattn.profiling.table import profile_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device) if options.device else default_device()
    command = {"demo": _demo, "doctor": _doctor, "profile": _profile}[options.command]
    return command(options, device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastattn", description="Fused attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="real sentences through a patched BERT, then the long-sequence profile")
    demo.add_argument("--sentences", type=int, default=256, help="how many sentences (default: %(default)s)")
    demo.add_argument("--batch-size", type=int, default=32, help="sentences in a batch (default: %(default)s)")
    demo.add_argument("--longest", type=int, default=256, help="tokens a sentence is cut to (default: %(default)s)")
    commands.add_parser("doctor", help="versions, devices, backends, a self-check of each; exit status 1 on failure")
    profiled = commands.add_parser("profile", help="time and peak memory of mha(x, x, x) over the sequence length")
    profiled.add_argument("--batch", type=int, default=1, help="batch size (default: %(default)s)")
    profiled.add_argument("--embed-dim", type=int, default=256, help="(default: %(default)s)")
    profiled.add_argument("--heads", type=int, default=8, help="(default: %(default)s)")
    profiled.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(default: %(default)s)"
    )
    for command in (demo, profiled):
        command.add_argument("--lengths", type=int, nargs="+", default=list(DEFAULT_LENGTHS), help="sequence lengths")
        command.add_argument("--out", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    for command in commands.choices.values():
        command.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    return parser


def _demo(options: argparse.Namespace, device: torch.device) -> int:
    from fastattn.demo.main import run

    run(
        options.out,
        device,
        count=options.sentences,
        batch_size=options.batch_size,
        longest=options.longest,
        lengths=options.lengths,
    )
    return 0


def _doctor(_: argparse.Namespace, device: torch.device) -> int:
    from fastattn.profiling.doctor import examine

    return examine(device)


def _profile(options: argparse.Namespace, device: torch.device) -> int:
    from fastattn.profiling.record import write

    points = profile(
        options.lengths,
        device=device,
        dtype=getattr(torch, options.dtype),
        batch=options.batch,
        embed_dim=options.embed_dim,
        heads=options.heads,
    )
    environment = describe(device)
    files = write(options.out, environment, points)
    print(f"{environment['device']}\n{profile_table(points)}\nwritten: {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
