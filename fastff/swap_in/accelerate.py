"""Replaces expressions in the source code of an nn.Module by calls of fastff's ops, in a way that can be undone.

The code is not traced. The methods of the module's class are parsed, and the expressions that patterns.py knows are replaced in the syntax tree.
The module then gets a new class that inherits from its old one and has the changed methods. Branches, loops, hooks, attributes and side effects
stay as they are. Parameters, buffers and state_dict do not change, nor do other objects of the class or anything global. Convolutions become
fastff.swap_in.accelerate.Conv2d, which returns the same values and computes the weight gradient faster.
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
    """nn.Conv2d with faster gradient kernels (fastff/ops/convolution.py): x [B, C, H, W] -> [B, K, H', W'], as nn.Conv2d.

    Inputs without a batch dimension and inputs of another dtype or device than the weight go through nn.Conv2d."""

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
    """One line of a Report.

    Fields:
        path: name of the module in the module that was given, such as "layers.0".
        place: method and line of the expression, or "" for a whole module.
        pattern: what was found, such as "1 x 1 goodness".
        result: "replaced", or the reason why it was not."""

    path: str
    place: str
    pattern: str
    result: str


class Report:
    """What `accelerate` did with a module. Printing it shows a table.

    Attributes:
        module: the module that was given.
        entries: [Entry] in the order of the modules."""

    def __init__(self, module):
        self.module, self.entries, self._classes = module, [], []

    @property
    def replaced(self):
        """Entries of what was replaced."""
        return [entry for entry in self.entries if entry.result == "replaced"]

    @property
    def left(self):
        """Entries of what was found but not replaced."""
        return [entry for entry in self.entries if entry.result != "replaced"]

    def undo(self):
        """Give every module its original class again. Parameters and everything else keep their present values."""
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

    def _set_class(self, module, new_class):
        self._classes.append((module, module.__class__))
        module.__class__ = new_class


def accelerate(module):
    """Replace the parts of `module` that fastff has a kernel for, in place, and return a Report of what was done.

    Replaced are: a 1 x 1 convolution whose output is squared and averaged over height and width; means over groups of channels, squared or
    not; x divided by its norm or by the root of its mean square; depthwise and k x k convolutions. The results differ by rounding errors
    only, which `fastff.verify` can confirm.

    Args:
        module: nn.Module, with all modules in it.

    Returns: a Report; its undo() takes the changes back.

    Raises:
        TypeError: `module` is not an nn.Module.
        ValueError: `module` or a module in it is accelerated already."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    report = Report(module)
    modules = dict(module.named_modules())
    for path, child in modules.items():
        if isinstance(child, Conv2d) or hasattr(type(child), "_fastff_original"):
            raise ValueError(
                f"module: expected one that is not accelerated yet, got {path or 'one'} that is; undo() first"
            )
    rewritten: dict = {}  # {class: what _rewrite_class returns for it}
    for path, child in modules.items():
        path = path or "(itself)"
        if isinstance(child, nn.Conv2d):
            _replace_convolution(report, path, child)
        elif not type(child).__module__.startswith("torch."):
            _replace_code(report, path, child, rewritten)
    return report


def _replace_convolution(report, path, layer):
    if type(layer) is not nn.Conv2d:
        return report.entries.append(Entry(path, "", "convolution", f"a class of its own, {type(layer).__name__}"))
    if layer.kernel_size == (1, 1) and layer.groups == 1:
        return None  # PyTorch's is as fast
    pattern = "depthwise convolution" if layer.groups == layer.in_channels > 1 else "convolution"
    if Convolution.of(layer) is None:
        reason = (
            "needs square filters, one stride, zero padding as numbers, no dilation, one group or one for each channel"
        )
        return report.entries.append(Entry(path, "", pattern, reason))
    report._set_class(layer, Conv2d)
    return report.entries.append(Entry(path, "", pattern, "replaced"))


def _replace_code(report, path, module, rewritten):
    original = type(module)
    if original not in rewritten:
        rewritten[original] = _rewrite_class(original)
    new_class, entries = rewritten[original]
    report.entries.extend(Entry(path, *entry) for entry in entries)
    if new_class is not None:
        report._set_class(module, new_class)


def _rewrite_class(original):
    """Return (subclass of `original` with changed methods, or None if none changes, and [(place, pattern, result)])."""
    methods, entries = {}, []
    for owner in original.__mro__:
        if owner is object or owner.__module__.startswith(("torch.", "fastff.")):
            continue
        for name, value in vars(owner).items():
            if isinstance(value, types.FunctionType) and getattr(original, name, None) is value:
                function, found = _rewrite_method(value)
                entries += [(f"{name}, line {line}", pattern, result) for line, pattern, result in found]
                if function is not None:
                    methods[name] = function
    if not methods:
        return None, entries
    attributes = {
        "_fastff_original": original,
        "__reduce_ex__": _reduce,
        "__deepcopy__": _deepcopy,
        "__module__": original.__module__,
    }
    return type(original.__name__, (original,), attributes | methods), entries


def _reduce(self, protocol):
    """Pickle the module as an object of its original class, since the new class cannot be imported."""
    return _new, (type(self)._fastff_original,), self.__dict__


def _new(original):
    return original.__new__(original)


def _deepcopy(self, memo):
    duplicate = type(self).__new__(type(self))
    memo[id(self)] = duplicate
    duplicate.__dict__ = copy.deepcopy(self.__dict__, memo)
    return duplicate


class _Replace(ast.NodeTransformer):
    """Replaces the expressions that patterns.match recognises. `found` lists them as (line, pattern, result)."""

    def __init__(self, first_line):
        self.first_line, self.found = first_line, []

    def visit(self, node):
        found = patterns.match(node) if isinstance(node, ast.expr) else None
        if found is None:
            return self.generic_visit(node)
        self.found.append((self.first_line + found.line - 1, found.pattern, found.reason or "replaced"))
        if found.replacement is None:
            return self.generic_visit(node)
        found.replacement.args = [self.visit(argument) for argument in found.replacement.args]
        return ast.copy_location(found.replacement, node)


def _join_single_uses(definition):
    """Join two statements such as `a = layer(x)` and `g = a.pow(2).mean((2, 3))` into one.

    This happens if `a` is used nowhere else and the joined expression is one that patterns.match recognises."""
    names = [node for node in ast.walk(definition) if isinstance(node, ast.Name)]
    declared = {
        name for node in ast.walk(definition) if isinstance(node, (ast.Global, ast.Nonlocal)) for name in node.names
    }

    def used_once(name):
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
            if not isinstance(second, (ast.Assign, ast.Return)) or not used_once(first.targets[0].id):
                continue
            whole = second.value
            parts = whole.elts if isinstance(whole, ast.Tuple) else [whole]
            for i, part in enumerate(parts):
                joined = _Substitute(first.targets[0].id, first.value).visit(copy.deepcopy(part))
                found = patterns.match(joined) if part is not None else None
                if (
                    found is not None
                    and found.replacement is not None
                    and all(isinstance(p, ast.Name) for p in parts[:i])
                ):
                    if isinstance(whole, ast.Tuple):
                        whole.elts[i] = joined
                    else:
                        second.value = joined
                    block.remove(first)
                    break


class _Substitute(ast.NodeTransformer):
    """Replaces every use of the variable `name` by the expression `value`."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def visit_Name(self, node):
        return self.value if node.id == self.name and isinstance(node.ctx, ast.Load) else node


def _rewrite_method(function):
    """Return (changed function, or None if it stays, and [(line, pattern, result)])."""
    inner = inspect.unwrap(function)
    try:
        lines, first_line = inspect.getsourcelines(inner)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):  # there is no source, or it holds more than this method
        return None, []
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.name != inner.__name__:
        return None, []
    _join_single_uses(definition)
    replace = _Replace(first_line)
    definition.body = [replace.visit(statement) for statement in definition.body]
    if not any(result == "replaced" for _, _, result in replace.found):
        return None, replace.found
    reason = _why_not_compilable(definition, function, inner)
    if reason:
        return None, [
            (line, pattern, reason if result == "replaced" else result) for line, pattern, result in replace.found
        ]
    return _compile_method(definition, inner, first_line), replace.found


def _why_not_compilable(definition, function, inner):
    """Return the reason why a method cannot be compiled again, or an empty string."""
    decorators = [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in definition.decorator_list]
    if not set(decorators) <= GRAD_MODES or (inner is not function) != bool(decorators):
        return f"its method is decorated, with {', '.join(decorators) or 'something not in its source'}"
    private = [
        n.attr
        for n in ast.walk(definition)
        if isinstance(n, ast.Attribute) and n.attr.startswith("__") and n.attr[-2:] != "__"
    ]
    return f"its method uses the private name {private[0]}" if private else ""


def _compile_method(definition, inner, first_line):
    """Compile a changed definition to a function with the globals, defaults and closure of the original function `inner`.

    The functions that replace expressions (patterns.RUNTIME) are added to its closure, so that no global name changes."""
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
    outer = ast.parse(f"def outer({', '.join(cells)}):\n    pass")
    outer.body[0].body = [definition, ast.parse(f"return {definition.name}").body[0]]
    ast.increment_lineno(definition, first_line - 1)
    scope: dict = {}
    exec(compile(ast.fix_missing_locations(outer), inner.__code__.co_filename, "exec"), inner.__globals__, scope)
    code = scope["outer"](*cells).__code__
    result = types.FunctionType(
        code, inner.__globals__, inner.__name__, inner.__defaults__, tuple(cells[name] for name in code.co_freevars)
    )
    result.__kwdefaults__, result.__qualname__, result.__doc__ = inner.__kwdefaults__, inner.__qualname__, inner.__doc__
    for decorator in reversed(decorators):
        result = eval(ast.unparse(decorator), inner.__globals__)(result)
    return result
