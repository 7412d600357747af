"""Depthwise convolution: forward and gradients, fastff's rows against PyTorch's own.

    python -m benchmarks.depthwise [--csv FILE] [--rounds N]

Times of fastff are those of the row that "auto" takes, PyTorch's forward pass included where that is the quicker one. Results are compared in
float64 first: a wrong one prints no number.
"""

import argparse

import torch

from benchmarks.timing import print_environment, write_csv
from fastff.bench import interleave, quantile, ratios
from fastff.nn.convolution import Convolution

SHAPES = [  # (B, C, H, kernel, stride)
    (32, 96, 28, 5, 1), (32, 240, 14, 3, 1), (32, 16, 112, 3, 2), (32, 16, 32, 3, 2), (32, 72, 16, 3, 2), (32, 88, 8, 3, 1), (32, 96, 8, 5, 2),
    (32, 240, 4, 5, 1), (32, 576, 2, 5, 1), (8, 960, 7, 3, 1), (32, 64, 56, 3, 1),
]  # fmt: skip


def run(module, x, grad, need_x):
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, ([x] if need_x else []) + [module_weight(module)], grad)


def module_weight(module):
    return module.convolution.weight if isinstance(module, Convolution) else module.weight


def measure(shape, channels_last, need_x, rounds):
    B, C, H, kernel, stride = shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(C, C, kernel, stride, kernel // 2, groups=C, bias=False).to(memory_format=layout)
    ours = Convolution(theirs)
    x = torch.randn(B, C, H, H).contiguous(memory_format=layout).requires_grad_(need_x)
    grad = torch.randn_like(theirs(x).detach())
    wide = torch.nn.Conv2d(C, C, kernel, stride, kernel // 2, groups=C, bias=False).double()
    wide.load_state_dict(theirs.state_dict())
    exact = run(wide, x.detach().double().requires_grad_(need_x), grad.double(), need_x)
    for got, plain, true in zip(run(ours, x, grad, need_x), run(theirs, x, grad, need_x), exact, strict=True):
        error, allowed = (float((v.double() - true).norm() / true.norm()) for v in (got, plain))
        if not error <= 4 * allowed + 1e-6:
            raise SystemExit(f"wrong result at {shape}: off by {error:.1e}, plain PyTorch by {allowed:.1e}")
    functions = {"pytorch": lambda: run(theirs, x, grad, need_x), "fastff": lambda: run(ours, x, grad, need_x)}
    times = interleave(functions, rounds)
    speedup, low, high = ratios(times, "pytorch", "fastff")
    return {
        "B": B, "C": C, "H": H, "kernel": kernel, "stride": stride, "layout": "channels_last" if channels_last else "contiguous",
        "gradients": "x and weight" if need_x else "weight", "pytorch_ms": quantile(times["pytorch"], 0.5) * 1e3,
        "fastff_ms": quantile(times["fastff"], 0.5) * 1e3, "speedup": speedup, "speedup_20": low, "speedup_80": high,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print_environment()
    rows = []
    for shape in SHAPES:
        for channels_last in (True, False):
            for need_x in (False, True):
                row = measure(shape, channels_last, need_x, arguments.rounds)
                rows.append(row)
                print(
                    f"{shape!s:22} {row['layout']:14} forward, gradient of {row['gradients']:13} {row['speedup']:6.2f} x PyTorch "
                    f"[{row['speedup_20']:.2f}, {row['speedup_80']:.2f}]",
                    flush=True,
                )
    print(f"slower than PyTorch: {sum(row['speedup'] < 1 for row in rows)} of {len(rows)}")
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
