"""Launching the Triton kernels: pointers, strides, flags and grids for each operator of ``op``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.attention import arguments, config, shapes
from fastattn.kernels.device import architecture, on
from fastattn.philox import keep_threshold

try:
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    from fastattn.kernels.attention import (
        backward,
        descriptors,
        forward,
        mask_gradient,
        operands,
        specialized_launch,
        weights,
    )
    from fastattn.kernels.attention.operands import heads as _heads
    from fastattn.kernels.attention.operands import weights as _weights
except ImportError as error:
    _MISSING: str | None = f"triton cannot be imported ({error}); run: pip install 'triton>=3.6,<3.10'"
    INTERPRETED = False
else:
    _MISSING = None
    INTERPRETED = isinstance(forward.attention_forward, InterpretedFunction)

# (compute capability, triton minor version) on which the whole GPU test suite has passed. Only these may be chosen
# without being asked for: a path that never ran on a real device is not a default.
VERIFIED: frozenset[tuple[tuple[int, int], str]] = frozenset()
_LOG2E = math.log2(math.e)
# Of unscaled scores' maxima: positive in float32, and far from where a product of the two overflows.
_LEAST_SCALE, _LARGEST_SCALE = 1e-30, 1e30


def why_unavailable(device_type: str) -> str | None:
    """The reason the kernels cannot run on tensors of this device type; None when they can."""
    if _MISSING is not None:
        return _MISSING
    if device_type == "cpu":
        return None if INTERPRETED else "the CPU needs Triton's interpreter: set TRITON_INTERPRET=1 before the import"
    if device_type != "cuda":
        return f"device {device_type}; the kernels run on CUDA"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability()}; the kernels need 8.0"
    return None


def verified(device_type: str) -> bool:
    """Whether this device and this Triton have passed the GPU tests."""
    if device_type != "cuda" or _MISSING is not None:
        return False
    return (torch.cuda.get_device_capability(), triton.__version__.rsplit(".", 1)[0]) in VERIFIED


def why_not_verified(device_type: str) -> str:
    """The reason ``auto`` does not take the kernels although they can run."""
    return 'not verified on this device with this Triton; force it with fastattn.backend("triton")'


NOT_PACKED = arguments.Packed(None, None, None)


class Problem:
    """The arguments shared by all kernels."""

    def __init__(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None,
        alibi_slopes: Tensor | None, segment_query: Tensor | None, segment_key: Tensor | None, seed: Tensor | None,
        dropout_p: float, scale: float, softcap: float, shift: int, lower: int | None, upper: int | None,
        packed: arguments.Packed = NOT_PACKED, sequences: tuple[int, int, int] = (0, 0, 0),
    ) -> None:  # fmt: skip
        """``sequences``: of packed ones, how many, and the longest's queries and keys."""
        self.batch, self.heads, self.rows, self.head_dim = query.shape
        self.key_heads, self.columns = key.shape[1], key.shape[2]
        self.packed, pitches = packed, (self.rows, self.columns)
        if packed is not NOT_PACKED:
            self.batch, self.rows, self.columns = sequences
        self.empty = 0 in (self.batch, self.heads, self.rows, self.columns)
        if self.empty:
            return
        self.dtype, self.device, self.dropout = query.dtype, query.device, dropout_p > 0.0
        masked = attn_mask is not None or key_padding_mask is not None or segment_query is not None
        bent = softcap > 0.0 or alibi_slopes is not None
        # A sequence's own lengths and addresses take registers that the plain tiles have none left of above 128.
        tight = packed is not NOT_PACKED and config.block_d(self.head_dim) > 128
        self.heavy = masked or bent or self.dropout or lower is not None or tight
        natural = any(mask is not None and mask.dtype != torch.bool for mask in (attn_mask, key_padding_mask))
        # Nothing beside the products decides the probabilities but a band and boolean padding.
        self.bare = not (
            natural or bent or self.dropout or attn_mask is not None or segment_query is not None
        )
        self.scale = scale
        unit = 1.0 if natural else _LOG2E
        self.score_scale = scale / softcap if softcap > 0.0 else scale * unit
        exact = self.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
        keep_scale = 1.0 if not self.dropout else 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
        self.dropout_arguments = arguments.Dropout(
            seed if self.dropout else None, keep_threshold(dropout_p), keep_scale
        )
        self.shape = arguments.Shape(
            self.batch, self.heads, self.heads // self.key_heads, self.rows, self.columns,
            self._within_reach(lower), self._within_reach(upper), shift, *pitches,
        )  # fmt: skip
        slopes = (None, 0) if alibi_slopes is None else (alibi_slopes, operands.batch_stride(alibi_slopes))
        self.masks = arguments.Masks._make(
            (*operands.mask(attn_mask), *operands.padding(key_padding_mask), *slopes,
             *operands.segments(segment_query, segment_key), softcap * unit)
        )  # fmt: skip
        self.features = arguments.Features(
            mask_bool=attn_mask is not None and attn_mask.dtype == torch.bool,
            mask_rows=attn_mask is not None and attn_mask.shape[2] != 1,
            mask_columns=attn_mask is not None and attn_mask.shape[3] != 1,
            padding_bool=key_padding_mask is not None and key_padding_mask.dtype == torch.bool,
            has_lower=lower is not None,
            has_upper=upper is not None,
            natural=natural,
            softcap=softcap > 0.0,
            split=config.split_loops(self.head_dim, heavy=self.heavy),
            piece=config.product_piece(self.dtype, self.head_dim),
            precision="ieee" if exact else "tf32",
        )

    def _within_reach(self, bound: int | None) -> int:
        """A bound of key - query no farther than both lengths together: its sums with positions fit 32 bits."""
        reach = self.rows + self.columns
        return 0 if bound is None else min(max(bound, -reach), reach)

    def tile(self, name: str, tensors: Mapping[str, Any]) -> config.Tile:
        """The tile of a kernel that reads ``tensors``."""
        choose = partial(
            config.tile, name, self.dtype, self.head_dim, heavy=self.heavy, arch=architecture(self.device)
        )
        tile = choose(described=True)
        if tile.descriptors and not (self.packed is NOT_PACKED and descriptors.possible(tensors)):
            tile = choose(described=False)
        return tile

    def programs_of_queries(self, tile: config.Tile) -> int:
        """Of a kernel whose programs own queries."""
        return int(triton.cdiv(self.rows, tile.block_m) * self.batch * self.heads)

    def programs_of_keys(self, tile: config.Tile) -> int:
        """Of a kernel whose programs own keys."""
        return int(triton.cdiv(self.columns, tile.block_n) * self.batch * self.key_heads)

    def specialized(
        self, name: str, programs: Callable[[config.Tile], int], tensors: Mapping[str, Any], **given: Any
    ) -> tuple[Callable[..., Any], dict[str, Any]] | None:
        """As ``ready``, a kernel of specialised warps; None where the other one of its name is to be taken."""
        tile = self._specialized_tile(name, tensors)
        if tile is None:
            return None
        given |= {"masks": self.masks, **self.shape._asdict(), "F": self.features}
        return specialized_launch.ready(name, tile, programs(tile), self.head_dim, tensors, **given)

    def _specialized_tile(self, name: str, tensors: Mapping[str, Any]) -> config.Tile | None:
        """The tile of a kernel of specialised warps, where it is to be taken.

        It serves what has no masks but a band and boolean padding, tensors that descriptors can read and write, and
        scores that grow with the products: it masks them, and takes their maximum, before it scales them.
        """
        if not self.bare or self.packed is not NOT_PACKED or not _LEAST_SCALE <= self.score_scale <= _LARGEST_SCALE:
            return None
        if name == "dkey_dvalue" and self.features.has_lower and self.heads != self.key_heads:
            return None  # the loop over the heads of a group spills 36 to 288 bytes beside a window's two bounds
        cut = self.features.has_lower or self.features.padding_bool
        tile = config.specialized_tile(name, self.head_dim, cut=cut, arch=architecture(self.device))
        described = tile is not None and all(descriptors.describable(heads) for heads in tensors.values())
        return tile if described else None

    def ready(
        self, name: str, kernel: Any, programs: Callable[[config.Tile], int], **arguments: Any
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """One kernel with its grid, of the size that ``programs`` gives for its tile, and all of its arguments."""
        tile = self.tile(name, arguments)
        features = replace(self.features, ahead=tile.ahead, edge_stages=tile.edge_stages)
        if tile.descriptors:
            arguments |= descriptors.of(arguments, tile, config.block_d(self.head_dim))
        arguments |= {
            "masks": self.masks, **self.shape._asdict(), "F": features, "DIM": self.head_dim,
            "BLOCK_D": config.block_d(self.head_dim), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
            "num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers,
        }  # fmt: skip
        return kernel[(programs(tile),)], arguments

    def launch(self, name: str, kernel: Any, programs: Callable[[config.Tile], int], **arguments: Any) -> None:
        """Run one kernel; see ``ready``."""
        start, given = self.ready(name, kernel, programs, **arguments)
        with on(self.device):
            start(**given)


def attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *problem: Any) -> tuple[Tensor, Tensor]:
    """See ``op``."""
    return forward_pass(query, key, value, sinks, Problem(query, key, *problem))


def forward_pass(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, shared: Problem
) -> tuple[Tensor, Tensor]:
    out, logsumexp = shapes.empty_output(query, value), shapes.empty_logsumexp(query)
    if shared.packed is not NOT_PACKED:  # boundaries may leave rows to nobody
        out.zero_()
        logsumexp.fill_(float("-inf"))
    if shared.empty:
        logsumexp[0] = float("-inf") if sinks is None else sinks.float()[:, None]
        logsumexp[1] = 0.0
        return out.zero_(), logsumexp
    start, given = forward_launch(shared, query, key, value, sinks, out, logsumexp)
    with on(shared.device):
        start(**given)
    return out, logsumexp


def forward_launch(
    shared: Problem, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, out: Tensor, logsumexp: Tensor
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The forward kernel with its grid, and all of its arguments; for a problem that is not empty."""
    tensors = {"query": _heads(query), "key": _heads(key), "value": _heads(value), "out": _heads(out)}
    given = {"sinks": sinks, "logsumexp": logsumexp, "scale": shared.score_scale}
    programs = shared.programs_of_queries
    return shared.specialized("forward", programs, tensors, **given) or shared.ready(
        "forward", forward.attention_forward, programs,
        **tensors, **given, dropout=shared.dropout_arguments, packed=shared.packed,
    )  # fmt: skip


def attention_weights(query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> Tensor:
    """See ``op``."""
    *problem, average = rest
    result = shapes.empty_weights(query, key, average)
    shared = Problem(query, key, *problem)
    if shared.empty:
        return result.zero_()
    averaged = shared.heads if average else 1

    def programs(tile: config.Tile) -> int:
        tiles = triton.cdiv(shared.rows, tile.block_m) * triton.cdiv(shared.columns, tile.block_n)
        return int(tiles * shared.batch * (shared.heads // averaged))

    shared.launch(
        "weights",
        weights.attention_weights,
        programs,
        query=_heads(query), key=_heads(key), logsumexp=logsumexp.contiguous(),
        weights=_weights(result.unsqueeze(1) if average else result), averaged=averaged, scale=shared.score_scale,
        dropout=shared.dropout_arguments,
    )  # fmt: skip
    return result


def attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``op``."""
    *problem, average = rest
    out, logsumexp = attention(query, key, value, sinks, *problem)
    return out, logsumexp, attention_weights(query, key, logsumexp, *problem, average)


def attention_backward(
    grad_out: Tensor | None, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    logsumexp: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """See ``op``."""
    *problem, attn_mask_grad, padding_grad = rest
    masks = shapes.empty_mask_grads(problem[:2], (attn_mask_grad, padding_grad))
    shared = Problem(query, key, *problem)
    return *backward_pass(grad_out, grad_logsumexp, query, key, value, out, logsumexp, shared, masks), masks


def backward_pass(
    grad_out: Tensor | None, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    logsumexp: Tensor, shared: Problem, masks: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dquery, dkey, dvalue; those of ``masks`` are written there."""
    dquery, dkey, dvalue = (shapes.empty_like_heads_last(tensor) for tensor in (query, key, value))
    if shared.empty or shared.packed is not NOT_PACKED:
        for grad in (dquery, dkey, dvalue, *masks):
            grad.zero_()
    if shared.empty:
        return dquery, dkey, dvalue
    dout = _heads(torch.zeros_like(out) if grad_out is None else grad_out.to(out.dtype))
    delta = query.new_empty(query.shape[:3], dtype=torch.float32)
    dlogsumexp = arguments.Heads(None, 0, 0, 0)
    if grad_logsumexp is not None:
        dlogsumexp = arguments.Heads(grad_logsumexp, *grad_logsumexp.stride()[1:])
    tile = config.tile("delta", shared.dtype, shared.head_dim)
    batch, heads, rows = delta.shape
    # Of all rows alike: of packed sequences as if they were one.
    shape = shared.shape._replace(batches=batch, rows=rows, pitch=rows)
    with on(shared.device):
        backward.attention_delta[(triton.cdiv(rows, tile.block_m) * batch * heads,)](
            _heads(out), dout, dlogsumexp, delta, *shape, DIM=shared.head_dim, BLOCK_D=config.block_d(shared.head_dim),
            BLOCK_M=tile.block_m, num_warps=tile.warps,
        )  # fmt: skip
    common = {
        "query": _heads(query), "key": _heads(key), "value": _heads(value), "dout": dout, "dweights": _weights(None),
        "logsumexp": logsumexp.contiguous(), "delta": delta, "dropout": shared.dropout_arguments,
    }  # fmt: skip
    _launch_gradients(shared, common, dquery, None, dkey, dvalue, masks)
    return dquery, dkey, dvalue


def attention_weights_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """See ``op``."""
    *problem, average, attn_mask_grad, padding_grad = rest
    shared = Problem(query, key, *problem)
    dquery, dkey = shapes.empty_like_heads_last(query), shapes.empty_like_heads_last(key)
    dlogsumexp = shapes.empty_logsumexp(query)
    dlogsumexp[1] = 0.0
    masks = shapes.empty_mask_grads(problem[:2], (attn_mask_grad, padding_grad))
    if shared.empty:
        return dquery.zero_(), dkey.zero_(), dlogsumexp.zero_(), [mask.zero_() for mask in masks]
    if average:
        grad_weights = grad_weights.unsqueeze(1).expand(-1, shared.heads, -1, -1)
    seed, threshold, keep_scale = shared.dropout_arguments
    common = {
        "query": _heads(query), "key": _heads(key), "value": _heads(None), "dout": _heads(None),
        "dweights": _weights(grad_weights), "logsumexp": logsumexp.contiguous(), "delta": None,
        "dropout": arguments.Dropout(seed, threshold, keep_scale / (shared.heads if average else 1)),
    }  # fmt: skip
    _launch_gradients(shared, common, dquery, dlogsumexp, dkey, None, masks)
    return dquery, dkey, dlogsumexp, masks


def _launch_gradients(
    shared: Problem, common: dict[str, Any], dquery: Tensor, dlogsumexp: Tensor | None, dkey: Tensor,
    dvalue: Tensor | None, masks: list[Tensor],
) -> None:  # fmt: skip
    of_queries, of_keys = shared.programs_of_queries, shared.programs_of_keys
    given = {**common, "scale": shared.scale, "score_scale": shared.score_scale}
    if not _launch_specialized("dquery", shared, given, of_queries, dquery=_heads(dquery)):
        shared.launch(
            "dquery", backward.attention_dquery, of_queries,
            **given, dquery=_heads(dquery), dlogsumexp=dlogsumexp, packed=shared.packed,
        )  # fmt: skip
    written = {"dkey": _heads(dkey), "dvalue": _heads(dvalue)}
    if not _launch_specialized("dkey_dvalue", shared, given, of_keys, **written):
        apart = dvalue is not None and shared.tile("dkey_dvalue", given).apart
        for of in [("dkey",), ("dvalue",)] if apart else [("dkey", "dvalue")]:
            wanted = {name: heads if name in of else _heads(None) for name, heads in written.items()}
            shared.launch(
                "dkey_dvalue", backward.attention_dkey_dvalue, of_keys, **given, **wanted, packed=shared.packed
            )
    for grad in masks:
        _launch_mask_gradient(shared, common, grad if grad.dim() == 4 else grad[:, None, None, :])


def _launch_specialized(
    name: str, shared: Problem, common: Mapping[str, Any], programs: Callable[[config.Tile], int],
    **written: arguments.Heads,
) -> bool:  # fmt: skip
    """Whether a gradient kernel of specialised warps serves the call; it is launched then."""
    tensors = {read: common[read] for read in ("query", "key", "value", "dout")} | written
    rest = {other: common[other] for other in ("logsumexp", "delta", "scale", "score_scale")}
    of_weights = common["dweights"].pointer is not None
    ready = None if of_weights else shared.specialized(name, programs, tensors, **rest)
    if ready is None:
        return False
    start, given = ready
    with on(shared.device):
        start(**given)
    return True


def _launch_mask_gradient(shared: Problem, common: dict[str, Any], grad: Tensor) -> None:
    batches, heads, rows, columns = grad.shape

    def programs(tile: config.Tile) -> int:
        row_tiles = triton.cdiv(rows, tile.block_m) if rows > 1 else 1
        column_tiles = triton.cdiv(columns, tile.block_n) if columns > 1 else 1
        return int(batches * heads * row_tiles * column_tiles)

    shared.launch(
        "dmask",
        mask_gradient.attention_dmask,
        programs,
        **common, dmask=_weights(grad), dmask_batches=batches, dmask_heads=heads,
        scale=shared.score_scale, GRAD_ROWS=rows > 1, GRAD_COLUMNS=columns > 1,
    )  # fmt: skip
