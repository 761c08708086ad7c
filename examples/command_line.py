"""What the commands of the examples have in common: a run is a folder, and has a twin of plain PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """An option's integer from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected at least 1")
    return number


def parser(
    documentation: str | None, helps: dict[str, str], folder: str
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """A parser, and those of its commands by name, for options of their own; ``folder`` describes the default.

    Every command takes --folder, "train" also --backend and --seed, "compare" --torch-folder.
    """
    result = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    subparsers = result.add_subparsers(dest="command", required=True)
    commands = {command: subparsers.add_parser(command, help=about) for command, about in helps.items()}
    for command in commands.values():
        command.add_argument("--folder", type=Path, help=f"default: {folder}")
    commands["train"].add_argument(
        "--backend", choices=("auto", "torch"), default="auto", help="torch: plain PyTorch"
    )  # fmt: skip
    commands["train"].add_argument("--seed", type=int, default=0)
    commands["compare"].add_argument("--torch-folder", type=Path)
    return result, commands


def folders(args: argparse.Namespace, usual: Path) -> tuple[Path, Path]:
    """The folder of this run, and that of the run of plain PyTorch, where nothing else is said."""
    options = vars(args)
    plain = options.get("torch_folder") or usual.with_name(f"{usual.name}-torch")
    return args.folder or (plain if options.get("backend") == "torch" else usual), plain
