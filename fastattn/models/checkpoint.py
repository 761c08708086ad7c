"""Checkpoints: dictionaries of tensors and plain values, written whole or not at all, read without running code."""

from __future__ import annotations

import dataclasses
import os
from os import PathLike
from pathlib import Path
from typing import Any

import torch

_FORMAT = "fastattn"


def save(path: str | PathLike[str], *, kind: str, **parts: Any) -> None:
    """Write ``parts``: tensors, state_dicts, numbers, strings, and lists and dictionaries of these.

    The file appears under its name when it is complete: an interruption leaves what was there before.
    """
    target = Path(path)
    unfinished = target.with_name(target.name + ".unfinished")
    torch.save({"format": _FORMAT, "kind": kind, **parts}, unfinished)
    os.replace(unfinished, target)


def load(path: str | PathLike[str], *parts: str, kind: str, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """What ``save`` wrote, with at least the parts named. Runs no code from the file (weights_only=True).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds more than tensors and plain values, or is no checkpoint of that kind.
    """
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:  # damaged bytes are read as instructions, and fail as whatever these say
            reason = str(error).split("\n")[0]
            raise ValueError(f"path: got {path}, which is damaged or holds more than tensors: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"path: got {path}, a file of something else, expected a checkpoint of fastattn")
    if content.get("kind") != kind:
        raise ValueError(f"path: got {path}, a checkpoint of kind {content.get('kind')!r}, expected {kind!r}")
    missing = [name for name in parts if name not in content]
    if missing:
        raise ValueError(f"path: got {path}, without {', '.join(missing)}, expected {', '.join(parts)}")
    return content


def load_model(
    path: str | PathLike[str], config_class: Any, config: Any, *, kind: str, map_location: torch.device | str
) -> tuple[Any, dict[str, Any]]:
    """The config and the weights of a model that ``save`` wrote as these two parts.

    Args:
        config_class: the dataclass of the config.
        config: what the file has to hold; None takes what it holds.

    Raises:
        FileNotFoundError, ValueError: as ``load``; or the config is refused, or another one; the message says where.
    """
    parts = load(path, "config", "weights", kind=kind, map_location=map_location)
    try:
        saved = config_class(**parts["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"path: got {path}, whose config is refused: {error}") from error
    if config is not None:
        _check_config(path, saved, config)
    return saved, parts["weights"]


def _check_config(path: str | PathLike[str], saved: Any, wanted: Any) -> None:
    """A file's config against the one, of the same dataclass, that it has to hold; ValueError where they differ."""
    differences = [
        f"{field.name}={getattr(saved, field.name)!r}, expected {getattr(wanted, field.name)!r}"
        for field in dataclasses.fields(saved)
        if getattr(saved, field.name) != getattr(wanted, field.name)
    ]
    if differences:
        raise ValueError(f"path: got {path}, whose model has {'; '.join(differences)}")
