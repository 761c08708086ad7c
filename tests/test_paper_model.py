"""What is read from machine code, and what the paper model makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import budget, machine_code, paper_model
from benchmarks.machine_code import Loop

SASS = """
        /*0100*/                   MUFU.EX2 R3, R3 ;
.L_x_0:
        /*0110*/                   LDS.128 R4, [R2] ;
        /*0120*/                   HGMMA.64x32x16.F32.BF16 R72, gdesc[UR40], RZ, !UPT ;
        /*0130*/              @!P4 MUFU.EX2 R8, R8 ;
        /*0140*/                   HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR12].tnspB, R24, gsb0 ;
        /*0150*/                   FFMA.FTZ R9, R8, R4, R9 ;
        /*0160*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0170*/                   MUFU.EX2 R10, R10 ;
        /*0180*/                   FADD R9, R9, R10 ;
        /*0190*/              @!P3 BRA `(.L_x_0) ;
        /*01a0*/              @!P5 BRA `(.L_x_2) ;
.L_x_1:
        /*01b0*/                   UTMALDG.3D [UR8], [UR4] ;
        /*01c0*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
        /*01d0*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*01e0*/                   EXIT ;
"""


def test_the_loop_with_the_matrix_products_is_counted() -> None:
    first = 32 * 16 + 64 * 16  # numbers of 16 bits, both operands in shared memory
    second = 64 * 16
    assert machine_code.parse(SASS) == Loop(
        flops=2 * 64 * (32 + 64) * 16 // 4,
        exponentials=2,
        fp32=2,
        shared_bytes=32 * 16 + 2 * first // 4 + 2 * second // 4,
        issued=9,
        overlapped=1,
    )


def test_code_without_a_loop_counts_nothing() -> None:
    assert machine_code.parse("        /*0100*/                   EXIT ;") == Loop()


def test_a_wgmma_issued_in_the_pass_before_still_runs() -> None:
    wait_first = """
.L_x_0:
        /*0110*/                   MUFU.EX2 R8, R8 ;
        /*0120*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0130*/                   HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR12], R24, gsb0 ;
        /*0140*/                   BRA `(.L_x_0) ;
"""
    assert machine_code.parse(wait_first).overlapped == 1


@pytest.mark.parametrize(
    ("head_dim", "tensor", "no_overlap", "overlap"), [(64, 1024, 467, 920), (128, 2048, 626, 949)]
)
def test_the_model_of_a_forward_pass(head_dim: int, tensor: int, no_overlap: float, overlap: float) -> None:
    """A tile of 128 x 128 by hand: 16,384 exponentials and 512 for the decay of the rows, at 16 a clock."""
    loop = Loop(flops=4 * 128 * 128 * head_dim // 8, exponentials=66, issued=400)
    bound = paper_model.bound("attention_forward", head_dim, 128, 128, 8, loop, wgmma=True)
    assert bound is not None
    assert (bound.clocks["tensor"], bound.clocks["exponentials"], bound.redundant) == (tensor, 1056, 1.0)
    assert bound.no_overlap == pytest.approx(no_overlap, abs=1)
    assert bound.overlap == pytest.approx(overlap, abs=1)
    assert bound.as_compiled == bound.no_overlap
    hidden = paper_model.bound(
        "attention_forward", head_dim, 128, 128, 8, replace(loop, overlapped=loop.exponentials), wgmma=True
    )
    assert hidden is not None
    assert hidden.as_compiled == hidden.overlap == bound.overlap


def test_a_kernel_without_matrix_products_has_no_model() -> None:
    assert paper_model.bound("attention_delta", 64, 64, 0, 4, Loop(), wgmma=False) is None
    assert paper_model.bound("attention_forward", 64, 64, 64, 4, Loop(), wgmma=False) is None


def test_no_plain_kernel_of_hopper_computes_twice() -> None:
    """Tiles chosen so that no warp group repeats another's work, up to a head dimension of 128."""
    for row in budget.read_table():
        if row.feature in ("plain", "causal") and row.head_dim == 64 and row.bound is not None:
            assert row.bound.redundant == pytest.approx(1.0), row
