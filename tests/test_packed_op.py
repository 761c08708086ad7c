"""The kernels of packed sequences: second derivatives, boundaries nobody checked, no waiting, bad calls, opcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import DEVICE, KERNELS
from torch import Tensor
from varlen_cases import LSE, bounds, ints, packed

import fastattn
from fastattn import debug
from fastattn.dispatch import Backend
from fastattn.kernels.attention import packed_launch

ours = pytest.mark.parametrize("kernel", KERNELS)
needs_triton = pytest.mark.skipif(Backend.TRITON not in KERNELS, reason="needs Triton on this device")
needs_extension = pytest.mark.skipif(Backend.CPU not in KERNELS, reason="needs the C++ extension")


@ours
def test_second_derivative_of_the_kernel(kernel: Backend) -> None:
    leaves = [tensor.requires_grad_() for tensor in packed([2, 0, 3], [3, 1, 2])]
    arguments = (bounds([2, 0, 3]), bounds([3, 1, 2]), 3, 3)
    results = []
    for backend in (kernel, "reference"):
        with fastattn.backend(backend):
            out, lse = fastattn.varlen_attention(*leaves, *arguments, return_aux=LSE, enable_gqa=True)
            first = torch.autograd.grad(out.square().sum() + lse.square().sum(), leaves, create_graph=True)
            results.append((*first, *torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@needs_triton
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


@needs_triton
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


@ours
@pytest.mark.parametrize("used", [None, (4, 0, 3)])
def test_opcheck_of_the_kernel(used: tuple[int, ...] | None, kernel: Backend) -> None:
    tensors = [tensor.requires_grad_() for tensor in packed([3, 0, 4], [5, 2, 4])]
    sequences = (bounds([3, 0, 4]), bounds([5, 2, 4]), None if used is None else ints(*used), 4, 5, 0.3, None, 0)
    sequences = (*sequences, kernel.value)
    torch.library.opcheck(torch.ops.fastattn.packed_attention, (*tensors, *sequences))
    plain = [tensor.detach() for tensor in tensors]
    out, logsumexp = torch.ops.fastattn.packed_attention(*plain, *sequences)
    grads = (torch.randn(7, 4, 8, device=DEVICE), torch.randn(2, 4, 7, device=DEVICE))
    arguments = (*grads, *plain, out, logsumexp, *sequences)
    torch.library.opcheck(torch.ops.fastattn.packed_attention_backward, arguments)


# The C++ kernel, called directly ------------------------------------------------------------------------------

OPS = torch.ops.fastattn


@needs_extension
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (40, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_and_short_sequences_are_dense_calls(window: tuple[int, int], dtype: torch.dtype) -> None:
    """Of less than a row tile, of several, and of more than run side by side."""
    rows, columns = [3, 300, 0, 70, 64, 9], [5, 280, 4, 90, 64, 0]
    arguments = (bounds(rows), bounds(columns), 300, 280)
    leaves = [tensor.requires_grad_() for tensor in packed(rows, columns, dtype=dtype)]
    results = []
    for backend in ("cpu", "reference"):
        with fastattn.backend(backend):
            out, lse = fastattn.varlen_attention(
                *leaves, *arguments, return_aux=LSE, window_size=window, enable_gqa=True
            )
            weight = lse.masked_fill(lse.isinf(), 0.0)
            loss = out.float().square().sum() + weight.square().sum() / 100
            results.append((out, lse, *torch.autograd.grad(loss, leaves)))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for one, other in zip(*results, strict=True):
        largest = float(other.detach()[other.isfinite()].abs().max())
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1.0, largest / 10))


@needs_extension
def test_bits_depend_neither_on_threads_nor_on_other_sequences() -> None:
    rows = [5, 270, 40, 1]
    tensors = packed(rows, rows, heads=4, key_heads=4)
    arguments = (bounds(rows), bounds(rows), None, 270, 270, 0.3, None, 0, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out, logsumexp = OPS.packed_attention(*tensors, *arguments)
            grads = OPS.packed_attention_backward(out, None, *tensors, out, logsumexp, *arguments)
            results.append((out, logsumexp, *grads))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    alone, _ = OPS.packed_attention(
        *(tensor[275:315] for tensor in tensors), bounds([40]), bounds([40]), None, 40, 40, 0.3, None, 0, "cpu"
    )
    assert torch.equal(alone, out[275:315])


def _good(**changes: Any) -> list[Any]:
    query, key, value = (torch.randn(9, heads, 8) for heads in (4, 2, 2))
    arguments = {
        "grad_out": torch.randn(9, 4, 8), "grad_logsumexp": torch.randn(2, 4, 9), "query": query, "key": key,
        "value": value, "out": torch.randn(9, 4, 8), "logsumexp": torch.randn(2, 4, 9), "q": bounds([4, 5]),
        "k": bounds([3, 6]), "used": ints(2, 6), "max_q": 5, "max_k": 6, "scale": 0.3, "left": None, "right": 0,
        "backend": "cpu",
    }  # fmt: skip
    assert changes.keys() <= arguments.keys()
    return list((arguments | changes).values())


BAD = {
    "query_dimensions": {"query": torch.randn(9, 8)},
    "query_double": {"query": torch.randn(9, 4, 8).double()},
    "query_heads": {"query": torch.randn(9, 3, 8)},
    "query_dim": {"query": torch.randn(9, 4, 7)},
    "key_dtype": {"key": torch.randn(9, 2, 8).half()},
    "key_tokens": {"key": torch.randn(8, 2, 8)},
    "value_tokens": {"value": torch.randn(10, 2, 8)},
    "value_dim": {"value": torch.randn(9, 2, 9)},
    "boundaries_float": {"q": torch.tensor([0.0, 4.0, 9.0])},
    "boundaries_none": {"q": ints()},
    "boundaries_dimensions": {"k": ints(0, 3, 9)[None]},
    "first": {"q": ints(1, 4, 9)},
    "descending": {"k": ints(0, 10, 9)},
    "negative": {"q": ints(0, -4, 9)},
    "last": {"q": ints(0, 4, 8)},
    "beyond": {"k": ints(0, 3, 10)},
    "other_number": {"k": ints(0, 9)},
    "extreme": {"q": torch.tensor([0, 2**63 - 1, -(2**63)])},
    "longest_q": {"max_q": 4},
    "longest_k": {"max_k": 5},
    "used_beyond": {"used": ints(4, 6)},
    "used_negative": {"used": ints(-1, 6)},
    "used_number": {"used": ints(2)},
    "used_float": {"used": torch.ones(2)},
}
BAD_BACKWARD = {
    "out": {"out": torch.randn(9, 4, 7)},
    "out_dtype": {"out": torch.randn(9, 4, 8).double()},
    "logsumexp": {"logsumexp": torch.randn(2, 9, 4)},
    "logsumexp_dtype": {"logsumexp": torch.randn(2, 4, 9).double()},
    "grad_out": {"grad_out": torch.randn(9, 8, 4)},
    "grad_out_integers": {"grad_out": torch.ones(9, 4, 8, dtype=torch.int32)},
    "grad_logsumexp": {"grad_logsumexp": torch.randn(4, 9)},
}


@needs_extension
@pytest.mark.parametrize("name", [*BAD, *BAD_BACKWARD])
def test_malformed_calls_of_the_operators_raise(name: str) -> None:
    bad = _good(**(BAD | BAD_BACKWARD)[name])
    OPS.packed_attention_backward(*_good())
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)):
        OPS.packed_attention_backward(*bad)
    if name in BAD:
        with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)):
            OPS.packed_attention(*bad[2:5], *bad[7:])


@needs_extension
def test_keys_that_nobody_sees_have_gradient_zero() -> None:
    _, dkey, dvalue = OPS.packed_attention_backward(*_good())
    assert dkey[2].eq(0).all()
    assert dvalue[2].eq(0).all()
    *_, dvalue = OPS.packed_attention_backward(*_good(grad_out=None))
    assert dvalue.eq(0).all()
    none = {"query": torch.randn(9, 0, 8), "grad_logsumexp": None, "logsumexp": torch.randn(2, 0, 9), "used": None}
    _, dkey, dvalue = OPS.packed_attention_backward(
        *_good(**none, grad_out=torch.randn(9, 0, 8), out=torch.randn(9, 0, 8))
    )
    assert dkey.eq(0).all()
    assert dvalue.eq(0).all()
