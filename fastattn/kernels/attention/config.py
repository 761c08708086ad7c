"""Tile sizes, apart from the maths: one choice per kernel, dtype, head dimension and feature that costs registers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps of a program, stages of the load pipeline, and registers of a thread.

    With None the assembler chooses how many; it may then spill a few bytes so that two programs fit where one did.
    ``ahead``: the forward kernel starts the scores of the next tile before the softmax of this one. ``apart``: dkey and
    dvalue get a launch each, which computes the scores once more and holds one of them in registers, not both.
    ``edge_stages``: stages where the forward kernel walks over tiles that something cuts, in a loop of their own.
    ``descriptors``: what is read by tiles is read by tensor descriptor. ``specialized``: the kernel is the one of
    that name whose warps share the work out; ``warps`` are those of its first consumer.
    """

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2
    registers: int | None = None
    ahead: bool = False
    apart: bool = False
    edge_stages: int | None = None
    descriptors: bool = False
    specialized: bool = False


KERNELS = ("forward", "delta", "dquery", "dkey_dvalue", "dmask", "weights")
_override: Tile | None = None
_specialize = False


@contextlib.contextmanager
def override(tile: Tile) -> Iterator[None]:
    """Use one tile for every kernel: for tests, which want several tiles in short sequences."""
    global _override
    previous, _override = _override, tile
    try:
        yield
    finally:
        _override = previous


@contextlib.contextmanager
def specialized() -> Iterator[None]:
    """Use the kernels of specialised warps wherever they can serve, measured faster or not: to measure them."""
    global _specialize
    previous, _specialize = _specialize, True
    try:
        yield
    finally:
        _specialize = previous


def in_force() -> tuple[Tile | None, bool]:
    """The tile that is used for every kernel, if there is one, and whether specialised warps are."""
    return _override, _specialize


def block_d(head_dim: int) -> int:
    """The head dimension as the kernels hold it: a power of two, at least the 16 a matrix product needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


# Kernel -> tile, by the block of the head dimension it is for (the first that is large enough) in ascending order.
# "plain" calls draw no dropout, load no mask and follow no window; "heavy" ones pay for that in registers. The choices
# are the largest of those tried that spill nothing on sm_80, sm_90 and sm_100 (the budget table, benchmarks/budget.py).
# wgmma needs 64 rows of its product: queries in most kernels, keys in dkey_dvalue. With as many, heavy dkey_dvalue and
# dmask above 128 would spill 16 to 244 bytes on one architecture or another.
_HALF_PLAIN = {
    "forward": {64: Tile(128, 64, 8), 128: Tile(64, 64, 8, 2, 255), 256: Tile(64, 32, 8)},
    "dquery": {64: Tile(64, 64, 8), 128: Tile(64, 64, 8), 256: Tile(64, 32, 8)},
    "dkey_dvalue": {128: Tile(32, 64, 8), 256: Tile(16, 64, 8)},
    "weights": {128: Tile(64, 64, 8), 256: Tile(64, 32, 8)},
}
_HALF_HEAVY = {
    "forward": {64: Tile(64, 32, 8), 256: Tile(64, 32, 8, 2, 255)},
    "dquery": {128: Tile(64, 32, 8), 256: Tile(64, 16, 8, 1)},
    "dkey_dvalue": {128: Tile(16, 64, 8, 2, 255), 256: Tile(16, 32, 8, 2, 255)},
    "dmask": {128: Tile(64, 16, 8, 1, 255), 256: Tile(16, 64, 8, 1, 255)},
    "weights": {128: Tile(64, 32, 8, 2, 255), 256: Tile(64, 16, 8)},
}
# sm_90 alone, where a wgmma belongs to four warps: with eight, a tile of 64 rows is computed by halves of its columns,
# and the softmax of all of it twice. On paper (benchmarks/paper_model.py), at head dimension 128 and without overlap,
# the tiles above allow 245 TFLOP/s forward and 219 for dquery, these 457.
# Started ahead, the scores of 64 keys are computed during all exponentials of the 64 before (34 of 34 in the table);
# of 128 keys, or at 256, there are not the registers for it. At 256 dkey and dvalue together leave room for 16 queries
# of 64 keys, of whose products a third is thrown away: 138 TFLOP/s on paper. Apart, each in 32 queries of 128 keys,
# they take 0.45 of that time, though the scores are computed twice.
_HOPPER_PLAIN = {
    "forward": {128: Tile(128, 64, 8, ahead=True), 256: Tile(128, 32, 8)},
    "dquery": {128: Tile(128, 64, 8), 256: Tile(128, 32, 8)},
    "dkey_dvalue": {64: Tile(64, 128, 8), 128: Tile(32, 128, 8), 256: Tile(32, 128, 8, apart=True)},
}
_HOPPER_HEAVY = {
    "forward": {64: Tile(128, 64, 8, 2, 255), 128: Tile(128, 32, 8), 256: Tile(128, 16, 8)},
    "dquery": {128: Tile(64, 32, 4, 2, 255), 256: Tile(128, 16, 8, 2, 255)},
    "dkey_dvalue": {128: Tile(16, 64, 4, 2, 255), 256: Tile(16, 128, 8, 2, 255, apart=True)},
    "dmask": {128: Tile(64, 16, 4, 1, 255), 256: Tile(64, 16, 8, 2, 255)},
}
# By tensor descriptor no thread holds addresses, and there are registers for larger tiles. TFLOP/s on paper of causal
# calls, without overlap and as compiled, by pointers and by descriptors:
#                    64                       128                      256
#     forward        381, 541 -> 444, 710     455, 874 -> 584, 940     464, 464 -> 542, 542
#     dquery         440, 759 -> 518, 880     457, 810 -> 518, 949     393, 531 -> 438, 813
#     dkey_dvalue    416, 690 -> 460, 723     394, 552 -> 434, 799     376, 536 -> 414, 569 of dkey
#                                                                      197, 197 -> 227, 227 of dvalue
# Forward at 128 a pipeline over the edge as well would spill 16 bytes. Tried and not taken: 128 queries of 128 keys for
# dquery (at 64 as compiled 821; at 128 it spills 92 bytes), 64 of 128 for dkey_dvalue at 128 (949 without a causal
# mask, with one it spills 56 bytes), for forward at 256 the scores ahead (spills 12 to 136 bytes); forward at 128 in a
# persistent grid (the loop around spills 196 bytes, 492 with a causal mask) and with warp_specialize=True (triton 3.9
# refuses host descriptors from 128 rows on; compiled by 3.6, 584 as here but none of 66 exponentials overlapped).
_HOPPER_PLAIN_DESCRIBED = {
    "forward": {
        64: Tile(128, 128, 8, ahead=True, descriptors=True),
        128: Tile(128, 128, 8, ahead=True, edge_stages=1, descriptors=True),
        256: Tile(128, 64, 8, descriptors=True),
    },
    "dquery": {128: Tile(128, 64, 8, descriptors=True), 256: Tile(128, 32, 8, descriptors=True)},
    "dkey_dvalue": {
        64: Tile(64, 128, 8, descriptors=True),
        128: Tile(32, 128, 8, descriptors=True),
        256: Tile(32, 128, 8, apart=True, descriptors=True),
    },
}
# At 256 forward calls with a mask alone have every wgmma serialised by the assembler, as at 64 by pointers, too.
_HOPPER_HEAVY_DESCRIBED = {
    "forward": {128: Tile(128, 64, 8, descriptors=True), 256: Tile(128, 32, 8, descriptors=True)},
    "dquery": {
        64: Tile(64, 64, 4, descriptors=True),
        128: Tile(64, 32, 4, 2, 255),  # with a mask the assembler would serialise every wgmma
        256: Tile(128, 16, 8, descriptors=True),
    },
    "dkey_dvalue": {
        64: Tile(32, 64, 4, descriptors=True),
        128: Tile(16, 64, 4, descriptors=True),
        256: Tile(16, 128, 8, apart=True, descriptors=True),
    },
}
# On sm_100 a tcgen05 instruction multiplies 128 rows at full speed: of queries, in dkey_dvalue of keys.
_BLACKWELL_PLAIN_DESCRIBED = {
    "forward": {128: Tile(128, 128, 8, ahead=True, descriptors=True), 256: Tile(128, 64, 8, descriptors=True)},
    "dquery": {128: Tile(128, 128, 8, descriptors=True), 256: Tile(128, 32, 8, descriptors=True)},
    "dkey_dvalue": {
        128: Tile(64, 128, 8, descriptors=True),
        256: Tile(32, 128, 8, apart=True, descriptors=True),
    },
}
_BLACKWELL_HEAVY_DESCRIBED = {
    "forward": {128: Tile(128, 64, 8, 2, 255, descriptors=True), 256: Tile(128, 32, 8, 2, 255, descriptors=True)},
    "dquery": {128: Tile(128, 64, 8, 2, 255, descriptors=True), 256: Tile(128, 32, 8, descriptors=True)},
    "dkey_dvalue": {
        128: Tile(32, 128, 8, 2, 255, descriptors=True),
        256: Tile(16, 128, 8, apart=True, descriptors=True),
    },
}
# The kernels of specialised warps (``specialized``); of the forward one also by whether a window or padding may cut the
# first keys of a row, which takes registers (16 to 40 bytes spilled with the larger tiles). All exponentials run beside
# a product, and no barrier holds all warps. TFLOP/s on paper of causal calls, no overlap and as compiled:
#                                  64          128         256
#     forward                      444, 710    584, 940    542, 542
#     by specialised warps         467, 920    584, 949    542, 949
#     dquery                       518, 880    518, 949    438, 813
#     by specialised warps         518, 949    518, 949    spills 40 to 556 bytes
#     dkey_dvalue                  460, 723    434, 799    (apart)
#     by specialised warps         514, 949    474, 949    no room for two sums of 64 keys
# Tried and not taken: three consumers (160 registers each; forward spills 724 bytes at 64 with 128 keys a tile, with 64
# keys 893 as compiled), 232 registers for a consumer and 40 for the producer (28 to 76 bytes at 128 and 256); for
# dkey_dvalue at 128 tiles of 64 queries (with a causal mask 12 bytes, compiled by 3.6 124), and at both the sums of
# one pass waited for in the next (the assembler serialises every wgmma).
_SPECIALIZED = {
    ("forward", False): {128: Tile(128, 128, specialized=True), 256: Tile(128, 64, specialized=True)},
    ("forward", True): {
        128: Tile(128, 64, stages=4, specialized=True),
        256: Tile(128, 32, stages=4, specialized=True),
    },
    "dquery": {128: Tile(128, 64, stages=3, specialized=True)},
    "dkey_dvalue": {
        64: Tile(64, 128, stages=3, specialized=True),
        128: Tile(32, 128, stages=3, specialized=True),
    },
}
# Kernels and blocks of the head dimension for which they measured faster than the others: none, no GPU has run them.
_SPECIALIZED_FASTER: frozenset[tuple[str, int]] = frozenset()
# By pointers sm_80's, without the assembler's choice of 128 registers and 12 or 16 bytes spilled.
_BLACKWELL_PLAIN = {"dquery": {64: Tile(64, 64, 8), 128: Tile(64, 64, 8, 2, 255), 256: Tile(64, 32, 8)}}
_BLACKWELL_HEAVY = {
    "dquery": {64: Tile(64, 32, 8), 128: Tile(64, 32, 8, 2, 255), 256: Tile(64, 16, 8, 2, 255)},
}
_OWN = {
    (90, False): _HOPPER_PLAIN,
    (90, True): _HOPPER_HEAVY,
    (100, False): _BLACKWELL_PLAIN,
    (100, True): _BLACKWELL_HEAVY,
}
_DESCRIBED = {
    (90, False): _HOPPER_PLAIN_DESCRIBED,
    (90, True): _HOPPER_HEAVY_DESCRIBED,
    (100, False): _BLACKWELL_PLAIN_DESCRIBED,
    (100, True): _BLACKWELL_HEAVY_DESCRIBED,
}
# Without tensor cores (IEEE float32) the operands of a product live in registers: small tiles, and small pieces.
_FLOAT32 = {64: Tile(32, 32, 8, 2, 255), 128: Tile(16, 32, 8, 2, 255), 256: Tile(16, 16, 8, 1, 255)}
_FLOAT32_HEAVY = {128: Tile(16, 32, 8, 2, 255), 256: Tile(16, 16, 8, 1, 255)}
_FLOAT32_PIECE = 32
_DELTA = {128: Tile(64, 16, 4, 1), 256: Tile(32, 16, 4, 1)}


def tile(
    kernel: str, dtype: torch.dtype, head_dim: int, *, heavy: bool = False, arch: int = 0, described: bool = False
) -> Tile:
    """The tile of a kernel; ``heavy`` where it loads a mask, draws dropout or follows a window; ``arch`` 90 is 9.0.

    ``described``: tensor descriptors can be made of all that it reads by tiles.
    """
    if _override is not None:
        return _override if described else replace(_override, descriptors=False)
    if kernel == "delta":
        choices = _DELTA
    elif dtype == torch.float32:
        choices = _FLOAT32_HEAVY if heavy and kernel in ("dkey_dvalue", "dmask") else _FLOAT32
    else:
        choices = (_HALF_HEAVY if heavy else _HALF_PLAIN)[kernel]
        choices = _OWN.get((arch, heavy), {}).get(kernel, choices)
        if described:
            choices = _DESCRIBED.get((arch, heavy), {}).get(kernel, choices)
    return next(choice for largest, choice in choices.items() if block_d(head_dim) <= largest)


def specialized_tile(kernel: str, head_dim: int, *, cut: bool, arch: int) -> Tile | None:
    """The tile of a kernel of specialised warps; None where the other one of its name is to be taken.

    ``cut``: a window or padding may cut the first keys of a row.
    """
    block = block_d(head_dim)
    if _override is not None:
        # Of queries by keys; a program of dkey_dvalue owns as many keys as the others own queries.
        turned = replace(_override, block_m=_override.block_n, block_n=_override.block_m)
        chosen = turned if kernel == "dkey_dvalue" else _override
        return chosen if _override.specialized and arch in (0, 90) else None
    if arch != 90 or not (_specialize or (kernel, block) in _SPECIALIZED_FASTER):
        return None
    choices = _SPECIALIZED[("forward", cut) if kernel == "forward" else kernel]
    return next((choice for largest, choice in choices.items() if block <= largest), None)


def product_piece(dtype: torch.dtype, head_dim: int) -> int:
    """Features of a piece, where products over the head dimension are computed piece by piece; else 0."""
    return _FLOAT32_PIECE if dtype == torch.float32 and block_d(head_dim) > _FLOAT32_PIECE else 0


def split_loops(head_dim: int, *, heavy: bool) -> bool:
    """Whether whole tiles run in a loop of their own: not where a second loop costs registers that are not there."""
    return not heavy and block_d(head_dim) <= 128
