"""Heads of a block: what all of them share, and GoodnessHead, whose goodness has learned weights."""

import torch
from torch import nn

import fastff.functional as ff
from fastff import arguments, ops, spec
from fastff.arguments import whole_number
from fastff.graph import fused
from fastff.ops.gradients import add_gradient


class Head(nn.Module):
    """A goodness with its loss, on which a block makes its local training step.

    Subclasses have goodness_spec() and the attributes channel_dim, impl and groups (of "group_norm"). The options of the loss, such as
    margin, are attributes: those of spec.LOSS_OPTIONS."""

    loss_name = "cross_entropy"
    algorithm = "auto"
    takes_epilogue = True  # whether local_step can start before batch norm and activation

    def set_loss_options(self, options):
        """Take the options of the loss, by their names in spec.Loss. Raises TypeError for others and ValueError for values out of range."""
        for name, value in spec.check_loss_options(options).items():
            setattr(self, name, value)

    def temperature(self):
        """Return tau, a number or, where it is learned, a tensor."""
        return self.tau

    def logits(self, g):
        """Return tau * goodness, of which the loss and the votes take the softmax."""
        return self.temperature() * g

    def loss_spec(self, target, grad_scale=None):
        """Describe the loss of these targets."""
        return spec.Loss(
            self.loss_name, target, grad_scale=grad_scale, **{name: getattr(self, name) for name in spec.LOSS_OPTIONS}
        )

    def loss(self, g, target=None, reduction="mean"):
        """Compute the differentiable loss from goodness g [B, K]; target [B] for cross-entropy, None for the other losses."""
        return ff.loss_of(g, self.loss_spec(target)._replace(reduction=reduction))

    @torch.no_grad()
    def local_step(
        self, x, target=None, normalize="layer_norm", eps=1e-5, grad_scale=None, need_grad_x=True, epilogue=None
    ):
        """Run the local training step on a block's output and add the gradients of the head's parameters to their .grad.

        Args:
            x: as for forward; with an epilogue the output [B, C, H, W] of the block's last convolution.
            target: [B] int64, or None for losses of positive and negative samples.
            normalize, eps: of the next block's input, as in fastff.functional.normalize, with `groups` groups; None for none.
            grad_scale: a tensor of one element that multiplies all gradients, or None.
            need_grad_x: False where nothing before the head learns.
            epilogue: spec.Epilogue of what stands between x and the head, or None.

        Returns spec.StepResult. Raises TypeError or ValueError that names the argument."""
        called, channel_dim = ("x", self.channel_dim) if epilogue is None else ("y", 1)
        x4, loss = arguments.canonical_x(x, channel_dim, called), self.loss_spec(target, grad_scale)
        with torch.enable_grad():  # weights that are computed from others (torch.nn.utils.parametrize)
            goodness = self.goodness_spec()
        if epilogue is not None:
            epilogue.check(x)
        goodness.check(x4, self.algorithm, called)
        loss.check(x4, getattr(goodness, "positions", False), called)
        normalization = spec.Normalization.checked(normalize, x4.shape[1], self.groups, eps)
        step = ops.step.run(
            spec.Step(x4, epilogue, goodness, loss, normalization, need_grad_x, self.algorithm), self.impl
        )
        self._finish(goodness, x4, step)
        grad_x, normalized = (arguments.restore(t, x, channel_dim) for t in (step.grad_x, step.normalized))
        return step._replace(grad_x=grad_x, normalized=normalized)

    def _finish(self, goodness, x, step):
        """Add the gradients of this head's parameters, those of its description of the goodness, to their .grad, and update its buffers."""


class LossHead(Head):
    """Any local loss in the place of a goodness and its loss: loss(output, target) -> a scalar, such as an auxiliary network or a decoder.

    A loss that is an nn.Module has its parameters trained with the block's. `target` is what the block's local_step was given, of any type."""

    takes_epilogue = False
    groups, channel_dim = 1, 1

    def __init__(self, loss):
        super().__init__()
        if not callable(loss):
            raise TypeError(
                f"loss: expected a function of the block's output and the target, got {type(loss).__name__}"
            )
        self.function = loss

    def forward(self, x, target=None):
        """Compute the loss, differentiable."""
        return self.function(x, target)

    def local_step(self, x, target=None, normalize=None, eps=1e-5, grad_scale=None, need_grad_x=True, epilogue=None):
        """Compute the loss and its gradients as Head.local_step does. The result has no goodness."""
        normalized = None if normalize is None else ff.normalize(x, normalize, eps=eps)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(need_grad_x)
            loss = self.function(leaf, target)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                got = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise ValueError(f"loss: expected a function that returns a scalar tensor, got {got}")
            if loss.requires_grad:
                (loss if grad_scale is None else loss * grad_scale.to(loss.dtype)).sum().backward()
        return spec.StepResult(loss.detach(), None, leaf.grad, normalized=normalized)


class GoodnessHead(Head):
    """Goodness of x [B, C, H, W] (or [B, C]; tokens with channel_dim=-1) for each class: head(x) -> [B, K].

    Args:
        channels: C of x.
        num_classes: K.
        kernel_size: 1, 3 or 5, with "same" padding.
        grid: cells on a side of the spatial term, or a pair; 0 for none (the paper's).
        hidden: channels of a hidden layer of the spatial term, relu(batch_norm(hidden_weight m)) of the means m over cells, which makes the term
            a classifier that is not linear; 0 for none. Its batch norm is an nn.BatchNorm2d over samples and cells: in training mode each
            sample's goodness depends on the batch (a micro-batch, of this rank alone), in evaluation mode it does not.
        squares: False leaves the spatial term alone, a local linear classifier (Nokland and Eidnes 2019, arXiv 1901.06656).
        bias: a bias inside the squares.
        scale: the standard deviation of the weight relative to PyTorch's default for a convolution. None: 4 without the spatial term,
            2 with it, so that the goodness of the classes differs by about one at the start (docs/learning.md).
        tau: the factor of the goodness before the softmax; learn_tau trains it from there (stored as its logarithm).
        loss: options of the loss as in spec.LOSS_OPTIONS: margin, label_smoothing.
        channel_dim: 1, or -1 for tokens [B, N, C] and [B, H, W, C].
        impl, algorithm: as in fastff.functional.

    Attributes: weight [K, C, k, k] or None, bias [K] or None, grid_weight [K, C, G, G] ([K, hidden, G, G]) or None, hidden_weight [hidden, C] or
    None, hidden_norm (the nn.BatchNorm2d) or None, log_tau [] or None.
    """

    def __init__(
        self, channels, num_classes, kernel_size=1, grid=0, *, hidden=0, squares=True, bias=False, scale=None, learn_tau=False,
        channel_dim=1, impl="auto", algorithm="auto", device=None, dtype=None, **loss,
    ):  # fmt: skip
        super().__init__()
        for name, value in (("channels", channels), ("num_classes", num_classes)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if kernel_size not in (1, 3, 5):
            raise ValueError(f"kernel_size: expected 1, 3 or 5, got {kernel_size!r}")
        grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if len(grid) != 2 or min(grid) < 0:
            raise ValueError(f"grid: expected a whole number of at least 0 or a pair, got {grid}")
        hidden = whole_number("hidden", hidden, least=0)
        if hidden and 0 in grid:
            raise ValueError(f"hidden: expected 0 without a spatial term (grid > 0), got {hidden}")
        if not squares and (0 in grid or bias):
            raise ValueError(
                f"squares: False needs a spatial term (grid > 0) and no bias, got grid={grid}, bias={bias}"
            )
        if scale is not None and not scale > 0:
            raise ValueError(f"scale: expected a positive number (a weight of zeros never learns), got {scale!r}")
        self.channels, self.num_classes, self.kernel_size, self.grid = channels, num_classes, kernel_size, grid
        self.groups = num_classes  # of normalize="group_norm"
        self.scale = scale if scale is not None else (2.0 if all(grid) else 4.0)
        self.set_loss_options(loss)
        self.channel_dim, self.impl, self.algorithm = channel_dim, impl, algorithm
        factory = {"device": device, "dtype": dtype}

        def parameter(condition, *shape):
            return nn.Parameter(torch.empty(shape, **factory)) if condition else None

        self.weight = parameter(squares, num_classes, channels, kernel_size, kernel_size)
        self.bias = parameter(bias, num_classes)
        self.grid_weight = parameter(all(grid), num_classes, hidden or channels, *grid)
        self.hidden_weight = parameter(hidden, hidden, channels)
        self.hidden_norm = nn.BatchNorm2d(hidden, **factory) if hidden else None
        self.log_tau = parameter(learn_tau)
        self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            default = (3 * self.channels * self.kernel_size**2) ** -0.5
            if self.weight is not None:
                nn.init.uniform_(self.weight, -self.scale * default * 3**0.5, self.scale * default * 3**0.5)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
            if self.hidden_norm is not None:
                for weight in (self.hidden_weight, self.grid_weight):  # as nn.Linear does
                    nn.init.kaiming_uniform_(weight, 5**0.5)
                self.hidden_norm.reset_parameters()
            elif self.grid_weight is not None:
                nn.init.normal_(self.grid_weight, std=0.5 * (3 * self.channels) ** -0.5)
            if self.log_tau is not None:
                self.log_tau.fill_(float(torch.tensor(self.tau).log()))

    def extra_repr(self):
        parts = [f"{self.channels}, {self.num_classes}, kernel_size={self.kernel_size}, grid={self.grid}"]
        parts += [f"hidden={len(self.hidden_weight)}"] if self.hidden_norm is not None else []
        return ", ".join(parts + [f"tau={self.tau}, margin={self.margin}"])

    def goodness_spec(self):
        """Describe the goodness."""
        norm, hidden = self.hidden_norm, ()
        if norm is not None:
            statistics = (None, None) if norm.training else (norm.running_mean, norm.running_var)
            hidden = (self.hidden_weight, norm.weight, norm.bias, norm.eps, *statistics)
        return spec.Projection(self.weight, self.bias, self.grid_weight, (self.kernel_size // 2,) * 2, *hidden)

    def loss_spec(self, target, grad_scale=None):
        """Describe the loss of these targets."""
        loss = super().loss_spec(target, grad_scale)
        return loss if self.log_tau is None else loss._replace(tau=1.0, learned_tau=self.log_tau.exp())

    def temperature(self):
        """Return tau, a number or, where it is learned, a tensor."""
        return self.tau if self.log_tau is None else self.log_tau.exp()

    def forward(self, x):
        """Compute goodness [B, K], differentiable."""
        x, goodness = arguments.canonical_x(x, self.channel_dim), self.goodness_spec()
        goodness.check(x, self.algorithm)
        g, mean, var = ops.goodness.differentiable(x, goodness, self.impl, self.algorithm)
        if mean is not None:
            self._update_statistics(goodness.hidden_values(x), mean.detach(), var.detach())
        return g

    def _update_statistics(self, count, mean, var):
        """Move the running statistics of the hidden layer towards those of `count` values, as nn.BatchNorm2d does."""
        if self.hidden_norm.training:
            fused.update_statistics(self.hidden_norm, mean, var, count)

    def _finish(self, goodness, x, step):
        for name, gradient in zip(spec.HEAD_PARAMETERS, spec.HEAD_GRADIENTS, strict=True):
            add_gradient(getattr(goodness, name), getattr(step, gradient))
        if self.hidden_norm is not None:
            self._update_statistics(goodness.hidden_values(x), step.hidden_mean, step.hidden_var)
        if self.log_tau is not None:
            add_gradient(self.log_tau, step.grad_tau * self.log_tau.exp())
