"""fastattn: fused attention for PyTorch, a drop-in for nn.MultiheadAttention and scaled_dot_product_attention."""

from fastattn.dispatch import Backend, Explanation, backend
from fastattn.functional import explain, scaled_dot_product_attention

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Explanation",
    "backend",
    "explain",
    "scaled_dot_product_attention",
]
