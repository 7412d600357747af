"""Layer normalisation of a block's output, forward, as the next block's input: ff.layer_norm against F.layer_norm.

    python -m benchmarks.layer_norm [--csv FILE] [--rounds N] [--quick] [--compile]

Over a sample: F.layer_norm(x, x.shape[1:]), which copies channels_last tensors. Over the channels at each position: F.layer_norm of x with its
channels last; there ff.layer_norm runs the same operator, and "normalize" is ff.normalize(x, "layer_norm_channels"), which has a kernel. The
shapes are outputs of ResNet18's stages at 32 x 32 and 224 x 224 and of MobileNetV3-large's at 224 x 224. Counted are x and the result once each.
--compile adds torch.compile of the eager code.
"""

import functools

import torch
import torch.nn.functional as F

import fastff.functional as ff
from benchmarks import runner, tables

SHAPES = [  # (B, C, H)
    (32, 64, 32), (32, 128, 16), (32, 256, 8), (32, 512, 4), (16, 64, 56), (16, 128, 28), (16, 256, 14), (16, 512, 7), (16, 16, 112), (16, 24, 56),
    (16, 40, 28), (16, 112, 14), (16, 160, 7), (16, 960, 7),
]  # fmt: skip
OVER = ("sample", "channels")


def over_sample(x):
    return (F.layer_norm(x, x.shape[1:]),)


def over_channels(x):
    return (F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2),)


def case(shape, layout, over, a):
    torch.manual_seed(0)
    x = torch.randn(shape[0], shape[1], shape[2], shape[2]).relu_().contiguous(memory_format=runner.LAYOUTS[layout])
    eager = over_sample if over == "sample" else over_channels
    functions = {"eager": eager} | ({"compiled": runner.compiled(eager)} if a.compile else {})
    functions["fastff"] = lambda x: (ff.layer_norm(x, over=over),)
    if over == "channels":
        functions["normalize"] = lambda x: (ff.normalize(x, "layer_norm_channels"),)
    return runner.Case(
        dict(zip(("B", "C", "H"), shape, strict=True)) | {"layout": layout, "over": over},
        {name: functools.partial(function, x) for name, function in functions.items()},
        lambda: eager(x.double()),
        mbytes=4 * 2 * x.numel() / 1e6,
    )


def cases(a):
    for shape in runner.chosen(SHAPES, a):
        for layout in runner.LAYOUTS:
            for over in OVER:
                yield case(shape, layout, over, a)


def table():
    def cells(of):
        r = of["fastff"]
        return f"{r['B']}, {r['C']}, {r['H']}", tables.words(r["layout"]), r["over"]

    against = {"normalize": "than ff.normalize"}
    return tables.speedups("layer_norm", "fastff", ("B, C, H", "layout", "over"), cells, against=against)


def main():
    a = runner.arguments(__doc__, rounds=15).parse_args()
    runner.run(cases(a), a)


if __name__ == "__main__":
    main()
