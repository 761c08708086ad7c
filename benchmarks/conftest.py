"""Options of the benchmarks: a record that is written row by row, and a limit of time."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import pytest
import torch

from fastattn.profiling.environment import default_device, describe, device_name, versions

_start = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastattn")
    group.addoption("--record", type=Path, help="JSON file that gets each row as soon as it is measured")
    group.addoption("--seconds-left", type=float, help="start no further row after so many seconds")


def pytest_report_header() -> str:
    found = versions()
    return f"{device_name(default_device())}, torch {found['torch']}, triton {found['triton']}"


@pytest.fixture(autouse=True)
def _within_the_limit(request: pytest.FixtureRequest) -> None:
    limit = request.config.getoption("--seconds-left")
    if limit is not None and time.monotonic() - _start > limit:
        pytest.skip("no time left")


@pytest.fixture
def keep(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[dict[str, Any], torch.device], None]:
    """Keep a row: in pytest-benchmark's ``extra_info``, and in the file of ``--record``; one of ours must not raise."""

    def write(row: dict[str, Any], device: torch.device) -> None:
        benchmark.extra_info.update(row | describe(device))
        path = request.config.getoption("--record")
        if path is not None:
            measure.record(path, request.node.name, row, device)
        broken = {name: reason for name, reason in row["refused"].items() if name.startswith(measure.OURS)}
        if broken:
            pytest.fail(f"one of ours raised: {broken}")

    return write


if importlib.util.find_spec("pytest_benchmark") is None:

    class _Benchmark:
        """The part of pytest-benchmark that is used, for machines without it: the record needs no more."""

        def __init__(self) -> None:
            self.extra_info: dict[str, Any] = {}

        def pedantic(
            self, target: Callable[..., Any], args: Any = (), *, setup: Callable[[], Any], rounds: int, iterations: int
        ) -> None:
            for _ in range(rounds):
                setup()
                for _ in range(iterations):
                    target(*args)

    @pytest.fixture
    def benchmark() -> _Benchmark:
        return _Benchmark()
