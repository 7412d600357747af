"""A convolution of a model as a block's training graph calls it: the same weights, by the quickest way to their gradients (fastff/ops)."""

from torch import nn

from fastff.ops.convolution import convolve, convolve_depthwise


def quickened(module):
    """A stand-in for an nn.Conv2d that shares its parameters, or None where there is no quicker way."""
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    sizes = (module.kernel_size, module.stride, module.padding)
    if module.dilation != (1, 1) or any(a != b for a, b in sizes):
        return None
    if module.groups == 1:
        return Convolution(module, convolve)
    if module.groups == module.in_channels == module.out_channels and module.padding[0] < module.kernel_size[0]:
        return Convolution(module, convolve_depthwise)
    return None


class Convolution(nn.Module):
    """The values and gradients of `convolution`, by `run`."""

    def __init__(self, convolution, run):
        super().__init__()
        self.convolution, self.run = convolution, run

    def forward(self, x):
        c = self.convolution
        return self.run(x, c.weight, c.bias, c.stride[0], c.padding[0])
