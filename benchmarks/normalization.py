"""Normalizations, forward and backward: ff.normalize against PyTorch's functions and what people write.

    python -m benchmarks.normalization [--csv FILE] [--rounds N] [--quick]

The shapes are those of layers of public Forward-Forward code, fully connected and convolutional. "forward" is without a gradient.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

import fastff.functional as ff
from benchmarks import runner, tables

SHAPES = [(64, 1000), (200, 500), (1000, 1000), (8, 320, 4, 4), (32, 20, 8, 8), (16, 64, 16, 16), (8, 40, 32, 32)]
GROUPS, EPS, BACKWARD = 10, 1e-5, (False, True)


def dims(x):
    return tuple(range(1, x.dim()))


WRITTEN = {
    "l2": lambda x: x / (torch.linalg.vector_norm(x, dim=dims(x), keepdim=True) + EPS),
    "rms": lambda x: x / (x.pow(2).mean(dims(x), keepdim=True) + EPS).sqrt(),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "group_norm": lambda x: F.group_norm(x, GROUPS),
    "l2_channels": lambda x: x / (x.norm(2, 1, keepdim=True) + EPS),
    "rms_channels": lambda x: x / (x.pow(2).mean(1, keepdim=True) + EPS).sqrt(),
    "layer_norm_channels": lambda x: F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1),
}


def both_ways(normalize, x, grad):
    y = normalize(x)
    return (y, torch.autograd.grad(y, x, grad)[0]) if x.requires_grad else (y,)


def case(shape, layout, how, backward):
    torch.manual_seed(0)
    x, grad = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    x.requires_grad_(backward)
    groups = GROUPS if how == "group_norm" else 1
    functions = {"eager": WRITTEN[how], "fastff": lambda x: ff.normalize(x, how, groups, EPS)}
    wide = x.detach().double().requires_grad_(backward)
    return runner.Case(
        {"shape": " ".join(map(str, shape)), "channels_last": layout == torch.channels_last, "how": how, "backward": backward},
        {name: functools.partial(both_ways, function, x, grad) for name, function in functions.items()},
        lambda: both_ways(WRITTEN[how], wide, grad.double()),
        mbytes=4 * (4 if backward else 2) * x.numel() / 1e6,
    )  # fmt: skip


def cases(a):
    torch.empty(1 << 23).fill_(0)  # the C library then keeps memory, as it does in training
    for shape, how, backward in itertools.product(runner.chosen(SHAPES, a), WRITTEN, BACKWARD):
        fits = len(shape) == 4 or not how.endswith("_channels")
        if fits and (how != "group_norm" or shape[1] % GROUPS == 0):
            yield case(shape, torch.contiguous_format, how, backward)
            if len(shape) == 4:
                yield case(shape, torch.channels_last, how, backward)


def table():
    def cells(of):
        r = of["fastff"]
        layout = "channels_last" if r["channels_last"] == "True" else ""
        return r["how"], r["shape"], layout, "both ways" if r["backward"] == "True" else "forward"

    return tables.speedups("normalization", "fastff", ("normalization", "shape", "layout", "pass"), cells)


def main():
    runner.main(__doc__, cases, rounds=31)


if __name__ == "__main__":
    main()
