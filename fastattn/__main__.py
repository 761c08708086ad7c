"""``python -m fastattn demo | doctor | profile | report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastattn.profiling import options as given
from fastattn.profiling.environment import default_device, describe
from fastattn.profiling.sequence import DEFAULT_LENGTHS, profile
from fastattn.profiling.table import profile_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device) if options.device else default_device()
    command = {"demo": _demo, "doctor": _doctor, "profile": _profile, "report": _report}[options.command]
    return command(options, device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastattn", description="Fused attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="real sentences through a patched BERT, then the long-sequence profile")
    demo.add_argument("--sentences", type=int, default=256, help="how many sentences (default: %(default)s)")
    demo.add_argument("--batch-size", type=int, default=32, help="sentences in a batch (default: %(default)s)")
    demo.add_argument("--longest", type=int, default=256, help="tokens a sentence is cut to (default: %(default)s)")
    commands.add_parser("doctor", help="versions, devices, backends, a self-check of each; exit status 1 on failure")
    _add_profile(commands.add_parser("profile", help="time, throughput and peak memory over the sequence length"))
    reported = commands.add_parser("report", help="tables and figures of the benchmarks' records, and the README's")
    reported.add_argument("records", type=Path, nargs="+", help="as in benchmarks/results/DEVICE.json")
    reported.add_argument("--out", type=Path, help="folder (default: docs/results and README.md of this checkout)")
    demo.add_argument("--lengths", type=int, nargs="+", default=list(DEFAULT_LENGTHS), help="sequence lengths")
    demo.add_argument("--out", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    for command in commands.choices.values():
        command.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    return parser


def _add_profile(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="mha", help="mha, encoder, lstm or hf:PATH (default: %(default)s)")
    command.add_argument("--seq-lens", default="1k:8k", help="as 1k:128k or 512,3k (default: %(default)s)")
    command.add_argument("--mask", default="none", help="causal, padding:SHARE or none (default: %(default)s)")
    command.add_argument("--backward", action="store_true", help="forward and backward instead of the forward alone")
    command.add_argument("--weights", action="store_true", help="mha returns the weights, as it does by default")
    command.add_argument(
        "--compare", default="torch", metavar="NAMES",
        help="torch, sdpa, fastattn:BACKEND, by commas; empty for none (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--trace", action="store_true", help="write a trace for Perfetto of the longest length")
    command.add_argument("--seconds", type=float, default=1.0, help="timing of one length (default: %(default)s)")
    command.add_argument("--batch", type=int, default=1, help="batch size (default: %(default)s)")
    command.add_argument("--embed-dim", type=int, default=256, help="features (default: %(default)s)")
    command.add_argument("--heads", type=int, default=8, help="(default: %(default)s)")
    command.add_argument("--dtype", choices=given.DTYPES, default="fp32", help="(default: %(default)s)")
    command.add_argument(
        "--lengths", type=int, nargs="+",
        help="instead of all that, the demonstration's measurement: mha(x, x, x), forward and training, at these",
    )  # fmt: skip
    command.add_argument("--out", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")


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
    if options.lengths is None:
        from fastattn.profiling.command import run

        return run(options, device)
    from fastattn.profiling.record import write

    points = profile(
        options.lengths,
        device=device,
        dtype=given.DTYPES[options.dtype],
        batch=options.batch,
        embed_dim=options.embed_dim,
        heads=options.heads,
    )
    environment = describe(device)
    files = write(options.out, environment, points)
    print(f"{environment['device']}\n{profile_table(points)}\nwritten: {', '.join(map(str, files))}")
    return 0


def _report(options: argparse.Namespace, _: torch.device) -> int:
    from fastattn.profiling.report import report

    return report(options.records, options.out)


if __name__ == "__main__":
    sys.exit(main())
