"""The operator a compiler sees of ``varlen_attention``: boundaries are read inside it, so lengths recompile nothing.

Its gradient computes the sequences again. Eager calls do without it: autograd records their dense calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import varlen_eager

_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor? cu_seq_k, SymInt max_q, SymInt max_k, "
    "float scale, SymInt? left, SymInt? right, Tensor? seqused_k, Tensor? block_table, bool return_lse"
)
_SCHEMAS = {
    "varlen_attention": f"({_PROBLEM}) -> (Tensor, Tensor)",
    "varlen_attention_backward": f"(Tensor? grad_out, Tensor? grad_lse, {_PROBLEM}) -> (Tensor, Tensor, Tensor)",
}
_library = torch.library.Library("fastattn", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _forward(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, lse = varlen_eager.attend(query, *rest)
    # Views and layouts of the backend in force stay inside: a compiler relies on those of the shape rule.
    return out.contiguous(), _no_lse(query) if lse is None else lse.contiguous()


def _backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    leaves: Any = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    # An operator runs below autograd; this one needs it.
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        out, lse = varlen_eager.attend(*leaves, *rest)
        pairs = [
            (result, grad)
            for result, grad in ((out, grad_out), (lse, grad_lse))
            if result is not None and grad is not None and result.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        grads = torch.autograd.grad(
            [result for result, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True
        )
    dquery, dkey, dvalue = (
        torch.zeros_like(leaf) if grad is None else grad.contiguous() for leaf, grad in zip(leaves, grads, strict=True)
    )
    return dquery.detach(), dkey.detach(), dvalue.detach()


def _no_lse(query: Tensor) -> Tensor:
    return query.new_empty(0, dtype=varlen_eager.lse_dtype(query))


for _name, _call in (("varlen_attention", _forward), ("varlen_attention_backward", _backward)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _call, _key)


@torch.library.register_fake("fastattn::varlen_attention", lib=_library)
def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[-1])
    if not rest[-1]:
        return out, _no_lse(query)
    return out, query.new_empty(query.shape[1], query.shape[0], dtype=varlen_eager.lse_dtype(query))


@torch.library.register_fake("fastattn::varlen_attention_backward", lib=_library)
def _backward_fake(
    grad_out: Tensor | None, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seq_q, cu_seq_k, *numbers, seqused_k, block_table, return_lse = inputs
    ctx.save_for_backward(query, key, value, cu_seq_q, cu_seq_k, seqused_k, block_table)
    ctx.numbers, ctx.return_lse = numbers, return_lse
    ctx.set_materialize_grads(False)


def _vjp(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *packed, seqused_k, block_table = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 13
    grads = torch.ops.fastattn.varlen_attention_backward(
        grad_out, grad_lse if ctx.return_lse else None, *packed, *ctx.numbers, seqused_k, block_table, ctx.return_lse
    )
    return (*grads, *(None,) * 10)


torch.library.register_autograd("fastattn::varlen_attention", _vjp, setup_context=_setup, lib=_library)
