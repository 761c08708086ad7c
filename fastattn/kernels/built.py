"""The C++ extension of ``csrc``, where it is built."""

from __future__ import annotations

from typing import Any

# Why it is not there; None where it is.
UNAVAILABLE: str | None = None

try:
    import fastattn._C as _built
except ImportError as error:
    UNAVAILABLE = f"the C++ extension fastattn._C is not built ({error}); run: pip install -e ."
    _built = None

extension: Any = _built
