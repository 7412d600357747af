"""Which implementation of an op runs: an ordered table of rows, each with a predicate that gives the reason it refuses."""

import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

NAMES = ("cuda", "triton", "native", "composed", "reference")


def always(x):
    """can_run of an implementation without conditions."""


class Implementation(NamedTuple):
    """One row: its name, can_run(x) -> None or the reason why not, what runs (a function, or a module of them), what it leaves to others,
    and passed_over(x) -> why "auto" does not take it though it runs, or None."""

    name: str
    can_run: Callable
    run: object
    note: str = ""
    passed_over: Callable = always


class Lazy:
    """A module of kernels that is imported when something in it is first asked for."""

    def __init__(self, name, within=None):
        self.name, self.within = name, within

    def __getattr__(self, attribute):
        module = importlib.import_module(self.name)
        return getattr(getattr(module, self.within) if self.within else module, attribute)


def choose(op, rows, impl, x):
    """The first row that can run for `impl`: "auto", a name, or names in order of preference, separated by commas.

    "auto" follows the environment variable FASTFF_IMPL, which is written likewise. A choice that cannot run raises
    RuntimeError with every row's reason; an unknown name raises ValueError."""
    if impl == "auto" and "FASTFF_IMPL" not in os.environ:  # at every call of an op
        for row in rows:
            if row.can_run(x) is None and row.passed_over(x) is None:
                return row
    source = "impl"
    if impl == "auto" and os.environ.get("FASTFF_IMPL", "auto") != "auto":
        impl, source = os.environ["FASTFF_IMPL"], "FASTFF_IMPL"
    wanted = (
        [row.name for row in rows if row.passed_over(x) is None]
        if impl == "auto"
        else [name.strip() for name in impl.split(",")]
    )
    for name in wanted:
        if name not in NAMES:
            raise ValueError(f"{source}: expected 'auto' or names out of {', '.join(NAMES)}, got {impl!r}")
    by_name = {row.name: row for row in rows}
    refused = []
    for name in wanted:
        why = by_name[name].can_run(x) if name in by_name else f"there is no such implementation of {op} yet"
        if why is None:
            return by_name[name]
        refused.append(f"{name}: {why}")
    raise RuntimeError(f"{source}={impl!r}: no implementation of {op} can run here ({'; '.join(refused)})")


def implement(lib, name, run, fake):
    """Define what the op `name` of `lib` does, on every device, and the shapes of its results."""
    lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastff::{name}", fake, lib=lib)


def concerns(rows):
    """Whether FASTFF_IMPL, where it is set, names a row of this table; other tables' names say nothing about it."""
    wanted = os.environ.get("FASTFF_IMPL", "auto").replace(" ", "").split(",")
    return wanted == ["auto"] or any(row.name in wanted for row in rows)
