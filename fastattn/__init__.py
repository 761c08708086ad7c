"""fastattn: fused attention for PyTorch, a drop-in for nn.MultiheadAttention and scaled_dot_product_attention."""

from fastattn.dispatch import Backend, Explanation, backend
from fastattn.functional import explain, scaled_dot_product_attention
from fastattn.modules.attention import MultiheadAttention
from fastattn.patching import PatchReport, patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Explanation",
    "MultiheadAttention",
    "PatchReport",
    "backend",
    "explain",
    "patch",
    "scaled_dot_product_attention",
    "unpatch",
]
