"""Build the extension where torch and a compiler are at hand, else install pure Python; never downloads.

The metadata stands in pyproject.toml. The CUDA sources are built too where torch is a CUDA build and nvcc is found, for
the architectures below whether or not such a GPU is here. FASTATTN_CUDA=0 leaves them out; FASTATTN_CUDA=1 refuses to
install without them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
ARCHITECTURES = (80, 90, 100)


def why_no_extension() -> str | None:
    """The reason the extension cannot be built here; None when it can."""
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported ({error}); install it first and use pip's --no-build-isolation"
    if sys.platform == "win32":
        return "the kernels use the vector types of GCC and Clang"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    return None


def nvcc() -> str | None:
    """The nvcc that torch would call."""
    from torch.utils.cpp_extension import CUDA_HOME

    return None if CUDA_HOME is None else shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin"))


def why_no_cuda() -> str | None:
    """The reason the CUDA sources cannot be built here; None when they can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    compiler = nvcc()
    if compiler is None:
        return "no nvcc on PATH or under CUDA_HOME"
    release = re.search(r"release (\d+)", subprocess.check_output([compiler, "--version"], text=True))
    found, wanted = release[1] if release else "unknown", torch.version.cuda.split(".")[0]
    if found != wanted:
        return f"nvcc is of CUDA {found}, torch of CUDA {wanted}"
    return None


def wants_cuda() -> bool:
    choice = os.environ.get("FASTATTN_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"fastattn: FASTATTN_CUDA is {choice!r}, expected 0 or 1")
    if choice == "0":
        return False
    reason = why_no_extension() or why_no_cuda()
    if reason is not None and choice == "1":
        sys.exit(f"fastattn: FASTATTN_CUDA=1, but the CUDA sources cannot be built: {reason}")
    return reason is None


def architecture_flags() -> list[str]:
    """Machine code for every architecture that this nvcc knows, and for later GPUs the last one's PTX."""
    listed = subprocess.check_output([nvcc() or "nvcc", "--list-gpu-arch"], text=True)
    known = [arch for arch in ARCHITECTURES if f"compute_{arch}" in listed.split()]
    if not known:
        sys.exit(f"fastattn: nvcc knows none of compute_{', compute_'.join(map(str, ARCHITECTURES))}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension(cuda: bool) -> dict[str, Any]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    flags += openmp + os.environ.get("FASTATTN_CXXFLAGS", "").split()
    compile_args = {"cxx": flags}
    if cuda:
        flags.append("-DFASTATTN_CUDA")
        compile_args["nvcc"] = ["-O3", "-std=c++20", *architecture_flags()]
    module = (CUDAExtension if cuda else CppExtension)(
        "fastattn._C",
        files("csrc/*.cpp", *(["csrc/cuda/*.cpp", "csrc/cuda/*.cu"] if cuda else [])),
        depends=files("csrc/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh"),
        extra_compile_args=compile_args,
        extra_link_args=openmp + os.environ.get("FASTATTN_LDFLAGS", "").split(),
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


cuda = wants_cuda()
reason = why_no_extension()
if reason is not None:
    print(f"fastattn: installing without the C++ extension: {reason}", file=sys.stderr)
setup(**(extension(cuda) if reason is None else {}))
