"""Convolutions, forward and each gradient: the way that fastff takes against oneDNN.

    python -m benchmarks.convolution [--csv FILE] [--rounds N] [--quick]

All tensors are float32 in channels_last. The bytes are those of x, dL/dy and the weight, once each.
"""

import torch

from benchmarks import runner, tables
from fastff.ops import convolution as op

SHAPES = [  # (B, C, H, D, kernel, stride): the convolutions of ResNet18 at width 64 and 16, 32 x 32 images, and of its first stage at 224 x 224
    (32, 64, 32, 64, 3, 1), (32, 64, 32, 128, 3, 2), (32, 128, 16, 128, 3, 1), (32, 128, 16, 256, 3, 2), (32, 256, 8, 256, 3, 1),
    (32, 256, 8, 512, 3, 2), (32, 512, 4, 512, 3, 1), (32, 16, 32, 16, 3, 1), (32, 16, 32, 32, 3, 2), (32, 32, 16, 32, 3, 1), (32, 64, 8, 64, 3, 1),
    (32, 128, 4, 128, 3, 1), (16, 64, 56, 64, 3, 1), (32, 64, 17, 30, 5, 1),
]  # fmt: skip


PASSES = ("forward", "gradient of x", "gradient of the weight")


def case(shape, which):
    B, C, H, D, kernel, stride = shape
    torch.manual_seed(0)
    last, padding = torch.channels_last, kernel // 2
    x = torch.randn(B, C, H, H).contiguous(memory_format=last)
    weight = torch.randn(D, C, kernel, kernel).contiguous(memory_format=last)
    grad = torch.randn_like(torch.conv2d(x, weight, None, stride, padding))
    how = op.way(x, weight, stride, padding, 1)
    wanted = which == "gradient of x", which == "gradient of the weight", False

    def onednn(grad=grad, x=x, weight=weight):
        if which == "forward":
            return (torch.conv2d(x, weight, None, stride, padding),)
        options = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, wanted
        return tuple(g for g in torch.ops.aten.convolution_backward(grad, x, weight, None, *options) if g is not None)

    def fast():
        if which == "forward":
            return (op.forward(x, weight, None, stride, padding, 1, how),)
        return tuple(g for g in op.gradients(grad, x, weight, stride, padding, 1, how, wanted) if g is not None)

    return runner.Case(
        dict(zip(("B", "C", "H", "D", "kernel", "stride"), shape, strict=True)) | {"pass": which, "way": how},
        {"onednn": onednn, "fastff": fast},
        lambda: onednn(grad.double(), x.double(), weight.double()),
        mbytes=4 * (x.numel() + grad.numel() + weight.numel()) / 1e6,
        gflop=2 * grad.numel() * C * kernel**2 / 1e9,
    )


def cases(a):
    for shape in runner.chosen(SHAPES, a):
        for which in PASSES:
            yield case(shape, which)


def table():
    def cells(of):
        r = of["fastff"]
        filters = f"{r['kernel']} x {r['kernel']}, stride {r['stride']}"
        rates = (f"{1e3 * float(of[who]['gflop']) / float(of[who]['ms']):.0f}" for who in ("fastff", "onednn"))
        return f"{r['B']}, {r['C']}, {r['H']}, {r['D']}", filters, r["pass"], r["way"], *rates

    header = ("B, C, H, D", "filters", "pass", "way", "fastff, GFLOP/s", "oneDNN, GFLOP/s")
    return tables.speedups("convolution", "fastff", header, cells, "faster than oneDNN")


def main():
    runner.main(__doc__, cases, rounds=15)


if __name__ == "__main__":
    main()
