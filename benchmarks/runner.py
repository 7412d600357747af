"""Runs a benchmark: it checks results, then times all contenders in turn, then writes one row for each contender.

The contenders of a Case compute the same; the first of them is the base of all ratios. Before anything is timed, the results of each contender are
compared with float64. If an error is more than four times the error of the base, the run ends, and no number of the case is printed. In each round
all contenders run once, so that the times of a ratio were taken at nearly the same moment. Results are medians with 20 % and 80 % quantiles.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.timing import print_environment, write_csv
from fastff.bench import interleave, quantile, ratios
from fastff.memory import peak_memory

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    """One comparison.

    Fields:
        columns: {column of the CSV: value} that distinguishes the case from the others.
        contenders: {name: function without arguments that returns a sequence of tensors}, the base first.
        exact: the results in float64, or a function that returns them; None if `check` is given.
        check: function that is called instead of the comparison with float64; it raises WrongResult.
        mbytes, gflop: MB that must be moved and GFLOP that must be computed, by formula; None if unknown.
        memory: whether to measure the peak memory of each contender.
        note: more columns, whose values are known only after the check.
    """

    columns: dict[str, Any]
    contenders: dict[str, Callable]
    exact: Sequence[torch.Tensor] | Callable | None = None
    check: Callable | None = None
    mbytes: float | None = None
    gflop: float | None = None
    memory: bool = False
    note: dict[str, Any] = {}

    @property
    def name(self):
        """The columns as text."""
        return ", ".join(f"{key} {value}" for key, value in self.columns.items())


# Sums of torch.compile's kernels in float32 are less exact than those of the code that it was given.
SLACK = {"compiled": 1e-4}


class WrongResult(SystemExit):
    """Ends the run because a result is wrong. The message says which one, how large its error is, and what was allowed."""


def check(case):
    """Raises WrongResult unless the error of every contender against float64 is at most four times that of the base, plus 1e-6 (SLACK)."""
    if case.check is not None:
        return case.check()
    exact = case.exact() if callable(case.exact) else case.exact
    of_base = None
    for name, function in case.contenders.items():
        errors = [_error(got, true) for got, true in zip(function(), exact, strict=True)]
        of_base = errors if of_base is None else of_base
        for index, (error, base) in enumerate(zip(errors, of_base, strict=True)):
            if not error <= (most := 4 * base + SLACK.get(name, 1e-6)):
                raise WrongResult(
                    f"wrong result: {case.name}: output {index} of {name} is off by {error:.1e}, allowed are {most:.1e}"
                )
    return None


def _error(got, exact):
    if got.shape != exact.shape:
        return float("inf")
    exact = exact.detach()
    return float((got.detach().double() - exact).norm() / exact.norm().clamp(min=1e-30))


def wide(*tensors):
    """Return detached copies of the tensors in float64, with the same requires_grad. None stays None."""
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def compiled(function):
    """Return torch.compile(function) for one case. Earlier compilations are discarded, since PyTorch stops compiling after eight shapes."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


@functools.cache
def copy_bandwidth():
    """Return the MB/s of a copy that is much larger than the caches, with torch's threads. Bytes read and written both count."""
    source = torch.ones(2**25)
    target = torch.empty_like(source)
    seconds = quantile(interleave({"copy": lambda: target.copy_(source)}, 7)["copy"], 0.5)
    return 2 * source.numel() * 4 / 1e6 / seconds


def measure(case, rounds):
    """Check a case, measure it, and return the rows of the CSV, one for each contender."""
    check(case)
    memory = {name: peak_memory(function) for name, function in case.contenders.items()} if case.memory else {}
    times = interleave(case.contenders, rounds)
    base = next(iter(case.contenders))
    floor = None if case.mbytes is None else 1e3 * case.mbytes / copy_bandwidth()
    rows = []
    for name in case.contenders:
        ratio, low, high = ratios(times, name, base)
        ms = [1e3 * quantile(times[name], q) for q in (0.5, 0.2, 0.8)]
        rows.append(case.columns | {
            "contender": name, "base": base, "ratio": ratio, "ratio_20": low, "ratio_80": high, "ms": ms[0], "ms_20": ms[1], "ms_80": ms[2],
            "peak_mib": memory.get(name), "mbytes": case.mbytes, "gflop": case.gflop, "floor_ms": floor,
        } | case.note)  # fmt: skip
    return rows


def show(rows):
    """Print one line for a case: speed-ups over the base, times, rates, peak memory, and the time of a copy of as many bytes (floor)."""
    first, others = rows[0], rows[1:]
    line = "  ".join(f"{key} {first[key]}" for key in list(first)[: list(first).index("contender")])
    for row in others:
        faster, low, high = (1 / row[key] for key in ("ratio", "ratio_80", "ratio_20"))
        line += f" | {row['contender']} {faster:.2f} x [{low:.2f}, {high:.2f}], {_cost(row)}"
    floor = "" if first["mbytes"] is None else f"; {first['mbytes']:.3g} MB, floor {first['floor_ms']:.3g} ms"
    print(f"{line}   (x as fast as {first['base']}, {_cost(first)}{floor})", flush=True)


def _cost(row):
    rate = "" if row["gflop"] is None else f", {1e3 * row['gflop'] / row['ms']:.3g} GFLOP/s"
    return f"{row['ms']:.3g} ms{rate}" + ("" if row["peak_mib"] is None else f", {row['peak_mib']:.1f} MiB")


def arguments(description, rounds=9):
    """Return the argparse parser that the benchmarks share: --csv, --rounds, --quick (used by make bench) and --compile."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--quick", action="store_true", help="measure every third shape only")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, in benchmarks that have it")
    return parser


def chosen(shapes, a):
    """Return all shapes, or every third for --quick."""
    return shapes[::3] if a.quick else shapes


def run(cases, a):
    """Measure every case, print a line for each, write all rows to a.csv if given, and return them. `cases` may be a generator."""
    print_environment()
    rows = []
    for case in cases:
        found = measure(case, a.rounds)
        del case  # frees its tensors before those of the next case are created
        show(found)
        rows += found
    if a.csv:
        write_csv(a.csv, rows)
    return rows


def main(description, cases, rounds=9):
    """Parse the command line of a benchmark and run cases(arguments)."""
    a = arguments(description, rounds).parse_args()
    run(cases(a), a)
