"""The instruction sets of the C++ kernels, for fixtures."""

from __future__ import annotations

from collections.abc import Iterator

from fastattn.kernels.attention import extension

ALL = extension.instruction_sets() if extension.UNAVAILABLE is None else []

# Kernels of their own; names with a + differ from these in the LSTM and in large products, which have their own tests.
PLAIN = [name for name in ALL if "+" not in name]


def chosen(name: str) -> Iterator[str]:
    """``name`` in use, and the default again afterwards."""
    extension.use_instruction_set(name)
    try:
        yield name
    finally:
        extension.use_instruction_set(ALL[0])
