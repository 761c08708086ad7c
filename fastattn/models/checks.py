"""Checks of tokens and lengths: each error names the argument, what was given and what is allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import debug


def check_tokens(name: str, tokens: Any, vocab_size: int, batch: int | None = None) -> None:
    """Tokens (B, L), int64 or int32, at least one a sequence, each below ``vocab_size``; B is ``batch`` where given.

    What tokens hold is read on the CPU, and on a GPU inside ``fastattn.debug_checks()``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: got {type(tokens).__name__}, expected a torch.Tensor of tokens")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: got dtype {tokens.dtype}, allowed are int64 and int32")
    if tokens.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(tokens.shape)}, expected 2 dimensions (B, L)")
    if tokens.shape[1] == 0:
        raise ValueError(f"{name}: got shape {tuple(tokens.shape)}, expected at least one token in a sequence")
    if batch is not None and tokens.shape[0] != batch:
        raise ValueError(f"{name}: got a batch of {tokens.shape[0]}, expected {batch}, that of the source")
    if not torch.compiler.is_compiling() and debug.may_read(tokens) and tokens.numel() > 0:
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name}: got token {low if low < 0 else high}, allowed are 0 to {vocab_size - 1}, the vocabulary of "
                "the model"
            )


def check_lengths(name: str, lengths: Any, tokens: Tensor) -> None:
    """Lengths (B,), int64 or int32, from 1 to L, of tokens (B, L), on the tokens' device; read as tokens are.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name}: got {type(lengths).__name__}, expected a torch.Tensor of lengths")
    if lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: got dtype {lengths.dtype}, allowed are int64 and int32")
    if tuple(lengths.shape) != (tokens.shape[0],):
        raise ValueError(f"{name}: got shape {tuple(lengths.shape)}, expected (B,) = ({tokens.shape[0]},)")
    if lengths.device != tokens.device:
        raise ValueError(f"{name}: got device {lengths.device}, expected the tokens' {tokens.device}")
    if not torch.compiler.is_compiling() and debug.may_read(lengths) and lengths.numel() > 0:
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 1 or high > tokens.shape[1]:
            raise ValueError(
                f"{name}: got length {low if low < 1 else high}, allowed are 1 to {tokens.shape[1]}, the padded length"
            )


def check_padding_mask(name: str, mask: Any, tokens: Tensor) -> None:
    """A boolean mask of the shape (B, L) of tokens, True at least once a sequence; read as tokens are.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, expected a torch.Tensor")
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: got dtype {mask.dtype}, expected torch.bool, True at real tokens")
    if mask.shape != tokens.shape:
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected the tokens' {tuple(tokens.shape)}")
    if mask.device != tokens.device:
        raise ValueError(f"{name}: got device {mask.device}, expected the tokens' {tokens.device}")
    if not torch.compiler.is_compiling() and debug.may_read(mask) and not mask.any(1).all():
        row = int((~mask.any(1)).nonzero()[0, 0])
        raise ValueError(f"{name}: got no real token in sequence {row}, expected at least one in each")
