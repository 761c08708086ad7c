"""transformers' mask function: what a model's attention layers get as their mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.integrations.huggingface import architectures
from fastattn.integrations.huggingface.structure import StructuredMask

# Furthest key before and after the query's position that a pattern lets through; None is no bound.
_Band = tuple[int | None, int | None]


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask as structure where the pattern has one, transformers' own dense mask elsewhere.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: B, L, S and the positions of the first query and key;
            q_offset is a tensor for a static cache.
        mask_function: the pattern over (batch, head, query, key) positions; None is the causal one.
        attention_mask: (B, at least S) boolean, True is a token, or None.
        allow_is_causal_skip, allow_is_bidirectional_skip: the caller only hands on the mask of a pattern of that
            kind; without it the caller goes on to combine the mask, and gets a dense one.
        use_vmap: the pattern holds a function of the caller's own.
        kwargs: ``config``, ``device``, ``dtype``, ``local_size`` and more.

    Returns:
        None: what the layer itself says (is_causal, sliding_window), the newest query beside the newest key.
        (B, S) boolean: the same with padding; in a compiled graph only.
        StructuredMask (B, 1, L, S): all there is to know, for every other pattern of padding and a band.
        (B, 1, L, S) boolean: any other pattern, such as documents packed into one row.

    Raises NotImplementedError for an architecture that is not verified, ValueError for a mask of another rank.
    """
    from transformers import masking_utils

    architectures.check(kwargs.get("config"))
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: got shape {tuple(attention_mask.shape)}, expected (B, S) or four dimensions")
    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    pattern = None if use_vmap else _band_of(mask_function)
    if pattern is not None and (allow_is_causal_skip if pattern[1] == 0 else allow_is_bidirectional_skip):
        # Set by a caller who turns a causal model into an encoder, or the reverse: its layers do not know.
        contradicted = getattr(kwargs.get("config"), "is_causal", None) is not None
        kept, structure = _structure(
            pattern, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, contradicted,
            torch.device(kwargs.get("device", "cpu")),
        )  # fmt: skip
        if kept:
            return structure
    dense: Tensor | None = masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,  # it would leave the rest of a static cache to the alignment of torch's function
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        **kwargs,
    )
    return dense


def _structure(
    pattern: _Band,
    batch: int,
    queries: int,
    keys: int,
    q_offset: Any,
    kv_offset: int,
    attention_mask: Tensor | None,
    contradicted: bool,
    device: torch.device,
) -> tuple[bool, Tensor | None]:
    """Whether the pattern can stay structure, and the structure (None is one, see ``mask``)."""
    compiling = torch.compiler.is_compiling()
    static = isinstance(q_offset, Tensor)
    if static and (compiling or queries == 1):
        # The offset changes from step to step inside one tensor, possibly in a compiled decoding step: only a mask
        # computed from that tensor follows. For one query it is (B, 1, 1, S), no more than padding is.
        return False, None
    # For several queries, a prompt, reading the offset is worth one wait for the device.
    shift = (int(q_offset) if static else q_offset) - kv_offset
    newest = shift + queries == keys
    causal = pattern[1] == 0
    as_layer = newest if causal else not contradicted
    if compiling:
        # A graph whose shapes are symbols cannot hold a StructuredMask.
        if pattern[0] is not None or not as_layer:
            return False, None
        return True, _padding(attention_mask, batch, keys, kv_offset)
    left, right = pattern
    if left is not None and queries - 1 + shift - left <= 0:  # reaches the first key from the last query
        left = None
    if right is not None and shift + right >= keys - 1:  # reaches the last key from the first query
        right = None
    padding = _padding(attention_mask, batch, keys, kv_offset)
    if padding is None and as_layer and left is None and (causal or right is None):
        return True, None
    if left is None and right is None:
        shift = 0  # one value for all, by which a layer compiled alone stays compiled from step to step
    elif not (newest or shift == 0 or (right == 0 and 0 <= shift <= keys - queries)):
        return False, None  # the public function places the queries at the first or at the last keys
    return True, StructuredMask((batch, 1, queries, keys), padding, left, right, shift, device)


def _padding(attention_mask: Tensor | None, batch: int, keys: int, kv_offset: int) -> Tensor | None:
    """(B, S) boolean, True at tokens; None where every key is known to be one."""
    from transformers import masking_utils
    from transformers.utils.import_utils import is_tracing

    if attention_mask is None:
        return None
    padding: Any = masking_utils.prepare_padding_mask(attention_mask, keys, kv_offset)
    padding = padding[:, kv_offset : kv_offset + keys].to(torch.bool).expand(batch, keys)
    # Looking at the values is free on the CPU and opens the backends for unpadded input; elsewhere it would stop
    # the host at every forward, or break the graph.
    if padding.device.type == "cpu" and not is_tracing(padding) and bool(padding.all()):
        return None
    structure: Tensor = padding
    return structure


def _band_of(function: Callable[..., Any]) -> _Band | None:
    """The band that one of transformers' pattern functions describes; None for a pattern that is no band.

    Windows come as closures: one of transformers' own is recognised by its code, its width read from its cells.
    """
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return None, 0
    if function is masking_utils.bidirectional_mask_function:
        return None, None
    if torch.compiler.is_compiling():  # Dynamo cannot look into a closure
        return None
    both = masking_utils.and_masks(masking_utils.causal_mask_function)
    cells = _cells(function)
    if getattr(function, "__code__", None) is not both.__code__ or len(cells.get("mask_functions", ())) != 2:
        return None
    overlay, base = cells["mask_functions"]
    code, width = getattr(overlay, "__code__", None), _cells(overlay).get("sliding_window")
    if not isinstance(width, int) or width < 1:
        return None
    if base is masking_utils.causal_mask_function and code is masking_utils.sliding_window_overlay(1).__code__:
        return width - 1, 0
    if (
        base is masking_utils.bidirectional_mask_function
        and code is masking_utils.sliding_window_bidirectional_overlay(1).__code__
    ):
        return width, width
    return None


def _cells(function: Any) -> dict[str, Any]:
    """The variables a closure has captured, by name."""
    closure, code = getattr(function, "__closure__", None), getattr(function, "__code__", None)
    if closure is None or code is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, closure, strict=True)}
