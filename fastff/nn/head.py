"""GoodnessHead: the parameters of a block's goodness, and the local training step on them."""

import torch
from torch import nn

import fastff.functional as ff
from fastff.ops.goodness import NORMALIZATIONS
from fastff.ops.gradients import add_gradient


class GoodnessHead(nn.Module):
    """Goodness of x [B, C, H, W] (or [B, C]; tokens with channel_dim=-1) for each class: head(x) -> [B, K].

    Args:
        channels: C of x.
        num_classes: K.
        kernel_size: 1, 3 or 5, with "same" padding.
        grid: cells on a side of the spatial term, or a pair; 0 for none (the paper's).
        squares: False leaves the spatial term alone, a local linear classifier (Nokland and Eidnes 2019, arXiv 1901.06656).
        bias: a bias inside the squares.
        scale: the standard deviation of the weight relative to PyTorch's default for a convolution. None: 4 without the spatial term,
            2 with it, so that the goodness of the classes differs by about one at the start (docs/learning.md).
        tau: the factor of the goodness before the softmax; learn_tau trains it from there (stored as its logarithm).
        margin, label_smoothing: of the loss.
        channel_dim: 1, or -1 for tokens [B, N, C] and [B, H, W, C].
        impl, algorithm: as in fastff.functional.

    Attributes: weight [K, C, k, k] or None, bias [K] or None, grid_weight [K, C, G, G] or None, log_tau [] or None.
    """

    def __init__(
        self, channels, num_classes, kernel_size=1, grid=0, *, squares=True, bias=False, scale=None, tau=1.0, learn_tau=False, margin=0.0,
        label_smoothing=0.0, channel_dim=1, impl="auto", algorithm="auto", device=None, dtype=None,
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
        if not squares and (0 in grid or bias):
            raise ValueError(
                f"squares: False needs a spatial term (grid > 0) and no bias, got grid={grid}, bias={bias}"
            )
        if scale is not None and not scale > 0:
            raise ValueError(f"scale: expected a positive number (a weight of zeros never learns), got {scale!r}")
        if not 0 < tau < float("inf"):
            raise ValueError(f"tau: expected a positive number, got {tau!r}")
        self.channels, self.num_classes, self.kernel_size, self.grid = channels, num_classes, kernel_size, grid
        self.groups = num_classes  # of normalize="group_norm"
        self.scale = scale if scale is not None else (2.0 if all(grid) else 4.0)
        self.tau, self.margin, self.label_smoothing = tau, margin, label_smoothing
        self.channel_dim, self.impl, self.algorithm = channel_dim, impl, algorithm
        factory = {"device": device, "dtype": dtype}

        def parameter(condition, *shape):
            return nn.Parameter(torch.empty(shape, **factory)) if condition else None

        self.weight = parameter(squares, num_classes, channels, kernel_size, kernel_size)
        self.bias = parameter(bias, num_classes)
        self.grid_weight = parameter(all(grid), num_classes, channels, *grid)
        self.log_tau = parameter(learn_tau)
        self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            default = (3 * self.channels * self.kernel_size**2) ** -0.5
            if self.weight is not None:
                nn.init.uniform_(self.weight, -self.scale * default * 3**0.5, self.scale * default * 3**0.5)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
            if self.grid_weight is not None:
                nn.init.normal_(self.grid_weight, std=0.5 * (3 * self.channels) ** -0.5)
            if self.log_tau is not None:
                self.log_tau.fill_(float(torch.tensor(self.tau).log()))

    def extra_repr(self):
        parts = [f"{self.channels}, {self.num_classes}, kernel_size={self.kernel_size}, grid={self.grid}"]
        return ", ".join(parts + [f"tau={self.tau}, margin={self.margin}"])

    def _arguments(self):
        return {
            "grid_weight": self.grid_weight,
            "padding": self.kernel_size // 2,
            "channel_dim": self.channel_dim,
            "impl": self.impl,
            "algorithm": self.algorithm,
        }

    def temperature(self):
        """tau: a number, or a tensor where it is learned."""
        return self.tau if self.log_tau is None else self.log_tau.exp()

    def forward(self, x):
        """Goodness [B, K], differentiable."""
        return ff.goodness(x, self.weight, self.bias, **self._arguments())

    def logits(self, g):
        """tau * goodness: what the loss and the votes take the softmax of."""
        return self.temperature() * g

    def loss(self, g, target, reduction="mean"):
        """The differentiable loss from goodness g [B, K]."""
        return ff.margin_cross_entropy(g, target, self.temperature(), self.margin, self.label_smoothing, reduction)

    @torch.no_grad()
    def local_step(self, x, target, normalize="layer_norm", eps=1e-5, grad_scale=None, need_grad_x=True):
        """goodness_step on x [B, C, H, W], adding the head's gradients to its parameters' .grad. Returns GoodnessStep."""
        fused = normalize if normalize in (None, *NORMALIZATIONS) else None
        step = ff.goodness_step(
            x, self.weight, self.bias, target, tau=self.temperature(), margin=self.margin, label_smoothing=self.label_smoothing,
            grad_scale=grad_scale, normalize=fused, eps=eps, need_grad_x=need_grad_x, **self._arguments(),
        )  # fmt: skip
        self._add_gradients(step)
        if fused == normalize:
            return step
        return step._replace(normalized=ff.normalize(x, normalize, self.groups, eps, channel_dim=self.channel_dim))

    @torch.no_grad()
    def local_tail_step(self, y, target, normalize="layer_norm", eps=1e-5, grad_scale=None, **tail):
        """The same for the tail of a block: tail_step on y [B, C, H, W] with its arguments bn_weight, ..., activation. Returns TailStep."""
        arguments = self._arguments()
        arguments.pop("channel_dim")  # 1, of what batch norm gives
        step = ff.tail_step(
            y, self.weight, self.bias, target, tau=self.temperature(), margin=self.margin, label_smoothing=self.label_smoothing,
            grad_scale=grad_scale, normalize=normalize, eps=eps, **arguments, **tail,
        )  # fmt: skip
        self._add_gradients(step)
        return step

    def _add_gradients(self, step):
        grad_log_tau = None if self.log_tau is None else step.grad_tau * self.log_tau.exp()
        add_gradient(self.weight, step.grad_weight)
        add_gradient(self.bias, step.grad_bias)
        add_gradient(self.grid_weight, step.grad_grid_weight)
        add_gradient(self.log_tau, grad_log_tau)
