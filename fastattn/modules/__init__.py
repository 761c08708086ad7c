"""Drop-in modules: they hold parameters and state, the arithmetic is in ``fastattn.functional``."""

from fastattn.modules.additive import AdditiveAttention
from fastattn.modules.attention import MultiheadAttention
from fastattn.modules.luong import LuongAttention
from fastattn.modules.maps import attention_maps

__all__ = ["AdditiveAttention", "LuongAttention", "MultiheadAttention", "attention_maps"]
