"""Layer normalization, forward, of a block's output for the next block: ff.layer_norm against F.layer_norm.

    python -m benchmarks.layer_norm [--csv FILE] [--rounds N] [--quick] [--compile]

Over a sample, the base is F.layer_norm(x, x.shape[1:]), which copies channels_last tensors. Over the channels at each position, it is F.layer_norm of
the permuted x; ff.layer_norm runs the same operator then, and "normalize" is ff.normalize(x, "layer_norm_channels"), which has a kernel. The shapes
are those of the stages of ResNet18 at 32 x 32 and 224 x 224 pixels and of MobileNetV3-large at 224 x 224. The bytes are those of x and the result,
once each. --compile adds torch.compile of the eager code.
"""

import functools
import itertools

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
    for values in itertools.product(runner.chosen(SHAPES, a), runner.LAYOUTS, OVER):
        yield case(*values, a)


def table():
    def cells(of):
        r = of["fastff"]
        return f"{r['B']}, {r['C']}, {r['H']}", tables.words(r["layout"]), r["over"]

    against = {"normalize": "than ff.normalize"}
    return tables.speedups("layer_norm", "fastff", ("B, C, H", "layout", "over"), cells, against=against)


def main():
    runner.main(__doc__, cases, rounds=15)


if __name__ == "__main__":
    main()
