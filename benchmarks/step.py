"""Whole training steps: time and peak memory of block-local training, backpropagation and its memory-saving variants.

    python -m benchmarks.step [--model resnet18] [--width 64] [--batch 32] [--classes 100] [--size 32] [--only NAME...] [--no-compile] [--csv FILE]

First the weights after three steps of layer-, block- and stage-wise training are compared with float64. Then all contenders are timed in turn, each
in the memory format (contiguous or channels_last) that a short measurement finds faster for it. The base of the ratios is eager or compiled
backpropagation, whichever a short measurement finds faster. Memory is what a step allocates above parameters and optimizer state. "layer", "block"
and "stage" are the setting of the paper (grid=0, window=1); all but those named so update by Adam. benchmarks/budget.py says where the time goes.
"""

import functools

import torch

import fastff
from benchmarks import networks, runner, tables
from benchmarks.timing import print_environment, write_csv
from fastff.bench import interleave, quantile
from fastff.graph.recording import WARM_UP
from fastff.graph.trace import CutError
from fastff.training import Backprop, Trainer, optim

PAPER = {"grid": 0, "window": 1}
ADAM = lambda groups: torch.optim.Adam(groups, lr=1e-4, fused=True)  # noqa: E731
MUON = optim.muon(1e-4)
CHECKED = ("layer", "block", "stage")


def build(a, kind, channels_last, granularity="block", impl="auto", **options):
    """Return a trainer of the network that a.model, a.width, a.size and a.classes describe. `kind` is "sff" or "backprop"."""
    torch.manual_seed(0)
    width = a.width if a.model in networks.WIDE else None
    net = networks.build(a.model, a.classes, width, a.size)
    return trainer_of(net, a.classes, a.size, kind, channels_last, granularity, impl, **options)


def trainer_of(net, classes, size, kind, channels_last, granularity="block", impl="auto", **options):
    """Return a trainer of the network `net` for images [B, 3, size, size]."""
    net = net.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    head = {k: options.pop(k) for k in ("grid", "hidden", "window") if k in options}
    updates = options.pop("updates", ADAM)
    plain = {"impl": impl, "fuse": impl != "reference", "readout": kind == "backprop"}
    sff = fastff.SFF(net, classes, granularity, (3, size, size), **plain, **head)
    return (Trainer if kind == "sff" else Backprop)(sff, updates, **options)


def variants(a):
    """Return {contender: (kind, options of build)}."""
    found = {
        "backprop": ("backprop", {}),
        "backprop, compiled": ("backprop", {"compile": True}),
        "backprop, 4 micro-batches": ("backprop", {"micro_batches": 4}),
        "backprop, checkpointing": ("backprop", {"checkpointing": True}),
        "backprop, deep supervision": ("backprop", PAPER | {"deep_supervision": True}),
        "layer": ("sff", PAPER | {"granularity": "layer"}),
        "block": ("sff", PAPER),
        "stage": ("sff", PAPER | {"granularity": "stage"}),
        "block, spatial term": ("sff", {"window": 1, "hidden": 0}),
        "block, window 2": ("sff", {"window": 2, "hidden": 0}),
        "defaults, Adam": ("sff", {"granularity": "auto"}),
        "defaults": ("sff", {"granularity": "auto", "updates": MUON}),
        "defaults, not recorded": ("sff", {"granularity": "auto", "updates": MUON, "record_steps": False}),
        "backprop, Muon": ("backprop", {"updates": MUON}),
        "backprop, Muon, recorded": ("backprop", {"updates": MUON, "record_steps": True}),
        "block, 4 micro-batches": ("sff", PAPER | {"micro_batches": 4}),
        "block, compiled": ("sff", PAPER | {"compile": True}),
    }
    return {name: v for name, v in found.items() if a.compile or "compiled" not in name}


def check(make, images, target, what="block", tries=4):
    """Check that three steps of SGD change the weights as in float64, up to four times the error of the float32 reference.

    Training amplifies rounding errors: if one of them moves a value across the kink of ReLU, a gradient jumps, in one implementation or the
    other. Therefore the largest error of the reference so far is allowed, and a difference counts only if it occurs with each of `tries`
    minibatches. The learning rate is 1e-3. With 1e-2, three steps amplified the error of the stage-wise reference to 6 % of the update; with
    1e-3 it is 0.3 %.

    Args:
        make: function make(impl=...) that returns a Trainer.
        images, target: the first minibatch.
        what: name of the check in its message.
        tries: number of minibatches.

    Raises:
        runner.WrongResult: the difference is too large with every minibatch.
    """

    def change(impl, images):
        sff = make(impl=impl).sff.to(images.dtype)
        weights = lambda: torch.cat([p.detach().flatten().double() for p in sff.parameters()])  # noqa: E731
        before, trainer = weights(), Trainer(sff, lambda groups: torch.optim.SGD(groups, lr=1e-3))
        for _ in range(3):
            trainer.step(images, target)
        return weights() - before

    largest = 1e-4
    for _ in range(tries):
        exact = change("reference", images.double())
        error, reference = (
            ((change(impl, images) - exact).norm() / exact.norm()).item() for impl in ("auto", "reference")
        )
        largest = max(largest, reference)
        found = f"{what}: what three steps change is off by {error:.1e}, allowed are {4 * largest:.1e}"
        if error <= 4 * largest:
            print(f"checked: {found}", flush=True)
            return
        images = torch.randn_like(images)
    raise runner.WrongResult(f"wrong result: {found}, and so with {tries} minibatches")


def minibatch(a):
    torch.manual_seed(1)
    images = torch.randn(a.batch, 3, a.size, a.size).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, a.classes, (a.batch,))


def in_faster_layout(a, kind, options, images, target):
    """Return (step, layout) for the memory format in which this variant is faster."""
    steps = {}
    for layout in ("contiguous", "channels_last"):
        batch = images if layout == "channels_last" else images.contiguous()
        trainer = build(a, kind, layout == "channels_last", **options)
        steps[layout] = functools.partial(trainer.step, batch, target)
    interleave(steps, WARM_UP + 1)  # then steps are recorded
    layout = fastest(interleave(steps, 5))
    return steps[layout], layout


def fastest(times):
    return min(times, key=lambda name: quantile(times[name], 0.5))


def case(a):
    """Return (runner.Case, {contender: layout})."""
    images, target = minibatch(a)
    steps, layouts, checked = {}, {}, []
    for name, (kind, options) in variants(a).items():
        if a.only and name != "backprop" and name not in a.only:
            continue
        try:
            steps[name], layouts[name] = in_faster_layout(a, kind, options, images, target)
        except CutError as error:
            print(f"{name}: left out, {a.model} has no such cut: {error}", flush=True)
            continue
        if name in CHECKED:
            checked.append(name)
    full = {name: steps[name] for name in ("backprop", "backprop, compiled") if name in steps}
    base = fastest(interleave(full, 3)) if len(full) > 1 else "backprop"

    few = max(2, a.batch // 4) if a.quick else a.batch

    def checks():
        for granularity in checked or ["block"]:
            make = functools.partial(build, a, "sff", True, granularity, **PAPER)
            check(make, images[:few], target[:few], granularity)

    width = a.width if a.model in networks.WIDE else None
    columns = {"model": a.model, "width": width, "batch": a.batch, "size": a.size, "classes": a.classes}
    contenders = {base: steps[base]} | steps
    return runner.Case(columns, contenders, check=checks, memory=True), layouts


def show(rows):
    print(f"{title(rows[0])}; time in units of that of {rows[0]['base']}")
    for row in rows:
        between = f"[{row['ratio_20']:.2f}, {row['ratio_80']:.2f}]"
        print(
            f"{row['contender']:28} {row['layout']:14} {row['ratio']:6.2f} x {between:14} {row['ms']:7.0f} ms {row['peak_mib']:6.0f} MiB"
        )


def title(row):
    width = f", width {row['width']}" if row["width"] else ""
    return f"{row['model']}{width}, batch {row['batch']}, {row['size']} x {row['size']}, {row['classes']} classes"


def table(*names):
    """Return the tables of results/step-NAME.csv for these names, or for all files if none are given."""
    found = [tables.read(f"step-{name}") for name in names or written()]
    found = [rows for rows in found if rows]
    if not found:
        return tables.missing("python -m benchmarks.step --csv benchmarks/results/step-resnet18-64.csv")
    text = []
    for rows in found:
        body = [
            (row["contender"], row["layout"].replace("_", " "), *tables.slower(row), f"{float(row['ms']):,.0f}",
             f"{float(row['peak_mib']):.1f} MiB")
            for row in rows
        ]  # fmt: skip
        header = ("step", "layout", "time", "20 to 80 %", "ms", "peak memory")
        text.append(
            f"{title(rows[0])}; ratios to {rows[0]['base']}:\n\n"
            + tables.table(header, body)
            + tables.measured_on(rows[0])
        )
    return "\n\n".join(text)


def sentence():
    """Return what a step of the defaults takes and needs, as the files for ResNet18 say it."""
    said = []
    for width in (64, 16):
        rows = {row["contender"]: row for row in tables.read(f"step-resnet18-{width}")}
        if not rows:
            return tables.missing(
                f"python -m benchmarks.step --width {width} --csv benchmarks/results/step-resnet18-{width}.csv"
            )
        local, whole = rows["defaults"], rows["backprop"]
        memory = float(local["peak_mib"]) / float(whole["peak_mib"])
        said.append((f"{float(local['ratio']):.2f}", f"{memory:.2f}", width))
    (time, memory, width), (time_narrow, memory_narrow, narrow) = said
    text = f"A step of a ResNet18 takes {time} of backpropagation's time and {memory} of its memory at width {width}"
    return f"{text}, {time_narrow} and {memory_narrow} at width {narrow}."


def written():
    """Return NAME of all files results/step-NAME.csv, in the order of the networks, wide ones before narrow ones."""

    def place(name):
        model, _, width = name.partition("-")
        return networks.NAMES.index(model), -int(width or 0)

    return sorted((path.stem.removeprefix("step-") for path in tables.RESULTS.glob("step-*.csv")), key=place)


def main():
    parser = runner.arguments(__doc__)
    parser.add_argument("--model", default="resnet18", choices=networks.NAMES)
    for name, default in (("width", 64), ("batch", 32), ("classes", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--size", type=int, help="of the images; 32, for torchvision's networks 64")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these, beside backprop")
    parser.set_defaults(compile=True)
    a = parser.parse_args()
    a.size = a.size or (32 if a.model in networks.OWN else 64)
    if unknown := set(a.only or ()) - set(variants(a)):
        parser.error(f"--only: expected names out of {'; '.join(variants(a))}, got {'; '.join(sorted(unknown))}")
    print_environment()
    measured, layouts = case(a)
    rows = [row | {"layout": layouts[row["contender"]]} for row in runner.measure(measured, a.rounds)]
    show(rows)
    if a.csv:
        write_csv(a.csv, rows)


if __name__ == "__main__":
    main()
