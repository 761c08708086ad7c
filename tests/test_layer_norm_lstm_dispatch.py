"""Which backend serves a layer-normalised LSTM, and what explain and the doctor say of the others."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import Backend, layer_norm_lstm
from fastattn.kernels.attention import extension
from fastattn.kernels.layer_norm_lstm.extension import KERNELS
from fastattn.profiling import lstm_doctor


def test_explain() -> None:
    lstm = fastattn.LayerNormLSTM(3, 4)
    chosen = lstm.explain(torch.randn(2, 1, 3))
    assert chosen.backend == ("cpu" if extension.UNAVAILABLE is None else "reference")
    wide = lstm.explain(torch.randn(2, 1, 3, dtype=torch.float64))
    assert wide.backend == "reference"
    assert "float64" in wide.why_not[Backend.CPU]
    with fastattn.backend("reference"):
        assert "forced" in fastattn.LayerNormLSTMCell(3, 4).explain(torch.randn(1, 3)).because


def test_explain_without_cuda_kernels() -> None:
    if KERNELS["cuda"].why_unavailable() is not None:
        assert layer_norm_lstm.explain("cuda", torch.float32).backend is Backend.REFERENCE
        with fastattn.backend("cuda"), pytest.raises(RuntimeError, match='backend\\("cuda"\\) cannot serve this call'):
            layer_norm_lstm.explain("cuda", torch.float32)
    assert "these kernels run on cpu" in layer_norm_lstm.explain("cuda", torch.float32).why_not[Backend.CPU]
    assert "float64" in str(layer_norm_lstm.why_not(Backend.CUDA, "cuda", torch.float64))


@pytest.mark.parametrize("verified", [False, True])
def test_cuda_kernels_that_no_device_verified_are_not_the_default(
    verified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither explain nor the doctor's lines promise them."""
    monkeypatch.setattr(KERNELS["cuda"], "why_unavailable", lambda: None)
    monkeypatch.setattr(layer_norm_lstm.extension, "verified", lambda: verified)
    chosen = layer_norm_lstm.explain("cuda", torch.bfloat16)
    line = lstm_doctor.choices(torch.device("cuda"))["layer norm, bfloat16"]
    if verified:
        assert chosen.backend is Backend.CUDA
        assert line == "cuda: our CUDA kernels, verified on this device"
    else:
        reason = 'not verified on this device; force it with fastattn.backend("cuda")'
        assert chosen.backend is Backend.REFERENCE
        assert chosen.why_not[Backend.CUDA] == reason
        assert line == f"reference: plain PyTorch serves every request (not cuda: {reason})"
    with fastattn.backend("cuda"):
        assert layer_norm_lstm.choose("cuda", torch.bfloat16) is Backend.CUDA
