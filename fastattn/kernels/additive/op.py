"""The operators of additive attention: schema, shape rule, autograd and autocast.

    S_ij = sum_d weight_d tanh(query_id + key_jd + coverage_ij coverage_weight_d),   -inf where the mask is False

| operator (torch.ops.fastattn) | returns                                                                |
|-------------------------------|------------------------------------------------------------------------|
| additive_scores               | scores (B, Tq, Tk), float32, or float64 for float64 inputs             |
| additive_scores_backward      | gradients of query, key, weight; of coverage_weight and, if asked for, |
|                               | coverage, where there is coverage                                      |

The scores alone are an operator of ours. They cost D evaluations of tanh for each entry, and the eager form holds the
(B, Tq, Tk, D) tensor of them; all that follows (masks, softmax, the product with the values) costs a few operations
an entry and is plain PyTorch, in ``fastattn.reference_additive``.

Arguments, checked by ``fastattn.additive`` before they come here: query (B, Tq, D), key (B, Tk, D) and weight (D) of
one dtype; coverage (B, 1 or Tq, Tk) floating and coverage_weight (D), both or none; key_padding_mask (B, Tk) boolean,
True takes part; backend "triton", "cpu" or "tiled".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels import definition
from fastattn.kernels.additive import extension, launch, shapes, tiled

_INPUTS = (
    "Tensor query, Tensor key, Tensor weight, Tensor? coverage, Tensor? coverage_weight, Tensor? key_padding_mask"
)
_BACKENDS: dict[str, Any] = {"triton": launch, "cpu": extension, "tiled": tiled}
# Autocast casts these positions; coverage keeps its own dtype, as a mask does: a sum of many weights.
_CAST = (0, 1, 2, 4)

Backward = tuple[Tensor, Tensor, Tensor, list[Tensor]]
# (query, key, weight, coverage, coverage_weight, key_padding_mask) -> scores in plain PyTorch, differentiable to any
# order. ``fastattn.additive`` sets it, because kernels import nothing that stands above them.
eager_scores: dict[str, Callable[..., Tensor]] = {}

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(f"additive_scores({_INPUTS}, str backend) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"additive_scores_backward(Tensor dscores, {_INPUTS}, bool coverage_grad, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _scores(
    query: Tensor, key: Tensor, weight: Tensor, coverage: Tensor | None, coverage_weight: Tensor | None,
    key_padding_mask: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    result: Tensor = _BACKENDS[backend].scores(query, key, weight, coverage, coverage_weight, key_padding_mask)
    if key_padding_mask is not None and backend != "cpu":  # there the kernel has
        result.masked_fill_(~key_padding_mask.unsqueeze(1), float("-inf"))
    return result


def _scores_backward(
    dscores: Tensor, query: Tensor, key: Tensor, weight: Tensor, coverage: Tensor | None,
    coverage_weight: Tensor | None, key_padding_mask: Tensor | None, coverage_grad: bool, backend: str,
) -> Backward:  # fmt: skip
    if key_padding_mask is not None and backend != "cpu":
        dscores = dscores.masked_fill(~key_padding_mask.unsqueeze(1), 0.0)
    # A program may call backward inside its autocast block: the products of the tiled path keep their dtype.
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        result: Backward = _BACKENDS[backend].scores_backward(
            dscores, query, key, weight, coverage, coverage_weight, key_padding_mask, coverage_grad
        )
    return result


for _key in ("CPU", "CUDA"):
    _library.impl("additive_scores", _scores, _key)
    _library.impl("additive_scores_backward", _scores_backward, _key)


# Shape rules -------------------------------------------------------------------------------------------------


def _scores_fake(query: Tensor, key: Tensor, *_: Any) -> Tensor:
    return shapes.empty_scores(query, key)


def _scores_backward_fake(
    dscores: Tensor, query: Tensor, key: Tensor, weight: Tensor, coverage: Tensor | None,
    coverage_weight: Tensor | None, key_padding_mask: Tensor | None, coverage_grad: bool, backend: str,
) -> Backward:  # fmt: skip
    more = [] if coverage_weight is None else [coverage_weight.new_empty(coverage_weight.shape)]
    if coverage is not None and coverage_grad:
        more.append(coverage.new_empty(coverage.shape))
    return query.new_empty(query.shape), key.new_empty(key.shape), weight.new_empty(weight.shape), more


torch.library.register_fake("fastattn::additive_scores", _scores_fake, lib=_library)
torch.library.register_fake("fastattn::additive_scores_backward", _scores_backward_fake, lib=_library)


# Autograd ----------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _vjp(ctx: Any, dscores: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of ``additive_scores``."""
    inputs = ctx.saved_tensors
    if dscores is None:
        return (None,) * 7
    if definition.asked_for(dscores):
        return _eager_vjp(ctx, dscores)
    coverage_grad = inputs[3] is not None and ctx.needs_input_grad[3]
    dquery, dkey, dweight, more = torch.ops.fastattn.additive_scores_backward(
        dscores, *inputs, coverage_grad, ctx.backend
    )
    dcoverage_weight, dcoverage = (*more, None, None)[:2]
    return dquery, dkey, dweight, dcoverage, dcoverage_weight, None, None


def _eager_vjp(ctx: Any, dscores: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients by the definition, which holds the (B, Tq, Tk, D) tensor."""
    wanted = [place for place, need in enumerate(ctx.needs_input_grad[:5]) if need]
    found = definition.gradients(
        lambda *inputs: (eager_scores["scores"](*inputs),), ctx.saved_tensors, wanted, (dscores,)
    )
    return *found, *(None,) * (7 - len(found))


torch.library.register_autograd("fastattn::additive_scores", _vjp, setup_context=_setup, lib=_library)


# Autocast ----------------------------------------------------------------------------------------------------


def _autocast(device_type: str, key: Any) -> Any:
    overload = torch.ops.fastattn.additive_scores.default
    guard = torch._C.DispatchKeySet(key)

    def call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(guard):
            cast = [
                arg.to(dtype) if place in _CAST and arg is not None and arg.dtype != torch.float64 else arg
                for place, arg in enumerate(args)
            ]
            return overload(*cast)

    return call


for _device, _name in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("additive_scores", _autocast(_device, getattr(torch._C.DispatchKey, _name)), _name)
