"""The goodness head alone: loss and all gradients, fastff against eager PyTorch, and the counted work.

    python -m benchmarks.goodness [--csv FILE] [--rounds N] [--compile]

eager: 1 x 1 convolution, square, mean, cross-entropy, backward. Both produce loss, dL/dx and dL/dW in float32; layer normalisation is left
out on both sides. Results are compared in float64 first: a wrong one prints no number. --compile adds torch.compile of the eager code.
"""

import argparse

import torch
import torch.nn.functional as F

import fastff.functional as ff
from benchmarks.timing import print_environment, write_csv
from fastff.bench import interleave, quantile, ratios
from fastff.ops.goodness import plan_for

SHAPES = [  # (B, C, H, K)
    (8, 64, 56, 1000), (32, 64, 32, 1000), (32, 64, 32, 100), (32, 64, 32, 10), (32, 128, 16, 100), (32, 128, 16, 10), (32, 256, 8, 100),
    (32, 256, 8, 10), (32, 512, 4, 100), (32, 512, 4, 10), (32, 512, 4, 1000), (64, 16, 32, 10), (64, 32, 16, 10), (64, 64, 8, 10), (64, 128, 4, 10),
    (32, 16, 16, 10), (32, 24, 28, 100), (32, 96, 14, 100), (32, 576, 2, 10), (8, 960, 7, 1000), (32, 512, 1, 100),
]  # fmt: skip


def eager(x, weight, target):
    """Loss and gradients as code without fastff computes them."""
    goodness = F.conv2d(x, weight[:, :, None, None]).square().mean((2, 3))
    loss = F.cross_entropy(goodness, target)
    return loss, *torch.autograd.grad(loss, (x, weight))


def floor(B, C, H, K):
    """(bytes that must move, multiply-adds of the cheaper algorithm), of sff.md sections 3 and 4."""
    P = H * H
    return 4 * (2 * B * C * P + 2 * K * C), B * min(3 * P * C * K, 2 * P * C * C + 2 * K * C * C)


def measure(shape, channels_last, rounds, compiled):
    B, C, H, K = shape
    torch.manual_seed(0)
    x, weight, target = torch.randn(B, C, H, H), torch.randn(K, C) * (2 / C**0.5), torch.randint(0, K, (B,))
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    exact = eager(x.double().requires_grad_(), weight.double().requires_grad_(), target)
    x_grad, weight_grad = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def fast():
        return ff.goodness_step(x, weight, None, target, normalize=None)

    step, plain = fast(), eager(x_grad, weight_grad, target)
    for name, ours, theirs, true in zip(
        ("loss", "grad_x", "grad_weight"), (step.loss, step.grad_x, step.grad_weight), plain, exact, strict=True
    ):
        error, allowed = ((v.double() - true).norm() / true.norm() for v in (ours, theirs.detach()))
        if not error <= 4 * allowed + 1e-6:
            raise SystemExit(f"wrong result at {shape}: {name} is off by {error:.1e}, plain PyTorch by {allowed:.1e}")
    functions = {"eager": lambda: eager(x_grad, weight_grad, target), "fastff": fast}
    if compiled:
        code = torch.compile(eager, dynamic=False)
        functions["compile"] = lambda: code(x_grad, weight_grad, target)
    times = interleave(functions, rounds)
    how = plan_for(x, weight[:, :, None, None], None, (0, 0))
    moved, work = floor(*shape)
    speedup, low, high = ratios(times, "eager", "fastff")
    row = {
        "B": B, "C": C, "H": H, "K": K, "layout": "channels_last" if channels_last else "contiguous", "algorithm": how.algorithm,
        "samples": how.samples, "eager_ms": quantile(times["eager"], 0.5) * 1e3, "fastff_ms": quantile(times["fastff"], 0.5) * 1e3,
        "speedup": speedup, "speedup_20": low, "speedup_80": high, "floor_mbytes": moved / 1e6, "gmultiply_adds": work / 1e9,
    }  # fmt: skip
    if compiled:
        row["against_compile"] = ratios(times, "compile", "fastff")[0]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    print_environment()
    rows = []
    for shape in SHAPES:
        for channels_last in (False, True):
            row = measure(shape, channels_last, arguments.rounds, arguments.compile)
            rows.append(row)
            against = f"  {row['against_compile']:6.2f} x torch.compile" if arguments.compile else ""
            print(
                f"{shape!s:20} {row['layout']:14} {row['algorithm']:14} {row['speedup']:7.2f} x eager "
                f"[{row['speedup_20']:.2f}, {row['speedup_80']:.2f}]{against}   "
                f"{row['floor_mbytes']:6.1f} MB, {row['gmultiply_adds']:5.2f} G multiply-adds"
            )
    slow = [row for row in rows if row["speedup"] < 1]
    print(f"slower than eager: {len(slow)} of {len(rows)}")
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
