"""The one way in which these benchmarks measure: results first, then interleaved timings, then rows in long form.

A Case has contenders that compute the same; one of them is the base of all ratios. Each contender's results are held against float64 before
anything is timed: one that errs by more than four times the base ends the run, and no number of the case is printed. Times are taken in turns,
so that a ratio is of one moment of the machine, and given as medians with 20 % and 80 % quantiles.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.timing import print_environment, write_csv
from fastff.bench import interleave, quantile, ratios
from fastff.training.memory import peak_memory

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    """What is measured.

    Fields:
        columns: what tells it from the other cases, as columns of the CSV.
        contenders: {name: function without arguments that returns a sequence of tensors}, the base first.
        exact: the results in float64, or a function that returns them; None where `check` says whether results are right.
        check: called instead of the comparison; raises WrongResult.
        mbytes, gflop: that must be moved and computed, by formula; None where unknown.
        memory: whether to measure what each contender allocates at its peak.
        note: more columns, known once it has run.
        unchecked: names of contenders that compute something else, whose time stands beside the others'.
    """

    columns: dict[str, Any]
    contenders: dict[str, Callable]
    exact: Sequence[torch.Tensor] | Callable | None = None
    check: Callable | None = None
    mbytes: float | None = None
    gflop: float | None = None
    memory: bool = False
    note: dict[str, Any] = {}
    unchecked: Sequence[str] = ()

    @property
    def name(self):
        return ", ".join(f"{key} {value}" for key, value in self.columns.items())


class WrongResult(SystemExit):
    """A contender computes something else: the message says what, by how much, and what was allowed."""


def check(case):
    """Raises WrongResult unless every contender is as near to float64 as a few times the base is."""
    if case.check is not None:
        return case.check()
    exact = case.exact() if callable(case.exact) else case.exact
    allowed = None
    for name, function in case.contenders.items():
        if name in case.unchecked:
            continue
        errors = [_error(got, true) for got, true in zip(function(), exact, strict=True)]
        allowed = [4 * error + 1e-6 for error in errors] if allowed is None else allowed
        for index, (error, most) in enumerate(zip(errors, allowed, strict=True)):
            if not error <= most:
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
    """The same leaves in float64, for exact results."""
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def compiled(function):
    """torch.compile of it for one case. What was compiled before is forgotten: past eight shapes of a function PyTorch runs it as it is."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


@functools.cache
def copy_bandwidth():
    """MB/s of a copy far larger than the caches, read and write counted, with torch's threads."""
    source = torch.ones(2**25)
    target = torch.empty_like(source)
    seconds = quantile(interleave({"copy": lambda: target.copy_(source)}, 7)["copy"], 0.5)
    return 2 * source.numel() * 4 / 1e6 / seconds


def measure(case, rounds):
    """Rows of the CSV, one a contender. Checks first."""
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
    """One line a case: how many times as fast as the base each contender is; times, rates, peak memory; what the bytes take at a copy's rate."""
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
    """The parser that all share: --csv, --rounds, --quick (what make bench runs), --compile (torch.compile as a contender)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--quick", action="store_true", help="a selection, for make bench")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, where a benchmark has it")
    return parser


def chosen(shapes, a):
    """All shapes; every third for --quick."""
    return shapes[::3] if a.quick else shapes


def run(cases, a):
    """Measure and print every case, one line each; returns the rows, written to a.csv if given. `cases` may make them as they are asked for."""
    print_environment()
    rows = []
    for case in cases:
        found = measure(case, a.rounds)
        del case  # its tensors, before those of the next are made
        show(found)
        rows += found
    if a.csv:
        write_csv(a.csv, rows)
    return rows
