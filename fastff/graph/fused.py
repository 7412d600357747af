"""Stand-ins for layers inside a block: the same parameters, values and gradients, by kernels that are faster or keep less memory.

    Convolution            an nn.Conv2d with the fastest gradients there are here
    Epilogue               nn.BatchNorm2d [+ residual] [+ activation] in one pass each way; keeps y alone for the backward pass
    EpilogueConvolution    the same and the convolution behind it, whose input is computed again in the backward pass instead of being kept

They replace nothing in the model: a training graph calls them in place of its modules (fastff/graph/training.py). Where no kernel runs for a
tensor (a GPU, float64, autocast, torch.compile, batch norm in eval mode), they call the modules themselves.
"""

import torch
from torch import nn

from fastff import spec
from fastff.ops import epilogue as epilogue_op
from fastff.ops import gradients as partial
from fastff.ops.convolution import convolve, forward, gradients, way

# Attributes of layers that a stand-in reads once; batch norm's are read in every step.
READS = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.GELU: ("approximate",),
    nn.Dropout: ("p",),
}


def update_statistics(norm, mean, var, count):
    """Update the running statistics of a batch norm module from the batch's mean and biased variance [C] of `count` values."""
    running_mean, tracked = norm.running_mean, norm.num_batches_tracked
    if norm.track_running_stats and running_mean is not None:
        rate = norm.momentum if norm.momentum is not None else 1 / (float(tracked) + 1)
        epilogue_op.update_running_statistics(running_mean, norm.running_var, tracked, mean, var, rate, count)
    elif norm.track_running_stats and tracked is not None:
        tracked.add_(1)


class StandIn(nn.Module):
    """What the stand-ins have in common: a forward pass and a backward pass that do without autograd.

    record(*inputs)      -> output, tensors, how: the inputs come first among the tensors; both are handed to `gradients`
    gradients(grad, tensors, how, wanted, parameters)
                         -> gradients of the inputs, those of learned(): what `wanted` (of each input) and `parameters` ask for, else None
    learned()            parameters, or None for one that is not there
    """

    def learns(self):
        """Whether a parameter wants a gradient."""
        return any(p is not None and p.requires_grad for p in self.learned())

    def recorded(self, *inputs):
        """`record` as a differentiable function."""
        return _Recorded.apply(self, len(inputs), *inputs, *self.learned())


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stand_in, count, *values):
        output, tensors, ctx.how = stand_in.record(*values[:count])
        ctx.save_for_backward(*tensors)
        ctx.stand_in, ctx.count = stand_in, count
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        tensors, count = ctx.saved_tensors, ctx.count
        needed = ctx.needs_input_grad[2 : 2 + count]
        wanted = [partial.needs_input(t, need) for t, need in zip(tensors, needed, strict=False)]
        parameters = partial.needs_parameters()
        of_inputs, of_parameters = ctx.stand_in.gradients(grad, tensors, ctx.how, wanted, parameters)
        return None, None, *of_inputs, *of_parameters


class Convolution(StandIn):
    """The values and gradients of an nn.Conv2d with square filters in one group, or one for each channel."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution
        self.options = convolution.stride[0], convolution.padding[0], convolution.groups

    @staticmethod
    def of(module):
        """The stand-in for a module, or None where there is none."""
        if type(module) is not nn.Conv2d or "forward" in vars(module):
            return None
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        sizes = (module.kernel_size, module.stride, module.padding)
        if module.dilation != (1, 1) or any(a != b for a, b in sizes):
            return None
        channels = (module.in_channels, module.out_channels)
        depthwise = channels == (module.groups, module.groups) and module.padding[0] < module.kernel_size[0]
        return Convolution(module) if module.groups == 1 or depthwise else None

    def learned(self):
        return self.convolution.weight, self.convolution.bias

    def forward(self, x):
        return convolve(x, *self.learned(), *self.options)

    def record(self, x):
        weight, bias = self.learned()
        how = way(x, weight, *self.options)
        return forward(x, weight, bias, *self.options, how), (x,), how

    def gradients(self, grad, tensors, how, wanted, parameters):
        weight, bias = self.learned()
        need = [parameters and p is not None and p.requires_grad for p in (weight, bias)]
        grad_x, *found = gradients(grad, tensors[0], weight, *self.options, how, [wanted[0], *need])
        return (grad_x,), found


class Epilogue(StandIn):
    """x = activation(batch_norm(y) + residual). `apply` is the callable that computes the activation where no kernel runs.

    At the end of a block it is not called: the step op computes it together with the goodness (fastff/nn/block.py)."""

    def __init__(self, batch_norm, activation, apply, has_residual=False):
        super().__init__()
        self.batch_norm, self.activation, self.apply_activation = batch_norm, activation, apply
        self.has_residual = has_residual

    def __str__(self):
        activation = [self.activation] if self.activation != "none" else []
        return " + ".join(["batch norm"] + ["residual"] * self.has_residual + activation)

    def learned(self):
        return self.batch_norm.weight, self.batch_norm.bias

    def ready(self):
        """Whether batch norm normalizes with the statistics of the batch, and updates running ones as `update_statistics` does."""
        norm = self.batch_norm
        return norm.training and (norm.momentum is not None or not norm.track_running_stats)

    def fits(self, y, residual=None):
        """Whether kernels take these tensors: images, no broadcasting, one dtype, more than one value a channel."""
        if y.dim() != 4 or y.numel() <= y.shape[1]:
            return False
        return residual is None or (residual.shape == y.shape and residual.dtype == y.dtype)

    def has_kernel(self, y, residual=None):
        """Whether a kernel runs for these tensors now."""
        return (
            not torch.compiler.is_compiling()
            and self.ready()
            and self.fits(y, residual)
            and not torch.is_autocast_enabled(y.device.type)
            and epilogue_op.kernel(y) is not None
        )

    def forward(self, y, residual=None):
        if self.has_kernel(y, residual):
            return self.recorded(*((y,) if residual is None else (y, residual)))
        return self.by_modules(y, residual)

    def by_modules(self, y, residual):
        h = nn.BatchNorm2d.forward(self.batch_norm, y)  # of a subclass, what follows it is in the graph
        return self.apply_activation(h if residual is None else h + residual)

    def description(self, residual=None, need_grad_residual=False):
        """The spec.Epilogue with this residual (or None)."""
        return spec.Epilogue(*self.learned(), self.batch_norm.eps, residual, need_grad_residual, self.activation)

    def update(self, y, mean, var):
        """Update the running statistics from those of the batch."""
        update_statistics(self.batch_norm, mean, var, y.numel() / y.shape[1])

    def activated(self, y, residual=None):
        """x, mean, var; the running statistics are updated."""
        x, _, mean, var = epilogue_op.kernel(y).forward(y, self.description(residual))
        self.update(y, mean, var)
        return x, mean, var

    def record(self, *inputs):
        x, *statistics = self.activated(*inputs)
        return x, (*inputs, *statistics), None

    def gradients(self, grad, tensors, how, wanted, parameters):
        y, *residual, mean, var = tensors
        e = self.description(*residual, need_grad_residual=wanted[-1])
        found = epilogue_op.kernel(y).backward(y, e, mean, var, grad)
        of_inputs = (found.y, found.residual) if residual else (found.y,)
        return of_inputs, found.of_parameters(e) if parameters else (None, None)


class EpilogueConvolution(StandIn):
    """convolution(activation(batch_norm(y))). It keeps y, and computes the convolution's input again for its weight's gradient."""

    def __init__(self, epilogue, convolution):
        super().__init__()
        self.epilogue, self.convolution = epilogue, convolution

    def learned(self):
        return *self.epilogue.learned(), *self.convolution.learned()

    def forward(self, y):
        if self.epilogue.has_kernel(y):
            return self.recorded(y)
        return self.convolution(self.epilogue(y))

    def record(self, y):
        x, mean, var = self.epilogue.activated(y)
        z, _, how = self.convolution.record(x)
        return z, (y, mean, var), how

    def gradients(self, grad, tensors, how, wanted, parameters):
        y, mean, var = tensors
        e = self.epilogue.description()
        kernel = epilogue_op.kernel(y)
        # without the weight's gradient, x's values do not matter: y is of the same shape and layout
        x = kernel.forward(y, e, statistics=(mean, var))[0] if parameters and self.convolution.learns() else y
        (grad_x,), of_convolution = self.convolution.gradients(grad, (x,), how, (True,), parameters)
        del x
        found = kernel.backward(y, e, mean, var, grad_x, overwrite=True)
        return (found.y,), (*(found.of_parameters(e) if parameters else (None, None)), *of_convolution)
