"""Depthwise convolution, forward and gradients: fastff against PyTorch.

    python -m benchmarks.depthwise [--csv FILE] [--rounds N] [--quick]

The times of fastff are those of the implementation that "auto" chooses; its forward pass is PyTorch's if that is faster. The bytes are those of x and
y in the forward pass, x and dL/dy in the backward pass, dL/dx if it is computed, and the filters. The FLOPs are a multiply-add for each filter tap
in each direction.
"""

import functools
import itertools

import torch

from benchmarks import runner, tables
from fastff.graph.fused import Convolution

SHAPES = [  # (B, C, H, kernel, stride)
    (32, 96, 28, 5, 1), (32, 240, 14, 3, 1), (32, 16, 112, 3, 2), (32, 16, 32, 3, 2), (32, 72, 16, 3, 2), (32, 88, 8, 3, 1), (32, 96, 8, 5, 2),
    (32, 240, 4, 5, 1), (32, 576, 2, 5, 1), (8, 960, 7, 3, 1), (32, 64, 56, 3, 1),
]  # fmt: skip
GRADIENTS = ("weight", "x and weight")


def step(module, weight, x, grad):
    """Return (output, gradient of x if it requires one, gradient of the weight)."""
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, [t for t in (x, weight) if t.requires_grad], grad)


def case(shape, layout, gradients, a):
    B, C, H, kernel, stride = shape
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(C, C, kernel, stride, kernel // 2, groups=C, bias=False)
    theirs.to(memory_format=runner.LAYOUTS[layout])
    x = torch.randn(B, C, H, H).contiguous(memory_format=runner.LAYOUTS[layout]).requires_grad_("x" in gradients)
    grad = torch.randn_like(theirs(x).detach())

    def exact():
        wide_x, weight, wide_grad = runner.wide(x, theirs.weight, grad)
        convolve = functools.partial(torch.conv2d, weight=weight, stride=stride, padding=kernel // 2, groups=C)
        return step(convolve, weight, wide_x, wide_grad)

    modules = {"pytorch": theirs, "fastff": Convolution(theirs)}
    directions = 2 + x.requires_grad
    return runner.Case(
        {"B": B, "C": C, "H": H, "kernel": kernel, "stride": stride, "layout": layout, "gradients": gradients},
        {name: functools.partial(step, module, theirs.weight, x, grad) for name, module in modules.items()},
        exact,
        mbytes=4 * (directions * (x.numel() + theirs.weight.numel()) + 2 * grad.numel()) / 1e6,
        gflop=2 * directions * grad.numel() * kernel**2 / 1e9,
    )


def cases(a):
    for values in itertools.product(runner.chosen(SHAPES, a), runner.LAYOUTS, GRADIENTS):
        yield case(*values, a)


def table():
    def cells(of):
        r = of["fastff"]
        filters = f"{r['kernel']} x {r['kernel']}, stride {r['stride']}"
        return f"{r['B']}, {r['C']}, {r['H']}", filters, tables.words(r["layout"]), r["gradients"]

    header = ("B, C, H", "filters", "layout", "forward and gradient of")
    return tables.speedups("depthwise", "fastff", header, cells, "faster than PyTorch")


def main():
    runner.main(__doc__, cases, rounds=15)


if __name__ == "__main__":
    main()
