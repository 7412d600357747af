"""The whole training step: block-local training against backpropagation and its memory-saving variants, time and peak memory.

    python -m benchmarks.step [--width 64] [--batch 32] [--classes 100] [--model resnet18] [--csv FILE] [--rounds N] [--no-compile]

Interleaved in one run; ratios are to the faster of eager and compiled backpropagation, round by round. Each variant runs in the layout
(contiguous or channels_last) that is faster for it on this machine, found by measurement first. Memory is what the step allocates above
parameters and optimiser state. SFF as in the paper (grid=0, window=1) and with the defaults. Results are checked first: the weights
after three steps, against float64. Where the time goes: benchmarks/budget.py.
"""

import argparse

import torch

import fastff
from benchmarks.timing import print_environment, write_csv
from fastff.bench import interleave, quantile, ratios
from fastff.training import Backprop, Trainer
from fastff.training.memory import peak_memory

PAPER = {"grid": 0, "window": 1}
ADAM = lambda groups: torch.optim.Adam(groups, lr=1e-4, fused=True)  # noqa: E731


def build(a, kind, channels_last, granularity="block", impl="auto", **options):
    """A trainer: kind "sff" or "backprop"."""
    torch.manual_seed(0)
    width = {"width": a.width} if a.model.startswith("resnet") else {}
    net = getattr(fastff.models, a.model)(a.classes, stem="cifar", **width)
    net = net.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    head = {k: options.pop(k) for k in ("grid", "window") if k in options}
    plain = {"impl": impl, "fuse": impl != "reference", "readout": kind == "backprop"}
    sff = fastff.SFF(net, a.classes, granularity, (3, a.size, a.size), **plain, **head)
    return (Trainer if kind == "sff" else Backprop)(sff, ADAM, **options)


def variants(a):
    """{name: (kind, options)}."""
    found = {
        "backprop": ("backprop", {}),
        "backprop, compiled": ("backprop", {"compile": True}),
        "backprop, 4 micro-batches": ("backprop", {"micro_batches": 4}),
        "backprop, checkpointing": ("backprop", {"checkpointing": True}),
        "block": ("sff", PAPER),
        "layer": ("sff", PAPER | {"granularity": "layer"}),
        "stage": ("sff", PAPER | {"granularity": "stage"}),
        "block, defaults": ("sff", {}),
        "block, spatial term": ("sff", {"window": 1}),
        "block, 4 micro-batches": ("sff", PAPER | {"micro_batches": 4}),
        "block, compiled": ("sff", PAPER | {"compile": True}),
    }
    return {name: v for name, v in found.items() if a.compile or "compiled" not in name}


def check(a, images, target):
    """Three steps of the block-wise trainer are no further from float64 than four times what the float32 reference is: both amplify roundings."""

    def weights(impl, dtype):
        sff = build(a, "sff", True, impl=impl, **PAPER).sff.to(dtype)
        trainer = Trainer(sff, lambda groups: torch.optim.SGD(groups, lr=1e-2))
        for _ in range(3):
            trainer.step(images.to(dtype), target)
        return torch.cat([p.detach().flatten().double() for p in sff.parameters()])

    exact = weights("reference", torch.float64)
    error, usual = (
        ((weights(impl, torch.float32) - exact).norm() / exact.norm()).item() for impl in ("auto", "reference")
    )
    if not error < 4 * max(usual, 1e-5):
        raise SystemExit(
            f"wrong result: after three steps weights are off by {error:.1e}, the reference's by {usual:.1e}"
        )
    print(f"checked: after three steps weights are off by {error:.1e}, those of the float32 reference by {usual:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", choices=["resnet18", "mobilenet_v3_small", "mobilenet_v3_large"])
    for name, default in (("width", 64), ("batch", 32), ("classes", 100), ("size", 32), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these, beside backprop")
    parser.add_argument("--csv")
    a = parser.parse_args()
    print_environment()
    torch.manual_seed(1)
    images, target = torch.randn(a.batch, 3, a.size, a.size), torch.randint(0, a.classes, (a.batch,))
    check(a, images, target)
    layouts = {False: images, True: images.contiguous(memory_format=torch.channels_last)}
    steps, chosen, memory = {}, {}, {}
    for name, (kind, options) in variants(a).items():
        if a.only and name != "backprop" and name not in a.only:
            continue
        tried = {}
        for channels_last, batch in layouts.items():
            trainer = build(a, kind, channels_last, **options)
            tried[channels_last] = lambda trainer=trainer, batch=batch: trainer.step(batch, target)
        times = interleave(tried, 3)
        chosen[name] = min(tried, key=lambda layout: quantile(times[layout], 0.5))
        steps[name] = tried[chosen[name]]
        memory[name] = peak_memory(steps[name], torch.device("cpu"))
    times = interleave(steps, a.rounds)
    full = [name for name in ("backprop", "backprop, compiled") if name in steps]
    base = min(full, key=lambda name: quantile(times[name], 0.5))
    print(f"{a.model}, width {a.width}, batch {a.batch}, {a.size} x {a.size}, {a.classes} classes; ratios to '{base}'")
    print(f"{'':28} {'layout':14} {'time':>8}   {'20-80 %':14} {'memory':>8}")
    rows = []
    for name in steps:
        ratio, low, high = ratios(times, name, base)
        layout = "channels_last" if chosen[name] else "contiguous"
        print(f"{name:28} {layout:14} {ratio:6.2f} x   [{low:.2f}, {high:.2f}]  {memory[name]:6.0f} MiB")
        rows.append({
            "model": a.model, "width": a.width, "batch": a.batch, "size": a.size, "classes": a.classes,
            "variant": name, "layout": layout, "base": base,
            "ratio": ratio, "ratio_20": low, "ratio_80": high, "milliseconds": quantile(times[name], 0.5) * 1e3, "peak_mib": memory[name],
        })  # fmt: skip
    if a.csv:
        write_csv(a.csv, rows)


if __name__ == "__main__":
    main()
