"""Helpers for the plots of the documentation: colours, axes without a frame, one resolution."""

from pathlib import Path

COLOURS = {"backprop": "#555555", "block": "#0072B2", "stage": "#D55E00", "layer": "#009E73"}


def figure(rows=1, columns=1, size=(5.5, 4.2), **options):
    """Return (figure, axes [rows][columns]). Each panel has `size` inches; no window opens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inches = (size[0] * columns, size[1] * rows)
    result, axes = plt.subplots(rows, columns, figsize=inches, squeeze=False, layout="constrained", **options)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return result, axes


def logarithmic(axis, ticks):
    """Make both axes logarithmic with plain numbers: x has the given ticks, y has ticks at 1, 2 and 5 in each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    for which in (axis.xaxis, axis.yaxis):
        which.set_minor_locator(NullLocator())


def save(figure, path):
    import matplotlib.pyplot as plt

    figure.savefig(Path(path), dpi=110)
    plt.close(figure)
