"""What ``pip install`` makes of a checkout: without a compiler, with a C++ compiler only, and with nvcc but no GPU.

Each state is a virtual environment of its own that sees this one's packages through a .pth file: nothing is downloaded.
The full compile, a minute and more, runs where FASTATTN_INSTALL_TESTS is set (``make install-test``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest
import torch

from benchmarks import cuda_budget

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
compiles = pytest.mark.skipif(
    not os.environ.get("FASTATTN_INSTALL_TESTS"), reason="compiles everything; set FASTATTN_INSTALL_TESTS=1"
)

# The layer against torch's, and why the extension is not there.
CHECK = """
import torch, fastattn
from fastattn.kernels.lstm import extension
from fastattn.kernels.attention import extension as attention

print(fastattn.__file__)
torch.manual_seed(0)
ours, theirs = fastattn.LSTM(3, 5), torch.nn.LSTM(3, 5)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(4, 2, 3)
torch.testing.assert_close(ours(x)[0], theirs(x)[0])
q = torch.randn(1, 2, 7, 8)
expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, q, q), expected)
print("attention:", attention.UNAVAILABLE)
print("LSTM:", extension.why_unavailable("cpu"))
print("CUDA:", extension.why_unavailable("cuda"))
"""


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FASTATTN_CUDA")}
    # ninja and the compiler are found as here.
    clean["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
    return subprocess.run(
        command, cwd=folder, env=clean | environment, capture_output=True, text=True, check=False
    )


def checkout(folder: Path) -> Path:
    """A copy of the sources alone."""
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("fastattn", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def installed(folder: Path, **environment: str) -> str:
    """Install a copy of the checkout into an environment of its own; what CHECK prints there."""
    venv.create(folder / "env", symlinks=True)
    python = str(folder / "env" / "bin" / "python")
    shared = sysconfig.get_paths()["purelib"]
    where = run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], folder).stdout.strip()
    Path(where, "shared.pth").write_text(shared + "\n")
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed"]
    result = run([*install, "-v", str(checkout(folder))], folder, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    result = run([python, "-c", CHECK], folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith(where), result.stdout
    return result.stdout


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "setup.py", *arguments], ROOT, **environment)


def test_without_a_compiler_it_is_pure_python(tmp_path: Path) -> None:
    printed = installed(tmp_path, CXX="none")
    for stem in ("attention", "LSTM", "CUDA"):
        assert f"{stem}: the C++ extension fastattn._C" in printed


@compiles
def test_with_a_compiler_the_cpu_has_kernels(tmp_path: Path) -> None:
    printed = installed(tmp_path, FASTATTN_CUDA="0")
    assert "attention: None" in printed
    assert "LSTM: None" in printed
    assert "CUDA: the C++ extension fastattn._C was built without the LSTM for CUDA" in printed


@pytest.mark.parametrize("choice", ["yes", "2"])
def test_a_wrong_choice_is_refused(choice: str) -> None:
    result = setup("--version", FASTATTN_CUDA=choice)
    assert result.returncode != 0
    assert f"FASTATTN_CUDA is {choice!r}, expected 0 or 1" in result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_cuda_that_cannot_be_built_is_an_error_when_asked_for() -> None:
    result = setup("--version", FASTATTN_CUDA="1")
    assert result.returncode != 0
    assert "FASTATTN_CUDA=1, but the CUDA sources cannot be built: torch" in result.stderr
    assert "is built without CUDA" in result.stderr


# setup.py beside a torch that says it has CUDA, and a setuptools that says what it is told to build.
PRETEND = """
import subprocess, sys
import setuptools, torch, torch.utils.cpp_extension as build

torch.version.cuda = {version!r}
build.CUDA_HOME = {home!r}
torch.cuda.is_available = lambda: sys.exit("asked for a visible GPU")

def tell(ext_modules, cmdclass):
    (module,) = ext_modules
    print(module.sources)
    print(module.extra_compile_args)

setuptools.setup = tell
sys.argv = ["setup.py"]
source = open("setup.py").read()
exec(compile(source, "setup.py", "exec"), {{"__file__": "setup.py", "__name__": "__main__"}})
"""


def pretend(version: str, **environment: str) -> subprocess.CompletedProcess[str]:
    compiler = cuda_budget.nvcc()
    if compiler is None:
        pytest.skip("needs nvcc")
    source = textwrap.dedent(PRETEND).format(version=version, home=str(Path(compiler).parents[1]))
    return run([sys.executable, "-c", source], ROOT, **environment)


def _cuda_of_nvcc() -> str:
    compiler = cuda_budget.nvcc()
    if compiler is None:
        pytest.skip("needs nvcc")
    printed = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return printed.split("release ")[1].split(",")[0]


def test_with_nvcc_the_kernels_are_built_for_every_architecture() -> None:
    result = pretend(_cuda_of_nvcc())
    assert result.returncode == 0, result.stderr
    for source in sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.c*") if path.suffix != ".cuh"):
        assert f"csrc/cuda/{source}" in result.stdout
    for arch in cuda_budget.ARCHITECTURES:
        assert f"-gencode=arch=compute_{arch},code=sm_{arch}" in result.stdout
    assert "-DFASTATTN_CUDA" in result.stdout


@pytest.mark.parametrize(
    ("version", "environment", "words"),
    [("12.8", {}, ""), ("12.8", {"FASTATTN_CUDA": "1"}, "torch of CUDA 12"), ("", {"FASTATTN_CUDA": "0"}, "")],
)
def test_without_the_right_nvcc_the_kernels_are_left_out(version: str, environment: dict[str, str], words: str) -> None:
    found = _cuda_of_nvcc()
    if version and found.split(".")[0] == version.split(".")[0]:
        pytest.skip("nvcc is of that version")
    result = pretend(version or found, **environment)
    assert "cuda" not in result.stdout
    assert (result.returncode != 0) == bool(words)
    assert words in result.stderr
