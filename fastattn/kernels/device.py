"""Which device a Triton kernel is launched on."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` the current one: Triton launches on that, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
