"""accelerate: existing code runs faster as it is written, and its report says what was done otherwise, call by call.

The methods of what is given, and of the layers in it, run in the mode of fastff/swap_in/calls.py; so does a function. An object gets a new class,
which inherits from its own, for that: nothing else about it changes, nor do other objects of its class or anything global.
"""

import copy
import functools
import sys
import time
import types
from typing import NamedTuple

import torch
from torch import nn

from fastff.ops.table import transformed
from fastff.swap_in.calls import Faster, current
from fastff.swap_in.optimizers import is_pytorchs, quick


class Entry(NamedTuple):
    """One line of a Report.

    Fields:
        path: name of the parameter's module in what was given, such as "layers.0", or "".
        place: the line that made the call: function, file and number.
        pattern: what was called, such as "convolution".
        result: "replaced", or the reason why it ran as written.
        calls: how often."""

    path: str
    place: str
    pattern: str
    result: str
    calls: int


class Trial:
    """Which is faster, calls done otherwise or as they are written: measured in the first calls, which take turns.

    Where memory and its layout decide, no rule knows that of a machine it has not seen. The first call of each is not counted, and of the others
    the fastest, which is the one that nothing disturbed. A fiftieth less is asked for: what is less than that is noise."""

    TURNS = 10

    def __init__(self):
        self.times, self.choice = {True: [], False: []}, None

    def next(self):
        """Return whether the next call is done otherwise."""
        return len(self.times[True]) <= len(self.times[False])

    def add(self, calls, seconds):
        self.times[calls].append(seconds)
        if min(map(len, self.times.values())) > self.TURNS:
            self.choice = min(self.times[True][1:]) < 0.98 * min(self.times[False][1:])

    def reason(self):
        otherwise, written = (1e3 * min(times[1:]) for times in (self.times[True], self.times[False]))
        return f"as written from now on: {written:.2f} ms, otherwise {otherwise:.2f} ms"


class Report:
    """What `accelerate` did in the calls that were made so far. Printing it shows a table.

    Attributes:
        module: what was given.
        measure: whether calls that take longer so go on as they are written; False does not measure.
        entries: [Entry], one for each place and result, in the order of their first calls."""

    def __init__(self, module):
        self.module, self._classes, self._calls, self._names = module, [], {}, {}
        self.measure = True
        self._convolutions = True  # whether there may be some

    @property
    def entries(self):
        found: dict = {}
        for (weight, code, line, *rest), calls in self._calls.items():
            place = f"{code.co_name}, {code.co_filename.rpartition('/')[2]}:{line}"
            key = self._names.get(weight, ""), place, *rest
            found[key] = found.get(key, 0) + calls
        return [Entry(*key, calls) for key, calls in found.items()]

    @property
    def replaced(self):
        """Entries of what was replaced."""
        return [entry for entry in self.entries if entry.result == "replaced"]

    @property
    def left(self):
        """Entries of what ran as it was written."""
        return [entry for entry in self.entries if entry.result != "replaced"]

    def undo(self):
        """Give every object its original class again. Parameters and everything else keep their present values."""
        for found, original in self._classes:
            found.__class__ = original
        self._classes.clear()

    def __str__(self):
        name = getattr(self.module, "__name__", type(self.module).__name__)
        if not self._calls:
            return f"{name}: nothing has run yet that fastff knows; make a training step and print this again"
        title = f"{name}: {len(self.replaced)} places replaced, {len(self.left)} as written"
        rows = [("module", "place", "what", "calls", ""), *((*e[:3], str(e.calls), e.result) for e in self.entries)]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(4)), row[4]]).rstrip() for row in rows]
        return "\n".join([title, *(f"  {line}" for line in lines)])

    def _record(self, pattern, result, weight):
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "fastff.")):
            frame = frame.f_back
        key = id(weight), frame.f_code, frame.f_lineno, pattern, result
        self._calls[key] = self._calls.get(key, 0) + 1

    def _runs(self, function):
        """Return `function` as one that runs in the mode, unless a caller of it does."""

        trials: dict = {}  # {what is called with what shapes: Trial}

        @functools.wraps(function)
        def run(*args, **kwargs):
            if current() is not None:
                current().step.after()
            if current() is not None or torch.compiler.is_compiling() or transformed():
                return function(*args, **kwargs)
            if not self._convolutions or not self.measure:
                with Faster(self._record, self._convolutions):
                    return function(*args, **kwargs)
            shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
            own = bool(args) and hasattr(type(args[0]), "_fastff_original")
            key = id(args[0]) if own else 0, torch.is_grad_enabled(), shapes
            trial = trials.get(key)
            if trial is None:
                trial = trials[key] = Trial()
            if trial.choice is not None:
                with Faster(self._record, trial.choice):
                    return function(*args, **kwargs)
            calls, start = trial.next(), time.perf_counter()
            with Faster(self._record, calls):
                result = function(*args, **kwargs)
            trial.add(calls, time.perf_counter() - start)
            if trial.choice is False:
                self._record("all calls", trial.reason(), None)
            return result

        return run

    def _enclose(self, found):
        """Give an object a class whose methods run in the mode, or an optimizer one whose step is quick."""
        original = type(found)
        if isinstance(found, torch.optim.Optimizer):
            attributes = quick(original, current)
        else:
            attributes = {name: self._runs(method) for name, method in _methods(original).items()}
        attributes |= {"_fastff_original": original, "__module__": original.__module__}
        attributes |= {"__reduce_ex__": _reduce, "__deepcopy__": _deepcopy}
        try:
            found.__class__ = type(original.__name__, (original,), attributes)
        except TypeError:  # the class has __slots__, or may have no subclasses
            return
        self._classes.append((found, original))


def accelerate(module):
    """Make existing training code faster as it stands: in place, or as a decorator of a function.

    Convolutions run in channels_last with fastff's gradients, and what follows them in that layout, views included; the goodness of large
    activations is one op each way; Adam and AdamW update all their parameters in one call. What is computed differs by rounding only, which
    `fastff.verify` can confirm. Calls that fastff would not make faster run as they are written: the first twenty-two calls take turns in both
    ways, and are measured.

    Args:
        module: nn.Module, a list of them, or any object that has them; or a function that trains. The methods of an object and of
            the modules in it are those that run faster, when they are called from anywhere. A function makes everything in it run faster.

    Returns: a Report, which shows what was done once a step has run; its undo() takes the changes back. For a function: a function to be called
        in its place, whose `report` is the Report.

    Raises:
        TypeError: there is nothing in `module` that could run faster.
        ValueError: something in `module` is accelerated already."""
    report = Report(module)
    if isinstance(module, (types.FunctionType, types.MethodType)):
        run = report._runs(module)
        run.report = report
        return run
    found = _objects(module)
    if not any(isinstance(each, nn.Module) for each in found.values()):
        expected = "an nn.Module, a list of them, an object with some as attributes, or a function"
        raise TypeError(f"module: expected {expected}, got {type(module).__name__}")
    for path, each in found.items():
        if hasattr(type(each), "_fastff_original"):
            raise ValueError(
                f"module: expected one that is not accelerated yet, got {path or 'one'} that is; undo() first"
            )
    for path, each in found.items():
        if isinstance(each, nn.Module):
            report._names |= {id(p): path for p in each.parameters(recurse=False)}
    report._convolutions = any(
        p.dim() == 4 for each in found.values() if isinstance(each, nn.Module) for p in each.parameters()
    )
    for path, each in found.items():
        torchs = type(each).__module__.startswith("torch.") and not isinstance(each, torch.optim.Optimizer)
        if not torchs or (path == "" and isinstance(each, nn.Sequential) and _convolutions(each) > 1):
            report._enclose(each)
    return report


def _convolutions(module):
    return sum(isinstance(child, nn.Conv2d) for child in module.modules())


def _objects(root):
    """Return {path: object}: the root, if it is not a list, and the modules in it, also those in lists, tuples, dictionaries and plain attributes."""
    found, seen = {}, set()

    def visit(path, value, top=False):
        if id(value) in seen or isinstance(value, (torch.Tensor, type)):
            return
        seen.add(id(value))
        if isinstance(value, (list, tuple)):
            items = enumerate(value)
        elif isinstance(value, dict):
            items = value.items()
        elif isinstance(value, torch.optim.Optimizer) and is_pytorchs(value):
            if not hasattr(type(value), "_fastff_original"):  # else of another object that is accelerated
                found[path] = value
            return
        elif isinstance(value, nn.Module) or (top and hasattr(value, "__dict__")):
            found[path] = value
            items = [*getattr(value, "_modules", {}).items(), *vars(value).items()]
        else:
            return
        for name, item in items:
            if name not in ("_modules", "_parameters", "_buffers"):
                visit(f"{path}.{name}" if path else str(name), item)

    visit("", root, top=True)
    return found


def _methods(original):
    """Return {name: function} of the methods that are not PyTorch's or fastff's, and forward, if the class is theirs."""
    libraries = ("torch.", "fastff.")
    found = {"forward": original.forward} if original.__module__.startswith(libraries) else {}
    for owner in reversed(original.__mro__):
        if owner is not object and not owner.__module__.startswith(libraries):
            functions = {name: value for name, value in vars(owner).items() if isinstance(value, types.FunctionType)}
            found |= {name: f for name, f in functions.items() if name == "__call__" or not name.startswith("__")}
    return found


def _reduce(self, protocol):
    """Pickle the object as one of its original class, since the new class cannot be imported."""
    return _new, (type(self)._fastff_original,), self.__dict__


def _new(original):
    return original.__new__(original)


def _deepcopy(self, memo):
    duplicate = type(self).__new__(type(self))
    memo[id(self)] = duplicate
    duplicate.__dict__ = copy.deepcopy(self.__dict__, memo)
    return duplicate
