"""Drop-in modules: they hold parameters and state, the arithmetic is in ``fastattn.functional``."""

from fastattn.modules.attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
