"""The operators of attention of packed sequences by our kernels: schema, shape rule, autograd.

| operator (torch.ops.fastattn) | returns                              |
|-------------------------------|--------------------------------------|
| packed_attention              | out (Tq, H, D), logsumexp (2, H, Tq) |
| packed_attention_backward     | gradients of query, key and value    |

query (Tq, H, D), key and value (Tk, Hkv, D), H a multiple of Hkv; cu_seq_q and cu_seq_k (N + 1) and seqused_k (N),
int32 or int64; max_q and max_k, at least the lengths of the longest sequence; a query sees the keys up to ``left``
before and ``right`` after its position, None leaves a side open, and the last query of a sequence stands at its last
key; backend "triton" or "cpu". What is computed: ``fastattn.varlen_eager``.

On a GPU boundaries are not read on the host: descending ones, or such as lie outside the tensors, are cut, and rows of
no sequence are 0, with a logsumexp of -inf. On the CPU they raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import debug
from fastattn.kernels import definition
from fastattn.kernels.attention import extension, packed_launch

_SEQUENCES = (
    "Tensor cu_seq_q, Tensor cu_seq_k, Tensor? seqused_k, SymInt max_q, SymInt max_k, float scale, SymInt? left, "
    "SymInt? right, str backend"
)
_SCHEMAS = {
    "packed_attention": f"(Tensor query, Tensor key, Tensor value, {_SEQUENCES}) -> (Tensor, Tensor)",
    "packed_attention_backward": (
        "(Tensor? grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, Tensor out, "
        f"Tensor logsumexp, {_SEQUENCES}) -> (Tensor, Tensor, Tensor)"
    ),
}
_library = torch.library.Library("fastattn", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

# (query, key, value, *sequences but the backend) -> out, logsumexp (H, Tq): plain PyTorch, differentiable to any order.
# ``fastattn.varlen`` puts it here, because kernels import nothing that stands above them.
second_derivative: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {}


def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, seqused_k: Tensor | None, max_q: int,
    max_k: int, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    *numbers, backend = rest
    sequences = (cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, *numbers)
    if backend == "cpu":  # it checks the boundaries itself
        return extension.packed_attention(query, key, value, *sequences)
    if debug.may_read(cu_seq_q):
        debug.check_cu_seq("cu_seq_q", cu_seq_q.tolist(), query.shape[0], max_q, "max_q")
        bounds = cu_seq_k.tolist()
        debug.check_cu_seq("cu_seq_k", bounds, key.shape[0], max_k, "max_k")
        if seqused_k is not None:
            debug.check_used(seqused_k.tolist(), bounds)
    return packed_launch.packed_attention(query, key, value, *sequences)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, backend = arguments
    backward = extension.packed_attention_backward if backend == "cpu" else packed_launch.packed_attention_backward
    return backward(*rest)


for _key in ("CPU", "CUDA"):
    _library.impl("packed_attention", _forward, _key)
    _library.impl("packed_attention_backward", _backward, _key)


@torch.library.register_fake("fastattn::packed_attention", lib=_library)
def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, dim = query.shape
    return query.new_empty(tokens, heads, dim), query.new_empty(2, heads, tokens, dtype=torch.float32)


@torch.library.register_fake("fastattn::packed_attention_backward", lib=_library)
def _backward_fake(
    grad_out: Tensor | None, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seq_q, cu_seq_k, seqused_k, *ctx.numbers = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seq_q, cu_seq_k, seqused_k)
    ctx.set_materialize_grads(False)


def _vjp(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, logsumexp, *bounds = ctx.saved_tensors
    grads: Any = (None, None, None)
    if definition.asked_for(grad_out, grad_logsumexp):
        dlogsumexp = None if grad_logsumexp is None else grad_logsumexp[0]
        grads = definition.gradients(
            lambda *inputs: second_derivative["packed"](*inputs, *bounds, *ctx.numbers[:-1]),
            (query, key, value),
            [place for place in range(3) if ctx.needs_input_grad[place]],
            (grad_out, dlogsumexp),
        )
    elif grad_out is not None or grad_logsumexp is not None:
        grads = torch.ops.fastattn.packed_attention_backward(
            grad_out, grad_logsumexp, query, key, value, out, logsumexp, *bounds, *ctx.numbers
        )
    return (*grads, *(None,) * (len(bounds) + len(ctx.numbers)))


torch.library.register_autograd("fastattn::packed_attention", _vjp, setup_context=_setup, lib=_library)
