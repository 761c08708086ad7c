"""The shortest way from a call to its kernel (fastattn/plain_call.py) against the long one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import DEVICE, KERNELS
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import plain_call

attention = fastattn.scaled_dot_product_attention


def tensors(heads: int = 2, columns: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(2, 4, 5, 8, device=DEVICE, dtype=dtype)
    key, value = (torch.randn(2, heads, columns, 8, device=DEVICE, dtype=dtype) for _ in range(2))
    return query, key, value


def short(*given: Tensor, **changes: Any) -> Tensor | None:
    arguments = {"is_causal": False, "scale": None, "enable_gqa": True, "alignment": "top-left"} | changes
    return plain_call.attention(*given, **arguments)


@pytest.mark.parametrize("alignment", ["top-left", "bottom-right"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3, -0.5])
@pytest.mark.parametrize("backend", [*KERNELS, "sdpa", "auto"])
def test_both_ways_lead_to_the_same_bits(backend: str, scale: float | None, causal: bool, alignment: str) -> None:
    given = tensors()
    with fastattn.backend(backend):
        found = short(*given, is_causal=causal, scale=scale, alignment=alignment)
        long = attention(
            *given, is_causal=causal, scale=scale, enable_gqa=True, causal_alignment=alignment, deterministic=False
        )
    assert found is not None
    assert torch.equal(found, long)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("change", [
    lambda q, k, v: (q, k, v),
    lambda q, k, v: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v),
    lambda q, k, v: (q[..., ::2], k[..., :4], v[..., 4:]),
    lambda q, k, v: (q, k[:, :, :1], v[:, :, :1]),
    lambda q, k, v: (q[:1].expand(2, -1, -1, -1), k, v),
], ids=["contiguous", "heads last", "strided", "one key", "expanded"])  # fmt: skip
def test_layouts(change: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    given = change(*tensors(dtype=dtype))
    found = short(*given)
    assert found is not None
    long = attention(*given, enable_gqa=True, deterministic=False)
    assert torch.equal(found, long)
    assert found.stride() == long.stride()


@pytest.mark.parametrize("backend", ["auto", *KERNELS])
def test_results_are_no_views(backend: str) -> None:
    """torch refuses to change a view that was made without gradients in place with them."""
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    with fastattn.backend(backend):
        for _ in range(2):
            with torch.no_grad():
                results = attention(*tensors(), enable_gqa=True), attention(*tensors(), enable_gqa=True, scale=2)
            for result in results:
                assert result._base is None
                result.mul_(weight)
                result.detach_()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_nobody_serves(dtype: torch.dtype) -> None:
    given = [tensor.to(dtype) for tensor in tensors()]
    assert short(*given) is None
    with pytest.raises(ValueError, match="query: got dtype"):
        attention(*given, enable_gqa=True)


def test_every_other_keyword_goes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors(heads=4)
    mask = torch.ones(5, 7, dtype=torch.bool, device=DEVICE)
    others: dict[str, Any] = {
        "attn_mask": mask, "dropout_p": 0.1, "key_padding_mask": mask[:2], "window": (1, 1), "softcap": 2.0,
        "alibi_slopes": torch.ones(4, device=DEVICE), "sinks": torch.zeros(4, device=DEVICE),
        "segment_ids": (mask[:2, :5].int(), mask[:2].int()), "need_weights": True, "average_weights": None,
        "return_lse": True, "deterministic": False,
    }  # fmt: skip
    short_ones = {"query", "key", "value", "is_causal", "scale", "enable_gqa", "causal_alignment"}
    assert inspect.signature(attention).parameters.keys() == others.keys() | short_ones

    def taken(*_: Any) -> None:
        raise AssertionError("the shortest way")

    monkeypatch.setattr(plain_call, "attention", taken)
    for name, other in others.items():
        attention(query, key, value, **{name: other})
    with pytest.raises(AssertionError, match="the shortest way"):
        attention(query, key, value, average_weights=False)


@pytest.mark.parametrize("changes", [
    {"is_causal": 1}, {"is_causal": None}, {"enable_gqa": 1}, {"scale": 1}, {"scale": True}, {"scale": float("nan")},
    {"scale": "1"}, {"alignment": "top"}, {"alignment": None}, {"enable_gqa": False},
], ids=str)  # fmt: skip
def test_keywords_out_of_the_ordinary_go_the_long_way(changes: dict[str, Any]) -> None:
    assert short(*tensors(), **changes) is None


@pytest.mark.parametrize("change", [
    lambda q, k, v: (q.requires_grad_(), k, v),
    lambda q, k, v: (q, k, v.requires_grad_()),
    lambda q, k, v: (q.double(), k, v),
    lambda q, k, v: (q[0], k[0], v[0]),
    lambda q, k, v: (q[:0], k[:0], v[:0]),
    lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]),
    lambda q, k, v: (q, k, v[:, :, 1:]),
    lambda q, k, v: (q, k, v[..., 1:]),
    lambda q, k, v: (q[:1], k, v),
    lambda q, k, v: (q[:, :3], k, v),
    lambda q, k, v: (torch._neg_view(q), k, v),
    lambda q, k, v: (q, k.to("meta"), v),
    lambda q, k, v: (q, k, None),
    lambda q, k, v: (q, k, v.tolist()),
], ids=[
    "gradient of query", "gradient of value", "dtypes", "three dimensions", "no batch", "no keys", "lengths",
    "head dimensions", "batches", "heads", "to be negated", "devices", "none", "a list",
])  # fmt: skip
def test_tensors_out_of_the_ordinary_go_the_long_way(change: Callable[..., tuple[Any, ...]]) -> None:
    assert short(*change(*tensors())) is None


def test_surroundings_out_of_the_ordinary_go_the_long_way(tmp_path: Path) -> None:
    query, key, value = tensors()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert short(query, key, value) is None
    with FlopCounterMode(display=False):
        assert short(query, key, value) is None
    with torch.profiler.profile():
        assert short(query, key, value) is None
    observer = torch.profiler.ExecutionTraceObserver().register_callback(str(tmp_path / "trace.json"))
    observer.start()
    assert short(query, key, value) is None
    observer.stop()
    observer.unregister_callback()
    with forward_ad.dual_level():
        assert short(forward_ad.make_dual(query, query), key, value) is None
    with fastattn.backend("reference"):
        assert short(query, key, value) is None

    def of_a_batch(query: Tensor) -> Tensor:
        assert short(query[None], key[:1], value[:1]) is None
        return query

    torch.vmap(of_a_batch)(query)


def test_a_tracer_before_autograd() -> None:
    given = tensors()
    graph = make_fx(lambda *tensors: attention(*tensors, enable_gqa=True), pre_dispatch=True)(*given)
    others = tensors()
    assert torch.equal(graph(*others), attention(*others, enable_gqa=True))


def test_gradients_that_nobody_records() -> None:
    query, key, value = tensors()
    query.requires_grad_()
    with torch.no_grad():
        assert short(query, key, value) is not None
    with torch.inference_mode():
        found = attention(query, key, value, enable_gqa=True)
    assert found.is_inference()
    torch.testing.assert_close(found.clone(), attention(query, key, value, enable_gqa=True).detach())


def test_a_backend_that_cannot_serve_the_call() -> None:
    given = [tensor.double() for tensor in tensors()]
    with fastattn.backend("cpu"), pytest.raises(RuntimeError, match="cannot serve this call"):
        attention(*given, enable_gqa=True)
