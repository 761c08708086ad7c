"""What the attention kernels are given: tensors with their strides, sizes, masks, and the features compiled in.

A feature whose pointer is None is absent from the compiled kernel.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple


class Heads(NamedTuple):
    """A (B, H, L, D) tensor: pointer and strides in elements; the last dimension is contiguous.

    Where a kernel only reads tiles of it, a descriptor may stand in its place (``descriptors``).
    """

    pointer: Any
    batch: Any
    head: Any
    row: Any


class Rows(NamedTuple):
    """Rows from ``first`` on, of ``length`` in all, of one head of a ``Heads``."""

    tensor: Any
    batch: Any
    head: Any
    first: Any
    length: Any


class Weights(NamedTuple):
    """A (B, H, L, S) tensor of any strides; pointer None where there is none."""

    pointer: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Shape(NamedTuple):
    """Batches, query heads, query heads of one key head, queries L and keys S; entry (row, column) may take part where
    lower <= column - row <= upper; query 0 stands at position ``shift`` among the keys. ``pitch`` is the number of
    queries from one head to the next where there is one number for each, as in the logsumexp: L, but in packed tensors.
    ``key_pitch`` is the same of keys.

    A kernel takes these numbers one by one: those of a tuple are specialised whatever do_not_specialize says, on 1 and
    on multiples of 16.
    """

    batches: Any
    heads: Any
    group: Any
    rows: Any
    columns: Any
    lower: Any
    upper: Any
    shift: Any
    pitch: Any
    key_pitch: Any


# What a kernel is not specialised on: other batches, lengths and windows compile nothing.
LENGTHS = ("batches", "rows", "columns", "lower", "upper", "shift", "pitch", "key_pitch")


class Masks(NamedTuple):
    """What is added to the scores or masks them.

    A mask (B, H, L, S) with stride 0 where it broadcasts; a padding mask (B, S) with the (start, end) of its keys
    and whether there is padding between (holes);
    ALiBi slopes (B, H); segments of queries (B, L) and keys (B, S), contiguous, with the (start, end) of the keys that
    belong to any of 16 queries (B, L / 16), and the other way round; ``cap`` of the capped scores.
    """

    mask: Any
    mask_batch: Any
    mask_head: Any
    mask_row: Any
    mask_column: Any
    padding: Any
    padding_batch: Any
    padding_column: Any
    start: Any
    end: Any
    holes: Any
    slopes: Any
    slopes_batch: Any
    segment_query: Any
    segment_key: Any
    key_start: Any
    key_end: Any
    query_start: Any
    query_end: Any
    cap: Any


class Packed(NamedTuple):
    """Sequences behind one another in tensors of one batch, (1, H, tokens, D).

    Sequence n has queries ``query``[n] to ``query``[n + 1] - 1 and keys ``key``[n] to ``key``[n + 1] - 1, of which the
    first ``used``[n] take part; ``used`` is None where all do, and so are both others where nothing is packed. The rows
    and columns of ``Shape`` are the longest sequence's, its pitches the tokens of all.
    """

    query: Any
    key: Any
    used: Any


class Dropout(NamedTuple):
    """Seed pointer (None: no dropout), the smallest 24-bit number kept, and 1 / (1 - dropout_p)."""

    seed: Any
    threshold: Any
    keep_scale: Any


@dataclass(frozen=True)
class Features:
    """What is compiled in.

    ``natural``: scores in natural units, because a float mask needs them (see score_tile). ``split``: tiles that
    nothing cuts run in a loop of their own without the comparisons; a second copy of a loop that also loads masks or
    draws dropout costs more registers than the comparisons cost time. ``piece``: see product_tile. ``ahead``: see the
    forward kernel. ``edge_stages``: see ``config.Tile``.
    """

    mask_bool: bool
    mask_rows: bool
    mask_columns: bool
    padding_bool: bool
    has_lower: bool
    has_upper: bool
    natural: bool
    softcap: bool
    split: bool
    piece: int
    precision: str
    ahead: bool = False
    edge_stages: int | None = None
