"""Additive attention scores: the operators (op), the tiled path in plain PyTorch and the Triton kernels."""
