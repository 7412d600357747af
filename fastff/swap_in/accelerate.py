"""accelerate: an nn.Module whose own code calls our ops where it has expressions they compute, and can be put back.

Source code is changed, not traced: the methods of a module's class are parsed, the expressions of patterns.py in them replaced, and the
module given a class of its own that inherits from the one it has. Branches, loops, hooks, attributes and side effects stay what they were;
parameters, buffers and state_dict are not touched; no other object of the class, and nothing global, changes. Convolutions become
fastff.swap_in.accelerate.Conv2d, whose values are the same and whose weight gradient is quicker.
"""

import ast
import copy
import inspect
import textwrap
import types
from typing import NamedTuple

import torch
from torch import nn

from fastff.graph.fused import Convolution
from fastff.ops.convolution import convolve
from fastff.swap_in import patterns

GRAD_MODES = {f"{prefix}{name}" for prefix in ("torch.", "") for name in ("no_grad", "inference_mode", "enable_grad")}


class Conv2d(nn.Conv2d):
    """nn.Conv2d by the quickest way to its gradients (fastff/ops/convolution.py)."""

    def forward(self, x):
        if (
            not isinstance(x, torch.Tensor)
            or x.dim() != 4
            or x.dtype != self.weight.dtype
            or x.device != self.weight.device
        ):
            return super().forward(x)
        return convolve(x, self.weight, self.bias, self.stride[0], self.padding[0], self.groups)


class Entry(NamedTuple):
    """One place: the path of the module in the given one, the method and line or "", the pattern, and "replaced" or why it was left."""

    path: str
    place: str
    pattern: str
    result: str


class Report:
    """What accelerate did: print it; `replaced` and `left` are its entries; undo() puts every module back."""

    def __init__(self, module):
        self.module, self.entries, self._classes = module, [], []

    @property
    def replaced(self):
        return [entry for entry in self.entries if entry.result == "replaced"]

    @property
    def left(self):
        return [entry for entry in self.entries if entry.result != "replaced"]

    def undo(self):
        """Every module has its own class again. Parameters and all else stay as they are now."""
        for module, original in self._classes:
            module.__class__ = original
        self._classes.clear()

    def __str__(self):
        title = f"{type(self.module).__name__}: {len(self.replaced)} replaced, {len(self.left)} left"
        if not self.entries:
            return f"{title}; it has none of the patterns that fastff knows"
        rows = [("module", "place", "pattern", ""), *self.entries]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows]
        return "\n".join([title, *(f"  {line}" for line in lines)])

    def _put(self, module, new):
        self._classes.append((module, module.__class__))
        module.__class__ = new


def accelerate(module):
    """Replaces in `module`, in place, what fastff has a kernel for, and returns a Report of it.

    Known: a 1 x 1 convolution whose output is squared and averaged over height and width; means of (squares of) groups of channels; x
    normalised by its norm or mean square; depthwise and k x k convolutions. Results differ by rounding only (`fastff.verify`).

    Raises TypeError where module is not an nn.Module, ValueError where it is accelerated already."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    report = Report(module)
    members = dict(module.named_modules())
    for path, member in members.items():
        if isinstance(member, Conv2d) or hasattr(type(member), "_fastff_original"):
            raise ValueError(
                f"module: expected one that is not accelerated yet, got {path or 'one'} that is; undo() first"
            )
    classes = {}
    for path, member in members.items():
        path = path or "(itself)"
        if isinstance(member, nn.Conv2d):
            _convolution(report, path, member)
        elif not type(member).__module__.startswith("torch."):
            _code(report, path, member, classes)
    return report


def _convolution(report, path, layer):
    if type(layer) is not nn.Conv2d:
        return report.entries.append(Entry(path, "", "convolution", f"a class of its own, {type(layer).__name__}"))
    if layer.kernel_size == (1, 1) and layer.groups == 1:
        return None  # PyTorch's own is as quick
    pattern = "depthwise convolution" if layer.groups == layer.in_channels > 1 else "convolution"
    if Convolution.of(layer) is None:
        why = (
            "needs square filters, one stride, zero padding as numbers, no dilation, one group or one for each channel"
        )
        return report.entries.append(Entry(path, "", pattern, why))
    report._put(layer, Conv2d)
    return report.entries.append(Entry(path, "", pattern, "replaced"))


def _code(report, path, module, classes):
    original = type(module)
    if original not in classes:
        classes[original] = _rewritten(original)
    changed, entries = classes[original]
    report.entries.extend(Entry(path, *entry) for entry in entries)
    if changed is not None:
        report._put(module, changed)


def _rewritten(original):
    """(a subclass of `original` with its methods rewritten, or None; [(place, pattern, result)])."""
    methods, entries = {}, []
    for owner in original.__mro__:
        if owner is object or owner.__module__.startswith(("torch.", "fastff.")):
            continue
        for name, value in vars(owner).items():
            if isinstance(value, types.FunctionType) and getattr(original, name, None) is value:
                function, found = _method(value)
                entries += [(f"{name}, line {line}", pattern, result) for line, pattern, result in found]
                if function is not None:
                    methods[name] = function
    if not methods:
        return None, entries
    own = {
        "_fastff_original": original,
        "__reduce_ex__": _reduce,
        "__deepcopy__": _deepcopy,
        "__module__": original.__module__,
    }
    return type(original.__name__, (original,), own | methods), entries


def _reduce(self, protocol):
    """Pickled as the class it had: the one it has can be imported from nowhere."""
    return _new, (type(self)._fastff_original,), self.__dict__


def _new(kind):
    return kind.__new__(kind)


def _deepcopy(self, memo):
    twin = type(self).__new__(type(self))
    memo[id(self)] = twin
    twin.__dict__ = copy.deepcopy(self.__dict__, memo)
    return twin


class _Replace(ast.NodeTransformer):
    """Puts what patterns.match says in the place of what it matches, and notes it: [(line, pattern, result)]."""

    def __init__(self, first_line):
        self.first_line, self.found = first_line, []

    def visit(self, node):
        found = patterns.match(node) if isinstance(node, ast.expr) else None
        if found is None:
            return self.generic_visit(node)
        self.found.append((self.first_line + found.line - 1, found.pattern, found.why or "replaced"))
        if found.instead is None:
            return self.generic_visit(node)
        found.instead.args = [self.visit(argument) for argument in found.instead.args]
        return ast.copy_location(found.instead, node)


def _join_single_uses(definition):
    """`a = layer(x)` and then `g = a.pow(2).mean((2, 3))` become one expression, where a is used nowhere else and the two are a pattern together."""
    names = [node for node in ast.walk(definition) if isinstance(node, ast.Name)]
    declared = {
        name for node in ast.walk(definition) if isinstance(node, (ast.Global, ast.Nonlocal)) for name in node.names
    }

    def once(name):
        return name not in declared and sorted(type(n.ctx).__name__ for n in names if n.id == name) == ["Load", "Store"]

    for block in [
        b
        for node in ast.walk(definition)
        for b in (getattr(node, "body", []), getattr(node, "orelse", []))
        if isinstance(b, list)
    ]:
        for first, second in zip(list(block), list(block)[1:], strict=False):
            if (
                not isinstance(first, ast.Assign)
                or len(first.targets) != 1
                or not isinstance(first.targets[0], ast.Name)
            ):
                continue
            if not isinstance(second, (ast.Assign, ast.Return)) or not once(first.targets[0].id):
                continue
            whole = second.value
            parts = whole.elts if isinstance(whole, ast.Tuple) else [whole]
            for i, part in enumerate(parts):
                joined = _Substitute(first.targets[0].id, first.value).visit(copy.deepcopy(part))
                found = patterns.match(joined) if part is not None else None
                if found is not None and found.instead is not None and all(isinstance(p, ast.Name) for p in parts[:i]):
                    if isinstance(whole, ast.Tuple):
                        whole.elts[i] = joined
                    else:
                        second.value = joined
                    block.remove(first)
                    break


class _Substitute(ast.NodeTransformer):
    def __init__(self, name, value):
        self.name, self.value = name, value

    def visit_Name(self, node):
        return self.value if node.id == self.name and isinstance(node.ctx, ast.Load) else node


def _method(function):
    """(the function rewritten, or None; [(line, pattern, result)])."""
    inner = inspect.unwrap(function)
    try:
        lines, first_line = inspect.getsourcelines(inner)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):  # no source, or not a method's alone
        return None, []
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.name != inner.__name__:
        return None, []
    _join_single_uses(definition)
    replace = _Replace(first_line)
    definition.body = [replace.visit(statement) for statement in definition.body]
    if not any(result == "replaced" for _, _, result in replace.found):
        return None, replace.found
    why = _hindrance(definition, function, inner)
    if why:
        return None, [
            (line, pattern, why if result == "replaced" else result) for line, pattern, result in replace.found
        ]
    return _compiled(definition, inner, first_line), replace.found


def _hindrance(definition, function, inner):
    """Why a method cannot be compiled again, or an empty string."""
    decorators = [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in definition.decorator_list]
    if not set(decorators) <= GRAD_MODES or (inner is not function) != bool(decorators):
        return f"its method is decorated, with {', '.join(decorators) or 'something not in its source'}"
    private = [
        n.attr
        for n in ast.walk(definition)
        if isinstance(n, ast.Attribute) and n.attr.startswith("__") and n.attr[-2:] != "__"
    ]
    return f"its method uses the private name {private[0]}" if private else ""


def _compiled(definition, inner, first_line):
    """A function of the changed definition with the globals, defaults and closure of the one it was; our functions are in its closure."""
    decorators, definition.decorator_list = definition.decorator_list, []
    arguments = definition.args
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [None if d is None else ast.Constant(None) for d in arguments.kw_defaults]
    definition.returns = None
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
    cells |= {name: types.CellType(function) for name, function in patterns.RUNTIME.items()}
    around = ast.parse(f"def around({', '.join(cells)}):\n    pass")
    around.body[0].body = [definition, ast.parse(f"return {definition.name}").body[0]]
    ast.increment_lineno(definition, first_line - 1)
    scope: dict = {}
    exec(compile(ast.fix_missing_locations(around), inner.__code__.co_filename, "exec"), inner.__globals__, scope)
    code = scope["around"](*cells).__code__
    made = types.FunctionType(
        code, inner.__globals__, inner.__name__, inner.__defaults__, tuple(cells[name] for name in code.co_freevars)
    )
    made.__kwdefaults__, made.__qualname__, made.__doc__ = inner.__kwdefaults__, inner.__qualname__, inner.__doc__
    for decorator in reversed(decorators):
        made = eval(ast.unparse(decorator), inner.__globals__)(made)
    return made
