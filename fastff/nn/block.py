"""Blocks that train themselves: any module, or a convolution / depthwise convolution / linear layer, with a goodness head of its own.

block(x)                     -> output, goodness [B, K]      ordinary, differentiable
block.local_step(x, target)  -> normalised detached output (the next block's input), loss
                                adds this block's gradients to .grad; step your optimiser after it
"""

import torch
from torch import nn

import fastff.functional as ff
from fastff.nn.convolution import quickened
from fastff.nn.group_head import GOODNESS, GroupGoodness
from fastff.nn.head import GoodnessHead
from fastff.nn.tail import Tail, activation_name, hooked
from fastff.spec import NORMALIZATIONS

FUSED = ("layer_norm", "layer_norm_channels", "none")


class FFBlock(nn.Module):
    """`module` as one locally trained block.

    Args:
        module: maps x to one tensor of `channels` channels.
        channels, num_classes: of the head (num_classes None for goodness without classes).
        goodness: "sff", the paper's 1 x 1 head (GoodnessHead); "projection": a learned matrix on the flattened activations (Mono-Forward,
            arXiv 2501.09238), whose positions are given as grid=(H, W); or without weights "class_group", "class_group_mean",
            "sum_of_squares", "mean_of_squares", "position" (GroupGoodness). Further keywords (grid, tau, loss, theta, ...) are the head's.
        normalize: of the output passed on: "layer_norm", "layer_norm_channels", "l2", "rms", ... as in fastff.functional.normalize ("group_norm"
            with a group for each class), or None.
    """

    def __init__(self, module, channels, num_classes=None, *, goodness="sff", normalize="layer_norm", **head):
        super().__init__()
        if normalize is not None and normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: expected one of {', '.join(NORMALIZATIONS)} or None, got {normalize!r}")
        self.module = module
        self.head = make_head(channels, num_classes, goodness, head)
        if normalize == "group_norm" and self.head.num_classes is None:
            raise ValueError(f"normalize: group_norm takes a group for each class, and {goodness} has no classes")
        self.normalize = None if normalize == "none" else normalize

    def forward(self, x):
        """x -> (output, goodness [B, K]): the output as it is, not normalised, with gradients."""
        output = self.module(x)
        return output, self.head(output)

    def local_step(self, x, target=None):
        """One local training step: (next block's input, loss), both detached. x gets no gradient.

        target [B] int64; None for losses of positive and negative samples, where x is the positive and then as many negative ones."""
        tail = self.tail()
        relu = False
        with torch.enable_grad():
            if tail is not None and tail.ready():
                y, residual = tail.body(x.detach())
                if tail.fits(y, residual):
                    step = tail.local_step(self.head, y, residual, target, self.normalize)
                    if y.requires_grad:
                        y.backward(step.grad_y)
                    return step.normalized, step.loss
                y = tail.finish(y, residual)
            else:
                y, relu = self.train_forward(x.detach())
        output = torch.relu_(y.detach()) if relu else y.detach()
        step = self.head.local_step(output, target, self.normalize, need_grad_x=y.requires_grad)
        if y.requires_grad:
            if relu:  # over the gradient, which is ours
                torch.ops.aten.threshold_backward.grad_input(step.grad_x, output, 0, grad_input=step.grad_x)
            y.backward(step.grad_x)
        return output if step.normalized is None else step.normalized, step.loss

    def layers(self):
        """The modules of an nn.Sequential in order, nested ones opened; None for other modules and where a hook would be passed over."""
        found, opened = [], []

        def open_up(module):
            inside = type(module) is nn.Sequential
            (opened if inside else found).append(module)
            for child in module if inside else ():
                open_up(child)

        open_up(self.module)
        return None if not opened or hooked(opened) else found

    def train_forward(self, x):
        """(the module's output for training without a tail, whether a ReLU is still to come, which may overwrite it)."""
        layers = self.layers()
        if not layers:
            return self.module(x), False
        *others, last = layers
        if type(last) is nn.ReLU and others and type(others[-1]) in OVERWRITABLE and not hooked([last, others[-1]]):
            return run(others, x), True
        return run(layers, x), False

    def tail(self):
        """The fastff.nn.tail.Tail to train with, for an nn.Sequential that ends with batch norm [and activation]; else None."""
        layers = self.layers() or []
        activation = layers.pop() if layers and activation_name(layers[-1]) is not None else None
        if len(layers) < 2 or type(layers[-1]) is not nn.BatchNorm2d or self.normalize is None:
            return None
        if self.normalize not in FUSED and not isinstance(self.head, GroupGoodness):
            return None
        norm = layers.pop()
        bypassed = [m for m in (norm, activation) if m is not None]
        name = activation_name(activation)
        return Tail(lambda x: (run(layers, x), None), norm, name, activation or nn.Identity(), False, bypassed)

    def next_input(self, output):
        """What local_step passes on, from an output of forward (for inference)."""
        if self.normalize is None:
            return output
        if self.normalize in FUSED:
            over = "sample" if self.normalize == "layer_norm" else "channels"
            return ff.layer_norm(output, over=over, channel_dim=self.head.channel_dim)
        return ff.normalize(output, self.normalize, self.head.groups, channel_dim=self.head.channel_dim)


OVERWRITABLE = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)  # no gradient of theirs needs their output


def run(layers, x):
    """Their output for training: convolutions by the quickest way to their gradients, ReLU in place where nothing needs what it overwrites."""
    before = None
    for layer in layers:
        in_place = type(layer) is nn.ReLU and type(before) in OVERWRITABLE and not hooked([before, layer])
        quick = None if hooked([layer]) else quickened(layer)
        x = torch.relu_(x) if in_place else (quick or layer)(x)
        before = layer
    return x


def make_head(channels, num_classes, goodness, options):
    """The head of this name."""
    if goodness in GOODNESS:
        return GroupGoodness(channels, num_classes, goodness, **options)
    if goodness == "projection":
        return GoodnessHead(channels, num_classes, squares=False, **{"grid": 1} | options)
    if goodness != "sff":
        raise ValueError(f"goodness: expected one of sff, projection, {', '.join(GOODNESS)}, got {goodness!r}")
    return GoodnessHead(channels, num_classes, **options)


class FFConv2d(FFBlock):
    """Convolution, batch norm and activation as one block: [B, in_channels, H, W] -> [B, out_channels, H', W'].

    Convolution arguments as of nn.Conv2d, but padding=None is "same" for stride 1 (kernel_size // 2). `norm` and `activation` are
    callables that make modules (norm gets the channels); None for none. Head keywords as of GoodnessHead.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=None, dilation=1, groups=1, bias=None, *, num_classes=None,
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
        if head_kernel_size != 1:
            head["kernel_size"] = head_kernel_size
        super().__init__(nn.Sequential(*layers), out_channels, num_classes, normalize=normalize, **head)


class FFDepthwiseConv2d(FFConv2d):
    """Depthwise convolution (one filter a channel), batch norm and activation as one block. Arguments as of FFConv2d."""

    def __init__(
        self, channels, kernel_size, stride=1, padding=None, dilation=1, bias=None, *, num_classes=None, **options
    ):
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

    def __init__(self, in_features, out_features, bias=True, *, num_classes=None, activation=nn.ReLU, **options):
        layers = [nn.Linear(in_features, out_features, bias)] + ([activation()] if activation is not None else [])
        super().__init__(nn.Sequential(*layers), out_features, num_classes, **options)
