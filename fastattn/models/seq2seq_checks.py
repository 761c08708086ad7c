"""Checks of what a Seq2Seq model is given beside tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.models.checks import check_lengths


def check_features(name: str, features: Any, size: int, dtype: torch.dtype) -> None:
    """Real features (B, S, size) of the parameters' dtype, at least one step a sequence.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: got {type(features).__name__}, expected a torch.Tensor of features")
    if features.dtype != dtype:
        raise ValueError(
            f"{name}: got dtype {features.dtype}, expected {dtype}, the parameters': a model with "
            "source_embedding=None reads real features, not tokens"
        )
    if features.dim() != 3 or features.shape[2] != size:
        raise ValueError(f"{name}: got shape {tuple(features.shape)}, expected (B, S, {size})")
    if features.shape[1] == 0:
        raise ValueError(f"{name}: got shape {tuple(features.shape)}, expected at least one step in a sequence")


def known_lengths(name: str, lengths: Tensor | None, sequences: Tensor) -> Tensor | None:
    """Lengths (B,) of sequences (B, T, ...) on the CPU, where torch packs by them; None where all sequences are full.

    A compiler reads no tensor: there they are the lengths given.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    if lengths is None:
        return None
    check_lengths(name, lengths, sequences)
    if torch.compiler.is_compiling():
        return lengths if sequences.shape[0] > 0 else None
    read = lengths.cpu()
    return None if bool((read == sequences.shape[1]).all()) else read


def check_probability(name: str, value: Any) -> None:
    """A number from 0 to 1.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: got {value}, expected a probability from 0 to 1")
