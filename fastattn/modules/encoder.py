"""nn.TransformerEncoder that takes no padding through its layers, in inference on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import TransformerEncoder as TorchTransformerEncoder
from torch.nn import TransformerEncoderLayer as TorchTransformerEncoderLayer
from torch.nn.modules.module import _has_any_global_hook

from fastattn.dispatch import Backend, Request, choose
from fastattn.modules.attention import MultiheadAttention


class TransformerEncoder(TorchTransformerEncoder):
    """What ``patch`` makes of an nn.TransformerEncoder that drops padding in inference by nested tensors.

    The real tokens of all sequences go through the layers as one packed row (1, tokens, E), in which the attention
    keeps every sequence to itself; then they return to their places, with zeros on padding, as torch's nested tensors
    do. Wherever torch makes none (training, a mask beside the padding, a compiler) nothing is packed, and here neither
    on a GPU, with hooks, or with layers of another class.
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
        tokens = ~src_key_padding_mask
        sequence = tokens.nonzero()[:, 0].unsqueeze(0)
        hidden = src[tokens].unsqueeze(0)
        for layer in self.layers:
            # A layer that torch makes nested tensors for is post-norm.
            hidden = layer.norm1(hidden + layer.self_attn.attend_within(hidden, sequence))
            hidden = layer.norm2(hidden + layer._ff_block(hidden))
        out = hidden.new_zeros(src.shape)
        out[tokens] = hidden[0]
        return out if self.norm is None else self.norm(out)

    def _packs(self, src: Tensor, padding: Tensor) -> bool:
        """Whether the call is one that torch would make a nested tensor for, and that the packed row serves."""
        if (
            any(part.training for part in self.modules())
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(src.device.type)
            or torch._C._are_functorch_transforms_active()
            or src.device.type != "cpu"
            or src.is_nested
            or src.dim() != 3
            or padding.dtype != torch.bool
            or padding.shape != src.shape[:2]
            or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (src, *self.parameters())))
            or _has_any_global_hook()
            or any(part._forward_hooks or part._forward_pre_hooks for part in self.modules() if part is not self)
            or not all(map(_computes_as_torch, self.layers))
        ):
            return False
        head_dim = self.layers[0].self_attn.head_dim
        request = Request(src.device.type, src.dtype, head_dim, head_dim, segments=True)
        return choose(request) is Backend.CPU


def _computes_as_torch(layer: nn.Module) -> bool:
    attention = layer.self_attn
    return (
        type(layer) is TorchTransformerEncoderLayer
        and not any("forward" in module.__dict__ for module in layer.modules())
        and isinstance(attention, MultiheadAttention)
        and attention.bias_k is None
        and not attention.add_zero_attn
    )
