"""What is done otherwise in accelerated code at all: below these sizes, or in other dtypes, PyTorch's own is as fast."""

import torch

DTYPES: tuple[torch.dtype, ...] = (torch.float32,)  # of convolutions by oneDNN: in float64 the layout gains nothing
FEWEST_CHANNELS = 16  # of a convolution's output, from which on channels_last pays
FEWEST_POSITIONS = 512  # of a minibatch's outputs: below, bringing the weights into the layout costs what it gains
SMALLEST = 1 << 15  # elements of x from which on a goodness, a mean or a deviation pays
TENSORS = (torch.Tensor, torch.nn.Parameter)


def known(x):
    """Return whether x is a tensor whose values fastff may compute otherwise: one without a class or a place of its own."""
    return type(x) in TENSORS and x.dtype in DTYPES and x.device.type == "cpu"


def methods(*names):
    """Return methods of tensors, as a mode of PyTorch sees them called."""
    return [getattr(torch.Tensor, name) for name in names]
