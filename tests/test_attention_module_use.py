"""fastattn.MultiheadAttention in use: state, copies, from_torch, exceptions, nested tensors, autocast, containers."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn

Theirs = nn.MultiheadAttention
Ours = fastattn.MultiheadAttention
BATCH, HEADS, ROWS, COLUMNS, EMBED = 2, 3, 4, 5, 12

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False, "batch_first": True},
    {"kdim": 7, "vdim": 9},
    {"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.1},
]
ids = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, ROWS, EMBED)


# State -------------------------------------------------------------------------------------------------------


@ids
def test_same_parameters_drawn_in_the_same_order(options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    theirs = Theirs(EMBED, HEADS, **options)
    torch.manual_seed(5)
    ours = Ours(EMBED, HEADS, **options)
    assert isinstance(ours, Theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, dict(ours.named_parameters())[name]), name
    torch.manual_seed(6)
    theirs._reset_parameters()
    torch.manual_seed(6)
    ours._reset_parameters()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, dict(ours.named_parameters())[name]), name


@ids
def test_state_dict_loads_strictly_both_ways(options: dict[str, Any]) -> None:
    theirs, ours = Theirs(EMBED, HEADS, **options), Ours(EMBED, HEADS, **options)
    assert not any(ours.load_state_dict(theirs.state_dict(), strict=True))
    assert not any(theirs.load_state_dict(Ours(EMBED, HEADS, **options).state_dict(), strict=True))


@ids
def test_copies_compute_the_same(options: dict[str, Any]) -> None:
    ours = Ours(EMBED, HEADS, **options).eval()
    ours.need_weights = False
    shapes = [(ROWS, BATCH, EMBED), (ROWS, BATCH, ours.kdim), (ROWS, BATCH, ours.vdim)]
    inputs = [torch.randn(shape) for shape in shapes]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    expected, _ = ours(*inputs)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert type(copied) is Ours
        assert torch.equal(copied(*inputs)[0], expected)
        assert copied(*inputs)[1] is None
    zeros = {name: torch.zeros_like(parameter) for name, parameter in ours.named_parameters()}
    assert not torch.func.functional_call(ours, zeros, tuple(inputs))[0].any()


def test_meta_device_and_dtype() -> None:
    ours = Ours(EMBED, HEADS, device="meta", dtype=torch.bfloat16, add_bias_kv=True)
    assert {(parameter.device.type, parameter.dtype) for parameter in ours.parameters()} == {("meta", torch.bfloat16)}


def test_meta_forward() -> None:
    ours = Ours(EMBED, HEADS, device="meta", dtype=torch.bfloat16, add_bias_kv=True)
    x = torch.empty(ROWS, BATCH, EMBED, device="meta", dtype=torch.bfloat16)
    out, weights = ours(x, x, x)
    assert out.shape == x.shape
    assert weights.shape == (BATCH, ROWS, ROWS + 1)


def test_torch_class_may_be_rebound_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "MultiheadAttention", Ours)
    monkeypatch.setattr(nn.modules.transformer, "MultiheadAttention", Ours)
    layer = nn.TransformerDecoderLayer(EMBED, HEADS, batch_first=True)
    assert type(layer.self_attn) is type(layer.multihead_attn) is Ours
    memory = torch.randn(BATCH, ROWS, EMBED)
    assert layer(memory, memory).shape == memory.shape


# from_torch --------------------------------------------------------------------------------------------------


def test_from_torch_shares_everything(x: Tensor) -> None:
    theirs = Theirs(EMBED, HEADS, batch_first=True, dropout=0.5).eval()
    theirs.in_proj_weight.requires_grad_(False)
    calls: list[str] = []
    handle = theirs.register_forward_hook(lambda *_: calls.append("before"))
    state = torch.get_rng_state()
    ours = Ours.from_torch(theirs)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(ours) is Ours
    assert not ours.training
    for name, parameter in theirs.named_parameters():
        assert dict(ours.named_parameters())[name] is parameter
    ours.register_forward_hook(lambda *_: calls.append("after"))
    out, weights = ours(x, x, x)
    assert calls == ["before", "after"]
    torch.testing.assert_close((out, weights), theirs(x, x, x))
    handle.remove()
    calls.clear()
    ours(x, x, x)
    assert calls == ["after"]
    ours.double()
    assert theirs.in_proj_weight.dtype == torch.float64


def test_from_torch_need_weights(x: Tensor) -> None:
    theirs = Theirs(EMBED, HEADS, batch_first=True)
    silent, loud = Ours.from_torch(theirs, need_weights=False), Ours.from_torch(theirs, need_weights=True)
    assert silent(x, x, x)[1] is None
    assert silent(x, x, x, need_weights=True)[1] is None
    assert loud(x, x, x, need_weights=False)[1].shape == (BATCH, ROWS, ROWS)


def test_from_torch_keeps_parametrizations(x: Tensor) -> None:
    theirs = Theirs(EMBED, HEADS, batch_first=True)
    parametrizations.weight_norm(theirs, "in_proj_weight")
    parametrizations.orthogonal(theirs.out_proj, "weight")
    ours = Ours.from_torch(theirs)
    assert isinstance(ours, Ours)
    assert parametrize.is_parametrized(ours, "in_proj_weight")
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))
    torch.testing.assert_close(copy.deepcopy(ours)(x, x, x), ours(x, x, x))
    expected = ours(x, x, x)
    parametrize.remove_parametrizations(ours, "in_proj_weight")
    assert type(ours) is Ours
    torch.testing.assert_close(ours(x, x, x), expected)


def test_from_torch_refuses_another_computation() -> None:
    class Doubled(Theirs):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    replaced = Theirs(EMBED, HEADS)
    replaced.forward = replaced.forward  # type: ignore[method-assign]
    for module in (nn.Linear(2, 2), Doubled(EMBED, HEADS), replaced):
        with pytest.raises(TypeError, match="module: got"):
            Ours.from_torch(module)  # type: ignore[arg-type]


# Exceptions --------------------------------------------------------------------------------------------------

Q, K = torch.randn(BATCH, ROWS, EMBED), torch.randn(BATCH, COLUMNS, EMBED)
UQ, UK = Q[0], K[0]
PAD = torch.zeros(BATCH, COLUMNS, dtype=torch.bool)
MASK = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
DIMS = {"kdim": 7, "vdim": 9}
K7, V9 = torch.randn(BATCH, COLUMNS, 7), torch.randn(BATCH, COLUMNS, 9)


def nested(*lengths: int, **kwargs: Any) -> Tensor:
    with warnings.catch_warnings():
        # torch calls its strided nested tensors a prototype.
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.randn(length, EMBED) for length in lengths], **kwargs)


N = nested(3, 4)

# Constructor arguments, positional and keyword arguments of forward, and the argument that the message must name.
BAD: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], str]] = {
    "query of rank 0": ({}, (torch.tensor(1.0), K, K), {}, "query"),
    "query of rank 1": ({}, (torch.randn(EMBED), K, K), {}, "query"),
    "query of rank 4": ({}, (Q[None], K, K), {}, "query"),
    "key of rank 2": ({}, (Q, UK, K), {}, "key"),
    "value of rank 2": ({}, (Q, K, UK), {}, "value"),
    "key of rank 1, time first": ({"batch_first": False}, (Q, torch.randn(EMBED), K), {}, "key"),
    "unbatched, key of rank 3": ({}, (UQ, K, UK), {}, "key"),
    "unbatched, value of rank 3": ({}, (UQ, UK, K), {}, "value"),
    "query no tensor": ({}, ("query", K, K), {}, "query"),
    "query None": ({}, (None, K, K), {}, "query"),
    "key None": ({}, (Q, None, K), {}, "key"),
    "value None": ({}, (Q, K, None), {}, "value"),
    "integer padding": ({}, (Q, K, K), {"key_padding_mask": PAD.int()}, "key_padding_mask"),
    "padding of rank 1": ({}, (Q, K, K), {"key_padding_mask": PAD[0]}, "key_padding_mask"),
    "padding of rank 3": ({}, (Q, K, K), {"key_padding_mask": PAD[None]}, "key_padding_mask"),
    "unbatched, padding of rank 2": ({}, (UQ, UK, UK), {"key_padding_mask": PAD[:1]}, "key_padding_mask"),
    "padding too short": ({}, (Q, K, K), {"key_padding_mask": PAD[:, :-1]}, "key_padding_mask"),
    "padding of another batch": ({}, (Q, K, K), {"key_padding_mask": PAD[:1]}, "key_padding_mask"),
    "padding transposed": ({}, (Q, K, K), {"key_padding_mask": PAD.T}, "key_padding_mask"),
    "unbatched, padding too short": ({}, (UQ, UK, UK), {"key_padding_mask": PAD[0, :-1]}, "key_padding_mask"),
    "padding a list": ({}, (Q, K, K), {"key_padding_mask": [False]}, "key_padding_mask"),
    "integer mask": ({}, (Q, K, K), {"attn_mask": MASK.int()}, "attn_mask"),
    "mask of rank 1": ({}, (Q, K, K), {"attn_mask": MASK[0]}, "attn_mask"),
    "mask of rank 4": ({}, (Q, K, K), {"attn_mask": MASK[None, None]}, "attn_mask"),
    "mask of other rows": ({}, (Q, K, K), {"attn_mask": MASK[:-1]}, "attn_mask"),
    "mask of other columns": ({}, (Q, K, K), {"attn_mask": MASK[:, :-1]}, "attn_mask"),
    "mask transposed": ({}, (Q, K, K), {"attn_mask": MASK.T}, "attn_mask"),
    "mask per batch": ({}, (Q, K, K), {"attn_mask": MASK.expand(BATCH, -1, -1)}, "attn_mask"),
    "mask per head of other rows": ({}, (Q, K, K), {"attn_mask": MASK[:-1].expand(6, -1, -1)}, "attn_mask"),
    "mask of one head": ({}, (Q, K, K), {"attn_mask": MASK[None]}, "attn_mask"),
    "unbatched, mask of other heads": ({}, (UQ, UK, UK), {"attn_mask": MASK.expand(4, -1, -1)}, "attn_mask"),
    "unbatched, mask of other rows": ({}, (UQ, UK, UK), {"attn_mask": MASK[:-1]}, "attn_mask"),
    "mask a list": ({}, (Q, K, K), {"attn_mask": [False]}, "attn_mask"),
    "query of other features": ({}, (Q[..., 1:], K, K), {}, "query"),
    "self-attention of other features": ({}, (Q[..., 1:],) * 3, {}, "query"),
    "key and value of other features": ({}, (Q, K[..., 1:], K[..., 1:]), {}, "key"),
    "key of other features": ({}, (Q, K[..., 1:], K), {}, "key"),
    "value of other features": ({}, (Q, K, K[..., 1:]), {}, "value"),
    "key is not kdim": (DIMS, (Q, K, V9), {}, "key"),
    "value is not vdim": (DIMS, (Q, K7, K), {}, "value"),
    "value of another length": ({}, (Q, K, K[:, 1:]), {}, "value"),
    "value of another batch": ({}, (Q, K, K[:1]), {}, "value"),
    "key of another batch": ({}, (Q, K[:1], K[:1]), {}, "key"),
    "own projections, value of another length": (DIMS, (Q, K7, V9[:, 1:]), {}, "value"),
    "own projections, key of another batch": (DIMS, (Q, K7[:1], V9[:1]), {}, "key"),
    "float64 query": ({}, (Q.double(), K, K), {}, "query"),
    "float64 key": ({}, (Q, K.double(), K), {}, "key"),
    "float64 value": ({}, (Q, K, K.double()), {}, "value"),
    "integer query": ({}, (Q.int(), K, K), {}, "query"),
    "own projections, float64 key": (DIMS, (Q, K7.double(), V9), {}, "key"),
    "nested and padding": ({}, (N, N, N), {"key_padding_mask": PAD[:, :4]}, "key_padding_mask"),
    "nested and mask": ({}, (N, N, N), {"attn_mask": MASK[:, :4]}, "attn_mask"),
    "nested, time first": ({"batch_first": False}, (N, N, N), {}, "batch_first"),
    "only query nested": ({}, (N, K, K), {}, "key"),
    "query not nested": ({}, (Q, N, N), {}, "query"),
    "dropout no probability": ({"dropout": 1.5}, (Q, K, K), {}, "dropout"),
    "no embed_dim": ({"embed_dim": 0}, (Q, K, K), {}, "embed_dim"),
    "no heads": ({"num_heads": 0}, (Q, K, K), {}, "num_heads"),
    "heads do not divide": ({"num_heads": 5}, (Q, K, K), {}, "num_heads"),
}


def outcome(cls: type, constructor: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  the type is what the test compares
        cls(**{"embed_dim": EMBED, "num_heads": HEADS, "batch_first": True, **constructor})(*args, **kwargs)
    return caught.value


@pytest.mark.parametrize("case", BAD)
def test_exceptions_are_torchs_and_name_the_argument(case: str) -> None:
    constructor, args, kwargs, name = BAD[case]
    theirs, ours = (outcome(cls, constructor, args, kwargs) for cls in (Theirs, Ours))
    assert isinstance(ours, type(theirs)), f"torch raises {theirs!r}, we {ours!r}"
    assert name in str(ours)


# Layout ------------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("inputs", "products"), [("xxx", 1), ("xyy", 2), ("xxy", 2), ("xyz", 3)])
def test_fewest_products_and_no_copies(inputs: str, products: int, batch_first: bool) -> None:
    ours = Ours(EMBED, HEADS, batch_first=batch_first).eval()
    tensors = {name: torch.randn(BATCH, ROWS, EMBED) for name in "xyz"}
    with Operators() as operators, torch.no_grad():
        ours(*(tensors[name] for name in inputs), need_weights=False)
    matrix_products = sum(operators.counts[name] for name in ("addmm", "mm", "linear", "mkldnn_linear"))
    assert matrix_products == products + 1, operators.counts
    copies = {"clone", "copy_", "contiguous", "_to_copy", "cat", "stack", "_reshape_copy"} & set(operators.counts)
    assert not copies, operators.counts


def test_no_per_head_weights_for_the_average() -> None:
    ours = Ours(EMBED, HEADS, batch_first=True)
    x = torch.randn(BATCH, ROWS, EMBED)
    if ours.explain(x, x, x).backend is fastattn.Backend.REFERENCE:
        pytest.skip("the reference holds the scores; no fused backend returns weights here")

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                assert (
                    not isinstance(tensor, Tensor) or tensor.numel() < BATCH * HEADS * 64 * 64 or tensor.shape[-1] != 64
                )
            return result

    long = torch.randn(BATCH, 64, EMBED)
    with Shapes():
        _, weights = ours(long, long, long)
    assert weights.shape == (BATCH, 64, 64)


def test_explain_is_what_forward_takes(x: Tensor) -> None:
    ours = Ours(EMBED, HEADS, batch_first=True)
    with fastattn.backend("reference"):
        assert ours.explain(x, x, x).backend is fastattn.Backend.REFERENCE
    explanation = ours.explain(x, x, x, need_weights=False)
    assert fastattn.Backend.REFERENCE in explanation.why_not
    assert "weights" in ours.explain(x, x, x).why_not[fastattn.Backend.SDPA]
    with pytest.raises(AssertionError, match="query"):
        ours.explain(x[None], x, x)


# Autocast and dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": EMBED, "vdim": 9}])
def test_autocast(dtype: torch.dtype, options: dict[str, Any]) -> None:
    theirs = Theirs(EMBED, HEADS, batch_first=True, **options)
    ours = Ours.from_torch(theirs)
    query, key, value = torch.randn(2, ROWS, EMBED), torch.randn(2, COLUMNS, EMBED), torch.randn(2, COLUMNS, ours.vdim)
    mask = torch.randn(ROWS, COLUMNS)
    # Entries that float16 and bfloat16 cannot hold.
    padding = torch.tensor([[0.0, -1e30, 0.0, 1e-7, -1e30], [0.0] * 5])
    for need_weights in (True, False):
        kwargs = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights}
        exact, _ = theirs(query, key, value, **kwargs)
        with torch.autocast("cpu", dtype=dtype):
            out, weights = ours(query, key, value, **kwargs)
        assert out.dtype == dtype
        assert (out - exact).abs().max() < 16 * torch.finfo(dtype).eps * exact.abs().max()
        assert weights is None or weights.isfinite().all()
        out.float().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_float32_mask_beside_another_dtype(dtype: torch.dtype) -> None:
    ours = Ours(EMBED, HEADS, batch_first=True, dtype=dtype)
    x = torch.randn(BATCH, ROWS, EMBED, dtype=dtype)
    mask = torch.full((ROWS, ROWS), -1e30).triu(1)
    tolerance = 4 * torch.finfo(dtype).eps
    for need_weights in (True, False):
        got = ours(x, x, x, attn_mask=mask, need_weights=need_weights)
        wanted = ours(x, x, x, is_causal=True, need_weights=need_weights)
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


# Nested tensors ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_equals_torch_in_eval() -> None:
    theirs = Theirs(EMBED, 4, batch_first=True).eval()
    ours = Ours.from_torch(theirs)
    x = nested(3, 1, 5)
    with torch.no_grad():
        for kwargs in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            (out, weights), (wanted, wanted_weights) = ours(x, x, x, **kwargs), theirs(x, x, x, **kwargs)
            assert out.is_nested
            torch.testing.assert_close(out.to_padded_tensor(0.0), wanted.to_padded_tensor(0.0))
            torch.testing.assert_close(weights, wanted_weights)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_is_each_sequence_alone(layout: torch.layout) -> None:
    """torch refuses these outside of its inference path, and jagged ones everywhere."""
    ours = Ours(EMBED, HEADS, batch_first=True)
    query, key = nested(3, 5, layout=layout, requires_grad=True), nested(4, 2, layout=layout)
    out, weights = ours(query, key, key, is_causal=True)
    total = out + query
    total.to_padded_tensor(0.0).sum().backward()
    assert query.grad is not None
    for place, (one, memory, got) in enumerate(zip(query.unbind(), key.unbind(), out.unbind(), strict=True)):
        alone, alone_weights = ours(one, memory, memory, is_causal=True)
        torch.testing.assert_close(got, alone)
        torch.testing.assert_close(weights[place, : len(one), : len(memory)], alone_weights)
        assert not weights[place, len(one) :].any()
        assert not weights[place, :, len(memory) :].any()
