"""All kernels agree, entry by entry, on which queries see which keys; and second derivatives are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import DEVICE, KERNELS
from torch import Tensor

import fastattn
from fastattn.dispatch import Backend
from fastattn.kernels.attention import config
from fastattn.kernels.attention.config import Tile

SIZE = 48
_SEGMENTS = torch.tensor([[0] * 20 + [1] * 9 + [2] * 19])
_MIXED = torch.arange(SIZE)[None] % 3
PATTERNS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "window": {"window": (7, 3)},
    "window of one": {"window": (0, 0)},
    "segments": {"segment_ids": _SEGMENTS},
    "mixed segments, causal": {"segment_ids": _MIXED, "is_causal": True},
    "padding": {"key_padding_mask": (torch.arange(SIZE) % 5 != 1)[None]},
    "mask": {"attn_mask": (torch.arange(SIZE)[:, None] * 7 + torch.arange(SIZE) * 3) % 4 > 0},
    "everything": {
        "is_causal": True, "window": (20, None), "segment_ids": _SEGMENTS, "softcap": 3.0,
        "key_padding_mask": (torch.arange(SIZE) < 45)[None], "alibi_slopes": torch.tensor([0.1]),
        "sinks": torch.tensor([0.5]),
    },
}  # fmt: skip


def _on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: item.to(DEVICE) if isinstance(item, Tensor) else item for name, item in arguments.items()}


@pytest.mark.parametrize("tile", [Tile(16, 16), Tile(32, 16), Tile(16, 32)], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", PATTERNS)
def test_kernels_agree_on_what_takes_part(name: str, backend: Backend, tile: Tile) -> None:
    """Each result shows its own kernel's pattern: value and dout are unit matrices, so nothing is summed."""
    if backend is Backend.CPU and tile != Tile(16, 16):
        pytest.skip("the C++ tiles are fixed")
    unit = torch.eye(SIZE, device=DEVICE)[None, None]
    query, key = (torch.randn(1, 1, SIZE, SIZE, device=DEVICE) * 0.1 for _ in range(2))
    value = unit.clone().requires_grad_()
    bias = torch.zeros(1, 1, SIZE, SIZE, device=DEVICE, requires_grad=True)
    arguments = _on_device(PATTERNS[name])
    with fastattn.backend(backend), config.override(tile):
        out, weights = fastattn.scaled_dot_product_attention(
            query, key, value, need_weights=True, average_weights=False, **arguments
        )
        (dvalue,) = torch.autograd.grad(out, value, unit)
        of_forward, of_weights, of_dvalue = out > 0, weights > 0, dvalue.transpose(-1, -2) > 0
        patterns = [of_forward, of_weights, of_dvalue]
        if "attn_mask" not in arguments:
            out = fastattn.scaled_dot_product_attention(query, key, value, bias, **arguments)
            (dbias,) = torch.autograd.grad(out, bias, torch.randn_like(out))
            patterns.append(dbias != 0)
        # With one key far from the others in a feature of its own, dquery has that feature where the key was seen.
        features = unit.clone().requires_grad_()
        out = fastattn.scaled_dot_product_attention(features, unit, torch.randn_like(unit), scale=0.01, **arguments)
        (dquery,) = torch.autograd.grad(out, features, torch.randn_like(out), retain_graph=True)
        alone = weights.detach().gt(0).sum(-1, keepdim=True) == 1  # a softmax over one key is constant
        keys = unit.clone().requires_grad_()
        out = fastattn.scaled_dot_product_attention(unit, keys, torch.randn_like(unit), scale=0.01, **arguments)
        (dkey,) = torch.autograd.grad(out, keys, torch.randn_like(out))
    for pattern in patterns[:3]:
        assert torch.equal(pattern, of_forward)
    if "sinks" not in arguments:
        of_forward = of_forward & ~alone
        patterns[3:] = [pattern & ~alone for pattern in patterns[3:]]
        dquery, dkey = dquery.masked_fill(alone, 0.0), dkey.masked_fill(alone.transpose(-1, -2), 0.0)
    for pattern in (*patterns[3:], dquery != 0, dkey.transpose(-1, -2) != 0):
        assert torch.equal(pattern, of_forward)


@pytest.mark.skipif(Backend.TRITON not in KERNELS, reason="needs CUDA or TRITON_INTERPRET=1")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        {"is_causal": True}, {"window": (7, 3)}, {"window": (0, 0)},
        {"is_causal": True, "window": (20, None), "softcap": 3.0},
    ],
    ids=str,
)  # fmt: skip
def test_decoding_agrees_with_the_forward(arguments: dict[str, Any], splits: int) -> None:
    rows, length = 5, 37  # in a cache with room for more
    query = torch.randn(1, 1, rows, SIZE, device=DEVICE) * 0.1
    key = torch.randn(1, 1, SIZE, SIZE, device=DEVICE) * 0.1
    value = torch.eye(SIZE, device=DEVICE)[None, None]
    with fastattn.backend("triton"), config.override(Tile(16, 16)):
        forward = fastattn.scaled_dot_product_attention(
            query, key[:, :, :length], value[:, :, :length], causal_alignment="bottom-right", **arguments
        )
        decoded = fastattn.attention_with_kv_cache(
            query, key, value, torch.tensor([length], device=DEVICE), num_splits=splits,
            **({"is_causal": False} | arguments),
        )  # fmt: skip
    assert torch.equal(decoded > 0, forward > 0)


SECOND: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "weights": {"need_weights": True},
    "weights per head": {"need_weights": True, "average_weights": False},
    "lse": {"return_lse": True},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.1])},
    "segments": {"segment_ids": (torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 1, 1]]))},
    "padding": {"key_padding_mask": torch.tensor([[True, True, False, True]])},
    "everything": {
        "is_causal": True, "causal_alignment": "bottom-right", "need_weights": True, "return_lse": True,
        "softcap": 2.0, "alibi_slopes": torch.tensor([0.3, 0.1]),
    },
}  # fmt: skip


def _flat(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", SECOND)
def test_gradgradcheck(name: str) -> None:
    query, key, value = (
        torch.randn(1, 2, n, 3, dtype=torch.float64, device=DEVICE, requires_grad=True) for n in (3, 4, 4)
    )
    sinks = torch.randn(2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    bias = torch.randn(1, 2, 3, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    arguments = {k: tuple(i.to(DEVICE) for i in v) if isinstance(v, tuple) else v for k, v in SECOND[name].items()}
    arguments = _on_device(arguments)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        *tensors, bias, sinks = tensors
        return _flat(fastattn.scaled_dot_product_attention(*tensors, bias, sinks=sinks, **arguments))

    inputs = (query, key, value, bias, sinks)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", SECOND)
def test_second_derivative_of_a_kernel(name: str, backend: Backend) -> None:
    """The gradient of a gradient's norm, against the eager definition in float64."""
    torch.manual_seed(0)
    leaves = [torch.randn(1, 2, n, 3) for n in (3, 4, 4)] + [torch.randn(1, 2, 3, 4), torch.randn(2)]

    def penalty(dtype: torch.dtype, chosen: Backend) -> list[Tensor]:
        tensors = [leaf.to(DEVICE, dtype).requires_grad_() for leaf in leaves]
        arguments = {k: tuple(i.to(DEVICE) for i in v) if isinstance(v, tuple) else v for k, v in SECOND[name].items()}
        *inputs, bias, sinks = tensors
        with fastattn.backend(chosen):
            results = _flat(
                fastattn.scaled_dot_product_attention(*inputs, bias, sinks=sinks, **_on_device(arguments))
            )
            loss = sum(result.double().square().sum() for result in results)
            first = torch.autograd.grad(loss, tensors, create_graph=True)
            norm = sum(grad.double().square().sum() for grad in first)
            return [grad.double() for grad in torch.autograd.grad(norm, tensors)]

    for found, wanted in zip(penalty(torch.float32, backend), penalty(torch.float64, Backend.REFERENCE), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
