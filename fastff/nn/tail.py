"""The tail of a block, trained as one op: what stands behind its last convolution, batch norm [+ residual] [+ activation] [+ goodness head]."""

import torch
from torch import nn

from fastff.nn.head import add_gradient
from fastff.spec import Epilogue

ACTIVATIONS = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu", nn.GELU: "gelu", nn.Identity: "none",
}  # fmt: skip
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def activation_name(module):
    """The name that tail_step knows an activation module by ("none" for None), or None."""
    if module is None:
        return "none"
    if type(module) is nn.GELU and module.approximate != "none":
        return None
    return ACTIVATIONS.get(type(module))


def hooked(modules):
    """Whether one of them has a hook, which would not run where its module is not called."""
    return any(getattr(m, hooks) for m in modules for hooks in HOOKS)


class Tail:
    """How to train a block as its body and one call of tail_step.

    Args:
        body: callable from the block's inputs to (y, residual or None, *further outputs).
        batch_norm: the nn.BatchNorm2d behind y.
        activation: its name.
        apply: callable that gives what `activation` names.
        bypassed: the modules whose forward no longer runs as such; a hook on one of them makes the tail stand aside.
        single: the fastff.nn.convolution.Convolution that is all of the body, on the block's first input; None for other bodies.
    """

    def __init__(self, body, batch_norm, activation, apply, has_residual, bypassed, single=None):
        self.single = single
        self.body, self.batch_norm, self.activation, self.apply = body, batch_norm, activation, apply
        self.has_residual, self.bypassed = has_residual, tuple(bypassed)

    def __str__(self):
        return " + ".join(
            ["batch norm"] + ["residual"] * self.has_residual + [self.activation] * (self.activation != "none")
        )

    def ready(self):
        """Whether the tail may stand in for the modules now: in training, and no hook would be passed over."""
        norm = self.batch_norm
        return (
            type(norm) is nn.BatchNorm2d
            and norm.training
            and (norm.momentum is not None or not norm.track_running_stats)
            and not hooked(self.bypassed)
        )

    def fits(self, y, residual):
        """Whether tail_step takes these: no broadcasting, no mixed dtypes (autocast), more than one value a channel."""
        same = residual is None or (residual.shape == y.shape and residual.dtype == y.dtype)
        return same and y.dim() == 4 and y.numel() > y.shape[1]

    def finish(self, y, residual):
        """The block's output from the body's, by its own modules."""
        h = self.batch_norm(y)
        return self.apply(h if residual is None else h + residual)

    @torch.no_grad()
    def local_step(self, head, y, residual, target, normalize, grad_scale=None):
        """tail_step on the body's outputs: adds the gradients of batch norm and of the head, updates the running statistics."""
        norm = self.batch_norm
        need_grad_residual = residual is not None and residual.requires_grad
        epilogue = Epilogue(norm.weight, norm.bias, norm.eps, residual, need_grad_residual, self.activation)
        step = head.local_step(y, target, normalize, grad_scale=grad_scale, epilogue=epilogue)
        add_gradient(norm.weight, step.grad_bn_weight)
        add_gradient(norm.bias, step.grad_bn_bias)
        if norm.track_running_stats and norm.running_mean is not None:
            count = y.numel() / y.shape[1]
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(step.mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_((step.var * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
        return step


class Seed(torch.autograd.Function):
    """A scalar of `outputs` whose backward starts theirs with the gradients in `box`, and lets go of them.

    Passed to torch.autograd.backward instead, gradients and outputs would be held by the call until the whole block is done: two tensors
    of the block's output at the peak (16 of 80 MiB for ResNet18 of width 64, batch 32)."""

    @staticmethod
    def forward(ctx, box, *outputs):
        ctx.box = box
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        grads = tuple(ctx.box)
        ctx.box.clear()
        return None, *grads
