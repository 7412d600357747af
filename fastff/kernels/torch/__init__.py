"""Kernels made of PyTorch's own operators (batched matrix products, reductions): they run wherever torch does."""
