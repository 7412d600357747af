"""Blocks that train themselves: any module, or a convolution / depthwise convolution / linear layer, with a goodness head of its own.

block(x)                     -> output, goodness [B, K]      ordinary, differentiable
block.local_step(x, target)  -> normalised detached output (the next block's input), loss
                                adds this block's gradients to .grad; step your optimiser after it
"""

import torch
from torch import nn

import fastff.functional as ff
from fastff.nn.convolution import quickened
from fastff.nn.head import GoodnessHead
from fastff.nn.tail import Tail, activation_name, hooked


class FFBlock(nn.Module):
    """`module` as one locally trained block.

    Args:
        module: maps x to one tensor of `channels` channels.
        channels, num_classes: of the head; further keywords (grid, kernel_size, tau, ...) as of GoodnessHead.
        normalize: of the output passed on, as in goodness_step: "layer_norm", "layer_norm_channels" or None.
    """

    def __init__(self, module, channels, num_classes, *, normalize="layer_norm", **head):
        super().__init__()
        self.module = module
        self.head = GoodnessHead(channels, num_classes, **head)
        self.normalize = normalize

    def forward(self, x):
        """x -> (output, goodness [B, K]): the output as it is, not normalised, with gradients."""
        output = self.module(x)
        return output, self.head(output)

    def local_step(self, x, target):
        """One local training step on x and target [B]: (next block's input, loss), both detached. x gets no gradient."""
        tail = self.tail()
        with torch.enable_grad():
            if tail is None or not tail.ready():
                output = self.module(x.detach())
            else:
                y, residual = tail.body(x.detach())
                if tail.fits(y, residual):
                    step = tail.local_step(self.head, y, residual, target, self.normalize)
                    if y.requires_grad:
                        y.backward(step.grad_y)
                    return step.normalized, step.loss
                output = tail.finish(y, residual)
        step = self.head.local_step(output.detach(), target, self.normalize, need_grad_x=output.requires_grad)
        if output.requires_grad:
            output.backward(step.grad_x)
        return (output.detach() if step.normalized is None else step.normalized), step.loss

    def tail(self):
        """The fastff.nn.tail.Tail to train with, or None."""
        return

    def next_input(self, output):
        """What local_step passes on, from an output of forward (for inference)."""
        if self.normalize is None:
            return output
        over = "sample" if self.normalize == "layer_norm" else "channels"
        return ff.layer_norm(output, over=over, channel_dim=self.head.channel_dim)


class FFConv2d(FFBlock):
    """Convolution, batch norm and activation as one block: [B, in_channels, H, W] -> [B, out_channels, H', W'].

    Convolution arguments as of nn.Conv2d, but padding=None is "same" for stride 1 (kernel_size // 2). `norm` and `activation` are
    callables that make modules (norm gets the channels); None for none. Head keywords as of GoodnessHead.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=None, dilation=1, groups=1, bias=None, *, num_classes,
        norm=nn.BatchNorm2d, activation=nn.ReLU, normalize="layer_norm", head_kernel_size=1, **head,
    ):  # fmt: skip
        if padding is None:
            sizes = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
            dilations = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
            padding = tuple(d * (k - 1) // 2 for k, d in zip(sizes, dilations, strict=True))
        bias = norm is None if bias is None else bias
        layers = [nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)]
        layers += [norm(out_channels)] if norm is not None else []
        layers += [activation()] if activation is not None else []
        super().__init__(
            nn.Sequential(*layers), out_channels, num_classes, normalize=normalize, kernel_size=head_kernel_size, **head
        )

    def tail(self):
        """Batch norm and activation behind the convolution, where they are PyTorch's own."""
        convolution, *rest = self.module
        norm, activation = (*rest, None, None)[:2]
        name = activation_name(activation)
        if self.normalize is None or name is None or type(norm) is not nn.BatchNorm2d or len(rest) > 2:
            return None
        bypassed = [m for m in (self.module, norm, activation) if m is not None]
        quick = quickened(convolution)
        if quick is not None and not hooked([convolution]):
            convolution = quick
        return Tail(lambda x: (convolution(x), None), norm, name, activation or nn.Identity(), False, bypassed)


class FFDepthwiseConv2d(FFConv2d):
    """Depthwise convolution (one filter a channel), batch norm and activation as one block. Arguments as of FFConv2d."""

    def __init__(self, channels, kernel_size, stride=1, padding=None, dilation=1, bias=None, *, num_classes, **options):
        super().__init__(
            channels,
            channels,
            kernel_size,
            stride,
            padding,
            dilation,
            channels,
            bias,
            num_classes=num_classes,
            **options,
        )


class FFLinear(FFBlock):
    """Linear layer and activation as one block: [B, in_features] -> [B, out_features], or tokens [B, N, in] with channel_dim=-1."""

    def __init__(self, in_features, out_features, bias=True, *, num_classes, activation=nn.ReLU, **options):
        layers = [nn.Linear(in_features, out_features, bias)] + ([activation()] if activation is not None else [])
        super().__init__(nn.Sequential(*layers), out_features, num_classes, **options)
