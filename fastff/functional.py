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

from fastff import reference
from fastff.kernels.composed.tail import ACTIVATIONS
from fastff.ops.goodness import NORMALIZATIONS, check_labels
from fastff.ops.layer_norm import over_channels
from fastff.reference import LOSSES, PAIRED

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    x, weight, bias, grid_weight, padding = _canonical(x, weight, bias, grid_weight, padding, channel_dim, algorithm)
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
    _check_loss(target, g.shape[0], g.device, tau, margin, label_smoothing, reduction)
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
    canonical = _canonical(x, weight, bias, grid_weight, padding, channel_dim, algorithm)
    x4, weight4, bias, grid_weight, padding = (t.detach() if isinstance(t, torch.Tensor) else t for t in canonical)
    loss_arguments = _loss_arguments(
        x, target, tau, margin, label_smoothing, reduction, grad_scale, normalize, float(eps)
    )
    loss, g, grad_x, grad_weight, grad_bias, grad_grid, grad_tau, normalized = torch.ops.fastff.goodness_step(
        x4, weight4, bias, grid_weight, *loss_arguments, need_grad_x, padding, impl, algorithm
    )
    learned = isinstance(tau, torch.Tensor)
    return GoodnessStep(
        loss,
        g,
        _restore(grad_x, x, channel_dim) if need_grad_x else None,
        None if weight is None else grad_weight.view(weight.shape),
        None if bias is None else grad_bias,
        None if grid_weight is None else grad_grid,
        grad_tau if learned else None,
        _restore(normalized, x, channel_dim) if normalize not in (None, "none") else None,
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
    _check_tail(y, bn_weight, bn_bias, residual, activation)
    canonical = _canonical(y, weight, bias, grid_weight, padding, 1, algorithm)
    y, weight4, bias, grid_weight, padding = (t.detach() if isinstance(t, torch.Tensor) else t for t in canonical)
    loss_arguments = _loss_arguments(
        y, target, tau, margin, label_smoothing, reduction, grad_scale, normalize, float(eps)
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


def _check_tail(y, bn_weight, bn_bias, residual, activation):
    if not isinstance(y, torch.Tensor) or y.dim() != 4:
        got = list(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
        raise ValueError(f"y: expected a tensor [B, C, H, W], got {got}")
    for name, t in (("bn_weight", bn_weight), ("bn_bias", bn_bias)):
        if t is not None and (t.shape != (y.shape[1],) or t.device != y.device or t.dtype not in FLOATS):
            expected = f"a floating-point tensor [{y.shape[1]}] on {y.device}"
            raise ValueError(f"{name}: expected {expected}, got {list(t.shape)} of {t.dtype} on {t.device}")
    if residual is not None and (residual.shape != y.shape or residual.dtype != y.dtype or residual.device != y.device):
        expected = f"{list(y.shape)} of {y.dtype} on {y.device} as y is"
        raise ValueError(
            f"residual: expected {expected}, got {list(residual.shape)} of {residual.dtype} on {residual.device}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if y.numel() == y.shape[1]:
        raise ValueError(f"y: expected more than one value per channel for batch statistics, got {list(y.shape)}")


def _loss_arguments(x, target, tau, margin, label_smoothing, reduction, grad_scale, normalize, eps):
    """target .. eps as the ops take them, checked."""
    _check_loss(target, x.shape[0], x.device, tau, margin, label_smoothing, reduction)
    if (normalize or "none") not in NORMALIZATIONS:
        raise ValueError(f"normalize: expected one of {', '.join(NORMALIZATIONS)} or None, got {normalize!r}")
    number, learned = (1.0, tau.detach()) if isinstance(tau, torch.Tensor) else (float(tau), None)
    return (
        target, number, learned, float(margin), float(label_smoothing), reduction, grad_scale, normalize or "none", eps
    )  # fmt: skip


def layer_norm(x, eps=1e-5, *, over="sample", channel_dim=1, impl="auto"):
    """Layer normalisation without affine: `over` "sample" (all but the batch dimension) or "channels" (at each position). As x."""
    x4 = _canonical_x(x, channel_dim)
    if over == "sample":
        return _restore(torch.ops.fastff.layer_norm(x4, eps, impl), x, channel_dim)
    if over == "channels":
        return _restore(over_channels(x4, eps), x, channel_dim)
    raise ValueError(f"over: expected 'sample' or 'channels', got {over!r}")


def group_goodness(x, groups=1, *, power=2, mean=True, positions=False, channel_dim=1, impl="auto"):
    """Goodness without weights, g [B, groups]: sum or mean of x^power over each group of channels and all positions. Differentiable twice.

    Args:
        groups: K, of neighbouring channels; where K does not divide them the first groups have one more.
        power: 2, or 1 for the activations themselves.
        mean: False for the sum.
        positions: g [B, P] instead, at each position over all channels (groups must be 1).

    Sources: Hinton 2022 (arXiv 2212.13345) one group; CwComp (arXiv 2312.12668) a group a class; DeeperForward (ICLR 2025) power 1."""
    x4, how = _canonical_groups(x, groups, power, mean, positions, channel_dim)
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
    _check_halves(len(g), "g")
    _check_reduction(reduction)
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
    x4, how = _canonical_groups(x, groups, power, mean, positions, channel_dim)
    x4 = x4.detach()
    how_to_learn = _group_loss_arguments(
        x, target, positions, loss, theta, alpha, tau, margin, label_smoothing, reduction, grad_scale, normalize, eps
    )
    step = torch.ops.fastff.group_goodness_step(x4, *how, *how_to_learn, need_grad_x, impl)
    return GroupGoodnessStep(
        step[0],
        step[1],
        _restore(step[2], x, channel_dim) if need_grad_x else None,
        None if normalize in (None, "none") else _restore(step[3], x, channel_dim),
    )


def group_tail_step(
    y, target=None, groups=1, *, bn_weight=None, bn_bias=None, bn_eps=1e-5, residual=None, need_grad_residual=True, activation="relu",
    power=2, mean=True, positions=False, loss="cross_entropy", theta=2.0, alpha=4.0, tau=1.0, margin=0.0, label_smoothing=0.0,
    reduction="mean", grad_scale=None, normalize="layer_norm", eps=1e-5, impl="auto",
):  # fmt: skip
    """The end of a block in one call: group_goodness_step on x = activation(batch_norm(y) + residual), and the gradients back to y.

    Args: y [B, C, H, W] .. activation as of tail_step, the rest as of group_goodness_step.

    Returns GroupTailStep, as TailStep without a head's parameters. Nothing is written to."""
    _check_tail(y, bn_weight, bn_bias, residual, activation)
    y, how = _canonical_groups(y, groups, power, mean, positions, 1)
    how_to_learn = _group_loss_arguments(
        y, target, positions, loss, theta, alpha, tau, margin, label_smoothing, reduction, grad_scale, normalize, eps
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


def _group_loss_arguments(
    x, target, positions, loss, theta, alpha, tau, margin, label_smoothing, reduction, grad_scale, normalize, eps
):
    """loss .. eps as the ops take them, checked."""
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
    if loss == "cross_entropy":
        if positions:
            raise ValueError(
                "positions: expected False for cross_entropy, which needs a column for each class, got True"
            )
        if target is None:
            raise ValueError("target: expected [B] int64 class labels for cross_entropy, got None")
        _check_loss(target, x.shape[0], x.device, float(tau), margin, label_smoothing, reduction)
    else:
        if target is not None:
            raise ValueError(f"target: expected None for {loss}, whose batch is two halves, got a tensor")
        _check_halves(x.shape[0], "x")
        _check_reduction(reduction)
    _check_normalization(normalize or "none")
    return (
        loss, float(alpha if loss in PAIRED else theta), target, float(tau), float(margin), float(label_smoothing), reduction, grad_scale,
        normalize or "none", float(eps),
    )  # fmt: skip


def normalize(x, how="l2", groups=1, eps=1e-5, *, channel_dim=1, impl="auto"):
    """x brought to length or variance 1, without affine; as x. Differentiable.

    how: "layer_norm", "l2" (x / (|x| + eps)) or "rms" over all of a sample, with "_channels" over C at each position; "group_norm" over each
    of `groups` groups of neighbouring channels."""
    x4, (groups, *_) = _canonical_groups(x, groups, 1, True, False, channel_dim)
    _check_normalization(how)
    if how == "none":
        return x
    return _restore(torch.ops.fastff.normalize(x4, how, groups, float(eps), impl), x, channel_dim)


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


def _canonical_groups(x, groups, power, mean, positions, channel_dim):
    """x as [B, C, H, W], and (groups, power, mean, positions), checked."""
    x4 = _canonical_x(x, channel_dim)
    if not isinstance(groups, int) or not 1 <= groups <= x4.shape[1]:
        raise ValueError(f"groups: expected 1 to {x4.shape[1]}, the channels of x, got {groups!r}")
    if power not in (1, 2):
        raise ValueError(f"power: expected 1 or 2, got {power!r}")
    if positions and groups != 1:
        raise ValueError(
            f"positions: expected groups=1, since each position is one group of all channels, got {groups}"
        )
    if 0 in x4.shape[1:]:
        raise ValueError(f"x: expected at least one channel and one position, got shape {list(x.shape)}")
    return x4, (groups, power, bool(mean), bool(positions))


def _check_halves(batch, name):
    if batch == 0 or batch % 2:
        raise ValueError(f"{name}: expected positive samples and as many negative ones, an even batch, got {batch}")


def _check_reduction(reduction):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")


def _check_normalization(how):
    if how not in reference.NORMALIZATIONS:
        raise ValueError(f"normalize: expected one of {', '.join(reference.NORMALIZATIONS)} or None, got {how!r}")


def _canonical_x(x, channel_dim):
    """x as a view [B, C, H, W]."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if not 2 <= x.dim() <= 4:
        raise ValueError(f"x: expected [B, C], [B, C, L], [B, C, H, W] or tokens, got shape {list(x.shape)}")
    if channel_dim in (-1, x.dim() - 1) and x.dim() > 2:
        return x.mT[:, :, None, :] if x.dim() == 3 else x.permute(0, 3, 1, 2)
    if channel_dim != 1 and x.dim() > 2:
        raise ValueError(f"channel_dim: expected 1 or -1, got {channel_dim}")
    if x.dim() == 2:
        return x[:, :, None, None]
    return x[:, :, None, :] if x.dim() == 3 else x


def _restore(y, x, channel_dim):
    """Undo _canonical_x: y [B, C, H, W] as a view of x's shape."""
    if x.dim() == 2:
        return y[:, :, 0, 0]
    if channel_dim in (-1, x.dim() - 1):
        return y[:, :, 0, :].mT if x.dim() == 3 else y.permute(0, 2, 3, 1)
    return y[:, :, 0, :] if x.dim() == 3 else y


def _canonical(x, weight, bias, grid_weight, padding, channel_dim, algorithm):
    x4 = _canonical_x(x, channel_dim)
    channels, device = x4.shape[1], x.device
    if weight is None and grid_weight is None:
        raise ValueError("weight: expected [K, C] or [K, C, k, k] unless grid_weight is given, got None for both")
    if weight is None and bias is not None:
        raise ValueError("bias: expected None without weight, since it is part of the squares")
    for name, t in (("weight", weight), ("bias", bias), ("grid_weight", grid_weight)):
        if t is None:
            continue
        if not isinstance(t, torch.Tensor) or t.dtype not in FLOATS:
            got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        if t.device != device:
            raise ValueError(f"{name}: expected on {device} as x is, got {t.device}")
    classes = (weight if weight is not None else grid_weight).shape[0]
    if weight is not None:
        if weight.dim() not in (2, 4) or weight.shape[1] != channels or weight.shape[0] == 0:
            expected = f"[K, {channels}] or [K, {channels}, k, k] with K >= 1"
            raise ValueError(f"weight: expected {expected} for x of {channels} channels, got {list(weight.shape)}")
        weight = weight[:, :, None, None] if weight.dim() == 2 else weight
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"bias: expected [{classes}], got {list(bias.shape)}")
    if grid_weight is not None and (grid_weight.dim() != 4 or grid_weight.shape[:2] != (classes, channels)):
        raise ValueError(f"grid_weight: expected [{classes}, {channels}, G, G], got {list(grid_weight.shape)}")
    padding = (padding, padding) if isinstance(padding, int) else tuple(padding)
    if len(padding) != 2 or min(padding) < 0:
        raise ValueError(f"padding: expected an int or a pair of at least 0, got {padding}")
    spatial = x4.shape[2:]
    if weight is not None and any(n + 2 * p < k for n, p, k in zip(spatial, padding, weight.shape[2:], strict=True)):
        raise ValueError(f"x: expected at least {list(weight.shape[2:])} positions for this head, got {list(x.shape)}")
    if channels == 0 or 0 in spatial:
        raise ValueError(f"x: expected at least one channel and one position, got shape {list(x.shape)}")
    if algorithm not in ("auto", "direct", "second_moment"):
        raise ValueError(f"algorithm: expected 'auto', 'direct' or 'second_moment', got {algorithm!r}")
    if algorithm == "second_moment" and weight is not None and tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(f"algorithm: second_moment needs kernel size 1, got {list(weight.shape[2:])}")
    return x4, weight, bias, grid_weight, padding


def _check_loss(target, batch, device, tau, margin, label_smoothing, reduction):
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        got = target.dtype if isinstance(target, torch.Tensor) else type(target).__name__
        raise TypeError(f"target: expected int64 class labels, got {got}")
    if target.shape != (batch,):
        raise ValueError(f"target: expected [{batch}], one label per sample, got {list(target.shape)}")
    if batch == 0:
        raise ValueError("x: expected at least one sample, since the loss of none is undefined, got an empty batch")
    if target.device != device:
        raise ValueError(f"target: expected on {device} as x is, got {target.device}")
    if isinstance(tau, torch.Tensor):
        if tau.dim() != 0:
            raise ValueError(f"tau: expected a number or a 0-dimensional tensor, got shape {list(tau.shape)}")
    elif not 0 < tau < float("inf"):
        raise ValueError(f"tau: expected a positive number, got {tau}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    if not abs(margin) < float("inf"):
        raise ValueError(f"margin: expected a finite number, got {margin}")
    _check_reduction(reduction)
