"""The C++ LSTM inside a process: forks, threads, numbers below the normal ones, very long sequences."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.kernels.lstm import extension

pytestmark = pytest.mark.skipif(
    extension.why_unavailable("cpu") is not None, reason=str(extension.why_unavailable("cpu"))
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(script: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=os.getcwd(), check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_fork_computes() -> None:
    """The parent's threads do not exist in the child: waiting for one would never end.

    torch's own operators wait for them too, so the child is told to use one thread, as a DataLoader's worker is.
    """
    script = """
import os, torch, fastattn
torch.set_num_threads(2)
lstm, data = fastattn.LSTM(64, 256), torch.randn(20, 32, 64)
with torch.no_grad():
    expected = lstm(data)[0]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.allclose(lstm(data)[0], expected, atol=1e-6) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(script) == "0\n"


@pytest.mark.parametrize("shape", [(5, 40, 24, 48), (4, 2, 300, 320), (3, 5, 512, 512)], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_threads(
    shape: tuple[int, int, int, int], bidirectional: bool, dtype: torch.dtype
) -> None:
    """Rows, units and directions split over any number of threads, more than the machine has among them."""
    steps, batch, features, hidden = shape
    torch.manual_seed(0)
    lstm = fastattn.LSTM(features, hidden, bidirectional=bidirectional, dtype=dtype)
    data = torch.randn(steps, batch, features, dtype=dtype, requires_grad=True)
    results: list[list[Tensor]] = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        out, (h_n, c_n) = lstm(data)
        results.append([out, h_n, c_n, *torch.autograd.grad(out.sum(), [data, *lstm.parameters()])])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            # torch's own products, for the sums and the weights' gradients, depend on the number of threads: a sum of
            # float32 by what it rounds, in the size of the tensor.
            size = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * size if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("threads", [3, 4])
def test_every_thread_has_rows_of_both_directions(threads: int) -> None:
    """One direction after the other, each split by rows: more groups that wait for one another than threads."""
    torch.manual_seed(0)
    lstm = fastattn.LSTM(32, 640, bidirectional=True)
    data = torch.randn(2, 64 * threads, 32)
    results = []
    with torch.no_grad():
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(lstm(data)[0])
    torch.testing.assert_close(*results, rtol=0, atol=2e-6)


def test_numbers_below_the_normal_ones_cost_nothing() -> None:
    """A gradient that fades away over the steps: computing with such numbers takes up to a hundred times as long."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lstm = fastattn.LSTM(64, 64)
    data = torch.randn(100, 4, 64, requires_grad=True)
    out, _ = lstm(data)
    taken: dict[float, list[float]] = {1.0: [], 1e-38: []}
    for _ in range(15):
        for size, times in taken.items():
            begin = time.perf_counter()
            torch.autograd.grad(out, [data], torch.full_like(out, size), retain_graph=True)
            times.append(time.perf_counter() - begin)
    assert statistics.median(taken[1e-38]) < 3.0 * statistics.median(taken[1.0])


def test_the_processor_is_left_as_it_was() -> None:
    """Within a call results below the normal numbers become zero; the caller's arithmetic keeps them."""
    tiny = torch.full((4,), 1e-40)
    lstm = fastattn.LSTM(8, 8)
    lstm(torch.randn(3, 2, 8))[0].sum().backward()
    assert (tiny * 0.5 > 0).all()


def test_a_very_long_sequence() -> None:
    torch.manual_seed(0)
    lstm = fastattn.LSTM(3, 5)
    data = torch.randn(100_000, 1, 3)
    with torch.no_grad():
        whole, last = lstm(data)
        first, state = lstm(data[:60_000])
        second, end = lstm(data[60_000:], state)
    torch.testing.assert_close(whole, torch.cat((first, second)), rtol=0, atol=1e-6)
    torch.testing.assert_close(last, end, rtol=0, atol=1e-6)


def test_saturated_sums_stay_finite() -> None:
    lstm = fastattn.LSTM(4, 20)
    data = torch.tensor([1e4, -1e4, 3e38, -3e38]).view(4, 1, 1).expand(4, 1, 4).clone().requires_grad_()
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.clamp_(min=0.05)
    out, (h_n, c_n) = lstm(data)
    for tensor in (out, h_n, c_n, *torch.autograd.grad(out.sum(), [data])):
        assert tensor.isfinite().all()


def test_autocast_does_not_reach_inside() -> None:
    """The operator computes in the dtype of its tensors; the module is what follows autocast."""
    lstm = fastattn.LSTM(20, 24)
    weights = [parameter.detach() for parameter in lstm.parameters()]
    data, state = torch.randn(6, 3, 20), torch.zeros(1, 3, 24)

    def evaluate() -> list[Tensor]:
        out, h_n, c_n, gates, cells = torch.ops.fastattn.lstm_layer(data, None, state, state, weights, True, "cpu")
        grads = torch.ops.fastattn.lstm_layer_backward(
            torch.ones_like(out), None, None, data, None, state, state, weights, out, gates, cells, "cpu"
        )
        return [out, h_n, c_n, *grads[:3], *grads[3]]

    plain = evaluate()
    with torch.autocast("cpu", torch.bfloat16):
        for found, expected in zip(evaluate(), plain, strict=True):
            assert torch.equal(found, expected)
