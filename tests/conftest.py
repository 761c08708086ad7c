"""What every test gets: uninitialised memory that shows, a seed of its own, the `gpu` marker, hypothesis profiles.

Environment: FASTATTN_SEED=n shifts every test's seed; FASTATTN_FUZZ=n draws n examples per property.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Read by triton when it is imported, which `import fastattn` does: the kernels then run on the CPU, interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.repair_bfloat16()
    interpreter.patch_once()
    interpreter.check_overflow_at_once()
    interpreter.describe_types_once()
    interpreter.keep_frames_together()
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import instruction_sets  # noqa: E402  it imports fastattn, and so triton

_COMMON = {
    "deadline": None,  # the interpreter's speed says nothing
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
}
hypothesis.settings.register_profile("default", max_examples=20, derandomize=True, **_COMMON)
_fuzz = int(os.environ.get("FASTATTN_FUZZ", "0"))
hypothesis.settings.register_profile("fuzz", max_examples=max(_fuzz, 1), derandomize=False, **_COMMON)
hypothesis.settings.load_profile("fuzz" if _fuzz else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Two processes get a half each: the two longest tests first in it, so that neither waits for the other at the end.
    longest = [item for item in items if "combinations_in" in item.name]
    if len(longest) == 2:
        rest = [item for item in items if item not in longest]
        half = (len(items) + 1) // 2 - 1
        items[:] = [longest[0], *rest[:half], longest[1], *rest[half:]]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return f"torch {torch.__version__}, {device}, triton {'interpreted' if interpreted else 'compiled'}"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """torch's generators, seeded by the test's own name: a test draws the same numbers alone and in the suite."""
    value = zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("FASTATTN_SEED", "0"))
    torch.manual_seed(value)
    request.node.add_report_section("setup", "seed", f"torch.manual_seed({value})")
    return value


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN (or the largest integer), so that reading one cannot go unseen.

    torch does it itself, below Python: empty, empty_like, empty_strided, new_empty and resize_, from C++ too, and
    nothing that a compiler traces is replaced. The switch that allows it also asks for deterministic algorithms;
    warn_only keeps those without one running.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=instruction_sets.PLAIN)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each plain instruction set of the C++ kernels in turn; tests of others have a fixture of their own."""
    yield from instruction_sets.chosen(request.param)
