"""Launching the kernels of specialised warps: which can serve a call, their descriptors and grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastattn.kernels.attention import config, descriptors
from fastattn.kernels.attention.arguments import Heads
from fastattn.kernels.attention.specialized import dkey_dvalue, dquery, forward
from fastattn.kernels.attention.specialized.primitives import ROWS

_MODULES = {"forward": forward, "dquery": dquery, "dkey_dvalue": dkey_dvalue}
# Whose rows a consumer owns, ROWS of them; the producer fetches tiles of the others.
_OWNED = {
    "forward": ("query", "out"), "dquery": ("query", "dout", "dquery"),
    "dkey_dvalue": ("key", "value", "dkey", "dvalue"),
}  # fmt: skip


def ready(
    name: str, tile: config.Tile, programs: int, head_dim: int, tensors: Mapping[str, Heads], **given: Any
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A kernel with its grid, and all of its arguments; of ``tensors`` all can be described."""
    kernel = getattr(_MODULES[name], f"attention_{name}_specialized")
    block_d, fetched = config.block_d(head_dim), tile.block_m if name == "dkey_dvalue" else tile.block_n
    rows = {tensor: ROWS.value if tensor in _OWNED[name] else fetched for tensor in tensors}
    return kernel[(programs,)], {
        **{tensor: descriptors.of_gluon(heads, rows[tensor], block_d) for tensor, heads in tensors.items()}, **given,
        "BLOCK_D": block_d, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.stages,
        "num_warps": tile.warps,
    }  # fmt: skip
