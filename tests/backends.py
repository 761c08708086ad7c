"""The device the tests use and the backends of our own that run on it."""

from __future__ import annotations

import pytest
import torch

from fastattn.dispatch import Backend, Request, why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
_ANY_CALL = Request(device_type=DEVICE, dtype=torch.float32, head_dim=8, value_dim=8)
KERNELS = [name for name in (Backend.TRITON, Backend.CPU) if why_not(name, _ANY_CALL) is None]
