"""nn.TransformerEncoder that takes no padding through its layers, in inference on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import TransformerEncoder as TorchTransformerEncoder
from torch.nn import TransformerEncoderLayer as TorchTransformerEncoderLayer
from torch.nn.modules.module import _has_any_global_hook

from fastattn import transforms
from fastattn.dispatch import Backend, Request, choose
from fastattn.kernels import onlookers
from fastattn.modules.attention import MultiheadAttention


class TransformerEncoder(TorchTransformerEncoder):
    """What ``patch`` makes of an nn.TransformerEncoder that drops padding in inference by nested tensors.

    The real tokens of all sequences go through the layers as one packed row (1, tokens, E), in which the attention
    keeps every sequence to itself; then they return to their places, with zeros on padding, as torch's nested tensors
    give. Unlike those, padding may stand anywhere. Nothing is packed in training, where a gradient or another
    derivative is taken, with a mask beside the padding, under autocast, a compiler or a tracer, with hooks, with layers
    that are no plain post-norm nn.TransformerEncoderLayer, where our C++ kernels do not serve the attention, nor with
    ``torch.backends.mha.set_fastpath_enabled(False)``, which stops torch's, too.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As nn.TransformerEncoder's: (B, S, E) of src (B, S, E), src_key_padding_mask (B, S) True on padding."""
        masked = mask is not None or bool(is_causal)
        if masked or src_key_padding_mask is None or not self._packs(src, src_key_padding_mask):
            padded: Tensor = super().forward(src, mask, src_key_padding_mask, is_causal)
            return padded
        out = self._packed(src, ~src_key_padding_mask)
        if not out.isfinite().all():
            # In one row a weight of 0 times what is no number is none: it would reach the other sequences.
            out = self._padded(src, src_key_padding_mask)
        return out if self.norm is None else self.norm(out)

    def _packed(self, src: Tensor, tokens: Tensor) -> Tensor:
        sequence = tokens.nonzero()[:, 0].unsqueeze(0)
        hidden = src[tokens].unsqueeze(0)
        for layer in self.layers:
            hidden = layer.norm1(hidden + layer.self_attn.attend_within(hidden, sequence))
            hidden = layer.norm2(hidden + layer._ff_block(hidden))
        out = hidden.new_zeros(src.shape)
        out[tokens] = hidden[0]
        return out

    def _padded(self, src: Tensor, padding: Tensor) -> Tensor:
        """The same, each sequence in a row of its own."""
        nothing = padding.unsqueeze(-1)
        hidden = src.masked_fill(nothing, 0.0)
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=padding)
        return hidden.masked_fill(nothing, 0.0)

    def _packs(self, src: Tensor, padding: Tensor) -> bool:
        """Whether the packed row serves the call."""
        if (
            onlookers.present()
            or not torch.backends.mha.get_fastpath_enabled()
            or torch.is_autocast_enabled(src.device.type)
            or transforms.transformed()
            or src.device.type != "cpu"
            or src.is_nested
            or src.dim() != 3
            or padding.dtype != torch.bool
            or padding.shape != src.shape[:2]
            or not padding.any()
            or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (src, *self.parameters())))
            or _has_any_global_hook()
            or self.training
            or not all(_in_inference_unseen(part) for part in self.modules() if part is not self)
            or not all(map(_computes_as_torch, self.layers))
        ):
            return False
        head_dims = {layer.self_attn.head_dim for layer in self.layers}
        requests = (Request(src.device.type, src.dtype, dim, dim, segments=True) for dim in head_dims)
        return all(choose(request) is Backend.CPU for request in requests)


def _in_inference_unseen(part: nn.Module) -> bool:
    """Whether a part drops nothing, and nobody looks at what goes in or out, or has put another forward in."""
    return not (part.training or part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)


def _computes_as_torch(layer: nn.Module) -> bool:
    """Whether a layer is torch's, post-norm, around our attention."""
    if type(layer) is not TorchTransformerEncoderLayer or layer.norm_first:
        return False
    attention = layer.self_attn
    return isinstance(attention, MultiheadAttention) and attention.bias_k is None and not attention.add_zero_attn
