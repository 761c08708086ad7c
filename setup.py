"""Build the C++ extension where torch and a compiler are at hand, else install pure Python; never downloads.

The metadata stands in pyproject.toml. FASTATTN_CUDA=0|1 is reserved for CUDA sources.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup


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


def extension() -> dict[str, Any]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    flags += openmp + os.environ.get("FASTATTN_CXXFLAGS", "").split()
    root = Path(__file__).parent
    sources = sorted(str(path.relative_to(root)) for path in root.glob("csrc/*.cpp"))
    module = CppExtension(
        "fastattn._C",
        sources,
        depends=[str(path.relative_to(root)) for path in sorted(root.glob("csrc/*.h"))],
        extra_compile_args=flags,
        extra_link_args=openmp + os.environ.get("FASTATTN_LDFLAGS", "").split(),
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


reason = why_no_extension()
if reason is not None:
    print(f"fastattn: installing without the C++ extension: {reason}", file=sys.stderr)
setup(**(extension() if reason is None else {}))
