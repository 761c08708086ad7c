"""What the profile command's options mean: lengths, dtypes, masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
}  # fmt: skip


@dataclass(frozen=True)
class Mask:
    """What hides keys: nothing, the future, or padding; ``kept`` is the share of tokens that are not padding."""

    causal: bool = False
    kept: float = 1.0

    @property
    def padded(self) -> bool:
        """Whether there is padding."""
        return self.kept < 1.0


def seq_lens(text: str) -> list[int]:
    """Lengths from ``1k:128k`` (doubling, both ends included) or ``512,3k,4096``; k is 1024.

    Raises ValueError for anything else.
    """
    try:
        first, colon, last = text.partition(":")
        if not colon:
            lengths = [_length(part) for part in text.split(",")]
        else:
            length, most = _length(first), _length(last)
            lengths = []
            while length <= most and length > 0:
                lengths.append(length)
                length *= 2
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise ValueError(f"--seq-lens: got {text!r}, expected FIRST:LAST as in 1k:128k, or lengths as in 512,3k,4096")
    return lengths


def _length(text: str) -> int:
    text = text.strip().lower()
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def mask(text: str) -> Mask:
    """A mask from ``none``, ``causal``, or ``padding:SHARE`` with the share of padding, above 0 and below 1.

    Raises ValueError for anything else.
    """
    if text == "none":
        return Mask()
    if text == "causal":
        return Mask(causal=True)
    name, _, share = text.partition(":")
    try:
        kept = 1.0 - float(share) if name == "padding" else 0.0
    except ValueError:
        kept = 0.0
    if not 0.0 < kept < 1.0:
        raise ValueError(f"--mask: got {text!r}, expected none, causal, or padding:SHARE with 0 < SHARE < 1")
    return Mask(kept=kept)
