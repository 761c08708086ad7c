"""Which sizes do not fit: memory predicted from the lengths measured before, and errors that mean out of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_MESSAGES = ("out of memory", "can't allocate memory", "alloc_failed", "unable to allocate")


def predicted_bytes(points: Sequence[tuple[int, int]], length: int) -> float | None:
    """Peak memory at ``length`` by the curve b L + c L² through the last two points, neither term negative.

    A model of sequences has a part that grows with the length, and one with its square where scores are stored.

    Args:
        points: (length, bytes) measured, in order of growing length. From one point alone all is taken as quadratic.
        length: that of the prediction, at least the last one measured.

    Returns bytes, or None without a point.
    """
    if not points:
        return None
    last, most = points[-1]
    quadratic = most / last**2
    if len(points) == 1:
        return quadratic * length**2
    first, least = points[-2]
    slope = (most / last - least / first) / (last - first)
    slope = min(max(slope, 0.0), quadratic)
    return (most / last - slope * last) * length + slope * length**2


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on ``device``: the GPU's free memory, or what the system calls available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: Exception) -> bool:
    """Whether ``error`` says that memory could not be had, by its class or, as torch's CPU allocator's, its text."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in _MESSAGES)
