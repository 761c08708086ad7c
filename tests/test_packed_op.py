"""The Triton kernels of packed sequences: second derivatives, boundaries nobody checked, no waiting, opcheck."""

from __future__ import annotations

import pytest
import torch
from backends import DEVICE, KERNELS
from torch import Tensor
from varlen_cases import LSE, bounds, ints, packed

import fastattn
from fastattn import debug
from fastattn.dispatch import Backend
from fastattn.kernels.attention import packed_launch

pytestmark = pytest.mark.skipif(Backend.TRITON not in KERNELS, reason="needs Triton on this device")


def test_second_derivative_of_the_kernel() -> None:
    leaves = [tensor.requires_grad_() for tensor in packed([2, 0, 3], [3, 1, 2])]
    arguments = (bounds([2, 0, 3]), bounds([3, 1, 2]), 3, 3)
    results = []
    for backend in ("triton", "reference"):
        with fastattn.backend(backend):
            out, lse = fastattn.varlen_attention(*leaves, *arguments, return_aux=LSE, enable_gqa=True)
            first = torch.autograd.grad(out.square().sum() + lse.square().sum(), leaves, create_graph=True)
            results.append((*first, *torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cu_seq_q", "cu_seq_k", "seqused_k"])
def test_bad_boundaries_lead_nowhere(name: str) -> None:
    """Where they are not checked, on a GPU outside ``debug_checks``: no address outside, no number of nobody."""
    query, key, value = packed([3, 20, 5], [5, 20, 9])
    good = {"cu_seq_q": bounds([3, 20, 5]), "cu_seq_k": bounds([5, 20, 9]), "seqused_k": ints(5, 20, 9)}
    for numbers in ((-7, 2**30, -(2**30), 40), (30, 20, 10, 0), (5, 5, 5, 5), (0, 28, 2**30, 2**31 - 1)):
        bad = good | {name: ints(*numbers[: len(good[name])])}
        sequences = (*bad.values(), 20, 20, 0.3, None, 0)
        out, logsumexp = packed_launch.packed_attention(query, key, value, *sequences)
        grads = packed_launch.packed_attention_backward(out, None, query, key, value, out, logsumexp, *sequences)
        assert all(tensor.isfinite().all() for tensor in (out, *grads))
        assert not logsumexp.isnan().any()


def test_the_kernel_reads_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack is a launch or two, whatever the lengths: no boundary is waited for."""
    tensors = [tensor.requires_grad_() for tensor in packed([3, 20, 0], [5, 20, 2])]
    arguments = (bounds([3, 20, 0]), bounds([5, 20, 2]), 20, 20)
    monkeypatch.setattr(debug, "may_read", lambda tensor: False)
    for method in ("tolist", "item", "__bool__", "__int__", "cpu"):
        monkeypatch.setattr(Tensor, method, lambda self, *_: pytest.fail("a tensor is read"))
    with fastattn.backend("triton"):
        out = fastattn.varlen_attention(*tensors, *arguments, window_size=(-1, 0), enable_gqa=True)
        torch.autograd.grad(out, tensors, torch.ones_like(out))


@pytest.mark.parametrize("used", [None, (4, 0, 3)])
def test_opcheck_of_the_kernel(used: tuple[int, ...] | None) -> None:
    tensors = [tensor.requires_grad_() for tensor in packed([3, 0, 4], [5, 2, 4])]
    sequences = (bounds([3, 0, 4]), bounds([5, 2, 4]), None if used is None else ints(*used), 4, 5, 0.3, None, 0)
    torch.library.opcheck(torch.ops.fastattn.packed_attention, (*tensors, *sequences))
    plain = [tensor.detach() for tensor in tensors]
    out, logsumexp = torch.ops.fastattn.packed_attention(*plain, *sequences)
    grads = (torch.randn(7, 4, 8, device=DEVICE), torch.randn(2, 4, 7, device=DEVICE))
    arguments = (*grads, *plain, out, logsumexp, *sequences)
    torch.library.opcheck(torch.ops.fastattn.packed_attention_backward, arguments)
