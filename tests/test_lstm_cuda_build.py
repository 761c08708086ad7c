"""The CUDA kernels compile for every architecture that ships, without spills: nvcc needs no GPU."""

from __future__ import annotations

import os

import pytest

from benchmarks import cuda_budget

pytestmark = pytest.mark.slow


def test_kernels_do_not_spill() -> None:
    if cuda_budget.nvcc() is None:
        pytest.skip("needs nvcc")
    # Over a minute for all three; in the suite the one that most users have.
    architectures = cuda_budget.ARCHITECTURES if os.environ.get("FASTATTN_INSTALL_TESTS") else (90,)
    rows = cuda_budget.compile_kernels(architectures)
    assert {row.arch for row in rows} == set(architectures)
    assert len({row.kernel for row in rows}) * len(architectures) == len(rows)
    assert [(row.kernel, row.arch, row.spills) for row in rows if row.spills] == []
    kernels = {row.kernel.split(": ")[1].split("<")[0] for row in rows}
    assert kernels == {
        "forward_kernel", "backward_kernel", "forward_step_kernel", "backward_step_kernel", "unprojected_kernel",
        "previous_states_kernel", "upload_kernel", "layer_norm_forward_kernel", "layer_norm_backward_kernel",
        "normalise_inputs_kernel", "input_gradients_kernel", "column_sums_kernel",
    }  # fmt: skip
