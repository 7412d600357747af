"""Weight gradient of a convolution, the only gradient of convolutions in layer-wise training: fastff's kernel against oneDNN's.

    python -m benchmarks.convolution [--csv FILE] [--rounds N] [--quick]

All tensors are float32 in channels_last. The rate of the forward pass is given for comparison, since it does the same multiply-adds. The bytes are
those of x, dL/dy and dL/dW, once each.
"""

import torch

from benchmarks import runner, tables

SHAPES = [  # (B, C, H, D, kernel, stride): the convolutions of ResNet18 at width 64 and 16, 32 x 32 images, and of its first stage at 224 x 224
    (32, 64, 32, 64, 3, 1), (32, 64, 32, 128, 3, 2), (32, 128, 16, 128, 3, 1), (32, 128, 16, 256, 3, 2), (32, 256, 8, 256, 3, 1),
    (32, 256, 8, 512, 3, 2), (32, 512, 4, 512, 3, 1), (32, 16, 32, 16, 3, 1), (32, 16, 32, 32, 3, 2), (32, 32, 16, 32, 3, 1), (32, 64, 8, 64, 3, 1),
    (32, 128, 4, 128, 3, 1), (16, 64, 56, 64, 3, 1), (32, 64, 17, 30, 5, 1),
]  # fmt: skip


def case(shape, a):
    B, C, H, D, kernel, stride = shape
    torch.manual_seed(0)
    last, padding = torch.channels_last, kernel // 2
    x = torch.randn(B, C, H, H).contiguous(memory_format=last)
    weight = torch.randn(D, C, kernel, kernel).contiguous(memory_format=last)
    grad = torch.randn_like(torch.conv2d(x, weight, None, stride, padding))

    def onednn(grad=grad, x=x):
        return (torch.nn.grad.conv2d_weight(x, weight.shape, grad, stride, padding),)

    def fast():
        return (torch.ops.fastff.convolution_weight_gradient(grad, x, kernel, stride, padding, "auto"),)

    return runner.Case(
        dict(zip(("B", "C", "H", "D", "kernel", "stride"), shape, strict=True)),
        {"onednn": onednn, "fastff": fast, "forward": lambda: torch.conv2d(x, weight, None, stride, padding)},
        lambda: onednn(grad.double(), x.double()),
        mbytes=4 * (x.numel() + grad.numel() + weight.numel()) / 1e6,
        gflop=2 * grad.numel() * C * kernel**2 / 1e9,
        unchecked=("forward",),
    )


def cases(a):
    for shape in runner.chosen(SHAPES, a):
        yield case(shape, a)


def table():
    def cells(of):
        r = of["fastff"]
        filters = f"{r['kernel']} x {r['kernel']}, stride {r['stride']}"
        rates = (
            f"{1e3 * float(of[who]['gflop']) / float(of[who]['ms']):.0f}" for who in ("fastff", "onednn", "forward")
        )
        return f"{r['B']}, {r['C']}, {r['H']}, {r['D']}", filters, *rates

    header = ("B, C, H, D", "filters", "fastff, GFLOP/s", "oneDNN, GFLOP/s", "oneDNN's forward pass")
    return tables.speedups("convolution", "fastff", header, cells, "faster than oneDNN")


def main():
    runner.main(__doc__, cases, rounds=15)


if __name__ == "__main__":
    main()
