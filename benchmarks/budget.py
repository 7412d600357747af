"""Divides the time of a training step among its parts: FLOPs and bytes of every operator by formula, milliseconds from the profiler.

    python -m benchmarks.budget [--width 64] [--batch 32] [--classes 100] [--csv FILE]

The network is ResNet18 for 32 x 32 images in channels_last with Adam; it is trained by backpropagation, block-wise and layer-wise in the setting of
the paper. A multiply-add counts as two FLOPs. FLOPs come from torch.utils.flop_counter (of convolutions those of the direct algorithm, whichever
runs), except those of the goodness head, which come from its plan. Bytes are those of the inputs and outputs of every operator, once each; if an
operator reads an input twice, the second time is not counted.
"""

import argparse

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import tables
from benchmarks.step import PAPER, build
from benchmarks.timing import print_environment, write_csv
from fastff import flat
from fastff.ops.goodness import plan_for

# {part of the step: words in the names of its operators}; the first match counts
PARTS = {
    "convolution, both ways": ("convolution", "conv2d", "depthwise"),  # the gradient of x is itself a convolution
    "goodness head, layer norm, fused epilogue": (
        "fastff::step",
        "fastff.step",
        "goodness_native",
        "epilogue_",
        "step_native",
    ),
    "batch norm": ("batch_norm",),
    "activation": ("relu", "threshold", "hardswish", "hardsigmoid", "clamp_min"),
    "optimiser": ("_fused_adam", "Optimizer", "foreach"),
    "gradients summed, residual additions": ("aten::add", "aten.add"),
}


def part_of(name):
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "everything else")


class Counter(TorchDispatchMode):
    """Dispatch mode that adds up the FLOPs and bytes of all operators, by part. An op of fastff counts as one operator."""

    def __init__(self):
        super().__init__()
        self.flops, self.bytes = {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        part, packet = part_of(str(function)), function._overloadpacket
        if function.is_view or packet in (torch.ops.aten.empty, torch.ops.aten.detach):
            return out
        flops = 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is torch.ops.fastff.step:
            projection = flat.unflatten(args[0], args[1:-3]).goodness
            flops = head_flops(args[0], projection.weight, projection.grid_weight)
        elif packet is torch.ops.fastff.convolution_weight_gradient:
            flops = 2 * args[0].numel() * args[1].shape[1] * args[2] ** 2
        tensors = {t.data_ptr(): t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)}
        self.flops[part] = self.flops.get(part, 0) + flops
        self.bytes[part] = self.bytes.get(part, 0) + sum(t.numel() * t.element_size() for t in tensors.values())
        return out


def head_flops(x, weight, grid_weight):
    """Return the FLOPs of the matrix products that the plan for this head does."""
    (b, c), p, k = x.shape[:2], x[0, 0].numel(), len(weight)
    plan = plan_for(x, weight, grid_weight, (0, 0), "auto")
    return 2 * b * (3 * p * c * k if plan.algorithm == "direct" else 2 * (p + k) * c * c)


def measure(trainer, images, target, repeats=5):
    """Return {part: (FLOPs, bytes, milliseconds)} of one step."""
    for _ in range(3):
        trainer.step(images, target)
    with Counter() as counted:
        trainer.step(images, target)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(repeats):
            trainer.step(images, target)
    return {
        part: (counted.flops.get(part, 0), counted.bytes.get(part, 0), milliseconds / repeats)
        for part, milliseconds in sorted(times(profile.profiler.function_events).items(), key=lambda item: -item[1])
    }


def times(events):
    """Return {part: milliseconds} of the profiler's events. The time of an operator counts for the outermost caller that is named in PARTS."""
    found = {}

    def visit(event, part):
        part = part if part != "everything else" else part_of(event.name)
        found[part] = found.get(part, 0) + event.self_cpu_time_total / 1e3
        for child in event.cpu_children:
            visit(child, part)

    for event in events:
        if event.cpu_parent is None:
            visit(event, "everything else")
    return found


def table():
    rows = tables.read("budget")
    if not rows:
        return tables.missing("python -m benchmarks.budget --csv benchmarks/results/budget.csv")
    parts = list(dict.fromkeys(row["part"] for row in rows))
    found = {(row["variant"], row["part"]): row for row in rows}
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    body = []
    for part in parts:
        cells = [part]
        for variant in variants:
            row = found.get((variant, part))
            cells += ["", "", ""] if row is None else [
                f"{float(row['milliseconds']):.1f} ({float(row['share']):.0%})", f"{float(row['gflop']):.2f}", f"{float(row['mbyte']):.0f}",
            ]  # fmt: skip
        body.append(cells)
    header = ["part", *(f"{variant}, {unit}" for variant in variants for unit in ("ms", "GFLOP", "MB"))]
    return tables.table(header, body) + tables.measured_on(rows[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 64), ("batch", 32), ("classes", 100), ("size", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--csv")
    a = parser.parse_args()
    a.model = "resnet18"
    print_environment()
    torch.manual_seed(1)
    images = torch.randn(a.batch, 3, a.size, a.size).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, a.classes, (a.batch,))
    rows = []
    for variant, kind, options in (
        ("backprop", "backprop", {}),
        ("block", "sff", PAPER),
        ("layer", "sff", PAPER | {"granularity": "layer"}),
    ):
        found = measure(build(a, kind, True, **options), images, target)
        total = sum(ms for *_, ms in found.values())
        print(f"\n{variant:38} {'ms':>8} {'share':>6} {'GFLOP':>8} {'MB':>8} {'GFLOP/s':>8} {'GB/s':>6}")
        for part, (flops, moved, ms) in found.items():
            rates = f"{flops / ms / 1e6:8.0f} {moved / ms / 1e6:6.1f}"
            print(f"{part:38} {ms:8.1f} {ms / total:6.1%} {flops / 1e9:8.2f} {moved / 1e6:8.0f} {rates}")
            rows.append({
                "variant": variant, "part": part, "milliseconds": ms, "share": ms / total, "gflop": flops / 1e9, "mbyte": moved / 1e6,
                "width": a.width, "batch": a.batch, "classes": a.classes, "size": a.size,
            })  # fmt: skip
        print(f"{'sum':38} {total:8.1f}")
    if a.csv:
        write_csv(a.csv, rows)


if __name__ == "__main__":
    main()
