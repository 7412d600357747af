"""The gradient of a convolution's weight, the one gradient that layer-wise training computes: fastff's kernel against oneDNN's.

    python -m benchmarks.convolution [--csv FILE] [--rounds N]

channels_last, float32. The forward pass's rate stands beside them: the same multiply-adds. Results are compared in float64 first.
"""

import argparse

import torch

from benchmarks.timing import print_environment, write_csv
from fastff.bench import interleave, quantile, ratios

SHAPES = [  # (B, C, H, D, kernel, stride): the convolutions of ResNet18 at width 64 and 16, 32 x 32 images, and of its first stage at 224 x 224
    (32, 64, 32, 64, 3, 1), (32, 64, 32, 128, 3, 2), (32, 128, 16, 128, 3, 1), (32, 128, 16, 256, 3, 2), (32, 256, 8, 256, 3, 1),
    (32, 256, 8, 512, 3, 2), (32, 512, 4, 512, 3, 1), (32, 16, 32, 16, 3, 1), (32, 16, 32, 32, 3, 2), (32, 32, 16, 32, 3, 1), (32, 64, 8, 64, 3, 1),
    (32, 128, 4, 128, 3, 1), (16, 64, 56, 64, 3, 1), (32, 64, 17, 30, 5, 1),
]  # fmt: skip


def measure(shape, rounds):
    B, C, H, D, kernel, stride = shape
    torch.manual_seed(0)
    last, padding = torch.channels_last, kernel // 2
    x = torch.randn(B, C, H, H).contiguous(memory_format=last)
    weight = torch.randn(D, C, kernel, kernel).contiguous(memory_format=last)
    grad = torch.randn_like(torch.conv2d(x, weight, None, stride, padding))

    def run(impl, x=x, grad=grad):
        return torch.ops.fastff.convolution_weight_gradient(grad, x, kernel, stride, padding, impl)

    exact = run("composed", x.double(), grad.double())
    error, allowed = (float((run(i).double() - exact).norm() / exact.norm()) for i in ("auto", "composed"))
    if not error <= 4 * allowed + 1e-6:
        raise SystemExit(f"wrong result at {shape}: off by {error:.1e}, oneDNN by {allowed:.1e}")
    times = interleave(
        {
            "forward": lambda: torch.conv2d(x, weight, None, stride, padding),
            "onednn": lambda: run("composed"),
            "fastff": lambda: run("auto"),
        },
        rounds,
    )
    gflop = 2 * grad.numel() * C * kernel**2 / 1e9
    speedup, low, high = ratios(times, "onednn", "fastff")
    rates = {f"{name}_gflops": gflop / quantile(seconds, 0.5) for name, seconds in times.items()}
    sizes = dict(zip(("B", "C", "H", "D", "kernel", "stride"), shape, strict=True))
    return sizes | {"gflop": gflop, "speedup": speedup, "speedup_20": low, "speedup_80": high} | rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print_environment()
    rows = []
    for shape in SHAPES:
        row = measure(shape, arguments.rounds)
        rows.append(row)
        rates = ", ".join(f"{name} {row[f'{name}_gflops']:.0f}" for name in ("fastff", "onednn", "forward"))
        print(
            f"{shape!s:26} {row['speedup']:5.2f} x oneDNN [{row['speedup_20']:.2f}, {row['speedup_80']:.2f}]   GFLOP/s: {rates}",
            flush=True,
        )
    print(f"slower than oneDNN: {sum(row['speedup'] < 1 for row in rows)} of {len(rows)}")
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
