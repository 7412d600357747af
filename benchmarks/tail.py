"""The tail of a block: batch norm, residual, ReLU, goodness head, layer norm and all gradients; fastff's one call against the eager sequence.

    python -m benchmarks.tail [--csv FILE] [--rounds N]

eager: what a user writes, with autograd from the last convolution's output and the residual to the loss, and layer norm of the block's output;
float32, with and without the residual's gradient. "by parts" is fastff without the fused tail: PyTorch's batch norm, addition and ReLU around
goodness_step. Results are compared in float64 first: a wrong one prints no number.
"""

import argparse

import torch
import torch.nn.functional as F

import fastff.functional as ff
from benchmarks.timing import print_environment, write_csv
from fastff.bench import interleave, quantile, ratios

SHAPES = [  # (B, C, H, K)
    (32, 64, 32, 100), (32, 64, 32, 10), (32, 128, 16, 100), (32, 256, 8, 100), (32, 512, 4, 100), (32, 16, 32, 10), (64, 32, 16, 10),
    (64, 64, 8, 10), (32, 24, 28, 100), (32, 96, 14, 100), (8, 64, 56, 1000),
]  # fmt: skip


def sequence(y, residual, bn_weight, bn_bias):
    h = F.batch_norm(y, None, None, bn_weight, bn_bias, training=True)
    return F.relu_(h.add_(residual) if residual is not None else h)


def eager(leaves, target):
    """(loss, next input, gradients) as code without fastff computes them."""
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


def measure(shape, channels_last, residual, rounds):
    B, C, H, K = shape
    torch.manual_seed(0)
    leaves = [
        torch.randn(B, C, H, H),
        torch.randn(B, C, H, H),
        torch.rand(C) + 0.5,
        torch.randn(C),
        torch.randn(K, C) * (2 / C**0.5),
    ]
    target = torch.randint(0, K, (B,))
    if channels_last:
        leaves[:2] = (t.contiguous(memory_format=torch.channels_last) for t in leaves[:2])
    for t in leaves:
        t.requires_grad_()
    if residual == "none":
        leaves[1] = None
    elif residual == "no gradient":
        leaves[1].requires_grad_(False)
    wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    exact = eager(wide, target)
    for ours, theirs, true in zip(fused(leaves, target), eager(leaves, target), exact, strict=True):
        error, allowed = ((v.double() - true).norm() / true.norm() for v in (ours, theirs))
        if not error <= 4 * allowed + 1e-6:
            raise SystemExit(f"wrong result at {shape}: off by {error:.1e}, plain PyTorch by {allowed:.1e}")
    functions = {"eager": eager, "by parts": by_parts, "fused": fused}
    times = interleave({name: lambda f=f: f(leaves, target) for name, f in functions.items()}, rounds)
    speedup, low, high = ratios(times, "eager", "fused")
    return {
        "B": B, "C": C, "H": H, "K": K, "layout": "channels_last" if channels_last else "contiguous", "residual": residual,
        "eager_ms": quantile(times["eager"], 0.5) * 1e3, "fused_ms": quantile(times["fused"], 0.5) * 1e3,
        "speedup": speedup, "speedup_20": low, "speedup_80": high, "against_parts": ratios(times, "by parts", "fused")[0],
        "floor_mbytes": 4 * B * C * H * H * (4 + (residual != "none") + (residual == "gradient")) / 1e6,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print_environment()
    rows = []
    for shape in SHAPES:
        for channels_last in (True, False):
            for residual in ("none", "no gradient", "gradient"):
                row = measure(shape, channels_last, residual, arguments.rounds)
                rows.append(row)
                print(
                    f"{shape!s:20} {row['layout']:14} residual: {residual:12} {row['speedup']:6.2f} x eager [{row['speedup_20']:.2f}, "
                    f"{row['speedup_80']:.2f}]  {row['against_parts']:5.2f} x by parts   {row['fused_ms']:7.2f} ms, "
                    f"floor {row['floor_mbytes']:6.1f} MB",
                    flush=True,
                )
    print(f"slower than eager: {sum(row['speedup'] < 1 for row in rows)} of {len(rows)}")
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
