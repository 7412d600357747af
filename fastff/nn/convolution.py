"""A convolution of a model as a block's training graph calls it: the same weights, by the quickest way to their gradients (fastff/ops)."""

from torch import nn

from fastff.nn.head import add_gradient
from fastff.ops.convolution import convolve, gradients, way


def quickened(module):
    """A stand-in for an nn.Conv2d that shares its parameters, or None where there is no quicker way."""
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    sizes = (module.kernel_size, module.stride, module.padding)
    if module.dilation != (1, 1) or any(a != b for a, b in sizes):
        return None
    depthwise = module.groups == module.in_channels == module.out_channels and module.padding[0] < module.kernel_size[0]
    return Convolution(module) if module.groups == 1 or depthwise else None


class Convolution(nn.Module):
    """The values and gradients of `convolution`."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution
        self.options = convolution.stride[0], convolution.padding[0], convolution.groups

    def forward(self, x):
        return convolve(x, self.convolution.weight, self.convolution.bias, *self.options)

    def add_gradients(self, grad, x):
        """What a backward pass from the output's gradient would add to .grad of weight and bias, without its graph."""
        weight, bias = self.convolution.weight, self.convolution.bias
        wanted = (False, weight.requires_grad, bias is not None and bias.requires_grad)
        if any(wanted):
            found = gradients(grad, x, weight.detach(), *self.options, way(x, weight, *self.options), wanted)
            add_gradient(weight, found[1])
            add_gradient(bias, found[2])
