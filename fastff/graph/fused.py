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
from fastff.ops.gradients import add_gradient

# Attributes of layers that a stand-in reads once; batch norm's are read in every step.
READS = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.GELU: ("approximate",),
    nn.Dropout: ("p",),
}


def hooked(modules):
    """Whether one of the modules has a hook, which would not run where the module is not called."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def uses_batch_statistics(norm):
    """Whether a batch norm module normalises with the statistics of the batch and updates running ones as `update_statistics` does."""
    return (
        isinstance(norm, nn.BatchNorm2d)
        and norm.training
        and (norm.momentum is not None or not norm.track_running_stats)
    )  # fmt: skip


def update_statistics(norm, mean, var, count):
    """Update the running statistics of a batch norm module from the batch's mean and biased variance [C] of `count` values."""
    running_mean, running_var = norm.running_mean, norm.running_var
    if not norm.track_running_stats or running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    # .data: the backward pass of an earlier call of the same module by PyTorch must not see the write, as with F.batch_norm
    epilogue_op.update_running_statistics(running_mean.data, running_var.data, mean, var, norm.momentum, count)


def description(norm, activation, residual=None):
    """The spec.Epilogue of a batch norm module, an activation's name and a residual."""
    need = residual is not None and residual.requires_grad
    return spec.Epilogue(norm.weight, norm.bias, norm.eps, residual, need, activation)


class Convolution(nn.Module):
    """The values and gradients of an nn.Conv2d with square filters in one group, or one for each channel."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution
        self.options = convolution.stride[0], convolution.padding[0], convolution.groups

    def forward(self, x):
        return convolve(x, self.convolution.weight, self.convolution.bias, *self.options)

    @staticmethod
    def of(module):
        """The stand-in for a module, or None where there is none."""
        if type(module) is not nn.Conv2d or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        sizes = (module.kernel_size, module.stride, module.padding)
        if module.dilation != (1, 1) or any(a != b for a, b in sizes):
            return None
        channels = (module.in_channels, module.out_channels)
        depthwise = channels == (module.groups, module.groups) and module.padding[0] < module.kernel_size[0]
        return Convolution(module) if module.groups == 1 or depthwise else None

    def add_gradients(self, grad_output, x):
        """Add to .grad of weight and bias what a backward pass from the gradient of the output would, without an autograd graph."""
        weight, bias = self.convolution.weight, self.convolution.bias
        wanted = (False, weight.requires_grad, bias is not None and bias.requires_grad)
        found = gradients(grad_output, x, weight.detach(), *self.options, way(x, weight, *self.options), wanted)
        add_gradient(weight, found[1])
        add_gradient(bias, found[2])


class Epilogue(nn.Module):
    """x = activation(batch_norm(y) + residual). `apply` is the callable that computes the activation where no kernel runs."""

    def __init__(self, batch_norm, activation, apply):
        super().__init__()
        self.batch_norm, self.activation, self.apply_activation = batch_norm, activation, apply

    def kernel(self, y, residual=None):
        """The kernel that runs for these tensors now, or None."""
        fits = (
            not torch.compiler.is_compiling()
            and uses_batch_statistics(self.batch_norm)
            and y.dim() == 4
            and y.numel() > y.shape[1]
            and (residual is None or (residual.shape == y.shape and residual.dtype == y.dtype))
            and not torch.is_autocast_enabled(y.device.type)
        )
        return epilogue_op.kernel(y) if fits else None

    def forward(self, y, residual=None):
        kernel = self.kernel(y, residual)
        if kernel is None:
            h = nn.BatchNorm2d.forward(self.batch_norm, y)  # of a subclass, what follows it is in the graph
            return self.apply_activation(h if residual is None else h + residual)
        e = description(self.batch_norm, self.activation, residual)
        x, mean, var = _Epilogue.apply(y, e.weight, e.bias, e.residual, e, kernel)
        update_statistics(self.batch_norm, mean, var, y.numel() / y.shape[1])
        return x


class _Epilogue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight, bias, residual, epilogue, kernel):
        x, _, mean, var = kernel.forward(y, epilogue)
        ctx.save_for_backward(y, weight, bias, residual, mean, var)
        ctx.kernel, ctx.options = kernel, epilogue._replace(weight=None, bias=None, residual=None)
        ctx.mark_non_differentiable(mean, var)
        return x, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_x, *_):
        y, weight, bias, residual, mean, var = ctx.saved_tensors
        e = ctx.options._replace(weight=weight, bias=bias, residual=residual)
        found = ctx.kernel.backward(y, e, mean, var, grad_x)
        return found.y, *found.of_parameters(e), found.residual, None, None


class EpilogueConvolution(nn.Module):
    """convolution(activation(batch_norm(y))). It keeps y, and computes the convolution's input again for its weight's gradient."""

    def __init__(self, epilogue, convolution):
        super().__init__()
        self.epilogue, self.convolution = epilogue, convolution

    def forward(self, y):
        kernel = self.epilogue.kernel(y)
        if kernel is None:
            return self.convolution(self.epilogue(y))
        norm, layer = self.epilogue.batch_norm, self.convolution.convolution
        e = description(norm, self.epilogue.activation)
        z, mean, var = _EpilogueConvolution.apply(
            y, e.weight, e.bias, layer.weight, layer.bias, e, kernel, self.convolution.options
        )
        update_statistics(norm, mean, var, y.numel() / y.shape[1])
        return z


class _EpilogueConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, norm_weight, norm_bias, weight, bias, epilogue, kernel, options):
        x, _, mean, var = kernel.forward(y, epilogue)
        ctx.how = way(x, weight, *options)
        ctx.save_for_backward(y, norm_weight, norm_bias, weight, mean, var)
        ctx.epilogue, ctx.kernel, ctx.options = epilogue._replace(weight=None, bias=None), kernel, options
        ctx.mark_non_differentiable(mean, var)
        return forward(x, weight, bias, *options, ctx.how), mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        y, norm_weight, norm_bias, weight, mean, var = ctx.saved_tensors
        e = ctx.epilogue._replace(weight=norm_weight, bias=norm_bias)
        _, _, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        wanted = [True, *(partial.needs_parameters() and need for need in (need_weight, need_bias))]
        x = y  # of the same shape and layout, where its values do not matter
        if wanted[1]:
            x = ctx.kernel.forward(y, e, statistics=(mean, var))[0]
        grad_x, grad_weight, grad_bias = gradients(grad, x, weight, *ctx.options, ctx.how, wanted)
        del x
        found = ctx.kernel.backward(y, e, mean, var, grad_x, overwrite=True)
        return found.y, *found.of_parameters(e), grad_weight, grad_bias, None, None, None
