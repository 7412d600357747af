"""Muon's update of all convolution weights of a network: fastff's kernel against the same update by PyTorch's operators.

    python -m benchmarks.muon [--csv FILE] [--rounds N] [--quick]

Weights are float32 in channels_last. The time of AdamW's kernel on the same weights is given for comparison. The bytes are those of the weights and
momenta, read and written, and of the gradients, read; the operations those of u u^T (its upper half), of the iteration, and of T u.
"""

import torch

from benchmarks import networks, runner, tables
from fastff.kernels.torch import muon as by_torch
from fastff.ops import muon

SHAPES = [("resnet18", 16), ("resnet18", 64), ("mobilenet_v3_small", None)]
SETTINGS = 1e-3, 0.95, 0.05  # learning rate, momentum, weight decay


def case(model, width):
    torch.manual_seed(0)
    net = networks.build(model, 10, width, 32).to(memory_format=torch.channels_last)
    weights = [p.detach() for p in net.parameters() if p.dim() == 4 and min(p.shape[:2]) > 1]
    grads, momenta = [torch.randn_like(p) for p in weights], [torch.randn_like(p) for p in weights]

    def updating(update, dtype=torch.float32):
        def run():
            copies = [[t.to(dtype, copy=True) for t in tensors] for tensors in (weights, grads, momenta)]
            update(*copies, *SETTINGS)
            return copies[0]

        return run

    ours, theirs = ([t.clone() for t in tensors] for tensors in (weights, weights))
    averages, squares = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    steps = [torch.ones(()) for _ in weights]
    timed = {
        "torch": lambda: by_torch.update(theirs, grads, averages, *SETTINGS),
        "fastff": lambda: muon.update(ours, grads, momenta, *SETTINGS),
        "adamw": lambda: torch._fused_adamw_(
            theirs, grads, averages, squares, [], steps, lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.05, eps=1e-8, amsgrad=False, maximize=False
        ),
    }  # fmt: skip
    exact = updating(by_torch.update, torch.float64)()
    checked = {"torch": updating(by_torch.update), "fastff": updating(muon.update)}

    def check():
        for name, run in checked.items():
            error = max(float((a.double() - b).abs().max()) for a, b in zip(run(), exact, strict=True))
            if error > 1e-5:
                raise runner.WrongResult(f"wrong result: {model}, {name}: a weight is off by {error:.1e}")

    numbers = sum(p.numel() for p in weights)
    columns = {"model": model, "width": width, "weights": numbers}
    return runner.Case(columns, timed, check=check, mbytes=20 * numbers / 1e6, gflop=_gflop(weights))


def _gflop(weights):
    total = 0.0
    for p in weights:
        count = -(-len(p) // by_torch.ROWS)
        rows, columns = len(p) / count, p[0].numel()
        side = min(rows, columns)
        total += count * side * (side * max(rows, columns) + 2 * rows * columns + 17 * side**2)
    return total / 1e9


def cases(a):
    for chosen in runner.chosen(SHAPES, a):
        yield case(*chosen)


def table():
    def cells(of):
        r = of["fastff"]
        width = f", width {r['width']}" if r["width"] else ""
        adamw = f"{float(r['ms']) / float(of['adamw']['ms']):.1f}"
        return (
            f"{r['model']}{width}",
            f"{int(r['weights']):,}",
            f"{1e3 * float(r['gflop']) / float(r['ms']):.0f}",
            adamw,
        )

    header = ("network", "weights", "fastff, GFLOP/s", "fastff in times of AdamW's kernel")
    return tables.speedups("muon", "fastff", header, cells, "faster than PyTorch's operators")


def main():
    runner.main(__doc__, cases, rounds=15)


if __name__ == "__main__":
    main()
