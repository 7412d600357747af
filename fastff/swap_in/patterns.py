"""The expressions that accelerate replaces: how they look in source code, and what runs instead.

    goodness    layer(x) squared, averaged over height and width              ff.goodness, where the layer is a 1 x 1 convolution
    groups      x seen as [B, K, ...] [squared], averaged over all but B, K   ff.group_goodness
    normalize   x / (its norm + eps), x / sqrt(its mean square + eps), F.normalize(x)    ff.normalize

A replacement decides at every call by the values it meets; where it has no kernel, the expression runs as it was written. What an expression
evaluates, it evaluates once and in the same order; x is a name or an attribute where it is written twice.
"""

import ast
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import fastff.functional as ff
from fastff.nn.tail import hooked
from fastff.spec import DTYPES


def goodness(layer, x):
    """layer(x).square().mean((2, 3))."""
    plain = type(layer) is nn.Conv2d and (layer.kernel_size, layer.stride, layer.groups) == ((1, 1), (1, 1), 1)
    if plain and layer.padding in ((0, 0), "valid", "same") and not hooked([layer]) and _fits(x, layer.weight):
        return ff.goodness(x, layer.weight, layer.bias)
    return layer(x).square().mean((2, 3))


def groups(x, power, dims, viewed, *shape):
    """x.view(*shape) or x.reshape(*shape), to the power 1 or 2, averaged over dims."""
    if _is_float(x) and x.dim() in (2, 4) and x.numel():
        sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape)
        rest = tuple(d % len(sizes) for d in dims) if len(sizes) > 2 else ()
        if sorted(rest) == list(range(2, len(sizes))) and sizes.count(-1) <= 1:
            at = torch.empty(x.shape, device="meta").reshape(sizes).shape if -1 in sizes else sizes
            whole = at[0] == len(x) and at[1] > 0 and x.shape[1] % at[1] == 0 and torch.Size(at).numel() == x.numel()
            if whole:
                return ff.group_goodness(x, int(at[1]), power=power)
    seen = getattr(x, viewed)(*shape)
    return (seen.square() if power == 2 else seen).mean(dims)


def normalize(x, how, eps):
    """x / (its 2-norm + eps) or x / sqrt(mean of its squares + eps), over dimension 1."""
    if _is_float(x) and x.dim() in (2, 4) and x.numel() and isinstance(eps, float):
        return ff.normalize(x, how if x.dim() == 2 else f"{how}_channels", eps=eps)
    if how == "l2":
        return x / (x.norm(2, 1, keepdim=True) + eps)
    return x / (x.square().mean(1, keepdim=True) + eps).sqrt()


def unit(x):
    """F.normalize(x): no more than rounding differs, since eps is 1e-12."""
    fits = _is_float(x) and x.dim() in (2, 4) and x.numel() and x.dtype != torch.float16
    return normalize(x, "l2", 1e-12) if fits else F.normalize(x)


def _is_float(x):
    return isinstance(x, torch.Tensor) and x.dtype in DTYPES and not torch.is_autocast_enabled(x.device.type)


def _fits(x, weight):
    return _is_float(x) and x.dim() == 4 and x.dtype == weight.dtype and x.numel() > 0 and x.shape[1] == weight.shape[1]


RUNTIME = {f"_fastff_{f.__name__}": f for f in (goodness, groups, normalize, unit)}


class Found(NamedTuple):
    """A pattern in source code: its name, the line, and the expression to run instead (None where it is only nearly one, with the reason)."""

    pattern: str
    line: int
    instead: ast.expr | None
    why: str = ""


def match(node):
    """The Found at an expression, or None."""
    averaged = _reduction(node, "mean")
    if averaged is not None:
        inside, dims = averaged
        squared = _square(inside)
        seen = _view(inside if squared is None else squared)
        if seen is not None and dims is not None:
            x, name, shape = seen
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
            return Found("normalisation", node.lineno, _call("unit", node.args[0]))
        return Found("normalisation", node.lineno, None, "another norm, dimension or eps than F.normalize's")
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Div) or not _repeatable(node.left):
        return None
    x, below = node.left, node.right
    if isinstance(below, ast.BinOp) and isinstance(below.op, ast.Add) and _is_norm(below.left, x):
        return Found("normalisation", node.lineno, _call("normalize", x, ast.Constant("l2"), below.right))
    root = _rooted(below)
    if root is not None and isinstance(root, ast.BinOp) and isinstance(root.op, ast.Add):
        averaged = _reduction(root.left, "mean", keepdim=True)
        if averaged is not None and averaged[1] == (1,) and _same(_square(averaged[0]), x):
            return Found("normalisation", node.lineno, _call("normalize", x, ast.Constant("rms"), root.right))
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
    """Whether evaluating it twice is evaluating it once."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _is_module_name(node, *names):
    return isinstance(node, ast.Name) and node.id in names or isinstance(node, ast.Attribute) and node.attr in names


def _is_function(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name


def _subject(node, name):
    """(x, further arguments, {keyword: value}) of x.name(...) or torch.name(x, ...)."""
    if not _is_function(node, name) or any(k.arg is None for k in node.keywords):
        return None
    if any(isinstance(a, ast.Starred) for a in node.args):
        return None
    keywords = {k.arg: k.value for k in node.keywords}
    if _is_module_name(node.func.value, "torch", "linalg"):
        return (node.args[0], node.args[1:], keywords) if node.args else None
    return node.func.value, node.args, keywords


def _dims(node):
    found = [_number(e) for e in (node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node])]
    return tuple(found) if all(isinstance(d, int) for d in found) else None


def _reduction(node, name, keepdim=False):
    """(what is reduced, its dimensions, None where they are not plain numbers), or None."""
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
    """What is squared, or None."""
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
    """(x, "view" or "reshape", shape arguments), or None."""
    for name in ("view", "reshape"):
        plain = _is_function(node, name) and not node.keywords and not _is_module_name(node.func.value, "torch")
        if plain and node.args and not any(isinstance(a, ast.Starred) for a in node.args):
            return node.func.value, name, node.args
    return None


def _is_layer_call(node):
    """A call of something on one argument that may be a layer: self.head(x), head(x), self.heads[i](x)."""
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
        return False
    layer = node.func.value if isinstance(node.func, ast.Subscript) else node.func
    return _repeatable(layer) and not _is_module_name(getattr(layer, "value", layer), "torch", "F", "functional")


def _is_norm(node, x):
    """x.norm(2, 1, keepdim=True) and its like."""
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


def _rooted(node):
    """What the square root is taken of."""
    found = _subject(node, "sqrt")
    if found is not None and not found[1] and not found[2]:
        return found[0]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and _number(node.right) == 0.5:
        return node.left
    return None
