"""What the C++ kernels keep from one call for the next: bounded, given back on request, and never seen in an answer."""

from __future__ import annotations

import pytest
import torch
from threads import at_once

import fastattn

_C = pytest.importorskip("fastattn._C")

MOST = 64 << 20  # csrc/kept_memory.h


def train(module: fastattn.LSTM, data: torch.Tensor) -> list[torch.Tensor]:
    out, (h_n, c_n) = module(data)
    return [out, h_n, c_n, *torch.autograd.grad(out.sum(), list(module.parameters()))]


def test_blocks_are_kept_and_given_back() -> None:
    module = fastattn.LSTM(64, 256)
    fastattn.empty_cache()
    with torch.no_grad():
        module(torch.randn(4, 16, 64))
    assert _C.release_kept_memory() >= 4 * 256 * (64 + 256) * 4  # the packed weights at least
    assert _C.release_kept_memory() == 0


def test_no_more_is_kept_than_the_bound() -> None:
    for hidden in (512, 768, 1024, 640):
        train(fastattn.LSTM(hidden, hidden), torch.randn(3, 16, hidden))
    assert 0 < _C.release_kept_memory() <= MOST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 5, 16, 70])
def test_what_stood_in_a_block_is_not_seen(batch: int, dtype: torch.dtype) -> None:
    """After a call full of NaN, in the same blocks, the answer is bit for bit that of fresh memory."""
    module = fastattn.LSTM(70, 150, num_layers=2, bidirectional=True, dtype=dtype)
    data = torch.randn(5, batch, 70, dtype=dtype)
    fastattn.empty_cache()
    fresh = train(module, data)
    train(module, torch.full_like(data, float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(fresh, train(module, data), strict=True))


def test_attention_does_not_see_it_either() -> None:
    query = torch.randn(2, 300, 4, 64).transpose(1, 2).requires_grad_()

    def run(value: float | None) -> list[torch.Tensor]:
        given = query if value is None else torch.full_like(query, value, requires_grad=True)
        with fastattn.backend("cpu"):
            out = fastattn.scaled_dot_product_attention(given, given, given, is_causal=True)
            return [out, *torch.autograd.grad(out.sum(), given)]

    fastattn.empty_cache()
    fresh = run(None)
    run(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(fresh, run(None), strict=True))


def test_results_are_nobody_elses() -> None:
    """They live in blocks that go back with their storages alone."""
    module = fastattn.LSTM(64, 256)
    out, (h_n, c_n) = module(torch.randn(40, 16, 64))
    before = [tensor.clone() for tensor in (out, h_n, c_n)]
    module(torch.full((40, 16, 64), 3.0))
    assert all(torch.equal(a, b) for a, b in zip((out, h_n, c_n), before, strict=True))
    lazy = torch._lazy_clone(out.detach())  # as torch's own storages can
    assert torch.equal(lazy.add_(1), before[0] + 1)
    assert torch.equal(out, before[0])
    assert out.detach().resize_(1).numel() == 1


def test_saved_tensors_are_storages_of_torch() -> None:
    """A hook that moves them away may shrink what it was given, and torch's profiler counts them."""
    module, data = fastattn.LSTM(64, 256), torch.randn(40, 16, 64)
    expected = train(module, data)
    moved: list[torch.Tensor] = []

    def away(tensor: torch.Tensor) -> torch.Tensor:
        copied = tensor.clone()
        if tensor.numel() == 40 * 16 * 4 * 256:  # the gates
            tensor.untyped_storage().resize_(0)
            moved.append(tensor)
        return copied

    with torch.autograd.graph.saved_tensors_hooks(away, lambda tensor: tensor):
        result = train(module, data)
    assert moved
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    with torch.profiler.profile(profile_memory=True) as profile:
        out = module(data)[0]
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert allocated >= 40 * 16 * 5 * 256 * 4  # gates and cells
    del out


def test_long_lived_tensors_take_no_block_far_too_large() -> None:
    """Graphs that are held would else hold the larger blocks of those that ended."""
    module, held = fastattn.LSTM(8, 512), []
    large, small = torch.randn(75, 64, 8), torch.randn(40, 64, 8)
    fastattn.empty_cache()
    module(large)
    held.append(module(small)[0])
    assert _C.release_kept_memory() >= 75 * 64 * 4 * 512 * 4  # its gates are still there
    del held


def test_threads_at_once_have_blocks_of_their_own() -> None:
    module, data = fastattn.LSTM(64, 256), torch.randn(20, 16, 64)
    expected = train(module, data)
    results = at_once(lambda: train(module, data), 4)
    assert len(results) == 4
    for result in results:
        torch.testing.assert_close(result, expected)
