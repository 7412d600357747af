"""What the public functions are handed, checked and brought into the shapes that the ops take.

All raise TypeError or ValueError naming the argument, what was expected and what came."""

import torch

from fastff import reference
from fastff.kernels.composed.tail import ACTIVATIONS
from fastff.ops.goodness import NORMALIZATIONS
from fastff.reference import LOSSES, PAIRED

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def canonical_x(x, channel_dim, name="x"):
    """x as a view [B, C, H, W]."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if not 2 <= x.dim() <= 4:
        raise ValueError(f"{name}: expected [B, C], [B, C, L], [B, C, H, W] or tokens, got shape {list(x.shape)}")
    if channel_dim in (-1, x.dim() - 1) and x.dim() > 2:
        return x.mT[:, :, None, :] if x.dim() == 3 else x.permute(0, 3, 1, 2)
    if channel_dim != 1 and x.dim() > 2:
        raise ValueError(f"channel_dim: expected 1 or -1, got {channel_dim}")
    if x.dim() == 2:
        return x[:, :, None, None]
    return x[:, :, None, :] if x.dim() == 3 else x


def restore(y, x, channel_dim):
    """Undo canonical_x: y [B, C, H, W] as a view of x's shape."""
    if x.dim() == 2:
        return y[:, :, 0, 0]
    if channel_dim in (-1, x.dim() - 1):
        return y[:, :, 0, :].mT if x.dim() == 3 else y.permute(0, 2, 3, 1)
    return y[:, :, 0, :] if x.dim() == 3 else y


def canonical(x, weight, bias, grid_weight, padding, channel_dim, algorithm, name="x"):
    x4 = canonical_x(x, channel_dim, name)
    channels, device = x4.shape[1], x.device
    if weight is None and grid_weight is None:
        raise ValueError("weight: expected [K, C] or [K, C, k, k] unless grid_weight is given, got None for both")
    if weight is None and bias is not None:
        raise ValueError("bias: expected None without weight, since it is part of the squares")
    for what, t in (("weight", weight), ("bias", bias), ("grid_weight", grid_weight)):
        if t is None:
            continue
        if not isinstance(t, torch.Tensor) or t.dtype not in FLOATS:
            got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
            raise TypeError(f"{what}: expected a floating-point tensor, got {got}")
        if t.device != device:
            raise ValueError(f"{what}: expected on {device} as {name} is, got {t.device}")
    classes = (weight if weight is not None else grid_weight).shape[0]
    if weight is not None:
        if weight.dim() not in (2, 4) or weight.shape[1] != channels or weight.shape[0] == 0:
            expected = f"[K, {channels}] or [K, {channels}, k, k] with K >= 1"
            raise ValueError(f"weight: expected {expected} for {name} of {channels} channels, got {list(weight.shape)}")
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
        raise ValueError(
            f"{name}: expected at least {list(weight.shape[2:])} positions for this head, got {list(x.shape)}"
        )
    if channels == 0 or 0 in spatial:
        raise ValueError(f"{name}: expected at least one channel and one position, got shape {list(x.shape)}")
    if algorithm not in ("auto", "direct", "second_moment"):
        raise ValueError(f"algorithm: expected 'auto', 'direct' or 'second_moment', got {algorithm!r}")
    if algorithm == "second_moment" and weight is not None and tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(f"algorithm: second_moment needs kernel size 1, got {list(weight.shape[2:])}")
    return x4, weight, bias, grid_weight, padding


def canonical_groups(x, groups, power, mean, positions, channel_dim, name="x"):
    """x as [B, C, H, W], and (groups, power, mean, positions), checked."""
    x4 = canonical_x(x, channel_dim, name)
    if not isinstance(groups, int) or not 1 <= groups <= x4.shape[1]:
        raise ValueError(f"groups: expected 1 to {x4.shape[1]}, the channels of {name}, got {groups!r}")
    if power not in (1, 2):
        raise ValueError(f"power: expected 1 or 2, got {power!r}")
    if positions and groups != 1:
        raise ValueError(
            f"positions: expected groups=1, since each position is one group of all channels, got {groups}"
        )
    if 0 in x4.shape[1:]:
        raise ValueError(f"{name}: expected at least one channel and one position, got shape {list(x.shape)}")
    return x4, (groups, power, bool(mean), bool(positions))


def check_tail(y, bn_weight, bn_bias, residual, activation):
    if not isinstance(y, torch.Tensor) or y.dim() != 4:
        got = list(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
        raise ValueError(f"y: expected a tensor [B, C, H, W], got {got}")
    for name, t in (("bn_weight", bn_weight), ("bn_bias", bn_bias)):
        if t is not None and (t.shape != (y.shape[1],) or t.device != y.device or t.dtype not in FLOATS):
            expected = f"a floating-point tensor [{y.shape[1]}] on {y.device}"
            raise ValueError(f"{name}: expected {expected}, got {list(t.shape)} of {t.dtype} on {t.device}")
    if residual is not None and not isinstance(residual, torch.Tensor):
        raise TypeError(f"residual: expected a tensor as y or None, got {type(residual).__name__}")
    if residual is not None and (residual.shape != y.shape or residual.dtype != y.dtype or residual.device != y.device):
        expected = f"{list(y.shape)} of {y.dtype} on {y.device} as y is"
        raise ValueError(
            f"residual: expected {expected}, got {list(residual.shape)} of {residual.dtype} on {residual.device}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if y.numel() == y.shape[1]:
        raise ValueError(f"y: expected more than one value per channel for batch statistics, got {list(y.shape)}")


def check_loss(target, batch, device, tau, margin, label_smoothing, reduction, name="x"):
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        got = target.dtype if isinstance(target, torch.Tensor) else type(target).__name__
        raise TypeError(f"target: expected int64 class labels, got {got}")
    if target.shape != (batch,):
        raise ValueError(f"target: expected [{batch}], one label per sample, got {list(target.shape)}")
    if batch == 0:
        raise ValueError(
            f"{name}: expected at least one sample, since the loss of none is undefined, got an empty batch"
        )
    if target.device != device:
        raise ValueError(f"target: expected on {device} as {name} is, got {target.device}")
    if isinstance(tau, torch.Tensor):
        if tau.dim() != 0:
            raise ValueError(f"tau: expected a number or a 0-dimensional tensor, got shape {list(tau.shape)}")
    elif not 0 < tau < float("inf"):
        raise ValueError(f"tau: expected a positive number, got {tau}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    if not abs(margin) < float("inf"):
        raise ValueError(f"margin: expected a finite number, got {margin}")
    check_reduction(reduction)


def check_halves(batch, name):
    if batch == 0 or batch % 2:
        raise ValueError(f"{name}: expected positive samples and as many negative ones, an even batch, got {batch}")


def check_scale(grad_scale):
    if grad_scale is not None and (not isinstance(grad_scale, torch.Tensor) or grad_scale.numel() != 1):
        got = list(grad_scale.shape) if isinstance(grad_scale, torch.Tensor) else type(grad_scale).__name__
        raise TypeError(f"grad_scale: expected a tensor of one element or None, got {got}")


def check_reduction(reduction):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")


def check_normalization(how):
    if how not in reference.NORMALIZATIONS:
        raise ValueError(f"normalize: expected one of {', '.join(reference.NORMALIZATIONS)} or None, got {how!r}")


def loss_arguments(x, target, tau, margin, label_smoothing, reduction, grad_scale, normalize, eps, name="x"):
    """target .. eps as the ops take them, checked."""
    check_scale(grad_scale)
    check_loss(target, x.shape[0], x.device, tau, margin, label_smoothing, reduction, name)
    if (normalize or "none") not in NORMALIZATIONS:
        raise ValueError(f"normalize: expected one of {', '.join(NORMALIZATIONS)} or None, got {normalize!r}")
    number, learned = (1.0, tau.detach()) if isinstance(tau, torch.Tensor) else (float(tau), None)
    return (
        target, number, learned, float(margin), float(label_smoothing), reduction, grad_scale, normalize or "none", eps
    )  # fmt: skip


def group_loss_arguments(
    x, target, positions, loss, theta, alpha, tau, margin, label_smoothing, reduction, grad_scale, normalize, eps, name="x",
):  # fmt: skip
    """loss .. eps as the ops take them, checked."""
    check_scale(grad_scale)
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
    if loss == "cross_entropy":
        if positions:
            raise ValueError(
                "positions: expected False for cross_entropy, which needs a column for each class, got True"
            )
        if target is None:
            raise ValueError("target: expected [B] int64 class labels for cross_entropy, got None")
        check_loss(target, x.shape[0], x.device, float(tau), margin, label_smoothing, reduction, name)
    else:
        if target is not None:
            raise ValueError(f"target: expected None for {loss}, whose batch is two halves, got a tensor")
        check_halves(x.shape[0], name)
        check_reduction(reduction)
    check_normalization(normalize or "none")
    return (
        loss, float(alpha if loss in PAIRED else theta), target, float(tau), float(margin), float(label_smoothing), reduction, grad_scale,
        normalize or "none", float(eps),
    )  # fmt: skip
