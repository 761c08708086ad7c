"""The checked-in budget of the Triton kernels: what is compiled today is what the table says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import budget

ROOT = Path(__file__).resolve().parents[1]
SPECIALIZED = ("plain", "causal", "window", "padding", "sinks")


def test_the_table_holds_every_case() -> None:
    held = {(row.arch, row.dtype, row.head_dim, row.feature) for row in budget.read_table()}
    assert held == {(case.arch, case.dtype, case.head_dim, case.feature) for case in budget.cases()}


LENGTHS = """
from benchmarks import budget
with budget.recording(90) as compiled:
    import torch
    from fastattn.kernels.attention import config, launch, packed_launch

    def heads(batch, length):
        return torch.empty(batch, length, 4, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)

    for batch, rows, columns, shift in ((2, 1024, 1024, 0), (1, 1000, 777, 1), (3, 1, 1, 16), (16, 7, 1024, -5)):
        query, key = heads(batch, rows), heads(batch, columns)
        problem = (None, None, None, None, None, None, 0.0, 0.125, 0.0, shift, None, shift)
        for _ in range(2):
            out, logsumexp = launch.attention(query, key, key, None, *problem)
            launch.attention_backward(out, None, query, key, key, out, logsumexp, *problem, False, False)
            with config.specialized():
                launch.attention(query, key, key, None, *problem)
                launch.attention_backward(out, None, query, key, key, out, logsumexp, *problem, False, False)
    plain = len(compiled)
    for tokens, longest in ((1000, 100), (1024, 16), (7, 1)):
        packed, bounds = heads(1, tokens)[0].transpose(0, 1), torch.empty(4, dtype=torch.int32, device="meta")
        packed_launch.packed_attention(packed, packed, packed, bounds, bounds, None, longest, longest, 0.125, None, 0)
kinds = {(place >= plain, name, kernel.hash) for place, (name, _, kernel) in enumerate(compiled)}
print(len(compiled), sorted(name for _, name, _ in kinds))
"""


def test_other_lengths_compile_nothing() -> None:
    """Where no strides depend on them: those of a mask and of the weights do, and are specialised on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", LENGTHS], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    names = ["delta", "dkey_dvalue", "dkey_dvalue_specialized", "dquery", "dquery_specialized", "forward", "forward"]
    names.append("forward_specialized")  # of packed sequences there is another ``attention_forward``
    assert result.stdout.strip() == f"67 {[f'attention_{name}' for name in names]}"


def test_the_printed_table_names_what_is_over_budget() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.budget"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = budget.read_table()
    assert f"{len(rows)} kernels, {sum(bool(row.faults()) for row in rows)} over budget" in result.stdout


def test_shared_memory_fits_every_chip() -> None:
    assert all(row.shared <= budget.SHARED_LIMIT[row.arch] for row in budget.read_table())


def test_half_precision_uses_tensor_cores() -> None:
    for row in budget.read_table():
        if row.dtype != "float32" and row.kernel != "attention_delta":
            assert row.tensor_core + row.mma > 0, row
            if row.arch == 90:
                assert row.tensor_core > 0, row


def test_nothing_spills() -> None:
    assert [(row.key, row.spills) for row in budget.read_table() if row.spills] == []


def test_tiles_are_read_by_descriptor_where_there_are_any() -> None:
    """Plain calls of half precision on sm_90 and sm_100; nowhere packed sequences, or batches that share their keys."""
    for row in budget.read_table():
        reads_tiles = row.kernel.startswith(("attention_forward", "attention_dquery", "attention_dkey_dvalue"))
        if row.arch == 80 or row.dtype == "float32" or "packed" in row.feature or "expanded" in row.feature:
            assert row.tma == 0, row
        elif row.feature in ("plain", "causal") and reads_tiles and "of weights" not in row.kernel:
            assert row.tma > 0, row


def test_specialised_warps_exponentiate_beside_a_product() -> None:
    """What the kernels of specialised warps are for: every exponential between a wgmma and the wait for it."""
    rows = [row for row in budget.read_table() if "specialized" in row.kernel]
    assert {(row.kernel, row.head_dim, row.feature) for row in rows} == {
        (f"attention_{kernel}_specialized", head_dim, feature)
        for kernel, head_dims in (("forward", (64, 80, 256)), ("dquery", (64, 80)), ("dkey_dvalue", (64, 80)))
        for head_dim in head_dims
        for feature in SPECIALIZED
    }
    for row in rows:
        assert (row.arch, row.serialized, row.overlapped) == (90, 0, row.exponentials), row
        assert row.setmaxnreg > 0, row
        assert row.bound is not None, row
        assert row.bound.redundant == pytest.approx(128 / 80 if row.head_dim == 80 else 1.0), row
