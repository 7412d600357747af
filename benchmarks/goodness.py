"""Goodness head: loss and all gradients, fastff against eager PyTorch, with counted work and measured memory.

    python -m benchmarks.goodness [--csv FILE] [--rounds N] [--quick] [--compile]

The eager code is a 1 x 1 convolution, a square, a mean, cross-entropy and backward. Both contenders return loss, dL/dx and dL/dW in float32, without
layer normalization. The bytes are those of x, dL/dx, W and dL/dW, once each. The FLOPs are those of the matrix products of the algorithm that needs
fewer: three of P C K a sample (direct), or two of P C^2 and two of K C^2 (second moment). --compile adds torch.compile of the eager code.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

import fastff.functional as ff
from benchmarks import runner, tables
from fastff.ops.goodness import plan_for

SHAPES = [  # (B, C, H, K)
    (8, 64, 56, 1000), (32, 64, 32, 1000), (32, 64, 32, 100), (32, 64, 32, 10), (32, 128, 16, 100), (32, 128, 16, 10), (32, 256, 8, 100),
    (32, 256, 8, 10), (32, 512, 4, 100), (32, 512, 4, 10), (32, 512, 4, 1000), (64, 16, 32, 10), (64, 32, 16, 10), (64, 64, 8, 10), (64, 128, 4, 10),
    (32, 16, 16, 10), (32, 24, 28, 100), (32, 96, 14, 100), (32, 576, 2, 10), (8, 960, 7, 1000), (32, 512, 1, 100),
]  # fmt: skip


def eager(x, weight, target):
    """Return loss, dL/dx and dL/dW from plain PyTorch code."""
    goodness = F.conv2d(x, weight[:, :, None, None]).square().mean((2, 3))
    loss = F.cross_entropy(goodness, target)
    return loss, *torch.autograd.grad(loss, (x, weight))


def fast(x, weight, target):
    step = ff.goodness_step(x, weight, None, target, normalize=None)
    return step.loss, step.grad_x, step.grad_weight


def products(B, C, H, K):
    """Return the GFLOP of the matrix products of the algorithm that needs fewer of them."""
    P = H * H
    return 2 * B * min(3 * P * C * K, 2 * P * C * C + 2 * K * C * C) / 1e9


def case(shape, layout, a):
    B, C, H, K = shape
    torch.manual_seed(0)
    x, weight, target = torch.randn(B, C, H, H), torch.randn(K, C) * (2 / C**0.5), torch.randint(0, K, (B,))
    x = x.contiguous(memory_format=runner.LAYOUTS[layout]).requires_grad_()
    given = (x, weight.requires_grad_(), target)
    functions = {"eager": eager} | ({"compiled": runner.compiled(eager)} if a.compile else {}) | {"fastff": fast}
    algorithm = plan_for(x, weight[:, :, None, None], None, (0, 0)).algorithm
    return runner.Case(
        {"B": B, "C": C, "H": H, "K": K, "layout": layout, "algorithm": algorithm},
        {name: functools.partial(function, *given) for name, function in functions.items()},
        lambda: eager(*runner.wide(x, weight), target),
        mbytes=4 * (2 * x.numel() + 2 * weight.numel()) / 1e6,
        gflop=products(*shape),
        memory=True,
    )


def cases(a):
    for values in itertools.product(runner.chosen(SHAPES, a), runner.LAYOUTS):
        yield case(*values, a)


def table():
    def cells(of):
        r = of["fastff"]
        return f"{r['B']}, {r['C']}, {r['H']}, {r['K']}", tables.words(r["layout"]), tables.words(r["algorithm"])

    return tables.speedups("goodness", "fastff", ("B, C, H, K", "layout", "algorithm"), cells)


def main():
    runner.main(__doc__, cases)


if __name__ == "__main__":
    main()
