"""The stateless functions: goodness, goodness_loss, goodness_step, tail_step, layer_norm.

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

from fastff.kernels.composed.tail import ACTIVATIONS
from fastff.ops.goodness import NORMALIZATIONS, check_labels
from fastff.ops.layer_norm import over_channels

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
    if not isinstance(y, torch.Tensor) or y.dim() != 4:
        got = list(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
        raise ValueError(f"y: expected a tensor [B, C, H, W], got {got}")
    canonical = _canonical(y, weight, bias, grid_weight, padding, 1, algorithm)
    y, weight4, bias, grid_weight, padding = (t.detach() if isinstance(t, torch.Tensor) else t for t in canonical)
    loss_arguments = _loss_arguments(
        y, target, tau, margin, label_smoothing, reduction, grad_scale, normalize, float(eps)
    )
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
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
