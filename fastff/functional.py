"""The stateless functions: goodness, goodness_loss, goodness_step, tail_step, layer_norm; without weights: group_goodness, group_goodness_step,
forward_forward_loss, normalize, overlay_label.

Common arguments

    x            [B, C, H, W], [B, C, L] or [B, C]; with channel_dim=-1 tokens [B, N, C] or [B, H, W, C]. float32, float64, bfloat16
                 or float16, any strides
    weight       [K, C], or [K, C, k, k] for a k x k head; None turns the squares off (then grid_weight is needed)
    bias         [K] or None
    grid_weight  [K, C, G, G] or None: the spatial term over a G x G grid of cells (tokens and [B, C, L] are one row of cells)
    target       [B] int64, classes 0..K-1. On a CPU a label out of range raises; on a GPU, where looking would make the host
                 wait, it makes that sample's loss NaN
    padding      zeros around x before a k x k head, an int or a pair
    impl         "auto", or a row of the op's table ("composed", "reference"; `fastff info` lists them): runs or raises
    algorithm    "auto", "direct" or "second_moment": two exact ways to compute the same (1 x 1 heads only)

Formulas and sources: fastff/reference.py. 16-bit inputs are accumulated in float32; goodness and loss are float32 (float64 for float64).
All raise TypeError or ValueError naming the argument, what was expected and what came.
"""

from typing import NamedTuple

import torch

from fastff import checks, reference
from fastff.ops.goodness import check_labels
from fastff.ops.layer_norm import over_channels
from fastff.reference import LOSSES


class GoodnessStep(NamedTuple):
    """Results of `goodness_step`; None where there is no such input or it was not asked for."""

    loss: torch.Tensor
    goodness: torch.Tensor
    grad_x: torch.Tensor | None
    grad_weight: torch.Tensor | None
    grad_bias: torch.Tensor | None
    grad_grid_weight: torch.Tensor | None
    grad_tau: torch.Tensor | None
    normalized: torch.Tensor | None


class GroupGoodnessStep(NamedTuple):
    """Results of `group_goodness_step`; None where it was not asked for."""

    loss: torch.Tensor
    goodness: torch.Tensor
    grad_x: torch.Tensor | None
    normalized: torch.Tensor | None


class GroupTailStep(NamedTuple):
    """Results of `group_tail_step`; None where there is no such input or it was not asked for."""

    loss: torch.Tensor
    goodness: torch.Tensor
    grad_y: torch.Tensor
    grad_residual: torch.Tensor | None
    grad_bn_weight: torch.Tensor | None
    grad_bn_bias: torch.Tensor | None
    normalized: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor


class TailStep(NamedTuple):
    """Results of `tail_step`; None where there is no such input or it was not asked for."""

    loss: torch.Tensor
    goodness: torch.Tensor
    grad_y: torch.Tensor
    grad_residual: torch.Tensor | None
    grad_bn_weight: torch.Tensor | None
    grad_bn_bias: torch.Tensor | None
    grad_weight: torch.Tensor | None
    grad_bias: torch.Tensor | None
    grad_grid_weight: torch.Tensor | None
    grad_tau: torch.Tensor | None
    normalized: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor


def goodness(x, weight, bias=None, *, grid_weight=None, padding=0, channel_dim=1, impl="auto", algorithm="auto"):
    """g [B, K]: g[b,k] = mean over positions p of (sum_c weight[k,c] x[b,c,p] + bias[k])^2, plus the spatial term. Differentiable twice."""
    x, weight, bias, grid_weight, padding = checks.canonical(
        x, weight, bias, grid_weight, padding, channel_dim, algorithm
    )
    return torch.ops.fastff.goodness(x, weight, bias, grid_weight, padding, impl, algorithm)


def goodness_loss(
    x, weight, bias, target, *, grid_weight=None, padding=0, tau=1.0, margin=0.0, label_smoothing=0.0, reduction="mean", channel_dim=1,
    impl="auto", algorithm="auto",
):  # fmt: skip
    """Margin cross-entropy over tau * goodness, differentiable with respect to x, weight, bias, grid_weight and tau.

    loss_b = logsumexp_k(u) - u[y_b] with u = tau * g and u[y_b] lowered by `margin`; `reduction` "mean", "sum" or "none" ([B])."""
    g = goodness(
        x,
        weight,
        bias,
        grid_weight=grid_weight,
        padding=padding,
        channel_dim=channel_dim,
        impl=impl,
        algorithm=algorithm,
    )
    return margin_cross_entropy(g, target, tau, margin, label_smoothing, reduction)


def margin_cross_entropy(g, target, tau=1.0, margin=0.0, label_smoothing=0.0, reduction="mean"):
    """The loss of goodness_loss from goodness g [B, K] already computed."""
    checks.check_loss(target, g.shape[0], g.device, tau, margin, label_smoothing, reduction)
    if not torch.compiler.is_compiling():
        check_labels(target, g.shape[1])
    u = tau * g
    if margin:
        u = u - margin * (target[:, None] == torch.arange(g.shape[1], device=g.device))
    return torch.nn.functional.cross_entropy(u, target, label_smoothing=label_smoothing, reduction=reduction)


def goodness_step(
    x, weight, bias, target, *, grid_weight=None, padding=0, tau=1.0, margin=0.0, label_smoothing=0.0, reduction="mean", grad_scale=None,
    normalize="layer_norm", eps=1e-5, channel_dim=1, need_grad_x=True, impl="auto", algorithm="auto",
):  # fmt: skip
    """The local training step of a block's output: loss, goodness, every gradient and the next block's input, outside autograd.

    Args beyond the common ones:
        tau: a number, or a 0-dimensional tensor (then grad_tau is its gradient).
        reduction: as in goodness_loss; for "none" the gradients are those of the sum.
        grad_scale: 0-dimensional tensor that multiplies all gradients (loss scaling, accumulation); None for 1.
        normalize: "layer_norm" over all of a sample; "layer_norm_channels" over C at each position; None for no normalised output.
        eps: added to the variance.
        need_grad_x: False where nothing before the head learns.

    Returns GoodnessStep: loss [] or [B], goodness [B, K], grad_x and normalized as x, gradients as their parameters. x is not written to.
    """
    canonical = checks.canonical(x, weight, bias, grid_weight, padding, channel_dim, algorithm)
    x4, weight4, bias, grid_weight, padding = (t.detach() if isinstance(t, torch.Tensor) else t for t in canonical)
    loss_arguments = checks.loss_arguments(
        x, target, tau, margin, label_smoothing, reduction, grad_scale, normalize, float(eps)
    )
    loss, g, grad_x, grad_weight, grad_bias, grad_grid, grad_tau, normalized = torch.ops.fastff.goodness_step(
        x4, weight4, bias, grid_weight, *loss_arguments, need_grad_x, padding, impl, algorithm
    )
    learned = isinstance(tau, torch.Tensor)
    return GoodnessStep(
        loss,
        g,
        checks.restore(grad_x, x, channel_dim) if need_grad_x else None,
        None if weight is None else grad_weight.view(weight.shape),
        None if bias is None else grad_bias,
        None if grid_weight is None else grad_grid,
        grad_tau if learned else None,
        checks.restore(normalized, x, channel_dim) if normalize not in (None, "none") else None,
    )


def tail_step(
    y, weight, bias, target, *, bn_weight=None, bn_bias=None, bn_eps=1e-5, residual=None, need_grad_residual=True, activation="relu",
    grid_weight=None, padding=0, tau=1.0, margin=0.0, label_smoothing=0.0, reduction="mean", grad_scale=None, normalize="layer_norm",
    eps=1e-5, impl="auto", algorithm="auto",
):  # fmt: skip
    """The end of a block in one call: goodness_step on x = activation(batch_norm(y) + residual), and the gradients back to y.

    Args beyond those of goodness_step:
        y: [B, C, H, W], the output of the block's last convolution.
        bn_weight, bn_bias: [C] or None, batch norm's; bn_eps is added to the variance. The statistics are those of this batch.
        residual: as y (shape, dtype), or None.
        need_grad_residual: False where the residual needs no gradient.
        activation: "none", "relu", "relu6", "hardswish", "silu" or "gelu".

    Returns TailStep: as GoodnessStep, with grad_y instead of grad_x; grad_residual as y; the gradients of batch norm's parameters; mean and
    var [C], the batch's biased statistics in float32 (for the running ones). Nothing is written to. Source: Ioffe and Szegedy 2015 (batch
    norm and its gradient), arXiv 1502.03167."""
    checks.check_tail(y, bn_weight, bn_bias, residual, activation)
    canonical = checks.canonical(y, weight, bias, grid_weight, padding, 1, algorithm, "y")
    y, weight4, bias, grid_weight, padding = (t.detach() if isinstance(t, torch.Tensor) else t for t in canonical)
    loss_arguments = checks.loss_arguments(
        y, target, tau, margin, label_smoothing, reduction, grad_scale, normalize, float(eps), "y"
    )
    loss, g, grad_y, grad_weight, grad_bias, grad_grid, grad_tau, normalized, grad_residual, *grad_bn, mean, var = (
        torch.ops.fastff.tail_step(
            y, *(None if t is None else t.detach() for t in (bn_weight, bn_bias)), float(bn_eps),
            None if residual is None else residual.detach(), need_grad_residual, activation,
            weight4, bias, grid_weight, *loss_arguments, padding, impl, algorithm,
        )
    )  # fmt: skip
    return TailStep(
        loss,
        g,
        grad_y,
        grad_residual if need_grad_residual and residual is not None else None,
        *(None if t is None else grad for t, grad in zip((bn_weight, bn_bias), grad_bn, strict=True)),
        None if weight is None else grad_weight.view(weight.shape),
        None if bias is None else grad_bias,
        None if grid_weight is None else grad_grid,
        grad_tau if isinstance(tau, torch.Tensor) else None,
        None if normalize in (None, "none") else normalized,
        mean,
        var,
    )


def layer_norm(x, eps=1e-5, *, over="sample", channel_dim=1, impl="auto"):
    """Layer normalisation without affine: `over` "sample" (all but the batch dimension) or "channels" (at each position). As x."""
    x4 = checks.canonical_x(x, channel_dim)
    if over == "sample":
        return checks.restore(torch.ops.fastff.layer_norm(x4, eps, impl), x, channel_dim)
    if over == "channels":
        return checks.restore(over_channels(x4, eps), x, channel_dim)
    raise ValueError(f"over: expected 'sample' or 'channels', got {over!r}")


def group_goodness(x, groups=1, *, power=2, mean=True, positions=False, channel_dim=1, impl="auto"):
    """Goodness without weights, g [B, groups]: sum or mean of x^power over each group of channels and all positions. Differentiable twice.

    Args:
        groups: K, of neighbouring channels; where K does not divide them the first groups have one more.
        power: 2, or 1 for the activations themselves.
        mean: False for the sum.
        positions: g [B, P] instead, at each position over all channels (groups must be 1).

    Sources: Hinton 2022 (arXiv 2212.13345) one group; CwComp (arXiv 2312.12668) a group a class; DeeperForward (ICLR 2025) power 1."""
    x4, how = checks.canonical_groups(x, groups, power, mean, positions, channel_dim)
    return torch.ops.fastff.group_goodness(x4, *how, impl)


def forward_forward_loss(g, loss="softplus", *, theta=2.0, alpha=4.0, reduction="mean"):
    """Loss of goodness g [2n, J] of a batch whose first half is positive and second half negative, plain PyTorch.

    "softplus": softplus(theta - g) of positive, softplus(g - theta) of negative samples (Hinton 2022); "swish": z sigmoid(z) instead of
    softplus; "symba": softplus(-alpha (g_positive - g_negative)) (arXiv 2303.08418); "swish_symba". `reduction` "mean", "sum" or "none" ([2n], or [n]
    of differences); J values of a sample are averaged."""
    if loss not in LOSSES[1:]:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES[1:])}, got {loss!r}")
    if g.dim() != 2:
        raise ValueError(f"g: expected [2n, J], got {list(g.shape)}")
    checks.check_halves(len(g), "g")
    checks.check_reduction(reduction)
    return reference.reduced(reference.forward_forward_losses(g, loss, theta, alpha), reduction)


def group_goodness_step(
    x, target=None, groups=1, *, power=2, mean=True, positions=False, loss="cross_entropy", theta=2.0, alpha=4.0, tau=1.0, margin=0.0,
    label_smoothing=0.0, reduction="mean", grad_scale=None, normalize="layer_norm", eps=1e-5, channel_dim=1, need_grad_x=True, impl="auto",
):  # fmt: skip
    """The local training step of a layer whose goodness has no weights: loss, goodness, dL/dx and the next layer's input, outside autograd.

    Args beyond those of group_goodness:
        target: [B] int64 for "cross_entropy" over tau * g; None for the losses of forward_forward_loss, whose batch is positive
            samples and then as many negative ones.
        loss, theta, alpha: as in forward_forward_loss.
        tau, margin, label_smoothing, reduction, grad_scale, need_grad_x: as in goodness_step (tau a number).
        normalize, eps: of the next layer's input, as in normalize; None for none.

    Returns GroupGoodnessStep: loss, goodness [B, K] or [B, P], grad_x and normalized as x. x is not written to."""
    x4, how = checks.canonical_groups(x, groups, power, mean, positions, channel_dim)
    x4 = x4.detach()
    how_to_learn = checks.group_loss_arguments(
        x, target, positions, loss, theta, alpha, tau, margin, label_smoothing, reduction, grad_scale, normalize, eps
    )
    step = torch.ops.fastff.group_goodness_step(x4, *how, *how_to_learn, need_grad_x, impl)
    return GroupGoodnessStep(
        step[0],
        step[1],
        checks.restore(step[2], x, channel_dim) if need_grad_x else None,
        None if normalize in (None, "none") else checks.restore(step[3], x, channel_dim),
    )


def group_tail_step(
    y, target=None, groups=1, *, bn_weight=None, bn_bias=None, bn_eps=1e-5, residual=None, need_grad_residual=True, activation="relu",
    power=2, mean=True, positions=False, loss="cross_entropy", theta=2.0, alpha=4.0, tau=1.0, margin=0.0, label_smoothing=0.0,
    reduction="mean", grad_scale=None, normalize="layer_norm", eps=1e-5, impl="auto",
):  # fmt: skip
    """The end of a block in one call: group_goodness_step on x = activation(batch_norm(y) + residual), and the gradients back to y.

    Args: y [B, C, H, W] .. activation as of tail_step, the rest as of group_goodness_step.

    Returns GroupTailStep, as TailStep without a head's parameters. Nothing is written to."""
    checks.check_tail(y, bn_weight, bn_bias, residual, activation)
    y, how = checks.canonical_groups(y, groups, power, mean, positions, 1, "y")
    how_to_learn = checks.group_loss_arguments(
        y,
        target,
        positions,
        loss,
        theta,
        alpha,
        tau,
        margin,
        label_smoothing,
        reduction,
        grad_scale,
        normalize,
        eps,
        "y",
    )
    loss, g, grad_y, normalized, grad_residual, *grad_bn, mean, var = torch.ops.fastff.group_tail_step(
        *(None if t is None else t.detach() for t in (y, bn_weight, bn_bias)), float(bn_eps), None if residual is None else residual.detach(),
        need_grad_residual, activation, *how, *how_to_learn, impl,
    )  # fmt: skip
    return GroupTailStep(
        loss,
        g,
        grad_y,
        grad_residual if need_grad_residual and residual is not None else None,
        *(None if t is None else grad for t, grad in zip((bn_weight, bn_bias), grad_bn, strict=True)),
        None if normalize in (None, "none") else normalized,
        mean,
        var,
    )


def normalize(x, how="l2", groups=1, eps=1e-5, *, channel_dim=1, impl="auto"):
    """x brought to length or variance 1, without affine; as x. Differentiable.

    how: "layer_norm", "l2" (x / (|x| + eps)) or "rms" over all of a sample, with "_channels" over C at each position; "group_norm" over each
    of `groups` groups of neighbouring channels."""
    x4, (groups, *_) = checks.canonical_groups(x, groups, 1, True, False, channel_dim)
    checks.check_normalization(how)
    if how == "none":
        return x
    return checks.restore(torch.ops.fastff.normalize(x4, how, groups, float(eps), impl), x, channel_dim)


def overlay_label(x, label, num_classes, value=None):
    """A copy of x [B, ...] whose first num_classes elements of each sample are the one-hot label [B], times `value` (x's maximum if None).

    Stays on x's device without a synchronisation; x itself is not written to (Hinton 2022)."""
    if not isinstance(label, torch.Tensor) or label.dtype != torch.int64 or label.shape != x.shape[:1]:
        got = f"{list(label.shape)} of {label.dtype}" if isinstance(label, torch.Tensor) else type(label).__name__
        raise ValueError(f"label: expected int64 [{len(x)}], one for each sample of x, got {got}")
    if not 1 <= num_classes <= x[0].numel():
        raise ValueError(f"num_classes: expected 1 to {x[0].numel()}, the elements of a sample, got {num_classes}")
    check_labels(label, num_classes)
    out = x.flatten(1).clone()
    out[:, :num_classes] = (label[:, None] == torch.arange(num_classes, device=x.device)) * (
        x.max() if value is None else value
    )
    return out.view(x.shape)
