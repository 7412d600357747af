"""The stateless functions: goodness, goodness_loss, goodness_step, tail_step, layer_norm; without weights: group_goodness,
group_goodness_step, group_tail_step, forward_forward_loss, normalize, overlay_label.

Common arguments

    x            [B, C, H, W], [B, C, L] or [B, C]; with channel_dim=-1 tokens [B, N, C] or [B, H, W, C]. float32, float64, bfloat16
                 or float16, any strides
    weight       [K, C], or [K, C, k, k] for a k x k head; None turns the squares off (then grid_weight is needed)
    bias         [K] or None
    grid_weight  [K, C, G, G] or None: the spatial term over a G x G grid of cells (tokens and [B, C, L] are one row of cells)
    hidden       Hidden(weight [M, C], bn_weight, bn_bias, eps, mean, var) or None: a hidden layer between the means over cells and
                 grid_weight, which is [K, M, G, G] then: relu(batch_norm(weight m)). mean, var [M] are the statistics of batch norm, or
                 None for those of this batch, over its samples and cells
    target       [B] int64, classes 0..K-1. On a CPU a label out of range raises; on a GPU, where looking would make the host
                 wait, it makes that sample's loss NaN
    padding      zeros around x before a k x k head, an int or a pair
    tau          the factor of goodness in cross-entropy, a positive number or, if it is learned, a 0-dimensional tensor
    margin       lowers tau * goodness of the target's class
    label_smoothing  the share of the one-hot target that is spread over all classes, in [0, 1)
    reduction    "mean", "sum" or "none" (a loss [B], or [B/2] for losses of pairs); gradients for "none" are those of the sum
    grad_scale   a tensor of one element that multiplies all gradients (loss scaling, accumulation), or None for 1
    normalize    what the next block's input is: a name of fastff.functional.normalize, or None for no such result
    eps          is added to the variance, or to the length, of the normalization
    impl         "auto", or the name of an implementation ("native", "torch", "reference"; `fastff info` lists them): it runs or raises
    algorithm    "auto", "direct" or "second_moment": two exact ways to compute the same (1 x 1 heads only)

Formulas and sources: fastff/reference.py. 16-bit inputs are accumulated in float32; goodness and loss are float32 (float64 for float64).
All raise TypeError or ValueError that names the argument, what was expected and what it got, and RuntimeError for an implementation that cannot
run. Nothing that is passed in is written to.
"""

import math

import torch

from fastff import arguments, ops, reference, spec
from fastff.arguments import described, number_between, whole_number
from fastff.ops.table import check_impl
from fastff.spec import Epilogue, Groups, Hidden, Loss, Normalization, Projection, Step, StepResult  # noqa: F401  Hidden: for users

GoodnessStep = GroupGoodnessStep = TailStep = GroupTailStep = StepResult


def goodness(
    x, weight, bias=None, *, grid_weight=None, hidden=None, padding=0, channel_dim=1, impl="auto", algorithm="auto"
):
    """Compute g [B, K], differentiable twice: g[b,k] = mean over positions p of (sum_c weight[k,c] x[b,c,p] + bias[k])^2, plus the spatial term.

    Arguments are those at the head of this file. Source: Krutsylo 2025, arXiv 2501.03176; the spatial term is this project's."""
    x = arguments.canonical_x(x, channel_dim)
    head = Projection.checked(x, weight, bias, grid_weight, padding, algorithm, hidden=hidden)
    return ops.goodness.differentiable(x, head, impl, algorithm)[0]


def goodness_loss(
    x, weight, bias, target, *, grid_weight=None, hidden=None, padding=0, tau=1.0, margin=0.0, label_smoothing=0.0, reduction="mean",
    channel_dim=1, impl="auto", algorithm="auto",
):  # fmt: skip
    """Compute the margin cross-entropy over tau * goodness, differentiable with respect to x, weight, bias, grid_weight, hidden and tau.

    loss_b = logsumexp_k(u) - u[target_b] with u = tau * g and u[target_b] lowered by `margin`; [] or, for reduction "none", [B]."""
    options = {"channel_dim": channel_dim, "impl": impl, "algorithm": algorithm}
    g = goodness(x, weight, bias, grid_weight=grid_weight, hidden=hidden, padding=padding, **options)
    return margin_cross_entropy(g, target, tau, margin, label_smoothing, reduction)


def margin_cross_entropy(g, target, tau=1.0, margin=0.0, label_smoothing=0.0, reduction="mean"):
    """Compute the loss of `goodness_loss` from goodness g [B, K] already computed: [] or, for reduction "none", [B]. Differentiable."""
    arguments.check_goodness(g)
    options = {"margin": margin, "label_smoothing": label_smoothing, "reduction": reduction}
    return loss_of(g, Loss.checked(g, target, called="g", tau=tau, **options))


def loss_of(g, loss):
    """Compute the loss that a fastff.spec.Loss describes from goodness g [B, K]: [], or for reduction "none" one for each sample or pair.

    Differentiable with respect to g and a learned tau."""
    arguments.check_goodness(g)
    loss.check(g, called="g")
    if loss.target is not None and not torch.compiler.is_compiling():
        arguments.check_labels(loss.target, g.shape[1])
    return reference.reduced(reference.losses(g, loss), loss.reduction)


def goodness_step(
    x, weight, bias, target, *, grid_weight=None, hidden=None, padding=0, tau=1.0, margin=0.0, label_smoothing=0.0, reduction="mean",
    grad_scale=None, normalize="layer_norm", eps=1e-5, channel_dim=1, need_grad_x=True, impl="auto", algorithm="auto",
):  # fmt: skip
    """Run the local training step on a block's output: loss, goodness, every gradient and the next block's input, outside autograd.

    Arguments are those at the head of this file, and need_grad_x: False where nothing before the head learns. "group_norm" has a group
    for each class.

    Returns a StepResult with loss [] or [B], goodness [B, K], grad_x and normalized as x, grad_weight, grad_bias and grad_grid_weight as their
    parameters, and grad_tau [] if tau is a tensor; with `hidden` its gradients and statistics (StepResult); None for what is absent."""
    x4 = arguments.canonical_x(x, channel_dim)
    head = Projection.checked(x4, weight, bias, grid_weight, padding, algorithm, hidden=hidden)
    loss = Loss.checked(
        x4, target, tau=tau, margin=margin, label_smoothing=label_smoothing, reduction=reduction, grad_scale=grad_scale
    )
    arguments.check_flags(need_grad_x=need_grad_x)
    normalization = Normalization.checked(normalize, x4.shape[1], head.classes, eps)
    result = ops.step.run(Step(x4, None, head, loss, normalization, need_grad_x, algorithm), impl)
    return _as_given(result, x, channel_dim, weight)


def tail_step(
    y, weight, bias, target, *, bn_weight=None, bn_bias=None, bn_eps=1e-5, residual=None, need_grad_residual=True, activation="relu",
    grid_weight=None, hidden=None, padding=0, tau=1.0, margin=0.0, label_smoothing=0.0, reduction="mean", grad_scale=None,
    normalize="layer_norm", eps=1e-5, impl="auto", algorithm="auto",
):  # fmt: skip
    """Run the end of a block in one call: `goodness_step` on x = activation(batch_norm(y) + residual), and the gradients back to y.

    Arguments beyond those of `goodness_step`:
        y: [B, C, H, W], the output of the block's last convolution.
        bn_weight, bn_bias: [C] or None, of batch norm; bn_eps is added to the variance. The statistics are those of this batch.
        residual: as y (shape, dtype), or None.
        need_grad_residual: False where the residual needs no gradient.
        activation: "none", "relu", "relu6", "hardswish", "silu" or "gelu".

    Returns a StepResult as `goodness_step` does, with grad_y for grad_x; grad_residual as y; grad_bn_weight and grad_bn_bias [C]; mean and var [C],
    the batch's biased statistics in float32 (for the running ones). Source: Ioffe and Szegedy 2015, arXiv 1502.03167."""
    epilogue = Epilogue(bn_weight, bn_bias, bn_eps, residual, need_grad_residual, activation)
    epilogue.check(y)
    y = arguments.canonical_x(y, 1, "y")
    head = Projection.checked(y, weight, bias, grid_weight, padding, algorithm, "y", hidden)
    loss = Loss.checked(
        y, target, called="y", tau=tau, margin=margin, label_smoothing=label_smoothing, reduction=reduction, grad_scale=grad_scale
    )  # fmt: skip
    normalization = Normalization.checked(normalize, y.shape[1], head.classes, eps)
    result = ops.step.run(Step(y, epilogue, head, loss, normalization, True, algorithm), impl)
    return _as_given(result, y, 1, weight)


def _as_given(result, x, channel_dim, weight=None):
    """Return a result whose tensors have the shapes of what a public function was given."""
    if x.dim() == 4 and channel_dim == 1 and (weight is None or weight.dim() == 4):
        return result
    grad_weight = None if weight is None else result.grad_weight.view(weight.shape)
    grad_x, normalized = (arguments.restore(t, x, channel_dim) for t in (result.grad_x, result.normalized))
    return result._replace(grad_x=grad_x, normalized=normalized, grad_weight=grad_weight)


def epilogue(y, *, bn_weight=None, bn_bias=None, bn_eps=1e-5, residual=None, activation="relu", impl="auto"):
    """Compute the end of a block in one pass each way: x = activation(batch_norm(y) + residual), with the statistics of this batch.

    Arguments are those of `tail_step`. Returns (x, mean, var): x as y, mean and biased variance [C] in float32 (float64 for float64), for the
    running ones. Differentiable once with respect to y, bn_weight, bn_bias and residual; only y and the residual are kept for that."""
    made = Epilogue(bn_weight, bn_bias, bn_eps, residual, False, activation)
    made.check(y)
    made = made._replace(need_grad_residual=residual is not None and residual.requires_grad)
    check_impl(impl)
    return torch.ops.fastff.epilogue(y, *made, impl)


def layer_norm(x, eps=1e-5, *, over="sample", channel_dim=1, impl="auto"):
    """Normalize x to mean 0 and variance 1 without affine: `over` "sample" (all but the batch dimension) or "channels" (at each position).

    eps is added to the variance. Returns a tensor as x; differentiable. Source: Ba et al. 2016, arXiv 1607.06450."""
    if over not in ("sample", "channels"):
        raise ValueError(f"over: expected 'sample' or 'channels', got {over!r}")
    how = "layer_norm" if over == "sample" else "layer_norm_channels"
    return normalize(x, how, eps=eps, channel_dim=channel_dim, impl=impl)


def group_goodness(x, groups=1, *, power=2, mean=True, positions=False, channel_dim=1, impl="auto"):
    """Compute goodness without weights, g [B, groups]: the sum or mean of x^power over each group of channels and all positions.

    Differentiable twice. Arguments beyond the common ones:
        groups: K, of neighbouring channels; where K does not divide them the first groups have one more.
        power: 2, or 1 for the activations themselves.
        mean: False for the sum.
        positions: True for g [B, P] at each position over all channels instead (groups must be 1).

    Sources: Hinton 2022 (arXiv 2212.13345) one group; CwComp (arXiv 2312.12668) a group a class; DeeperForward (ICLR 2025) power 1."""
    x = arguments.canonical_x(x, channel_dim)
    check_impl(impl)
    return ops.group_goodness.goodness(x, *Groups.checked(x, groups, power, mean, positions), impl)


def forward_forward_loss(g, loss="softplus", *, theta=2.0, alpha=4.0, reduction="mean"):
    """Compute the loss of goodness g [2n, J] of a batch whose first half is positive and second half negative; differentiable.

    Args:
        loss: "softplus": softplus(theta - g) of positive and softplus(g - theta) of negative samples (Hinton 2022); "swish": z sigmoid(z) instead
            of softplus; "symba": softplus(-alpha (g_positive - g_negative)) (arXiv 2303.08418); "swish_symba".
        theta, alpha: the threshold, or a pair of those of positive and of negative samples, and the factor of differences.
        reduction: "mean", "sum" or "none" ([2n], or [n] for losses of differences). The J values of a sample are averaged."""
    arguments.check_member("loss", loss, spec.LOSSES[1:])
    return loss_of(g, Loss(loss, alpha=alpha, reduction=reduction, **spec.with_thresholds({"theta": theta})))


def group_goodness_step(
    x, target=None, groups=1, *, power=2, mean=True, positions=False, loss="cross_entropy", theta=2.0, alpha=4.0, tau=1.0, margin=0.0,
    label_smoothing=0.0, reduction="mean", grad_scale=None, normalize="layer_norm", eps=1e-5, channel_dim=1, need_grad_x=True, impl="auto",
):  # fmt: skip
    """Run the local training step of a layer whose goodness has no weights: loss, goodness, dL/dx and the next layer's input, outside autograd.

    Arguments beyond those of `group_goodness` and those at the head of this file:
        target: [B] int64 for "cross_entropy" over tau * g; None for the losses of `forward_forward_loss`, whose batch is two halves.
        loss, theta, alpha: as in `forward_forward_loss`, or "cross_entropy", whose tau is a number here.
        need_grad_x: False where nothing before this layer learns.

    Returns a StepResult with loss, goodness [B, K] or [B, P], grad_x and normalized as x; None for what is absent."""
    x4 = arguments.canonical_x(x, channel_dim)
    tau = number_between("tau", tau, 0, math.inf, low_allowed=False)
    head = Groups.checked(x4, groups, power, mean, positions)
    wanted = Loss.checked(
        x4, target, positions, name=loss, theta=theta, alpha=alpha, tau=tau, margin=margin, label_smoothing=label_smoothing,
        reduction=reduction, grad_scale=grad_scale,
    )  # fmt: skip
    arguments.check_flags(need_grad_x=need_grad_x)
    step = Step(x4, None, head, wanted, Normalization.checked(normalize, x4.shape[1], groups, eps), need_grad_x)
    return _as_given(ops.step.run(step, impl), x, channel_dim)


def group_tail_step(
    y, target=None, groups=1, *, bn_weight=None, bn_bias=None, bn_eps=1e-5, residual=None, need_grad_residual=True, activation="relu",
    power=2, mean=True, positions=False, loss="cross_entropy", theta=2.0, alpha=4.0, tau=1.0, margin=0.0, label_smoothing=0.0,
    reduction="mean", grad_scale=None, normalize="layer_norm", eps=1e-5, impl="auto",
):  # fmt: skip
    """Run the end of a block in one call: `group_goodness_step` on x = activation(batch_norm(y) + residual), and the gradients back to y.

    y [B, C, H, W] to activation are arguments of `tail_step`, the others of `group_goodness_step`. Returns a StepResult as `tail_step` does,
    without the gradients of a head."""
    epilogue = Epilogue(bn_weight, bn_bias, bn_eps, residual, need_grad_residual, activation)
    epilogue.check(y)
    y = arguments.canonical_x(y, 1, "y")
    tau = number_between("tau", tau, 0, math.inf, low_allowed=False)
    head = Groups.checked(y, groups, power, mean, positions, "y")
    wanted = Loss.checked(
        y, target, positions, "y", name=loss, theta=theta, alpha=alpha, tau=tau, margin=margin, label_smoothing=label_smoothing,
        reduction=reduction, grad_scale=grad_scale,
    )  # fmt: skip
    normalization = Normalization.checked(normalize, y.shape[1], groups, eps)
    return ops.step.run(Step(y, epilogue, head, wanted, normalization), impl)


def normalize(x, how="l2", groups=1, eps=1e-5, *, channel_dim=1, impl="auto"):
    """Normalize x to length or variance 1, without affine. Returns a tensor as x; differentiable.

    Args:
        how: "layer_norm", "l2" (x / (|x| + eps); what is all zero stays zero and gets no gradient) or "rms" over all of a sample, with
            "_channels" over C at each position; "group_norm" over each of `groups` groups of neighbouring channels; "none" gives x itself.
        eps: is added to the variance, or to the length."""
    if isinstance(x, torch.Tensor) and channel_dim == 1:
        y = ops.group_goodness.quick(x, how, groups, eps, impl)
        if y is not None:
            return y
    x4 = arguments.canonical_x(x, channel_dim)
    if type(groups) is not int or groups != 1:
        Groups(groups).check(x4)
    normalization = Normalization.checked(how, x4.shape[1], groups, eps, called="how")
    check_impl(impl)
    if normalization.name == "none":
        return x
    if x.dim() == 2:
        return ops.group_goodness.normalize(x, *normalization, impl)
    return arguments.restore(ops.group_goodness.normalize(x4, *normalization, impl), x, channel_dim)


def overlay_label(x, label, num_classes, value=None):
    """Return a copy of x [B, ...] whose first num_classes elements of each sample are the one-hot label, times `value`.

    label is [B] int64; value is x's maximum if None. Nothing waits for x's device. Source: Hinton 2022, arXiv 2212.13345."""
    if not isinstance(x, torch.Tensor) or x.dtype not in spec.DTYPES or x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: expected a floating-point tensor [B, ...] with elements, got {described(x)}")
    if not isinstance(label, torch.Tensor) or label.dtype != torch.int64 or label.shape != x.shape[:1]:
        raise ValueError(f"label: expected int64 [{len(x)}], one for each sample of x, got {described(label)}")
    if whole_number("num_classes", num_classes) > x[0].numel():
        raise ValueError(f"num_classes: expected 1 to {x[0].numel()}, the elements of a sample, got {num_classes}")
    arguments.check_labels(label, num_classes)
    if value is not None and (not isinstance(value, torch.Tensor) or value.dim() > 0):
        value = number_between("value", value, -math.inf, math.inf, low_allowed=False)
    out = x.flatten(1).clone()
    out[:, :num_classes] = (label[:, None] == torch.arange(num_classes, device=x.device)) * (
        x.max() if value is None else value
    )
    return out.view(x.shape)
