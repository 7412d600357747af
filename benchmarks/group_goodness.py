"""Step of a layer whose goodness has no weights: ff.group_goodness_step against the formulas of the papers, differentiated by autograd.

    python -m benchmarks.group_goodness [--csv FILE] [--rounds N] [--quick] [--compile]

Both contenders return loss, dL/dx and the next layer's input from one float32 tensor of activations. For "hinton", "symba" and "scff" the first half
of the batch are positive samples and the second half are negative ones:

    hinton         mean of squares of a sample, softplus around a threshold, l2 normalization (arXiv 2212.13345)
    symba          mean of squares of a sample, softplus of the difference of both halves, layer norm (arXiv 2303.08418)
    scff           mean of squares at each position, softplus around a threshold, layer norm (SCFF)
    cwcomp         mean of squares of a group of channels for each class, cross-entropy, layer norm (arXiv 2312.12668)
    deeperforward  mean of a group of channels for each class, cross-entropy, group norm (ICLR 2025)

The bytes are those of x, dL/dx and the next input, once each. --compile adds torch.compile of the eager code.
"""

import functools

import torch
import torch.nn.functional as F

import fastff.functional as ff
from benchmarks import runner, tables

THETA, ALPHA = 2.0, 4.0
SHAPES = [  # (family, B, C, H, K): K classes; H = 1 means features [B, C]
    ("hinton", 128, 1000, 1, 1), ("hinton", 64, 64, 32, 1), ("hinton", 64, 128, 16, 1), ("hinton", 64, 256, 8, 1),
    ("symba", 128, 1000, 1, 1), ("symba", 64, 64, 32, 1), ("symba", 64, 128, 16, 1), ("symba", 64, 256, 8, 1),
    ("scff", 64, 64, 32, 1), ("scff", 64, 128, 16, 1), ("scff", 64, 256, 8, 1),
    ("cwcomp", 128, 1000, 1, 10), ("cwcomp", 64, 80, 32, 10), ("cwcomp", 64, 160, 16, 10), ("cwcomp", 64, 240, 8, 10),
    ("deeperforward", 128, 1000, 1, 10), ("deeperforward", 64, 80, 32, 10), ("deeperforward", 64, 160, 16, 10), ("deeperforward", 64, 240, 8, 10),
]  # fmt: skip


def softplus_around_threshold(g):
    positive, negative = g.chunk(2)
    return F.softplus(torch.cat([THETA - positive, negative - THETA])).mean()


def sample_dims(x):
    return tuple(range(1, x.dim()))


def hinton(x, target, K):
    loss = softplus_around_threshold(x.pow(2).mean(sample_dims(x)))
    y = x.detach()
    return loss, y / (torch.linalg.vector_norm(y, dim=sample_dims(y), keepdim=True) + 1e-5)


def symba(x, target, K):
    positive, negative = x.pow(2).mean(sample_dims(x)).chunk(2)
    return F.softplus(-ALPHA * (positive - negative)).mean(), F.layer_norm(x.detach(), x.shape[1:])


def scff(x, target, K):
    return softplus_around_threshold(x.pow(2).mean(1)), F.layer_norm(x.detach(), x.shape[1:])


def cwcomp(x, target, K):
    g = x.view(len(x), K, -1, *x.shape[2:]).pow(2).mean(tuple(range(2, x.dim() + 1)))
    return F.cross_entropy(g, target), F.layer_norm(x.detach(), x.shape[1:])


def deeperforward(x, target, K):
    g = x.view(len(x), K, -1, *x.shape[2:]).mean(tuple(range(2, x.dim() + 1)))
    return F.cross_entropy(g, target), F.group_norm(x.detach(), K)


FAMILIES = {  # name: (function in plain PyTorch, options of group_goodness_step that compute the same)
    "hinton": (hinton, {"loss": "softplus", "theta": THETA, "normalize": "l2"}),
    "symba": (symba, {"loss": "symba", "alpha": ALPHA}),
    "scff": (scff, {"loss": "softplus", "theta": THETA, "positions": True}),
    "cwcomp": (cwcomp, {}),
    "deeperforward": (deeperforward, {"power": 1, "normalize": "group_norm"}),
}


def case(family, B, C, H, K, layout, a):
    formula, options = FAMILIES[family]
    torch.manual_seed(0)
    x = torch.randn(B, C) if H == 1 else torch.randn(B, C, H, H).contiguous(memory_format=runner.LAYOUTS[layout])
    x = x.relu_().requires_grad_()
    target = torch.randint(0, K, (B,)) if K > 1 else None

    def eager(x):
        loss, next_input = formula(x, target, K)
        return loss.detach(), *torch.autograd.grad(loss, x), next_input

    def fast(x):
        step = ff.group_goodness_step(x, target, K, **options)
        return step.loss, step.grad_x, step.normalized

    functions = {"eager": eager} | ({"compiled": runner.compiled(eager)} if a.compile else {}) | {"fastff": fast}
    return runner.Case(
        {"family": family, "B": B, "C": C, "H": H, "K": K, "layout": layout},
        {name: functools.partial(function, x) for name, function in functions.items()},
        lambda: eager(*runner.wide(x)),
        mbytes=4 * 3 * x.numel() / 1e6,
        memory=True,
    )


def cases(a):
    for shape in runner.chosen(SHAPES, a):
        for layout in runner.LAYOUTS if shape[3] > 1 else ("contiguous",):
            yield case(*shape, layout, a)


def table():
    def cells(of):
        r = of["fastff"]
        return r["family"], f"{r['B']}, {r['C']}, {r['H']}, {r['K']}", tables.words(r["layout"])

    return tables.speedups("group_goodness", "fastff", ("family", "B, C, H, K", "layout"), cells)


def main():
    runner.main(__doc__, cases, rounds=15)


if __name__ == "__main__":
    main()
