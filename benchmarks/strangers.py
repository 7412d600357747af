"""One line, fastff.accelerate(net), in programs of the styles of public repositories (examples/styles): time of a minibatch, exactness.

    python -m benchmarks.strangers [STYLE ...] [--rounds N] [--csv FILE]

Each program trains twice, as it is and accelerated. In float64, with every replacement made that can be, both must have the same parameters after
two steps but for rounding; otherwise no time is printed. Then minibatches of both are timed in turn, after the calls in which `accelerate` measures.
Nothing is fetched: inputs are drawn.
"""

import argparse
import importlib
from contextlib import contextmanager

import torch

import fastff
from benchmarks import tables
from benchmarks.timing import print_environment, write_csv
from fastff.bench import interleave, ratios
from fastff.swap_in import limits

CONVOLUTIONAL = ("splits", "views", "contrasts", "predictions", "decoders", "samples", "positions")
FULLY_CONNECTED = ("lengths", "sums", "suite")
STYLES = CONVOLUTIONAL + FULLY_CONNECTED
WARM_UP = 23  # calls, in twenty-two of which accelerate measures


def program(style, dtype=torch.float32):
    """Return (a new net, a minibatch for it)."""
    module = importlib.import_module(f"examples.styles.{style}")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        net, x = module.Net(), torch.randn(module.BATCH, *module.SHAPE)
    finally:
        torch.set_default_dtype(before)
    return net, (x, torch.randint(10, (module.BATCH,)))


def parameters(net):
    """Return all parameters of a net, also those of layers in a plain list."""
    layers = getattr(net, "layers", [])
    owners = [net] if isinstance(net, torch.nn.Module) and any(True for _ in net.parameters()) else layers
    return [p.detach() for owner in owners for p in owner.parameters()]


@contextmanager
def everything():
    """Within it, all is done otherwise that can be, at any size and in float64."""
    wanted = {"DTYPES": (torch.float32, torch.float64), "SMALLEST": 1, "FEWEST_POSITIONS": 1, "FEWEST_CHANNELS": 1}
    before = {name: getattr(limits, name) for name in wanted}
    for name, value in wanted.items():
        setattr(limits, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(limits, name, value)


def difference(style, steps=2, batch=None):
    """Return the largest difference of a parameter in float64 after a few steps, relative to the largest element, and the Report."""
    nets = []
    for accelerated in (False, True):
        net, (x, label) = program(style, torch.float64)
        if accelerated:
            report = fastff.accelerate(net)
            report.measure = False
        with everything():
            for step in range(steps):
                torch.manual_seed(step)
                net.train_batch(x[:batch], label[:batch])
        nets.append(net)
    pairs = list(zip(*map(parameters, nets), strict=True))
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs), report


def table():
    """The rows of results/strangers.csv as a table in Markdown, each style with the first sentence of its program."""
    rows = tables.read("strangers")
    if not rows:
        return tables.missing("python -m benchmarks.strangers --csv benchmarks/results/strangers.csv")
    body = []
    for row in rows:
        about = importlib.import_module(f"examples.styles.{row['style']}").__doc__.splitlines()[0].rstrip(".")
        between = f"{float(row['faster_20']):.2f} to {float(row['faster_80']):.2f}"
        body.append(
            (f"`{row['style']}`: {about}", f"{float(row['faster']):.2f} x", between, f"{float(row['float64']):.0e}")
        )
    head = ("style", "one line", "20 to 80 %", "difference in float64")
    return tables.table(head, body) + tables.measured_on(rows[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("styles", nargs="*", default=STYLES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv")
    a = parser.parse_args()
    print_environment()
    print(f"{'':12} {'faster':>8} {'20-80 %':>14} {'in float64':>12}")
    rows = []
    for style in a.styles:
        exact, _ = difference(style)
        if not exact < 1e-7:  # Adam divides gradients that are zero but for rounding by its eps of 1e-8
            print(f"{style:12} wrong result: parameters differ by {exact:.1e}")
            continue
        steps = {}
        for name in ("before", "after"):
            net, batch = program(style)
            if name == "after":
                fastff.accelerate(net)
            steps[name] = lambda net=net, batch=batch: net.train_batch(*batch)
            for _ in range(WARM_UP):
                steps[name]()
        faster, low, high = ratios(interleave(steps, a.rounds), "before", "after")
        print(f"{style:12} {faster:6.2f} x [{low:.2f}, {high:.2f}] {exact:12.0e}")
        rows.append({"style": style, "faster": faster, "faster_20": low, "faster_80": high, "float64": exact})
    if a.csv:
        write_csv(a.csv, rows)


if __name__ == "__main__":
    main()
