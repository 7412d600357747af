"""GroupGoodness: the head of a block whose goodness has no weights, by the name of the goodness."""

import fastff.functional as ff
from fastff import spec
from fastff.nn.head import Head

# name: (whether each class has a group, power, mean, whether at each position)
GOODNESS = {
    "class_group": (True, 2, True, False),
    "class_group_mean": (True, 1, True, False),
    "sum_of_squares": (False, 2, False, False),
    "mean_of_squares": (False, 2, True, False),
    "position": (False, 2, True, True),
}


class GroupGoodness(Head):
    """Goodness of x [B, C, H, W] (or [B, C]; tokens with channel_dim=-1) without weights: head(x) -> [B, K], [B, 1] or [B, P].

    Args:
        channels: C of x.
        num_classes: K, for the goodness of classes; else None.
        goodness: "class_group": mean of x^2 over the k-th of K groups of channels and all positions (CwComp, arXiv 2312.12668);
            "class_group_mean": mean of x (DeeperForward, ICLR 2025); "sum_of_squares", "mean_of_squares": one value (Hinton 2022,
            arXiv 2212.13345); "position": mean of x^2 over the channels at each of P positions (SCFF).
        loss: "cross_entropy" over classes (the default where there are some), or of a batch whose first half is positive and second
            half negative "softplus" (the default otherwise), "swish", "symba", "swish_symba" (fastff.functional.forward_forward_loss).
        theta, alpha: the threshold, or a pair of those of positive and of negative samples, and the factor of differences. Where
            Hinton's threshold is the number of units, it is that of "sum_of_squares", and 1 of "mean_of_squares".
        tau, margin, label_smoothing: of cross-entropy, as of GoodnessHead.
        channel_dim, impl: as in fastff.functional.
    """

    def __init__(
        self, channels, num_classes=None, goodness="class_group", *, loss=None, channel_dim=1, impl="auto", **options
    ):
        super().__init__()
        if goodness not in GOODNESS:
            raise ValueError(f"goodness: expected one of {', '.join(GOODNESS)}, got {goodness!r}")
        classes, self.power, self.mean, self.positions = GOODNESS[goodness]
        loss = loss or ("cross_entropy" if classes else "softplus")
        if loss not in spec.LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(spec.LOSSES)}, got {loss!r}")
        if loss == "cross_entropy" and not classes:
            raise ValueError(f"loss: expected a loss of positive and negative samples for {goodness}, got {loss!r}")
        if classes and (not isinstance(num_classes, int) or not 1 <= num_classes <= channels):
            expected = f"1 to {channels}, a channel or more for each"
            raise ValueError(f"num_classes: expected {expected}, got {num_classes!r}")
        self.channels, self.num_classes, self.goodness = channels, num_classes if classes else None, goodness
        self.groups = num_classes if classes else 1
        self.loss_name, self.channel_dim, self.impl = loss, channel_dim, impl
        self.set_loss_options(options)

    def extra_repr(self):
        return f"{self.channels}, {self.num_classes}, goodness={self.goodness}, loss={self.loss_name}"

    def goodness_spec(self):
        """Describe the goodness."""
        return spec.Groups(self.groups, self.power, self.mean, self.positions)

    def forward(self, x):
        """Compute goodness, differentiable."""
        groups, power, mean, positions = self.goodness_spec()
        options = {"channel_dim": self.channel_dim, "impl": self.impl}
        return ff.group_goodness(x, groups, power=power, mean=mean, positions=positions, **options)
