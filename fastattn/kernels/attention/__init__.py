"""Fused attention: the operators (op), their Triton kernels and the C++ extension."""
