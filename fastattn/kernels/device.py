"""Which device a Triton kernel is launched on, and what it is compiled for."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` the current one: Triton launches on that, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def architecture(device: torch.device) -> int:
    """The compute capability kernels are compiled for, 90 for 9.0; 0 where they are interpreted."""
    if device.type == "cuda":
        return _of_gpu(device)
    if device.type == "meta":  # compiled without a device: the driver names the target
        import triton

        return int(triton.runtime.driver.active.get_current_target().arch)
    return 0


@functools.cache
def _of_gpu(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
