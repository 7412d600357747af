"""Local step with an epilogue (batch norm, residual, ReLU), goodness head, layer norm and all gradients: ff.tail_step against eager PyTorch.

    python -m benchmarks.epilogue [--csv FILE] [--rounds N] [--quick] [--compile]

The eager code is what a user would write: autograd from the loss back to the last convolution's output and the residual, and layer norm of the
block's output, in float32. "by parts" is fastff without the fused epilogue: batch norm, addition and ReLU of PyTorch, and ff.goodness_step. The bytes
are those of y, read twice since its statistics are needed first, of dL/dy and the next input, and of the residual and its gradient if there are any.
The FLOPs are those of the head's matrix products. --compile adds torch.compile of the eager code.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

import fastff.functional as ff
from benchmarks import runner, tables
from benchmarks.goodness import products

SHAPES = [  # (B, C, H, K)
    (32, 64, 32, 100), (32, 64, 32, 10), (32, 128, 16, 100), (32, 256, 8, 100), (32, 512, 4, 100), (32, 16, 32, 10), (64, 32, 16, 10),
    (64, 64, 8, 10), (32, 24, 28, 100), (32, 96, 14, 100), (8, 64, 56, 1000),
]  # fmt: skip
RESIDUALS = ("none", "no gradient", "gradient")


def sequence(y, residual, bn_weight, bn_bias):
    h = F.batch_norm(y, None, None, bn_weight, bn_bias, training=True)
    return F.relu_(h.add_(residual) if residual is not None else h)


def eager(leaves, target):
    """Return (loss, next input, gradients) from plain PyTorch code."""
    y, residual, bn_weight, bn_bias, weight = leaves
    x = sequence(y, residual, bn_weight, bn_bias)
    loss = F.cross_entropy(F.conv2d(x, weight[:, :, None, None]).square().mean((2, 3)), target)
    grads = torch.autograd.grad(loss, [t for t in leaves if t is not None and t.requires_grad])
    return loss.detach(), F.layer_norm(x.detach(), x.shape[1:]), *grads


def by_parts(leaves, target):
    y, residual, bn_weight, bn_bias, weight = leaves
    x = sequence(y, residual, bn_weight, bn_bias)
    step = ff.goodness_step(x.detach(), weight.detach(), None, target)
    body = [t for t in leaves[:4] if t is not None and t.requires_grad]
    return step.loss, step.normalized, *torch.autograd.grad(x, body, step.grad_x), step.grad_weight


def fused(leaves, target):
    y, residual, bn_weight, bn_bias, weight = leaves
    need = residual is not None and residual.requires_grad
    step = ff.tail_step(
        y, weight, None, target, bn_weight=bn_weight, bn_bias=bn_bias, residual=residual, need_grad_residual=need
    )
    grads = (step.grad_y, step.grad_residual, step.grad_bn_weight, step.grad_bn_bias, step.grad_weight)
    return step.loss, step.normalized, *(g for g in grads if g is not None)


def case(shape, layout, residual, a):
    B, C, H, K = shape
    torch.manual_seed(0)
    y, other = (torch.randn(B, C, H, H).contiguous(memory_format=runner.LAYOUTS[layout]) for _ in range(2))
    leaves = [y, other, torch.rand(C) + 0.5, torch.randn(C), torch.randn(K, C) * (2 / C**0.5)]
    target = torch.randint(0, K, (B,))
    for t in leaves:
        t.requires_grad_()
    if residual == "none":
        leaves[1] = None
    elif residual == "no gradient":
        leaves[1].requires_grad_(False)
    functions = {"eager": eager} | ({"compiled": runner.compiled(eager)} if a.compile else {})
    functions |= {"by parts": by_parts, "fused": fused}
    return runner.Case(
        {"B": B, "C": C, "H": H, "K": K, "layout": layout, "residual": residual},
        {name: functools.partial(function, leaves, target) for name, function in functions.items()},
        lambda: eager(runner.wide(*leaves), target),
        mbytes=4 * y.numel() * (4 + (residual != "none") + (residual == "gradient")) / 1e6,
        gflop=products(*shape),
        memory=True,
    )


def cases(a):
    for values in itertools.product(runner.chosen(SHAPES, a), runner.LAYOUTS, RESIDUALS):
        yield case(*values, a)


def table():
    def cells(of):
        r = of["fused"]
        return f"{r['B']}, {r['C']}, {r['H']}, {r['K']}", tables.words(r["layout"]), r["residual"]

    against = {"by parts": "than by parts"}
    return tables.speedups("epilogue", "fused", ("B, C, H, K", "layout", "residual"), cells, against=against)


def main():
    runner.main(__doc__, cases)


if __name__ == "__main__":
    main()
