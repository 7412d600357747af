"""Kernels composed of PyTorch's own (batched matrix products, reductions): they run wherever torch does."""
