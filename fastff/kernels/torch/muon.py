"""Orthogonalised momentum of convolutions' weights (Muon) on PyTorch's operators.

A convolution's weight [D, C, k, k] is a matrix [D, C k k]. Matrices of many rows are taken in parts of up to ROWS rows, each for itself: the work
grows with the square of the rows, and for the last convolutions of a ResNet18 of width 64 it would be as much as theirs. (With parts of 32 rows, in
a run of benchmarks/plans.py, backpropagation learned two points less and local training half a point.)
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
ROWS = 64
SCALE = 0.2  # times the root of the longer side: updates about as large as AdamW's


def orthogonalizers(grams):
    """Return matrices T [n, m, m] for Gram matrices A = X X^T [n, m, m] of matrices X: all singular values of T X are near one (0.7 to 1.2).

    The iteration X <- (a + b A + c A^2) X, from X / |X| on, only ever multiplies X by polynomials in A from the left. So it is run on A, which is
    small, and on all matrices with as many rows at once. X itself is multiplied once, which for a 3 x 3 convolution takes less than half the time."""
    a, b, c = COEFFICIENTS
    squares = grams.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-14
    gram, product = grams / squares, None
    for step in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # without a on its diagonal
        if product is None:
            product = factor.clone()
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = torch.baddbmm(product, factor, product, beta=a)
        if step + 1 < STEPS:
            gram = torch.baddbmm(gram, factor, gram, beta=a)
            gram = torch.baddbmm(gram, gram, factor, beta=a)
    return product.div_(squares.sqrt())


def _matrices(p, other):
    """A parameter [D, ...] and a tensor of its shape as [D, N], in the order in which the parameter lies in memory: of it itself a view."""
    order = sorted(range(1, p.dim()), key=p.stride, reverse=True)
    return p.permute(0, *order).view(len(p), -1), other.permute(0, *order).flatten(1)


def update(params, grads, momenta, lr, momentum, weight_decay):
    """Update weights and their momenta in place, which have Nesterov's look ahead. lr: a number, or a tensor of one."""
    decay = 1 - lr * weight_decay
    if isinstance(decay, torch.Tensor):
        torch._foreach_mul_(params, decay)
        decay = 1.0
    torch._foreach_lerp_(momenta, grads, 1 - momentum)
    by_rows = {}  # {rows or columns, whichever are fewer: [(part of a weight, of its update)]}
    for p, update in zip(params, torch._foreach_lerp(grads, momenta, momentum), strict=True):
        count = -(-len(p) // ROWS)
        for weight, part in zip(*(t.tensor_split(count) for t in _matrices(p, update)), strict=True):
            if len(part) > part.shape[1]:
                weight, part = weight.mT, part.mT
            by_rows.setdefault(len(part), []).append((weight, part))
    for parts in by_rows.values():
        products = orthogonalizers(torch.stack([part @ part.mT for _, part in parts]))
        for (weight, part), product in zip(parts, products, strict=True):
            rate = lr
            if isinstance(lr, torch.Tensor):  # no factor that addmm_ takes
                product, rate = product.mul_(lr), 1.0
            weight.addmm_(product, part, beta=decay, alpha=-SCALE * rate * part.shape[1] ** 0.5)
