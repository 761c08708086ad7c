"""Drop-in modules: they hold parameters and state, the arithmetic is in ``fastattn.functional``."""

from fastattn.modules.attention import MultiheadAttention
from fastattn.modules.maps import attention_maps

__all__ = ["MultiheadAttention", "attention_maps"]
