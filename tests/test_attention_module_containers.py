"""fastattn.MultiheadAttention inside nn.Transformer and its layers: never bypassed, full shapes, compiled, exported."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.modules import attention_maps

BATCH, HEADS, LENGTH, EMBED = 2, 4, 6, 16
PADDING = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def switched(model: nn.Module) -> nn.Module:
    """A copy with our modules in the place of torch's, sharing no parameter with the original."""
    ours = copy.deepcopy(model)
    for parent in list(ours.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention:
                setattr(parent, name, fastattn.MultiheadAttention.from_torch(child))
    return ours


def calls(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, int]:
    """The result, and how often our forward ran. Counted without a hook: a hook alone keeps torch from its path."""
    count = 0
    forward = fastattn.MultiheadAttention.forward

    def counting(self: nn.Module, *inner: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        return forward(self, *inner, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastattn.MultiheadAttention, "forward", counting)
        return model(*args, **kwargs), count


@TRAINING
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "mask", "both"])
def test_encoder_layer(masks: str, batch_first: bool, norm_first: bool, grad: bool, training: bool) -> None:
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first, "dtype": torch.float64}
    theirs = nn.TransformerEncoderLayer(EMBED, HEADS, 32, **options).train(training)
    ours = switched(theirs)
    x = torch.randn((BATCH, LENGTH, EMBED) if batch_first else (LENGTH, BATCH, EMBED), dtype=torch.float64)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if masks in ("mask", "both") else None
    padding = PADDING if masks in ("padding", "both") else None
    with torch.set_grad_enabled(grad):
        out, count = calls(ours, x, src_mask=mask, src_key_padding_mask=padding)
        wanted = theirs(x, src_mask=mask, src_key_padding_mask=padding)
    assert count == 1
    torch.testing.assert_close(out, wanted)


@TRAINING
@pytest.mark.parametrize("batch_first", [True, False])
def test_decoder_layer(batch_first: bool, training: bool) -> None:
    options = {"dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    theirs = nn.TransformerDecoderLayer(EMBED, HEADS, 32, **options).train(training)
    ours = switched(theirs)
    shape = (BATCH, LENGTH, EMBED) if batch_first else (LENGTH, BATCH, EMBED)
    target, memory = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    kwargs = {"tgt_mask": mask, "tgt_is_causal": True, "memory_key_padding_mask": PADDING}
    out, count = calls(ours, target, memory, **kwargs)
    assert count == 2
    torch.testing.assert_close(out, theirs(target, memory, **kwargs))


@TRAINING
def test_transformer(training: bool) -> None:
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    theirs = nn.Transformer(EMBED, HEADS, 2, 2, 32, **options).train(training)
    ours = switched(theirs)
    source, target = torch.randn(2, BATCH, LENGTH, EMBED, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    kwargs = {"tgt_mask": mask, "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    out, count = calls(ours, source, target, **kwargs)
    assert count == 6
    torch.testing.assert_close(out, theirs(source, target, **kwargs))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("built", ["around ours", "then switched"])
def test_encoder_keeps_its_shape_in_eval(built: str) -> None:
    """Around our layers the encoder makes no nested tensors; one that was built before does, and gets them back."""
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True)
    if built == "around ours":
        encoder = nn.TransformerEncoder(switched(layer), 2)
        assert not encoder.use_nested_tensor
    else:
        encoder = switched(nn.TransformerEncoder(layer, 2))
    x = torch.randn(BATCH, LENGTH + 2, EMBED)
    padding = nn.functional.pad(PADDING, (0, 2), value=True)
    trained = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        out, count = calls(encoder.eval(), x, src_key_padding_mask=padding)
    assert count == 2
    assert out.shape == x.shape
    torch.testing.assert_close(out[~padding], trained[~padding])
    if built == "around ours":
        torch.testing.assert_close(out, trained)


def test_encoder_layer_takes_nested_tensors() -> None:
    layer = switched(nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sequences = [torch.randn(length, EMBED) for length in (3, 5)]
        out = layer(torch.nested.nested_tensor(sequences))
        for got, sequence in zip(out.unbind(), sequences, strict=True):
            torch.testing.assert_close(got, layer(sequence[None])[0])


def test_maps_of_silent_modules_are_restored() -> None:
    encoder = switched(nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True), 2))
    for layer in encoder.layers:
        layer.self_attn.need_weights = False
    x = torch.randn(BATCH, LENGTH, EMBED)
    with attention_maps(encoder, average=False) as maps:
        encoder(x)
    assert {name: weights.shape for name, weights in maps.items()} == {
        f"layers.{place}.self_attn": (BATCH, HEADS, LENGTH, LENGTH) for place in range(2)
    }
    assert encoder.layers[0].self_attn.need_weights is False
    assert not encoder.layers[0].self_attn._forward_hooks
    with pytest.raises(ValueError, match="model"), attention_maps(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("batch_first", [True, False])
def test_export_of_an_encoder(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=batch_first)
    encoder = switched(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()

    def inputs(length: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.randn(3, length, EMBED)
        padding = torch.arange(length).expand(3, length) >= torch.tensor([[length], [2], [length]])
        return x if batch_first else x.transpose(0, 1).contiguous(), {"src_key_padding_mask": padding}

    x, kwargs = inputs(LENGTH)
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {"src": {1 if batch_first else 0: length}, "src_key_padding_mask": {1: length}}
    exported = torch.export.export(encoder, (x,), kwargs, dynamic_shapes=shapes)
    x, kwargs = inputs(11)
    torch.testing.assert_close(exported.module()(x, **kwargs), encoder(x, **kwargs))
