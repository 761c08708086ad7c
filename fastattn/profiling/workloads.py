"""The models that the profile command brings: attention, an encoder, an LSTM, a Hugging Face model from a folder.

All implementations of one hold the same parameters and get the same batch. ``torch`` is the module as torch (or
transformers' "eager" attention) runs it, ``sdpa`` the one that goes through F.scaled_dot_product_attention, and
``fastattn`` the patched one; ``fastattn:NAME`` forces a backend.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fastattn.dispatch import Backend, backend
from fastattn.patching import patch
from fastattn.profiling.options import Mask

# Bound at import: a program may rebind torch's classes to ours.
_MultiheadAttention, _LSTM = nn.MultiheadAttention, nn.LSTM
_TransformerEncoder, _TransformerEncoderLayer = nn.TransformerEncoder, nn.TransformerEncoderLayer

OURS, TORCH, SDPA = "fastattn", "torch", "sdpa"
MODELS = ("mha", "encoder", "lstm", "hf:PATH")
_ENCODER_LAYERS = 2


@dataclass(frozen=True)
class Shape:
    """Sizes and dtype of a workload; ``heads`` and ``features`` count where the model leaves them open."""

    batch: int
    features: int
    heads: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Workload:
    """What ``fastattn.profiling.profile`` is to be given."""

    models: Mapping[str, Forced]
    make_batch: Callable[[int], Any]
    flops: Callable[[int], float] | None
    # An index beyond a table of positions ends a CUDA process: None where there is no table.
    longest: int | None = None


def build(model: str, compare: Sequence[str], shape: Shape, mask: Mask, *, backward: bool, weights: bool) -> Workload:
    """The workload of ``--model`` with the implementations of ``compare``; ours comes last.

    Args:
        model: one of MODELS.
        compare: names as in the module's docstring.
        shape: sizes, dtype and device.
        mask: what hides keys.
        backward: modules train, and the count of operations includes the backward.
        weights: ``mha`` returns the head-averaged weights, as torch's module does by default.

    Raises:
        ValueError: a model, implementation or mask that there is not, naming the option.
    """
    names = [name for name in dict.fromkeys(compare) if name != OURS] + [OURS]
    kind, _, path = model.partition(":")
    if kind == "hf" and path:
        return _hugging_face(path, names, shape, mask, backward)
    if model not in MODELS[:3]:
        raise ValueError(f"--model: got {model!r}, expected {', '.join(MODELS)}")
    if weights and model != "mha":
        raise ValueError(f"--weights: got --model {model}, expected mha")
    if model == "lstm":
        return _lstm(names, shape, mask, backward)
    layers = _ENCODER_LAYERS if model == "encoder" else 1
    options: dict[str, Any] = {"batch_first": True, "device": shape.device, "dtype": shape.dtype}
    base: nn.Module
    if model == "mha":
        base = _MultiheadAttention(shape.features, shape.heads, **options)
    else:
        layer = _TransformerEncoderLayer(shape.features, shape.heads, 4 * shape.features, dropout=0.0, **options)
        # Nested tensors would cut the output to the longest sequence.
        base = _TransformerEncoder(layer, layers, enable_nested_tensor=False)
    models = {
        name: _Attention(_implementation(base, name), name, mask.causal, weights).train(backward) for name in names
    }

    def make_batch(length: int) -> tuple[Tensor, Tensor | None]:
        x = torch.randn(shape.batch, length, shape.features, device=shape.device, dtype=shape.dtype)
        return x, padding(mask, shape, length) if mask.padded else None

    def flops(length: int) -> float:
        tokens = float(shape.batch * length)
        columns = length * (0.5 if mask.causal else mask.kept)
        products = 8.0 * tokens * shape.features**2 + (16.0 * tokens * shape.features**2 if model == "encoder" else 0.0)
        attention = 4.0 * tokens * columns * shape.features
        return layers * (products * (3.0 if backward else 1.0) + attention * (3.5 if backward else 1.0))

    return Workload(models, make_batch, flops)


def padding(mask: Mask, shape: Shape, length: int) -> Tensor:
    """(B, L), True at padding: lengths spread evenly about ``mask.kept`` of ``length``, the widest spread that fits."""
    return torch.arange(length, device=shape.device) >= _lengths(mask, shape, length).to(shape.device)[:, None]


def _lengths(mask: Mask, shape: Shape, length: int) -> Tensor:
    """(B,), descending; their mean is ``mask.kept * length``, each is at least 1."""
    half = min(mask.kept, 1.0 - mask.kept)
    places = (torch.arange(shape.batch, 0, -1) - 0.5) / shape.batch
    return ((mask.kept + half * (2.0 * places - 1.0)) * length).round().long().clamp(1, length)


def _implementation(base: nn.Module, name: str) -> nn.Module:
    """A copy of ``base`` with the same parameters, patched where it is ours."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    twin = copy.deepcopy(base, shared)
    if name.partition(":")[0] == OURS:
        report = patch(twin)
        if not report.replaced:
            raise ValueError(f"--model: fastattn replaces nothing in it: {report.skipped}")
    elif name not in (TORCH, SDPA):
        choices = f"{TORCH}, {SDPA}, {OURS}, {OURS}:BACKEND"
        raise ValueError(f"--compare: got {name!r}, expected names out of {choices}")
    return twin


class Forced(nn.Module):
    """``module``, run under a backend of ours where its name forces one."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        forced = name.partition(":")[2]
        if forced and forced not in set(Backend):
            raise ValueError(f"--compare: got {name!r}, expected a backend out of {', '.join(Backend)}")
        self.backend = forced or "auto"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with backend(self.backend):
            return self.module(*args, **kwargs)


class _Attention(Forced):
    """Self-attention, or an encoder, called as its implementation wants it."""

    def __init__(self, module: nn.Module, name: str, causal: bool, weights: bool) -> None:
        super().__init__(module, name)
        self.ours, self.fast_path = name.partition(":")[0] == OURS, name != SDPA
        self.causal, self.weights = causal, weights

    def forward(self, x: Tensor, ignored: Tensor | None) -> Any:
        """Output of x (B, L, E), where ignored (B, L) is True at padding."""
        triangle = None
        if self.causal and not self.ours:  # torch's modules take is_causal for a promise about a mask
            triangle = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu_(1)
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(before and self.fast_path)
        try:
            if isinstance(self.module, _TransformerEncoder):
                return super().forward(x, mask=triangle, src_key_padding_mask=ignored, is_causal=self.causal)
            return super().forward(
                x, x, x, key_padding_mask=ignored, need_weights=self.weights, attn_mask=triangle, is_causal=self.causal
            )
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


def _lstm(names: list[str], shape: Shape, mask: Mask, backward: bool) -> Workload:
    if mask.causal:
        raise ValueError("--mask: got causal, expected none or padding:SHARE with --model lstm")
    if SDPA in names:
        raise ValueError("--compare: got sdpa, expected torch or fastattn:BACKEND with --model lstm")
    base = _LSTM(shape.features, shape.features, batch_first=True, device=shape.device, dtype=shape.dtype)
    models = {name: Forced(_implementation(base, name), name).train(backward) for name in names}

    def make_batch(length: int) -> Any:
        x = torch.randn(shape.batch, length, shape.features, device=shape.device, dtype=shape.dtype)
        return pack_padded_sequence(x, _lengths(mask, shape, length), batch_first=True) if mask.padded else x

    def flops(length: int) -> float:
        return 16.0 * shape.batch * length * mask.kept * shape.features**2 * (3.0 if backward else 1.0)

    return Workload(models, make_batch, flops)


def _hugging_face(path: str, names: list[str], shape: Shape, mask: Mask, backward: bool) -> Workload:
    """A model from a local folder; where that has a configuration and no weights, with random ones."""
    if mask.causal:
        raise ValueError("--mask: got causal, expected none or padding:SHARE with hf:PATH, which masks as it is built")
    import transformers

    automatic: Any = transformers.AutoModel
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"--model: got hf:{path}, expected a folder with config.json")
    config: Any = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    try:
        base: Any = automatic.from_pretrained(path, local_files_only=True, dtype=shape.dtype)
    except OSError:
        base = automatic.from_config(config, dtype=shape.dtype)
    base.set_attn_implementation("eager")
    base.to(shape.device)
    models = {}
    for name in names:
        twin = _implementation(base, name)
        if name == SDPA:
            twin.set_attn_implementation("sdpa")  # type: ignore[operator]
        models[name] = Forced(twin, name).train(backward)

    def make_batch(length: int) -> dict[str, Tensor]:
        tokens = torch.randint(config.vocab_size, (shape.batch, length), device=shape.device)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if mask.padded:
            batch["attention_mask"] = (~padding(mask, shape, length)).long()
        if config.is_encoder_decoder:
            batch["decoder_input_ids"] = tokens
        return batch

    return Workload(models, make_batch, None, getattr(config, "max_position_embeddings", None))
