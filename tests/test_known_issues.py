"""One test per pytorch/pytorch issue that fastattn.MultiheadAttention cures, by its number.

Each runs the issue's own case. "torch 2.13 fails" was tried with torch.nn.MultiheadAttention in the same test.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn import MultiheadAttention
from fastattn.modules import attention_maps

INF = float("-inf")


def encoder_layer(embed: int = 16, heads: int = 2, **options: Any) -> nn.TransformerEncoderLayer:
    """torch's layer around our attention."""
    layer = nn.TransformerEncoderLayer(embed, heads, 32, dropout=0.0, batch_first=True, **options)
    layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)
    return layer


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    """torch's stack, built of torch's layers, and then given our attention."""
    stack = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options), layers
    )
    for layer in stack.layers:
        layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)
    return stack


def gradients_are_finite(module: nn.Module, out: Tensor) -> bool:
    out.square().sum().backward()
    return all(parameter.grad.isfinite().all() for parameter in module.parameters())


# Fully masked rows -------------------------------------------------------------------------------------------


def test_41508_gradients_with_fully_masked_rows() -> None:
    """A sliding window and padding leave a row without keys: NaN gradients for the whole batch. torch 2.13 fails."""
    module = MultiheadAttention(1, 1)
    x = torch.rand(4, 2, 1)
    padding = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, INF, INF]])
    window = torch.tensor([[0, INF, INF, INF], [0, 0, INF, INF], [INF, 0, 0, INF], [INF, INF, 0, 0]])
    for key_padding_mask, attn_mask in ((padding, window), (padding < 0, window < 0), (padding < 0, window)):
        module.zero_grad()
        out, weights = module(x, x, x, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
        torch.testing.assert_close(out[3, 1], module.out_proj.bias)
        assert not weights[1, 3].any()
        assert gradients_are_finite(module, out[:2])


def test_160064_a_fully_masked_head() -> None:
    """A 3-D mask that closes one head gives NaN with weights, not without. torch 2.13 fails."""
    module = MultiheadAttention(3, 3, batch_first=True)
    x = torch.randn(1, 5, 3)
    mask = torch.tensor([False, False, True]).view(-1, 1, 1).expand(-1, 5, 5)
    out, weights = module(x, x, x, attn_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(out, module(x, x, x, attn_mask=mask, need_weights=False)[0])
    assert not weights[0, 2].any()
    torch.testing.assert_close(weights[0, :2].sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("need_weights", [True, False])
def test_152028_masks_and_dropout(need_weights: bool) -> None:
    """Masks, dropout and a row without keys give NaN. torch 2.13 fails with weights."""
    module = MultiheadAttention(8, 2, dropout=0.5, batch_first=True, bias=False)
    query, key = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0] = True
    out, weights = module(query, key, key, attn_mask=mask, need_weights=need_weights)
    assert not out[:, 0].any()
    assert weights is None or not weights[:, 0].any()
    assert gradients_are_finite(module, out)


# is_causal ---------------------------------------------------------------------------------------------------


def causal_cases(module: nn.Module, x: Tensor, **kwargs: Any) -> tuple[Any, Any]:
    """The hint alone, and the mask alone."""
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return module(x, x, x, is_causal=True, **kwargs), module(x, x, x, attn_mask=mask, **kwargs)


def test_100347_is_causal_without_a_mask() -> None:
    """is_causal=True alone raises "Need attn_mask". torch 2.13 fails."""
    hint, mask = causal_cases(MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8), need_weights=False)
    torch.testing.assert_close(hint, mask)


def test_118972_is_causal_as_in_scaled_dot_product_attention() -> None:
    """The function refuses a mask beside is_causal, the module refuses is_causal without one. torch 2.13 fails."""
    q, k, v = torch.randn(3, 2, 2, 5, 8)
    mask = torch.randn(5, 5)
    both = fastattn.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    merged = mask.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), INF)
    torch.testing.assert_close(both, fastattn.scaled_dot_product_attention(q, k, v, merged))
    module = MultiheadAttention(8, 2, batch_first=True)
    x = q[:, 0]
    torch.testing.assert_close(module(x, x, x, attn_mask=mask, is_causal=True), module(x, x, x, attn_mask=merged))


def test_172338_is_causal_with_weights() -> None:
    """is_causal=True with need_weights=True has no mask to work with. torch 2.13 fails."""
    for average in (True, False):
        module = MultiheadAttention(8, 2, batch_first=True)
        hint, mask = causal_cases(module, torch.randn(2, 5, 8), average_attn_weights=average)
        torch.testing.assert_close(hint, mask)
        assert not hint[1].triu(1).any()


def test_99282_is_causal_whatever_need_weights() -> None:
    """The result with weights ignored is_causal; since then it raises. torch 2.13 fails."""
    module = MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(4, 3, 8)
    with_weights, without = (module(x, x, x, is_causal=True, need_weights=needed)[0] for needed in (True, False))
    torch.testing.assert_close(with_weights, without)
    assert not torch.allclose(with_weights, module(x, x, x)[0])


def test_100709_is_causal_with_padding() -> None:
    """key_padding_mask and is_causal=True cannot be combined. torch 2.13 fails."""
    padding = torch.tensor([[False, False, False, True, True], [False] * 5])
    for need_weights in (True, False):
        module = MultiheadAttention(8, 2, batch_first=True)
        kwargs = {"key_padding_mask": padding.float().masked_fill(padding, INF), "need_weights": need_weights}
        hint, mask = causal_cases(module, torch.randn(2, 5, 8), **kwargs)
        torch.testing.assert_close(hint, mask)
        torch.testing.assert_close(
            module(*(torch.ones(2, 5, 8),) * 3, key_padding_mask=padding, is_causal=True)[0][1],
            module(*(torch.ones(1, 5, 8),) * 3, is_causal=True)[0][0],
        )


# Evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_97111_encoder_output_keeps_its_length() -> None:
    """In eval the output was cut to the longest sequence of the batch."""
    stack = encoder().eval()
    x = torch.randn(3, 9, 16)
    padding = torch.arange(9).expand(3, 9) >= torch.tensor([[4], [2], [5]])
    with torch.no_grad():
        assert stack(x, src_key_padding_mask=padding).shape == x.shape


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_86120_encoder_in_eval_is_the_encoder_in_training() -> None:
    """In eval src_key_padding_mask went through other code, with other results (zeros on padding). torch 2.13 fails."""
    stack = nn.TransformerEncoder(encoder_layer(), 2)
    x = torch.randn(3, 9, 16)
    padding = torch.arange(9).expand(3, 9) >= torch.tensor([[4], [2], [9]])
    trained = stack(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(stack.eval()(x, src_key_padding_mask=padding), trained)


def test_97409_mask_per_head_in_eval() -> None:
    """A mask (B * H, L, S) crashed in eval."""
    module = MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(3, 7, 16)
    mask = torch.randn(12, 7, 7) > 0
    mask[..., 0] = False
    trained = module(x, x, x, attn_mask=mask, need_weights=False)[0]
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x, x, x, attn_mask=mask, need_weights=False)[0], trained)


def test_97605_mask_per_head_and_padding_in_eval() -> None:
    """A mask (B * H, L, S) beside key_padding_mask failed in eval only. torch 2.13 gives NaN where a row has no key."""
    module = MultiheadAttention(4, 4, batch_first=True)
    x = torch.randn(2, 8, 4)
    padding, mask = torch.randn(2, 8) > 1, (torch.randn(2, 8, 8) > 1).repeat(4, 1, 1)
    mask[0, 0] = True
    trained = module(x, x, x, key_padding_mask=padding, attn_mask=mask)
    assert trained[0].isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x, x, x, key_padding_mask=padding, attn_mask=mask), trained)


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"num_heads": 1}, {"num_heads": 3}, {"num_heads": 3, "bias": False}]
)
def test_97128_no_bias_and_odd_heads_in_eval(options: dict[str, Any]) -> None:
    """bias=False, and odd head counts with padding, failed in eval."""
    module = MultiheadAttention(**{"embed_dim": 12, "num_heads": 4, "batch_first": True, **options})
    x = torch.randn(2, 5, 12)
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    trained = module(x, x, x, key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x, x, x, key_padding_mask=padding), trained)


# Floating masks ----------------------------------------------------------------------------------------------


def test_107084_float_mask_is_added_in_eval() -> None:
    """In eval a float mask was read as boolean."""
    module = MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(1, 10, 16)
    mask = torch.randn(10, 10)
    with torch.no_grad():
        out, weights = module(x, x, x, attn_mask=mask, average_attn_weights=False)
        _, plain = module(x, x, x, average_attn_weights=False)
    assert out.isfinite().all()
    torch.testing.assert_close(weights, (plain.log() + mask).softmax(-1))


def test_92554_float_padding_masks() -> None:
    """A key_padding_mask of -inf was ignored beside a float attn_mask."""
    module = MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    added = torch.zeros(2, 5).masked_fill(padding, INF)
    mask = torch.randn(5, 5)
    _, weights = module(x, x, x, key_padding_mask=added, attn_mask=mask)
    assert not weights[1, :, 3:].any()
    torch.testing.assert_close(weights, module(x, x, x, key_padding_mask=padding, attn_mask=mask)[1])


@pytest.mark.parametrize("need_weights", [True, False])
def test_99012_float32_mask_under_autocast(need_weights: bool) -> None:
    """A float32 mask met a bfloat16 query under autocast and raised."""
    module = MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 7, 16)
    mask = torch.full((7, 7), -1e30).triu(1)
    with torch.no_grad(), torch.autocast("cpu"):
        out, _ = module(x, x, x, attn_mask=mask, need_weights=need_weights)
        causal, _ = module(x, x, x, is_causal=True, need_weights=need_weights)
    tolerance = 4 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(out, causal, rtol=tolerance, atol=tolerance)


# Warnings ----------------------------------------------------------------------------------------------------


def test_95702_no_warning_for_masks_of_two_kinds() -> None:
    """Boolean masks given to an encoder, of which one was converted underway, were called mismatched."""
    stack = encoder()
    x = torch.randn(2, 3, 16)
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False, False, False], [False, False, True]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack(x, mask=mask, src_key_padding_mask=padding)
        module = stack.layers[0].self_attn
        # torch 2.13 warns here.
        mixed = module(x, x, x, key_padding_mask=padding, attn_mask=torch.zeros(3, 3).masked_fill(mask, INF))
    torch.testing.assert_close(mixed, module(x, x, x, key_padding_mask=padding, attn_mask=mask))


def test_96103_no_warning_in_a_decoder() -> None:
    """The same in a decoder."""
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)
    layer.multihead_attn = MultiheadAttention.from_torch(layer.multihead_attn)
    stack = nn.TransformerDecoder(layer, 2, nn.LayerNorm(16))
    x, memory = torch.randn(2, 2, 3, 16)
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False, False, False], [False, False, True]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The mask is float and the paddings are boolean: torch 2.13 warns.
        stack(x, memory, torch.zeros(3, 3).masked_fill(mask, INF), None, padding, padding)
        stack(x, memory, mask, None, padding, padding)


# Compilers ---------------------------------------------------------------------------------------------------


def compiled_over_lengths(
    module: nn.Module, inputs: Callable[[int], tuple[tuple[Tensor, ...], dict[str, Any]]], backward: bool
) -> None:
    """Results equal eager's for 20 lengths, and after the first one nothing is compiled any more."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    first = None
    # Not from 3, the batch size: equal sizes share a symbol.
    for length in range(4, 24):
        args, kwargs = inputs(length)
        with torch.set_grad_enabled(backward):
            results = []
            for function in (compiled, module):
                module.zero_grad()
                out, weights = function(*args, **kwargs)
                if backward:
                    (out.square().sum() + (0.0 if weights is None else weights.square().sum())).backward()
                results.append([out, weights, [parameter.grad for parameter in module.parameters()]])
        torch.testing.assert_close(*results)
        first = counter.frame_count if first is None else first
    assert counter.frame_count == first


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_97158_compiles_with_dynamic_shapes(batch_first: bool, need_weights: bool) -> None:
    """torch.compile(dynamic=True) failed."""
    module = MultiheadAttention(16, 2, batch_first=batch_first)

    def inputs(length: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        x = torch.randn((3, length, 16) if batch_first else (length, 3, 16))
        return (x, x, x), {"is_causal": True, "need_weights": need_weights}

    compiled_over_lengths(module, inputs, backward=True)


@pytest.mark.parametrize("backward", [True, False])
def test_141827_a_masked_module_is_one_graph(backward: bool) -> None:
    """A mask, with no_grad after training, broke the graph."""
    module = MultiheadAttention(16, 2, batch_first=True)

    def inputs(length: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        x, memory = torch.randn(3, length, 16), torch.randn(3, length + 5, 16)
        padding = torch.arange(length + 5).expand(3, -1) > torch.tensor([[2], [length], [length + 5]])
        masks = {"attn_mask": torch.randn(length, length + 5), "key_padding_mask": padding}
        return (x, memory, memory), masks

    compiled_over_lengths(module, inputs, backward)


# Maps --------------------------------------------------------------------------------------------------------


def test_99304_an_encoder_gives_its_maps() -> None:
    """nn.TransformerEncoder throws the weights away. torch 2.13 has no way to ask it for them."""
    for training in (True, False):
        stack = encoder(layers=3).train(training)
        x = torch.randn(2, 5, 16)
        with attention_maps(stack) as maps:
            out = stack(x)
        assert list(maps) == [f"layers.{place}.self_attn" for place in range(3)]
        for weights in maps.values():
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
        torch.testing.assert_close(out, stack(x))
