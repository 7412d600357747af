"""The expressions that `accelerate` replaces: how they look in source code, and the functions that are called instead.

    goodness    layer(x), squared, averaged over height and width               ff.goodness, if the layer is a 1 x 1 convolution
    groups      x viewed as [B, K, ...], squared or not, averaged over the rest  ff.group_goodness
    normalize   x / (norm of x + eps), x / sqrt(mean square of x + eps)         ff.normalize
    unit        F.normalize(x)                                                  ff.normalize

A replacement looks at its arguments in every call. If fastff has no kernel for them, it computes the expression as it was written. The parts of an
expression are still evaluated once and in the same order. An x that the expression contains twice must be a name or an attribute.
"""

import ast
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import fastff.functional as ff
from fastff.graph.fused import hooked
from fastff.spec import DTYPES


def goodness(layer, x):
    """Return layer(x).square().mean((2, 3)): x [B, C, H, W] -> [B, K]."""
    plain = type(layer) is nn.Conv2d and (layer.kernel_size, layer.stride, layer.groups) == ((1, 1), (1, 1), 1)
    if plain and layer.padding in ((0, 0), "valid", "same") and not hooked([layer]) and _fits(x, layer.weight):
        return ff.goodness(x, layer.weight, layer.bias)
    return layer(x).square().mean((2, 3))


def groups(x, power, dims, method, *shape):
    """Return the mean over `dims` of x.view(*shape) or x.reshape(*shape) (`method` says which), to the power 1 or 2."""
    if _is_float(x) and x.dim() in (2, 4) and x.numel():
        sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape)
        averaged = tuple(d % len(sizes) for d in dims) if len(sizes) > 2 else ()
        if sorted(averaged) == list(range(2, len(sizes))) and sizes.count(-1) <= 1:
            view = torch.empty(x.shape, device="meta").reshape(sizes).shape if -1 in sizes else sizes
            batch, count = view[:2]
            if batch == len(x) and count > 0 and x.shape[1] % count == 0 and torch.Size(view).numel() == x.numel():
                return ff.group_goodness(x, int(count), power=power)
    grouped = getattr(x, method)(*shape)
    return (grouped.square() if power == 2 else grouped).mean(dims)


def normalize(x, name, eps):
    """Return x / (2-norm + eps) for the name "l2", or x / sqrt(mean square + eps) for "rms", both over dimension 1."""
    if _is_float(x) and x.dim() in (2, 4) and x.numel() and isinstance(eps, float):
        return ff.normalize(x, name if x.dim() == 2 else f"{name}_channels", eps=eps)
    if name == "l2":
        return x / (x.norm(2, 1, keepdim=True) + eps)
    return x / (x.square().mean(1, keepdim=True) + eps).sqrt()


def unit(x):
    """Return F.normalize(x). It divides by max(norm, 1e-12), not by norm + 1e-12, which differ by rounding errors only."""
    fits = _is_float(x) and x.dim() in (2, 4) and x.numel() and x.dtype != torch.float16
    return normalize(x, "l2", 1e-12) if fits else F.normalize(x)


def _is_float(x):
    return isinstance(x, torch.Tensor) and x.dtype in DTYPES and not torch.is_autocast_enabled(x.device.type)


def _fits(x, weight):
    return _is_float(x) and x.dim() == 4 and x.dtype == weight.dtype and x.numel() > 0 and x.shape[1] == weight.shape[1]


# What changed methods call: {name in the changed code: function}.
RUNTIME = {f"_fastff_{f.__name__}": f for f in (goodness, groups, normalize, unit)}


class Found(NamedTuple):
    """A pattern that was found in source code.

    `replacement` is the expression to put in its place. It is None if the code resembles the pattern but computes something else; `reason`
    says then what."""

    pattern: str
    line: int
    replacement: ast.expr | None
    reason: str = ""


def match(node):
    """Return a Found if the expression `node` is, or resembles, one that accelerate replaces, else None."""
    averaged = _reduction(node, "mean")
    if averaged is not None:
        inside, dims = averaged
        squared = _square(inside)
        view = _view(inside if squared is None else squared)
        if view is not None and dims is not None:
            x, name, shape = view
            power = ast.Constant(1 if squared is None else 2)
            numbers = ast.Tuple([ast.Constant(d) for d in dims], ast.Load())
            return Found(
                "class-group goodness", node.lineno, _call("groups", x, power, numbers, ast.Constant(name), *shape)
            )
        if squared is not None and _is_layer_call(squared):
            if dims is not None and sorted(d % 4 for d in dims) == [2, 3]:
                return Found("1 x 1 goodness", node.lineno, _call("goodness", squared.func, squared.args[0]))
            return Found("1 x 1 goodness", node.lineno, None, "averaged over something else than height and width")
    summed = _reduction(node, "sum")
    if summed is not None and (squared := _square(summed[0])) is not None and _is_layer_call(squared):
        return Found("1 x 1 goodness", node.lineno, None, "summed, not averaged")
    return _match_normalize(node)


def _match_normalize(node):
    if _is_function(node, "normalize") and len(node.args) == 1 and _is_module_name(node.func.value, "F", "functional"):
        if all((k.arg, _number(k.value)) in (("dim", 1), ("p", 2), ("p", 2.0)) for k in node.keywords):
            return Found("normalization", node.lineno, _call("unit", node.args[0]))
        return Found("normalization", node.lineno, None, "another norm, dimension or eps than F.normalize's")
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Div) or not _repeatable(node.left):
        return None
    x, divisor = node.left, node.right
    if isinstance(divisor, ast.BinOp) and isinstance(divisor.op, ast.Add) and _is_norm(divisor.left, x):
        return Found("normalization", node.lineno, _call("normalize", x, ast.Constant("l2"), divisor.right))
    radicand = _radicand(divisor)
    if radicand is not None and isinstance(radicand, ast.BinOp) and isinstance(radicand.op, ast.Add):
        averaged = _reduction(radicand.left, "mean", keepdim=True)
        if averaged is not None and averaged[1] == (1,) and _same(_square(averaged[0]), x):
            return Found("normalization", node.lineno, _call("normalize", x, ast.Constant("rms"), radicand.right))
    return None


def _call(name, *arguments):
    return ast.Call(ast.Name(f"_fastff_{name}", ast.Load()), list(arguments), [])


def _number(node):
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _same(a, b):
    return a is not None and b is not None and ast.dump(a) == ast.dump(b)


def _repeatable(node):
    """Whether `node` is a name or an attribute of one, which may be evaluated twice."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _is_module_name(node, *names):
    return isinstance(node, ast.Name) and node.id in names or isinstance(node, ast.Attribute) and node.attr in names


def _is_function(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name


def _subject(node, name):
    """Return (x, other arguments, {keyword: value}) of a call x.name(...) or torch.name(x, ...), or None."""
    if not _is_function(node, name) or any(k.arg is None for k in node.keywords):
        return None
    if any(isinstance(a, ast.Starred) for a in node.args):
        return None
    keywords = {k.arg: k.value for k in node.keywords}
    if _is_module_name(node.func.value, "torch", "linalg"):
        return (node.args[0], node.args[1:], keywords) if node.args else None
    return node.func.value, node.args, keywords


def _dims(node):
    """The integers of a literal number, tuple or list, or None."""
    found = [_number(e) for e in (node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node])]
    return tuple(found) if all(isinstance(d, int) for d in found) else None


def _reduction(node, name, keepdim=False):
    """Return (x, dims) of x.name(dims); dims is None unless they are literal numbers. Return None for other expressions."""
    found = _subject(node, name)
    if found is None:
        return None
    x, arguments, keywords = found
    dim = arguments[0] if arguments else keywords.get("dim", keywords.get("axis"))
    kept = arguments[1] if len(arguments) > 1 else keywords.get("keepdim")
    if set(keywords) - {"dim", "axis", "keepdim"} or len(arguments) > 2:
        return None
    if (isinstance(kept, ast.Constant) and kept.value is True) != keepdim or not isinstance(
        kept, (ast.Constant, type(None))
    ):
        return None
    return x, None if dim is None else _dims(dim)


def _square(node):
    """Return the expression that `node` squares, or None."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and _number(node.right) == 2:
        return node.left
    if (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult)
        and _repeatable(node.left)
        and _same(node.left, node.right)
    ):
        return node.left
    for name, count in (("square", 0), ("pow", 1)):
        found = _subject(node, name)
        if found is None or len(found[1]) != count or found[2]:
            continue
        if count == 0 or _number(found[1][0]) == 2:
            return found[0]
    return None


def _view(node):
    """Return (x, "view" or "reshape", arguments) of a call x.view(...) or x.reshape(...), or None."""
    for name in ("view", "reshape"):
        plain = _is_function(node, name) and not node.keywords and not _is_module_name(node.func.value, "torch")
        if plain and node.args and not any(isinstance(a, ast.Starred) for a in node.args):
            return node.func.value, name, node.args
    return None


def _is_layer_call(node):
    """Whether `node` calls something that may be a layer with one argument: self.head(x), head(x), self.heads[i](x)."""
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
        return False
    layer = node.func.value if isinstance(node.func, ast.Subscript) else node.func
    return _repeatable(layer) and not _is_module_name(getattr(layer, "value", layer), "torch", "F", "functional")


def _is_norm(node, x):
    """Whether `node` is the 2-norm of x over dimension 1 with keepdim=True, in any of the ways to write it."""
    for name in ("norm", "vector_norm"):
        found = _subject(node, name)
        if found is None or not _same(found[0], x):
            continue
        arguments, keywords = found[1], dict(found[2])
        names = ("ord" if name == "vector_norm" else "p", "dim", "keepdim")
        given = dict(zip(names, arguments, strict=False)) | keywords
        kept = given.pop("keepdim", None)
        order = _number(given.pop(names[0])) if names[0] in given else 2
        dim = _dims(given.pop("dim")) if "dim" in given else None
        return not given and order == 2 and dim == (1,) and isinstance(kept, ast.Constant) and kept.value is True
    return False


def _radicand(node):
    """Return the expression of which `node` is the square root, or None."""
    found = _subject(node, "sqrt")
    if found is not None and not found[1] and not found[2]:
        return found[0]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and _number(node.right) == 0.5:
        return node.left
    return None
