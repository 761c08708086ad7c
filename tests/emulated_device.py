"""Builds the CUDA LSTMs for the host: the kernels of ``csrc/cuda`` over the emulator in ``tests/emulated``.

The library lies in ``build/emulated`` under a name that holds a digest of its sources: compiled once (a minute on one
core) for each state of them. ``ops()`` are its operators.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
_SOURCES = (
    "csrc/lstm_shape.cpp", "csrc/cuda/call.cpp", "csrc/cuda/lstm_forward.cpp", "csrc/cuda/lstm_backward.cpp",
    "csrc/cuda/lstm_layers_forward.cpp", "csrc/cuda/lstm_layers_backward.cpp",
    "csrc/cuda/lstm_step.cu", "csrc/cuda/lstm_persistent_forward.cu", "csrc/cuda/lstm_persistent_backward.cu",
    "csrc/layer_norm_lstm_shape.cpp", "csrc/cuda/layer_norm_call.cpp", "csrc/cuda/layer_norm_forward.cpp",
    "csrc/cuda/layer_norm_backward.cpp", "csrc/cuda/layer_norm_step.cu", "csrc/cuda/layer_norm_rows.cu",
    "tests/emulated/lstm.cpp", "tests/emulated/layer_norm_lstm.cpp",
)  # fmt: skip
_HEADERS = ("csrc/cuda/*.h", "csrc/cuda/*.cuh", "csrc/lstm*.h", "csrc/layer_norm*.h", "tests/emulated/*")


def compiler() -> str:
    """The C++ compiler, or a skip of the test."""
    found = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if found is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C++ compiler")
    return found


def ops() -> Any:
    """``torch.ops.fastattn_emulated``, built if need be."""
    cxx = compiler()
    inputs = sorted({*_SOURCES, *(str(p.relative_to(ROOT)) for glob in _HEADERS for p in ROOT.glob(glob))})
    digest = hashlib.sha256(torch.__version__.encode())
    for name in inputs:
        digest.update((ROOT / name).read_bytes())
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"lstm_{digest.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two test processes one builds
        if not library.exists():
            for old in folder.glob("lstm_*.so"):
                old.unlink()
            _build(cxx, folder, library)
    torch.ops.load_library(str(library))
    return torch.ops.fastattn_emulated


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """What torch says of tf32 products, which the kernels follow."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _build(cxx: str, folder: Path, library: Path) -> None:
    package = Path(torch.__file__).parent
    include = package / "include"
    flags = [
        "-std=c++20", "-g0", "-fPIC", "-fno-strict-aliasing", '-DFASTATTN_EMULATED="cuda_emulator.h"',
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulated'}",
        "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"),
    ]  # fmt: skip
    objects = []
    for source in _SOURCES:
        optimise = "-O1" if source.endswith(".cu") else "-O0"
        objects.append(str(folder / (Path(source).stem + Path(source).suffix + ".o")))
        _run([cxx, *flags, optimise, "-x", "c++", "-c", str(ROOT / source), "-o", objects[-1]])
    lib = package / "lib"
    _run([cxx, "-shared", "-o", f"{library}.part", *objects, f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"])
    Path(f"{library}.part").rename(library)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
