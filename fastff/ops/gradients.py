"""Gradients of a block: backward passes to its inputs or its parameters alone, and adding to .grad.

A block that two losses train goes backward twice: with its own loss's gradient to its inputs, and, when the later loss's has come, with both
gradients' sum to its parameters. PyTorch's own operators leave out what torch.autograd.grad does not ask for, but a torch.autograd.Function
is not told what that is: ours look here.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_left_out: set = set()  # module-wide: autograd runs backward passes on a GPU in threads of its own


@contextlib.contextmanager
def without(kind):
    """Within it, functions of fastff leave out the gradients of "parameters", or those of "leaves": inputs that are leaves, as a block's are."""
    _left_out.add(kind)
    try:
        yield
    finally:
        _left_out.remove(kind)


def needs_parameters():
    """Whether gradients of parameters are asked for."""
    return "parameters" not in _left_out


def needs_input(x, needed):
    """Whether the gradient of x, of which autograd says `needed`, is asked for."""
    return needed and not ("leaves" in _left_out and x.is_leaf)


def add_gradient(parameter, grad):
    """Add grad to parameter.grad, or to those of what it was computed from (by a parametrization), where there is a parameter and it learns."""
    if parameter is None or grad is None or not parameter.requires_grad:
        return
    if grad.dtype != parameter.dtype:
        grad = grad.to(parameter.dtype)
    if not parameter.is_leaf:
        parameter.backward(grad)
    else:
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad


class GroupNormGuard(TorchFunctionMode):
    """Within it, group norms always compute the gradient of their input, whoever asks for it. `used`: whether there was one.

    Where nobody does and the input is channels_last, PyTorch's backward pass on a CPU ends the process (torch 2.13). Nobody asks for that of a
    block's first layer, nor without("leaves")."""

    used = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (F.group_norm, torch.group_norm):
            self.used = True
            x, *others = args or (kwargs.pop("input"),)
            learned = [t for t in (*others, *kwargs.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
            if torch.is_grad_enabled() and (learned or x.requires_grad):
                x = _LeadingTo.apply(x, *learned)
            args = (x, *others)
        return function(*args, **kwargs)


class _LeadingTo(torch.autograd.Function):
    """x itself, whose gradient autograd computes as soon as it computes one of `parameters`."""

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.others = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, *[None] * ctx.others


class Seed(torch.autograd.Function):
    """A scalar without a value. Its backward pass, whatever gradient it is given, starts that of `outputs` with those in `box`, which it empties.

    torch.autograd.backward would hold outputs and gradients until the whole block is done: two tensors of the block's output at the peak
    (16 of 80 MiB for ResNet18 of width 64, batch 32)."""

    @staticmethod
    def forward(ctx, box, *outputs):
        ctx.box = box
        return outputs[0].new_empty(())

    @staticmethod
    def backward(ctx, _):
        grads = tuple(ctx.box)
        ctx.box.clear()
        return None, *grads
