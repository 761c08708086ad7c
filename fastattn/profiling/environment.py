"""What a measurement ran on: device, versions, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("fastattn", "torch", "triton", "transformers", "numpy")


def default_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; "not installed" where one is missing."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    # An in-place build has no metadata; torch's own version also tells its build (+cpu, +cu130).
    found["torch"] = str(torch.__version__)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_model()}, {cores} cores"


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions, date: what stands beside every figure."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


# A hypervisor may hide the model's number; AMD's families of processors are as many microarchitectures. Family 25 holds
# two, of which the second has AVX-512.
_AMD_FAMILIES = {"23": "Zen to Zen 2", "25": "Zen 3", "26": "Zen 5"}


def _cpu_model() -> str:
    """The model's name, for AMD with its microarchitecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    model = facts.get("model name") or platform.processor() or platform.machine()
    generation = _AMD_FAMILIES.get(facts.get("cpu family", "")) if facts.get("vendor_id") == "AuthenticAMD" else None
    if generation == "Zen 3" and "avx512f" in facts.get("flags", ""):
        generation = "Zen 4"
    return f"{model} ({generation})" if generation else model
