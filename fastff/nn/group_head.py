"""GroupGoodness: the goodness of a block that has no weights of its own, by its name, and the local training step on it."""

import torch
from torch import nn

import fastff.functional as ff
from fastff.reference import LOSSES

# name: (a group for each class, power, mean, at each position)
GOODNESS = {
    "class_group": (True, 2, True, False),
    "class_group_mean": (True, 1, True, False),
    "sum_of_squares": (False, 2, False, False),
    "mean_of_squares": (False, 2, True, False),
    "position": (False, 2, True, True),
}


class GroupGoodness(nn.Module):
    """Goodness of x [B, C, H, W] (or [B, C]; tokens with channel_dim=-1) without weights: head(x) -> [B, K], [B, 1] or [B, P].

    Args:
        channels: C of x.
        num_classes: K, for the goodness of classes; else None.
        goodness: "class_group": mean of x^2 over the k-th of K groups of channels and all positions (CwComp, arXiv 2312.12668);
            "class_group_mean": mean of x (DeeperForward, ICLR 2025); "sum_of_squares", "mean_of_squares": one value (Hinton 2022,
            arXiv 2212.13345); "position": mean of x^2 over the channels at each of P positions (SCFF).
        loss: "cross_entropy" over classes (the default where there are some), or of a batch whose first half is positive and second
            half negative "softplus" (the default otherwise), "swish", "symba", "swish_symba" (fastff.functional.forward_forward_loss).
        theta, alpha: the threshold, and the factor of differences. Where Hinton's threshold is the number of units, it is that of
            "sum_of_squares", and 1 of "mean_of_squares".
        tau, margin, label_smoothing: of cross-entropy, as of GoodnessHead.
        channel_dim, impl: as in fastff.functional.
    """

    def __init__(
        self, channels, num_classes=None, goodness="class_group", *, loss=None, theta=2.0, alpha=4.0, tau=1.0, margin=0.0, label_smoothing=0.0,
        channel_dim=1, impl="auto",
    ):  # fmt: skip
        super().__init__()
        if goodness not in GOODNESS:
            raise ValueError(f"goodness: expected one of {', '.join(GOODNESS)}, got {goodness!r}")
        classes, self.power, self.mean, self.positions = GOODNESS[goodness]
        loss = loss or ("cross_entropy" if classes else "softplus")
        if loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
        if loss == "cross_entropy" and not classes:
            raise ValueError(f"loss: expected a loss of positive and negative samples for {goodness}, got {loss!r}")
        if classes and (not isinstance(num_classes, int) or not 1 <= num_classes <= channels):
            expected = f"1 to {channels}, a channel or more for each"
            raise ValueError(f"num_classes: expected {expected}, got {num_classes!r}")
        self.channels, self.num_classes, self.goodness = channels, num_classes if classes else None, goodness
        self.groups = num_classes if classes else 1
        self.loss_name, self.theta, self.alpha = loss, theta, alpha
        self.tau, self.margin, self.label_smoothing = tau, margin, label_smoothing
        self.channel_dim, self.impl = channel_dim, impl

    def extra_repr(self):
        return f"{self.channels}, {self.num_classes}, goodness={self.goodness}, loss={self.loss_name}"

    def _goodness(self):
        return {
            "power": self.power, "mean": self.mean, "positions": self.positions, "channel_dim": self.channel_dim, "impl": self.impl,
        }  # fmt: skip

    def forward(self, x):
        """Goodness, differentiable."""
        return ff.group_goodness(x, self.groups, **self._goodness())

    def logits(self, g):
        """tau * goodness: what cross-entropy and the votes take the softmax of."""
        return self.tau * g

    def loss(self, g, target=None, reduction="mean"):
        """The differentiable loss from goodness g; target [B] for cross_entropy, None for the others."""
        if self.loss_name == "cross_entropy":
            return ff.margin_cross_entropy(g, target, self.tau, self.margin, self.label_smoothing, reduction)
        return ff.forward_forward_loss(g, self.loss_name, theta=self.theta, alpha=self.alpha, reduction=reduction)

    def _loss(self):
        return {
            "loss": self.loss_name, "theta": self.theta, "alpha": self.alpha, "tau": self.tau, "margin": self.margin,
            "label_smoothing": self.label_smoothing,
        }  # fmt: skip

    @torch.no_grad()
    def local_step(self, x, target=None, normalize="layer_norm", eps=1e-5, grad_scale=None, need_grad_x=True):
        """group_goodness_step on x. Returns GroupGoodnessStep."""
        return ff.group_goodness_step(
            x, target, self.groups, grad_scale=grad_scale, normalize=normalize, eps=eps, need_grad_x=need_grad_x, **self._loss(),
            **self._goodness(),
        )  # fmt: skip

    @torch.no_grad()
    def local_tail_step(self, y, target=None, normalize="layer_norm", eps=1e-5, grad_scale=None, **tail):
        """The same for the tail of a block: group_tail_step on y [B, C, H, W] with its arguments bn_weight, ..., activation."""
        goodness = self._goodness()
        goodness.pop("channel_dim")  # 1, of what batch norm gives
        return ff.group_tail_step(
            y,
            target,
            self.groups,
            grad_scale=grad_scale,
            normalize=normalize,
            eps=eps,
            **self._loss(),
            **goodness,
            **tail,
        )
