"""Goodness in accelerated code: a mean or sum of squares, or of a view, of x [B, C, H, W] is one op each way if nothing else can have that square.

mean, sum    of x.square(), x.view(...) or both: ff.group_goodness
split        and a loop over the parts: their goodness at once
std          of what needs no gradient: as the length of x - mean
"""

import sys
import weakref
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

import fastff.functional as ff
from fastff.ops.table import unseen
from fastff.swap_in import limits
from fastff.swap_in.limits import known, methods

MEANS = (torch.Tensor.mean, torch.mean)
SQUARES = (torch.Tensor.square, torch.square)


class _Chain(NamedTuple):
    """How a tensor came about: `power` 1 or 2 of x [B, C, H, W] as it was at `version`, viewed in the tensor's shape."""

    result: weakref.ref
    x: torch.Tensor
    version: int
    power: int
    direct: bool  # nothing else has the tensors between x and the result

    def of(self, tensor):
        """Whether this is how `tensor` came about, and x has not been written to since."""
        return self.result() is tensor and self.x._version == self.version


class _Parts(torch.autograd.Function):
    """Goodness [B, K] of equal parts of x, as torch.split makes them, over all of each: the gradients go back to the parts."""

    @staticmethod
    def forward(ctx, x, mean, *parts):
        ctx.save_for_backward(x, *parts)
        ctx.options = len(parts), 2, mean, False
        with torch.no_grad():
            return ff.group_goodness(x, len(parts), mean=mean)

    @staticmethod
    @unseen
    def backward(ctx, grad):
        x, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            x = torch.cat(parts, 1)
        grad = torch.ops.fastff.group_goodness_backward(grad, x, *ctx.options, "auto")
        return None, None, *grad.chunk(ctx.options[0], 1)


class _Split:
    """What torch.split made of x. Its goodness is computed once, when it is first asked for."""

    def __init__(self, x, parts):
        self.x, self.version, self.parts, self.found = x, x._version, [weakref.ref(p) for p in parts], {}

    def goodness(self, part, mean):
        """Return the goodness [B] of a part, or None if one of them is gone."""
        parts = [ref() for ref in self.parts]
        if self.x._version != self.version or any(p is None for p in parts):
            return None
        how = mean, torch.is_grad_enabled()
        if how not in self.found:
            self.found[how] = _Parts.apply(self.x.detach(), mean, *parts)
        return self.found[how][:, next(i for i, p in enumerate(parts) if p is part)]


class _References(TorchFunctionMode):
    """Counts the references to the first argument of the last function called."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count = sys.getrefcount(args[0])
        return function(*args, **(kwargs or {}))


def _references_of_temporaries():
    """Return the number of references, inside a mode, to an argument that nothing else has: `h.square()` in h.square().mean(1). 0 if it is the same
    for one that has a name."""
    x = torch.ones(1)
    with _References() as counted:
        x.square().mean(0)
        temporary = counted.count
        named = x.square()
        named.mean(0)
    return temporary if temporary < counted.count else 0


TEMPORARY = _references_of_temporaries()


def is_temporary(args):
    """Whether the first argument of a function has no name."""
    return bool(args) and sys.getrefcount(args[0]) == TEMPORARY


def _is_activation(x):
    """Whether x is a tensor whose goodness fastff may compute."""
    return type(x) is torch.Tensor and x.dim() == 4 and known(x) and not x.is_inference()


def follow(mode, x, result, temporary, power=1):
    """Note that `result` is a view of x, or its square: mode.chain."""
    before, mode.chain = mode.chain, None
    if before is not None and before.of(x) and before.power * power <= 2:
        direct = before.direct and temporary
        mode.chain = before._replace(result=weakref.ref(result), power=before.power * power, direct=direct)
    elif _is_activation(x) and _whole(mode, x).numel() >= limits.SMALLEST:
        mode.chain = _Chain(weakref.ref(result), x, x._version, power, True)


def _split(mode, function, args, kwargs):
    result, mode.split = function(*args, **kwargs), None
    x = args[0] if args else None
    if _is_activation(x) and result[0].shape[1] * len(result) == x.shape[1] and len({p.shape for p in result}) == 1:
        mode.split = _Split(x, result)
    return result


def _square(mode, function, args, kwargs):
    temporary, result = is_temporary(args), function(*args, **kwargs)
    x, *others = args or (kwargs.get("input"),)
    exponent = others[0] if others else kwargs.get("exponent")
    if exponent is x or function in SQUARES or (type(exponent) in (int, float) and exponent == 2):
        follow(mode, x, result, temporary, power=2)
    return result


def _reduce(mode, function, args, kwargs):
    """Compute the mean or sum of a square, or of a view, as a goodness, if it is one and is a temporary: no gradient is asked for of those."""
    (chain, mode.chain), found = (mode.chain, None), None
    if chain is not None and args and chain.of(args[0]):
        if chain.direct and is_temporary(args):
            found = _goodness(mode, chain, function in MEANS, args[0], *args[1:], **kwargs)
        mode.record("goodness", "as written" if found is None else "replaced", None)
    return function(*args, **kwargs) if found is None else found


def _whole(mode, x):
    """Return what x is a part of by the last torch.split, or x."""
    return mode.split.x if mode.split is not None and any(part() is x for part in mode.split.parts) else x


def _goodness(mode, chain, mean, z, dim=None, keepdim=False, **other):
    """Return the reduction of z over `dim` as a goodness of the x in its chain, or None if it is none."""
    dims = (dim,) if isinstance(dim, int) else dim
    if other or keepdim or not dims or torch.is_autocast_enabled("cpu"):
        return None
    (batch, channels, height, width), shape = chain.x.shape, tuple(z.shape)
    over = sorted(d % z.dim() for d in dims)
    unviewed = shape == tuple(chain.x.shape) and chain.power == 2
    if unviewed and over == [1]:
        return ff.group_goodness(chain.x, positions=True, mean=mean).view(batch, height, width)
    groups = 1 if over[0] == 1 else shape[1]
    if shape[0] != batch or over != list(range(over[0], z.dim())) or over[0] not in (1, 2) or channels % groups:
        return None
    if unviewed and groups == 1 and _whole(mode, chain.x) is not chain.x:
        g = mode.split.goodness(chain.x, mean)
        if g is not None:
            return g
    g = ff.group_goodness(chain.x, groups, power=chain.power, mean=mean)
    return g[:, 0] if over[0] == 1 else g


def _deviation(mode, function, args, kwargs):
    """Compute a standard deviation that needs no gradient in vectors: PyTorch's own takes one element after the other, ten times as long."""
    found = _deviation_of(*args, **kwargs) if len(args) > 1 and known(args[0]) else None
    return function(*args, **kwargs) if found is None else found


def _deviation_of(x, dim=None, unbiased=True, keepdim=False, correction=None, **other):
    learns = torch.is_grad_enabled() and x.requires_grad
    if other or learns or isinstance(dim, bool) or dim is None or x.numel() < limits.SMALLEST:
        return None
    mean = x.mean(dim, keepdim=True)
    degrees = x.numel() // mean.numel() - (int(unbiased) if correction is None else correction)
    if degrees <= 0:
        return None
    return torch.linalg.vector_norm(x - mean, dim=dim, keepdim=keepdim) / degrees**0.5


HANDLERS = (
    (_square, [*SQUARES, torch.pow, torch.mul, *methods("pow", "__pow__", "mul", "__mul__")]),
    (_split, [torch.split, torch.chunk, *methods("split", "chunk")]),
    (_deviation, [torch.Tensor.std, torch.std]),
    (_reduce, [*MEANS, torch.Tensor.sum, torch.sum]),
)
