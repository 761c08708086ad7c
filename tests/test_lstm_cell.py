"""The gate maths that host and device share, ``csrc/lstm_cell.h``, in float32 against float64."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulated_device import ROOT, compiler
from torch import Tensor

Cell = Callable[[Tensor, float, float, float], Tensor]
_RESULTS = 11  # i, f, g, o, c, m; the gradients of the four sums and of the previous cell


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    library = tmp_path_factory.mktemp("cell") / "cell.so"
    source = ROOT / "tests" / "emulated" / "cell.cpp"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler(), *flags, str(source), "-o", str(library)], check=True)
    return _bind(library)


def _bind(library: Path) -> Cell:
    function = ctypes.CDLL(str(library)).cell
    floats = ctypes.POINTER(ctypes.c_float)
    function.argtypes = [floats, ctypes.c_float, ctypes.c_float, ctypes.c_float, floats]
    function.restype = None

    def call(sums: Tensor, previous: float, dm: float, dc: float) -> Tensor:
        result = (ctypes.c_float * _RESULTS)()
        function((ctypes.c_float * 4)(*sums.tolist()), previous, dm, dc, result)
        return torch.tensor(list(result), dtype=torch.float64)

    return call


def in_float64(sums: Tensor, previous: float, dm: float, dc: float) -> Tensor:
    """The same by autograd, from the definition of the LSTM alone."""
    sums = sums.double().requires_grad_()
    before = torch.tensor(previous, dtype=torch.float64, requires_grad=True)
    i, f, o = (sums[k].sigmoid() for k in (0, 1, 3))
    g = sums[2].tanh()
    c = f * before + i * g
    m = o * c.tanh()
    dsums, dbefore = torch.autograd.grad(m * dm + c * dc, [sums, before])
    return torch.cat([torch.stack([i, f, g, o, c, m]).detach(), dsums, dbefore[None]])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 8.0])
def test_values_and_derivatives(cell: Cell, scale: float) -> None:
    for _ in range(200):
        sums = torch.randn(4) * scale
        previous, dm, dc = (torch.randn(3) * torch.tensor([scale, 1.0, 1.0])).tolist()
        got, exact = cell(sums, previous, dm, dc), in_float64(sums, previous, dm, dc)
        # Each is a sum of at most two terms no larger than 1 + |previous| + |dm| + |dc|, of at most six roundings.
        size = (1 + abs(previous)) * (1 + abs(dm) + abs(dc))
        assert (got - exact).abs().max() <= 8 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_saturated_gates_stay_finite(cell: Cell, sign: float) -> None:
    for size in (20.0, 90.0, 3e38):
        sums = torch.full((4,), sign * size)
        got = cell(sums, 0.5, 1.0, 1.0)
        assert torch.isfinite(got).all()
        assert (got - in_float64(sums, 0.5, 1.0, 1.0)).abs().max() <= 1e-6


def test_small_sums_keep_their_relative_precision(cell: Cell) -> None:
    for size in (1e-3, 1e-6, 1e-20):
        g = cell(torch.full((4,), size), 0.0, 0.0, 0.0)[2]
        assert g == pytest.approx(torch.tensor(torch.tensor(size).double().tanh().item()).item(), rel=1e-6)
