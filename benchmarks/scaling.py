"""Growth of time and peak memory of a step along one axis: backpropagation, block-wise and layer-wise training in the setting of the paper.

    python -m benchmarks.scaling --axis classes|batch|depth|width|size [--quick] [--csv FILE] [--rounds N]

    classes, batch, width, size   ResNet18 with width 64, batch 32, 32 x 32 images and 100 classes, except for the axis
    depth                         a plain network of N residual blocks with 32 channels at 16 x 16, batch 32, 10 classes; all blocks are alike, so
                                  that the largest block has the same size in all networks

First the weights of the block-wise trainer at one point are compared with float64, as in benchmarks/step.py. Then the steps of all points are timed
in turn in one run. "ratio" is to backpropagation at the same point, "growth" is to the same kind of training at the first point. Memory is what a
step allocates above parameters and optimizer state. All networks are in memory at once, 2 GB for the largest axis.
"""

import argparse
import functools

import torch
from torch import nn

from benchmarks import plots, runner, step, tables
from benchmarks.timing import print_environment, write_csv
from fastff.bench import interleave, quantile, ratios
from fastff.memory import peak_memory

CONTENDERS = {
    "backprop": ("backprop", {}),
    "block": ("sff", step.PAPER),
    "layer": ("sff", step.PAPER | {"granularity": "layer"}),
}
LABELS = {"backprop": "backpropagation", "block": "block-wise", "layer": "layer-wise"}
RESNET = {"model": "resnet18", "width": 64, "batch": 32, "size": 32, "classes": 100, "depth": None}
PLAIN = {"model": "plain", "width": 32, "batch": 32, "size": 16, "classes": 10, "depth": 16}
AXES = {  # name: (fixed settings, points, points of --quick); growth is relative to the first point of --quick
    "classes": (RESNET, (2, 10, 100, 1000, 10000), (10, 1000, 10000)),
    "batch": (RESNET, (8, 16, 32, 64, 128), (8, 32)),
    "depth": (PLAIN, (4, 8, 16, 32, 64), (4, 16, 64)),
    "width": (RESNET, (16, 32, 64, 128), (16, 32)),
    "size": (RESNET, (16, 32, 64, 96), (16, 32)),
}
WORDS = {
    "classes": "classes",
    "batch": "images a batch",
    "depth": "residual blocks",
    "width": "channels of the first stage",
    "size": "pixels an image side",
}
NOTES = {  # added to the title of the first panel of a plot
    "classes": ": flat where the second moment serves",
    "depth": ": of blocks, that of the largest",
}


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class Plain(nn.Module):
    """Plain network: a stem, `depth` residual blocks of one resolution, the global average and a classifier."""

    def __init__(self, depth, channels, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.Sequential(*(Residual(channels) for _ in range(depth)))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, x):
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


def build(point, kind, impl="auto", **options):
    """Return a trainer of the network at `point`, in channels_last."""
    if point.model != "plain":
        return step.build(point, kind, True, impl=impl, **options)
    torch.manual_seed(0)
    net = Plain(point.depth, point.width, point.classes)
    return step.trainer_of(net, point.classes, point.size, kind, True, impl=impl, **options)


def points(axis, quick=False):
    """Return {value on the axis: Namespace that describes network and minibatch}."""
    fixed, every, few = AXES[axis]
    narrow = {"width": 32} if quick and axis != "depth" else {}
    return {value: argparse.Namespace(**fixed | narrow | {axis: value}) for value in (few if quick else every)}


def measure(axis, settings, rounds, quick=False):
    """Check one point, time the steps of all points, and return a row for each point and contender."""
    first = AXES[axis][2][0]
    images, target = step.minibatch(settings[first])
    few = max(2, len(images) // 4) if quick else len(images)
    make = functools.partial(build, settings[first], "sff", **step.PAPER)
    step.check(make, images[:few], target[:few], f"block, {axis} {first}")
    steps = {}
    for value, point in settings.items():
        images, target = step.minibatch(point)
        for name, (kind, options) in CONTENDERS.items():
            steps[value, name] = functools.partial(build(point, kind, **options).step, images, target)
    times = interleave(steps, rounds)
    rows = []
    for (value, name), one in steps.items():
        rows.append(
            {"axis": axis} | vars(settings[value]) | {"contender": name, "base": "backprop", "grown_from": first}
        )
        for what, base in (("ratio", (value, "backprop")), ("growth", (first, name))):
            found = ratios(times, (value, name), base)
            rows[-1] |= dict(zip((what, f"{what}_20", f"{what}_80"), found, strict=True))
        rows[-1] |= {
            key: 1e3 * quantile(times[value, name], q) for key, q in (("ms", 0.5), ("ms_20", 0.2), ("ms_80", 0.8))
        }
        rows[-1]["peak_mib"] = peak_memory(one)
    return rows


def show(axis, rows):
    for row in rows:
        r = {key: f"{row[key]:.2f} [{row[f'{key}_20']:.2f}, {row[f'{key}_80']:.2f}]" for key in ("ratio", "growth")}
        cost = f"{row['ms']:8.1f} ms {row['peak_mib']:7.1f} MiB"
        print(
            f"{axis} {row[axis]:<6} {row['contender']:9} {cost}   {r['ratio']:>19} x backprop   grown {r['growth']} x"
        )


def title(axis, row):
    """Return the settings that are fixed along the axis, as text."""
    parts = {
        "model": "a plain network" if row["model"] == "plain" else row["model"],
        "depth": f"{row['depth']} residual blocks",
        "width": f"width {row['width']}",
        "batch": f"batch {row['batch']}",
        "size": f"{row['size']} x {row['size']}",
        "classes": f"{row['classes']} classes",
    }
    return ", ".join(text for key, text in parts.items() if key != axis and row[key])


def table(axis):
    """Return the plot and the table of results/scaling-AXIS.csv: times with their growth, ratios to backpropagation, memory."""
    rows = tables.read(f"scaling-{axis}")
    if not rows:
        return tables.missing(f"python -m benchmarks.scaling --axis {axis} --csv benchmarks/results/scaling-{axis}.csv")
    header, body = [WORDS[axis]], []
    for name in CONTENDERS:
        header += [f"{LABELS[name]}, ms", *(["against backpropagation"] if name != "backprop" else []), "memory"]
    for (value,), found in tables.grouped(rows, axis).items():
        cells = [f"{int(value):,}"]
        for row in found:
            against = [] if row["contender"] == "backprop" else [f"{float(row['ratio']):.2f} x"]
            grown = f"{float(row['ms']):,.0f} ({float(row['growth']):.2f} x)"
            cells += [grown, *against, f"{float(row['peak_mib']):.1f} MiB"]
        body.append(cells)
    picture = f"![Time and memory of a step against {WORDS[axis]}](scaling-{axis}.png)"
    return (
        f"{picture}\n\n{title(axis, rows[0])}; in brackets the time in units of that at {int(rows[0]['grown_from']):,} {WORDS[axis]}:\n\n"
        + (tables.table(header, body) + tables.measured_on(rows[0]))
    )


def plot(folder):
    """Draw time and memory over each measured axis, into FOLDER/scaling-AXIS.png. For the depth, memory comes first."""
    for axis in AXES:
        rows = tables.read(f"scaling-{axis}")
        if not rows:
            continue
        figure, ((left, right),) = plots.figure(1, 2)
        time, memory = (right, left) if axis == "depth" else (left, right)
        for (name,), found in tables.grouped(rows, "contender").items():
            x = [int(row[axis]) for row in found]
            look = {"color": plots.COLOURS[name], "linewidth": 2, "marker": "o", "markersize": 4, "label": LABELS[name]}
            time.plot(x, [float(row["ms"]) for row in found], **look)
            between = ([float(row[key]) for row in found] for key in ("ms_20", "ms_80"))
            time.fill_between(x, *between, color=look["color"], alpha=0.15, linewidth=0)
            memory.plot(x, [float(row["peak_mib"]) for row in found], **look)
        for panel, what in ((time, "milliseconds a step"), (memory, "peak memory of a step (MiB)")):
            plots.logarithmic(panel, x)
            panel.set_xlabel(WORDS[axis])
            note = NOTES.get(axis, "") if panel is left else ""
            panel.set_title(what + note, fontsize=10, loc="left")
        left.legend(frameon=False)
        figure.suptitle(title(axis, rows[0]), fontsize=11)
        plots.save(figure, f"{folder}/scaling-{axis}.png")


def main():
    parser = runner.arguments(__doc__)
    parser.add_argument("--axis", required=True, choices=AXES)
    a = parser.parse_args()
    print_environment()
    settings = points(a.axis, a.quick)
    print(f"{title(a.axis, vars(next(iter(settings.values()))))}, along {a.axis}")
    rows = measure(a.axis, settings, a.rounds, a.quick)
    show(a.axis, rows)
    if a.csv:
        write_csv(a.csv, rows)


if __name__ == "__main__":
    main()
