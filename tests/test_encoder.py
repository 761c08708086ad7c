"""nn.TransformerEncoder around patched layers: no padding goes through them in inference, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import KERNELS
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn.dispatch import Backend
from fastattn.modules.attention import MultiheadAttention
from fastattn.modules.encoder import TransformerEncoder
from fastattn.modules.maps import attention_maps

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.skipif(Backend.CPU not in KERNELS, reason="needs the C++ extension"),
]
BATCH, LENGTH, EMBED, HEADS = 4, 9, 16, 2
PADDINGS = {
    "right": torch.arange(LENGTH) >= torch.tensor([[4], [2], [9], [1]]),
    "left": torch.arange(LENGTH) < torch.tensor([[4], [2], [0], [8]]),
    "holes": torch.arange(LENGTH) % torch.tensor([[2], [3], [4], [10]]) == 1,
    "none": torch.zeros(BATCH, LENGTH, dtype=torch.bool),
    "all of one": torch.arange(LENGTH) >= torch.tensor([[4], [0], [9], [1]]),
    "all": torch.ones(BATCH, LENGTH, dtype=torch.bool),
}


def encoder(norm: bool = False, **options: Any) -> nn.TransformerEncoder:
    options = {"dim_feedforward": 32, "dropout": 0.5, "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, **options)
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(EMBED) if norm else None)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.3)
    return stack.eval()


def patched(stack: nn.Module) -> Any:
    fastattn.patch(stack)
    return stack


class _Rows(list[int]):
    """How many tokens of a call each attention saw."""

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.append(args[0].shape[0] * args[0].shape[1])
        return self.project(module, *args, **kwargs)

    project: Callable[..., Any] = staticmethod(MultiheadAttention._project)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> _Rows:
    counted = _Rows()
    monkeypatch.setattr(MultiheadAttention, "_project", lambda *args, **kwargs: counted(*args, **kwargs))
    return counted


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"norm": True}, {"activation": "gelu"}], ids=str)
@pytest.mark.parametrize("name", PADDINGS)
def test_real_tokens_alone(name: str, options: dict[str, Any], rows: _Rows) -> None:
    """torch's result on the real tokens, and zeros, or what the last norm makes of them, on padding."""
    stack, padding = encoder(**options), PADDINGS[name]
    x = torch.randn(BATCH, LENGTH, EMBED)
    x[padding] = float("nan")
    expected = torch.zeros_like(x)
    for row in range(BATCH):
        kept = ~padding[row]
        if kept.any():
            expected[row, kept] = nn.TransformerEncoder.forward(_without_norm(stack), x[row, kept][None])[0]
    if stack.norm is not None:
        expected = stack.norm(expected)
    out = patched(stack)(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out, expected)
    assert rows == [int((~padding).sum())] * 2


def _without_norm(stack: nn.TransformerEncoder) -> nn.TransformerEncoder:
    copied = copy.deepcopy(stack)
    copied.norm = None
    return copied


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_torch_with_nested_tensors(dtype: torch.dtype) -> None:
    stack = encoder(norm=True).to(dtype)
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=dtype)
    expected = stack(x, src_key_padding_mask=PADDINGS["right"])
    out = patched(stack)(x, src_key_padding_mask=PADDINGS["right"])
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out, expected, **tolerance)


PADDED = {
    "training": (lambda stack: stack.train(), {}),
    "training of a part": (lambda stack: stack.layers[1].dropout.train() and stack, {}),
    "causal": (lambda stack: stack, {"is_causal": True}),
    "mask": (lambda stack: stack, {"mask": torch.zeros(LENGTH, LENGTH, dtype=torch.bool)}),
    "floating padding": (lambda stack: stack, {"src_key_padding_mask": PADDINGS["right"].float() * -1e9}),
    "no padding": (lambda stack: stack, {"src_key_padding_mask": None}),
    "float64": (lambda stack: stack.double(), {}),
    "a hook": (lambda stack: stack.layers[1].linear1.register_forward_hook(lambda *_: None) and stack, {}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PADDED)
def test_padded_where_torch_pads_or_somebody_looks(name: str, rows: _Rows) -> None:
    change, arguments = PADDED[name]
    stack = change(patched(encoder(dropout=0.0)))
    x = torch.randn(BATCH, LENGTH, EMBED, dtype=stack.layers[0].linear1.weight.dtype)
    arguments = {"src_key_padding_mask": PADDINGS["right"]} | arguments
    out = stack(x, **arguments)
    assert rows == [BATCH * LENGTH] * 2
    torch.testing.assert_close(out, nn.TransformerEncoder.forward(stack, x, **arguments))


def test_a_gradient_is_that_of_training(rows: _Rows) -> None:
    stack = patched(encoder(dropout=0.0))
    x = torch.randn(BATCH, LENGTH, EMBED)
    stack(x, src_key_padding_mask=PADDINGS["right"]).sum().backward()
    assert rows == [BATCH * LENGTH] * 2
    assert stack.layers[0].self_attn.in_proj_weight.grad.abs().sum() > 0
    stack.requires_grad_(False)
    stack(x, src_key_padding_mask=PADDINGS["right"])
    assert rows[2:] == [int((~PADDINGS["right"]).sum())] * 2


@torch.no_grad()
def test_maps_have_the_padded_shape() -> None:
    stack = patched(encoder())
    with attention_maps(stack) as maps:
        stack(torch.randn(BATCH, LENGTH, EMBED), src_key_padding_mask=PADDINGS["right"])
    assert {weights.shape for weights in maps.values()} == {(BATCH, LENGTH, LENGTH)}


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_forced_backend_serves_the_padded_call(backend: str, rows: _Rows) -> None:
    stack = patched(encoder())
    with fastattn.backend(backend):
        stack(torch.randn(BATCH, LENGTH, EMBED), src_key_padding_mask=PADDINGS["right"])
    assert rows == [BATCH * LENGTH if backend == "reference" else int((~PADDINGS["right"]).sum())] * 2


@torch.no_grad()
def test_under_a_compiler_and_vmap() -> None:
    stack, padding = patched(encoder()), PADDINGS["right"]
    x = torch.randn(BATCH, LENGTH, EMBED)
    expected = stack(x, src_key_padding_mask=padding)
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")(x, src_key_padding_mask=padding)
    mapped = torch.vmap(lambda one: stack(one, src_key_padding_mask=padding))(x[None])[0]
    for out in (compiled, mapped):
        torch.testing.assert_close(out[~padding], expected[~padding])


@torch.no_grad()
def test_patch_copy_pickle_unpatch() -> None:
    stack, padding = encoder(), PADDINGS["right"]
    x = torch.randn(BATCH, LENGTH, EMBED)
    expected = stack(x, src_key_padding_mask=padding)
    fastattn.patch(stack)
    fastattn.patch(stack)
    assert type(stack) is TransformerEncoder
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), stack):
        torch.testing.assert_close(other(x, src_key_padding_mask=padding), expected)
        fastattn.unpatch(other)
        assert type(other) is nn.TransformerEncoder
        assert other.use_nested_tensor
        assert not any(name.startswith("_fastattn") for name in vars(other))
        assert torch.equal(other(x, src_key_padding_mask=padding), expected)


class _Own(nn.TransformerEncoder):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src, *args, **kwargs) + 1.0


class _OwnLayer(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src, *args, **kwargs) + 1.0


@torch.no_grad()
@pytest.mark.parametrize("which", ["encoder", "layer", "instance"])
def test_a_subclass_keeps_its_own_forward(which: str, rows: _Rows) -> None:
    options = {"dim_feedforward": 32, "batch_first": True}
    layer = (_OwnLayer if which == "layer" else nn.TransformerEncoderLayer)(EMBED, HEADS, **options)
    stack: Any = (_Own if which == "encoder" else nn.TransformerEncoder)(layer, 2).eval()
    if which == "instance":
        stack.layers[0].forward = stack.layers[1].forward
    x = torch.randn(BATCH, LENGTH, EMBED)
    expected = stack(x, src_key_padding_mask=PADDINGS["right"])
    out = patched(stack)(x, src_key_padding_mask=PADDINGS["right"])
    torch.testing.assert_close(out[~PADDINGS["right"]], expected[~PADDINGS["right"]])
    assert rows == [BATCH * LENGTH] * 2


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_what_is_no_number_stays_in_its_sequence(bad: float) -> None:
    stack, padding = encoder(norm=True), PADDINGS["right"]
    x = torch.randn(BATCH, LENGTH, EMBED)
    x[padding] = float("nan")
    x[2, 5] = bad
    expected = stack(x.masked_fill(padding.unsqueeze(-1), 0.0), src_key_padding_mask=padding)
    out = patched(stack)(x, src_key_padding_mask=padding)
    others = torch.tensor([0, 1, 3])
    assert not out[2].isfinite().all()
    torch.testing.assert_close(out[others], expected[others])


class _Adapter(nn.Module):
    def forward(self, src: Tensor, **_: Any) -> Tensor:
        return src + 1.0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pre-norm", "without attention"])
def test_a_layer_of_another_kind(kind: str, rows: _Rows) -> None:
    stack, padding = encoder(), PADDINGS["right"]
    other = nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True, norm_first=True)
    stack.layers.append(other.eval() if kind == "pre-norm" else _Adapter().eval())
    x = torch.randn(BATCH, LENGTH, EMBED)
    expected = stack(x, src_key_padding_mask=padding)
    out = patched(copy.deepcopy(stack))(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out[~padding], expected[~padding])
    assert set(rows) == {BATCH * LENGTH}


@torch.no_grad()
def test_padded_for_a_head_dimension_the_kernels_lack(rows: _Rows) -> None:
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(600, 4, 8, batch_first=True), 2).eval()
    stack.layers[1] = nn.TransformerEncoderLayer(600, 2, 8, batch_first=True).eval()
    patched(stack)(torch.randn(BATCH, LENGTH, 600), src_key_padding_mask=PADDINGS["right"])
    assert rows == [BATCH * LENGTH] * 2


class _Around(nn.Module):
    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.stack(x, src_key_padding_mask=padding)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("tracer", ["fx", "make_fx", "jit"])
def test_under_a_tracer(tracer: str) -> None:
    """Traced with one padding, right with another."""
    model, x = _Around(patched(encoder())), torch.randn(BATCH, LENGTH, EMBED)
    first, second = PADDINGS["right"], PADDINGS["holes"]
    if tracer == "fx":
        traced: Any = torch.fx.symbolic_trace(model)
    elif tracer == "make_fx":
        traced = make_fx(model)(x, first)
    else:
        traced = torch.jit.trace(model, (x, first), check_trace=False)
    torch.testing.assert_close(traced(x, second)[~second], model(x, second)[~second])


def test_forward_derivatives_and_transforms() -> None:
    stack = patched(encoder()).requires_grad_(False)
    x, along = torch.randn(2, BATCH, LENGTH, EMBED)
    padding = PADDINGS["right"]

    def call(src: Tensor) -> Tensor:
        return stack(src, src_key_padding_mask=padding)[~padding]

    wide = copy.deepcopy(stack).double()
    step = 1e-6 * along.double()
    wanted = sum(sign * wide(x.double() + sign * step, src_key_padding_mask=padding) for sign in (1, -1)) / 2e-6
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, along))).tangent
    for found in (tangent, torch.func.jvp(call, (x,), (along,))[1]):
        torch.testing.assert_close(found.double(), wanted[~padding], rtol=1e-3, atol=1e-3)
    gradient = torch.func.grad(lambda src: call(src).square().sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(call(leaf).square().sum(), leaf)[0], rtol=1e-4, atol=1e-4)
