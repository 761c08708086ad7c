"""Memory that the C++ kernels keep between calls."""

from __future__ import annotations

from fastattn.kernels.built import UNAVAILABLE, extension


def empty_cache() -> None:
    """Give the memory that the CPU kernels keep for their next call back to the system.

    They keep packed weights and scratch of a call, at most 64 MB of the process, where the C library would give such
    blocks back and the next call would meet each of their pages for the first time. Memory on a GPU is torch's, see
    ``torch.cuda.empty_cache``, whose name this has. Without the extension nothing is kept, and nothing done.
    """
    if UNAVAILABLE is None:
        extension.release_kept_memory()
