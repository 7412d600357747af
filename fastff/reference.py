"""Every op of fastff, and a training step, in a few lines of plain PyTorch: the definition that all kernels and the Trainer are tested against.

Source: A. Krutsylo, "Scalable Forward-Forward Algorithm", arXiv 2501.03176 (2025); the spatial term and the second-moment
algorithm are this project's. Shapes here are canonical: x [B, C, H, W] with P positions of the head's output, weight [K, C, k, k],
bias [K], grid_weight [K, C, G, G], target [B] (int64). Nothing is tiled, nothing is saved: read it, test against it in float64.

    a[b,k,p] = sum_c W[k,c] x[b,c,p] + beta[k]                                   the head, a convolution
    g[b,k]   = (1/P) sum_p a[b,k,p]^2 + sum_cell V[k,cell] . mean_cell(x_b)      goodness (or V . relu(batch_norm(U mean_cell(x_b))))
    u        = tau * g, lowered by the margin m at the target
    loss_b   = logsumexp_k(u[b,k]) - sum_k q[b,k] u[b,k]                         q: one-hot target, smoothed
    d[b,k]   = dL/dg[b,k] = tau * (softmax_k(u)[b,k] - q[b,k]) * r               r: 1/B for the mean, times grad_scale
"""

import torch
import torch.nn.functional as F

from fastff.spec import PAIRED_LOSSES


def columns(x, weight, padding=(0, 0)):
    """Im2col: [B, C, H, W] -> [B, C*k*k, P]. A k x k head is the 1 x 1 head on these columns."""
    return F.unfold(x, weight.shape[2:], padding=padding)


def cell_means(x, grid_weight):
    """Means of x over a grid of cells, [B, C, h, w]: edges of adaptive average pooling, at most one cell a position."""
    return F.adaptive_avg_pool2d(x, [min(n, g) for n, g in zip(x.shape[2:], grid_weight.shape[2:], strict=True)])


def hidden_layer(means, weight, bn_weight=None, bn_bias=None, eps=1e-5, mean=None, var=None):
    """A spec.Hidden on the means over cells: a [B, M, h, w], what batch norm is applied to, what ReLU is applied to, mean and var [M]."""
    z = torch.einsum("mc,bchw->bmhw", weight, means)
    a, h, mean, var = epilogue(z, bn_weight, bn_bias, eps, statistics=None if mean is None else (mean, var))
    return a, z, h, mean, var


def spatial(means, grid_weight, hidden=None):
    """The spatial term of g [B, K] from the means over cells [B, C, h, w], and the mean and var [M] of a hidden layer's batch norm, or None."""
    a, _, _, mean, var = (means, *[None] * 4) if hidden is None else hidden_layer(means, *hidden)
    return a.flatten(1) @ grid_weight[..., : means.shape[2], : means.shape[3]].flatten(1).T, mean, var


def goodness(x, weight=None, bias=None, grid_weight=None, padding=(0, 0), hidden=None):
    """g [B, K]: mean of squares of the head's outputs, plus the spatial term."""
    g = 0
    if weight is not None:
        g = F.conv2d(x, weight, bias, padding=padding).square().mean((2, 3))
    if grid_weight is not None:
        g = g + spatial(cell_means(x, grid_weight), grid_weight, hidden)[0]
    return g


def target_weights(target, num_classes, label_smoothing=0.0, dtype=torch.float64):
    """q [B, K]: 1 at the target, smoothed towards 1/K."""
    one_hot = (target[:, None] == torch.arange(num_classes, device=target.device)).to(dtype)
    return one_hot * (1 - label_smoothing) + label_smoothing / num_classes


def margin_cross_entropy(g, target, tau=1.0, margin=0.0, label_smoothing=0.0):
    """loss [B]: cross-entropy over tau * g with the target's entry lowered by the margin. NaN or infinite for a label out of range."""
    hit = target_weights(target, g.shape[1], dtype=g.dtype)
    u = tau * g - margin * hit
    return (u.logsumexp(1) - (target_weights(target, g.shape[1], label_smoothing, g.dtype) * u).sum(1)) / hit.sum(1)


def reduced(losses, reduction):
    """Per-sample losses as their "mean" or "sum", or as they are ("none")."""
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def goodness_gradient(g, target, tau=1.0, margin=0.0, label_smoothing=0.0, scale=1.0):
    """d [B, K] = d(sum_b scale * loss_b)/dg, and d(...)/dtau."""
    u = tau * g - margin * target_weights(target, g.shape[1], dtype=g.dtype)
    d = (u.softmax(1) - target_weights(target, g.shape[1], label_smoothing, g.dtype)) * scale
    return tau * d, (d * g).sum()


def gradients_direct(d, x, weight, bias=None, padding=(0, 0)):
    """Gradients of sum(d * g) for the squares, from a itself: dL/dx = (2/P) W^T (d * a), dL/dW = (2/P) sum_b (d * a) X^T."""
    X, W = columns(x, weight, padding), weight.flatten(1)
    a = W @ X + (0 if bias is None else bias[:, None])
    e = (2 / X.shape[2]) * d[:, :, None] * a
    grad_x = F.fold(W.T @ e, x.shape[2:], weight.shape[2:], padding=padding)
    return grad_x, (e @ X.mT).sum(0).view_as(weight), e.sum((0, 2))


def gradients_second_moment(d, x, weight, bias=None, padding=(0, 0)):
    """The same without a: S_b = X X^T / P, mu_b = mean_p x; dL/dx = (2/P)(M_b X + c_b), M_b = W^T diag(d_b) W, c_b = W^T (d_b * beta)."""
    X, W = columns(x, weight, padding), weight.flatten(1)
    beta = weight.new_zeros(len(W)) if bias is None else bias
    S, mu = X @ X.mT / X.shape[2], X.mean(2)
    M, c = (W.T * d[:, None, :]) @ W, (d * beta) @ W
    grad_x = F.fold((2 / X.shape[2]) * (M @ X + c[:, :, None]), x.shape[2:], weight.shape[2:], padding=padding)
    t = W @ S + beta[:, None] * mu[:, None, :]
    return grad_x, 2 * (d[:, :, None] * t).sum(0).view_as(weight), 2 * (d * (mu @ W.T + beta)).sum(0)


def goodness_second_moment(x, weight, bias=None, padding=(0, 0)):
    """The squares' part of g from S_b and mu_b: w^T S w + 2 beta (w . mu) + beta^2."""
    X, W = columns(x, weight, padding), weight.flatten(1)
    beta = weight.new_zeros(len(W)) if bias is None else bias
    S, mu = X @ X.mT / X.shape[2], X.mean(2)
    return torch.einsum("kc,bcd,kd->bk", W, S, W) + 2 * beta * (mu @ W.T) + beta**2


def spatial_gradients(d, means, grid_weight, hidden=None):
    """Gradients of sum(d * g) for the spatial term: of means, of grid_weight (dV = d^T means), and of a hidden layer's weight, bn_weight, bn_bias."""
    h, w = means.shape[2:]
    a, z, before, mean, var = (means, *[None] * 4) if hidden is None else hidden_layer(means, *hidden)
    grad_grid = torch.zeros_like(grid_weight, memory_format=torch.contiguous_format)
    grad_grid[..., :h, :w] = (d.T @ a.flatten(1)).view(-1, *a.shape[1:])
    grad = (d @ grid_weight[..., :h, :w].flatten(1)).view(a.shape)
    if hidden is None:
        return grad, grad_grid
    constant = hidden.mean is not None
    grad, _, *of_norm = epilogue_gradients(grad, z, before, mean, var, hidden.bn_weight, hidden.eps, constant=constant)
    of_weight = torch.einsum("bmhw,bchw->mc", grad, means)
    return torch.einsum("mc,bmhw->bchw", hidden.weight, grad), grad_grid, of_weight, *of_norm


def gradients_grid(d, x, grid_weight, hidden=None):
    """Those of `spatial_gradients` with dL/dx for that of means: one constant vector per cell (spread by the pooling's adjoint)."""
    cells, *grads = spatial_gradients(d, cell_means(x, grid_weight), grid_weight, hidden)
    return torch.ops.aten._adaptive_avg_pool2d_backward(cells, x), *grads


ACTIVATIONS = {
    "none": (lambda h: h, torch.ones_like),
    "relu": (F.relu, lambda h: (h > 0).to(h.dtype)),
    "relu6": (F.relu6, lambda h: ((h > 0) & (h < 6)).to(h.dtype)),
    "hardswish": (F.hardswish, lambda h: (h / 3 + 0.5).where(h > -3, 0).where(h < 3, 1)),
    "silu": (F.silu, lambda h: h.sigmoid() * (1 + h * (1 - h.sigmoid()))),
    "gelu": (F.gelu, lambda h: (1 + (h / 2**0.5).erf()) / 2 + h * (-h.square() / 2).exp() / (2 * torch.pi) ** 0.5),
}
"""{name of spec.ACTIVATIONS: (the activation, its derivative)}"""


def channels(v):
    """Return a vector [C] as it broadcasts against [B, C, H, W]."""
    return v[:, None, None]


def epilogue(y, weight=None, bias=None, eps=1e-5, residual=None, activation="relu", statistics=None):
    """The end of a block: x = activation(h), h = batch_norm(y) + residual, with the batch's mean [C] and biased variance [C].

    statistics: (mean, var) where they are known already."""
    mean, var = statistics or torch.var_mean(y, (0, 2, 3), correction=0)[::-1]
    h = (y - channels(mean)) * channels((var + eps).rsqrt())
    h = h if weight is None else h * channels(weight)
    h = h if bias is None else h + channels(bias)
    h = h if residual is None else h + residual
    return ACTIVATIONS[activation][0](h), h, mean, var


def epilogue_gradients(grad_x, y, h, mean, var, weight=None, eps=1e-5, activation="relu", added=None, constant=False):
    """From dL/dx: dL/dy, dL/dh (which is that of the residual), and the two sums that are dL/dweight and dL/dbias (Ioffe and Szegedy 2015).

    added: dL/dh, dL/dweight and dL/dbias of another loss, to be added to those of this one. constant: mean and var do not depend on y."""
    grad_h = grad_x * ACTIVATIONS[activation][1](h)
    rstd = channels((var + eps).rsqrt())
    normal = (y - channels(mean)) * rstd
    grad_bias, grad_weight = grad_h.sum((0, 2, 3)), (grad_h * normal).sum((0, 2, 3))
    if added is not None:
        grad_h, grad_weight, grad_bias = grad_h + added[0], grad_weight + added[1], grad_bias + added[2]
    n = torch.inf if constant else y.numel() / y.shape[1]
    grad_y = rstd * (grad_h - channels(grad_bias) / n - normal * channels(grad_weight) / n)
    return grad_y if weight is None else grad_y * channels(weight), grad_h, grad_weight, grad_bias


def group_sizes(channels, groups):
    """Channels of each of K groups of neighbouring ones: where K does not divide them, the first groups have one more."""
    return [channels // groups + (k < channels % groups) for k in range(groups)]


def group_goodness(x, groups=1, power=2, mean=True, positions=False):
    """g [B, K]: sum or mean of x^power over the k-th group of channels and all positions; with `positions` g [B, P], over all channels at each.

    One group and power 2: Hinton 2022 (arXiv 2212.13345); K groups: CwComp (arXiv 2312.12668); power 1: DeeperForward (ICLR 2025)."""
    powers = (x.square() if power == 2 else x).flatten(2)
    parts = powers.split(1, 2) if positions else powers.split(group_sizes(x.shape[1], groups), 1)
    return torch.stack([part.mean((1, 2)) if mean else part.sum((1, 2)) for part in parts], 1)


def group_goodness_gradient(d, x, groups=1, power=2, mean=True, positions=False):
    """dL/dx from d = dL/dg: power * d * x^(power - 1), by the number of elements where g is a mean."""
    parts = [x] if positions else x.split(group_sizes(x.shape[1], groups), 1)
    columns = [d.view(len(x), 1, *x.shape[2:])] if positions else d[:, :, None, None].split(1, 1)
    grads = []
    for part, column in zip(parts, columns, strict=True):
        n = (part.shape[1] if positions else part[0].numel()) if mean else 1
        grads.append(power * column / n * (part if power == 2 else torch.ones_like(part)))
    return torch.cat(grads, 1)


def forward_forward_losses(g, loss="softplus", theta=2.0, alpha=4.0, theta_gap=0.0):
    """Losses of g [2n, J], first half of positive samples, second of negative, averaged over J: [2n], or [n] for losses of differences.

    f(theta - g) of positive and f(g - theta - theta_gap) of negative ones (Hinton 2022), or f(-alpha (g_positive - g_negative)) (SymBa,
    arXiv 2303.08418; Trifecta, arXiv 2311.18130); f is softplus, or z sigmoid(z) for the "swish" variants."""
    # F.softplus(z) is z itself above 20, which in float64 is off by 2e-9, and does not fit the gradient below.
    f = F.silu if loss.startswith("swish") else lambda z: -F.logsigmoid(-z)
    positive, negative = g.chunk(2)
    if loss in PAIRED_LOSSES:
        return f(-alpha * (positive - negative)).mean(1)
    return f(torch.cat([theta - positive, negative - (theta + theta_gap)])).mean(1)


def forward_forward_gradient(g, loss="softplus", theta=2.0, alpha=4.0, scale=1.0, theta_gap=0.0):
    """d = d(sum of scale * losses)/dg: a derivative of f at theta - g, g - theta or -alpha (g_positive - g_negative), with its sign."""
    (positive, negative), paired = g.chunk(2), loss in PAIRED_LOSSES
    z = -alpha * (positive - negative) if paired else torch.cat([theta - positive, negative - (theta + theta_gap)])
    s = z.sigmoid()
    slope = (s * (1 + z * (1 - s)) if loss.startswith("swish") else s) * scale / g.shape[1]
    down, up = (alpha * slope, alpha * slope) if paired else slope.chunk(2)
    return torch.cat([-down, up])


def losses(g, loss):
    """Losses of g that a fastff.spec.Loss describes, not reduced: one for each sample, or for each pair."""
    if loss.name == "cross_entropy":
        return margin_cross_entropy(g, loss.target, temperature(g, loss), loss.margin, loss.label_smoothing)
    return forward_forward_losses(g, loss.name, loss.theta, loss.alpha, loss.theta_gap)


def loss_gradient(g, loss, scale):
    """d = d(sum of scale * grad_scale * losses)/dg, and the same with respect to learned_tau (None without one)."""
    scale = scale if loss.grad_scale is None else scale * loss.grad_scale.to(g.dtype)
    if loss.name != "cross_entropy":
        return forward_forward_gradient(g, loss.name, loss.theta, loss.alpha, scale, loss.theta_gap), None
    d, grad_tau = goodness_gradient(g, loss.target, temperature(g, loss), loss.margin, loss.label_smoothing, scale)
    return d, None if loss.learned_tau is None else grad_tau * loss.tau


def temperature(g, loss):
    """The factor of goodness in cross-entropy."""
    return loss.tau if loss.learned_tau is None else loss.tau * loss.learned_tau.to(g.dtype)


def normalized(x, how, groups=1, eps=1e-5):
    """x [B, C, H, W] brought to length or variance 1, without affine.

    "layer_norm", "l2", "rms" over a sample, with "_channels" over C at each position, "group_norm" over each group of channels.
    Norms (x - mean) / sqrt(var + eps); l2 x / (|x| + eps), where what is all zero stays zero and gets no gradient; rms x / sqrt(mean of
    x^2 + eps)."""
    name = how.removesuffix("_channels")
    if name != how:
        dims, parts = (1,), [x]
    else:
        dims, parts = (1, 2, 3), x.split(group_sizes(x.shape[1], groups if how == "group_norm" else 1), 1)
    done = []
    for part in parts:
        if name == "l2":
            square = part.square().sum(dims, keepdim=True)
            done.append(part / (square.masked_fill(square == 0, torch.inf).sqrt() + eps))
        elif name == "rms":
            done.append(part / (part.square().mean(dims, keepdim=True) + eps).sqrt())
        else:
            var, mean = torch.var_mean(part, dims, correction=0, keepdim=True)
            done.append((part - mean) / (var + eps).sqrt())
    return torch.cat(done, 1)


def mean_loss(g, target):
    """Scalar: margin cross-entropy with its defaults, averaged over the batch."""
    return margin_cross_entropy(g, target).mean()


def sample_norm(z):
    """Layer normalisation over a sample that keeps the shape [B, C, H, W]."""
    return normalized(z, "layer_norm")


def train_step(blocks, heads, optimizers, images, target, segments=None, loss=mean_loss, normalize=sample_norm):
    """One step of block-local training on one minibatch: what fastff.Trainer computes, without its speed and its savings.

    With z_l = block_l(x_{l-1}) and x_0 = images, the goodness of block l is g_l = head_l(z_l), and x_l = normalize(z_l) is the next block's
    input. A segment (i, l) is the loss L_l = loss(g_l, target), which trains the head of block l and the weights of the blocks i to l. The
    gradient of the weights w_j of block j is the sum of dL_l/dw_j over the segments that j is in. With segments (0, 0), (1, 1), ... each block
    learns from its own loss alone, and no gradient crosses from one block into another.

    Args:
        blocks: L functions of tensors [B, ...]; each returns a tuple (z, *others), where others go to the next block as they are (the
            shortcut of a residual connection that a cut runs through). Images go to the first.
        heads: L functions from z [B, C, H, W] to goodness [B, K], such as lambda z: goodness(z, W) with weights W [K, C, 1, 1].
        optimizers: L, the l-th of all parameters of block l and head l.
        images, target: [B, ...], and labels [B] (int64).
        segments: (first, last) of block numbers from 0, one a loss; None for one a block, as in the paper. What follows the two is not read.
        loss: function of goodness [B, K] and target that returns a scalar.
        normalize: function of z that returns a tensor of its shape.

    Returns the losses [L] from before the update, 0 for blocks without one. Source: Krutsylo 2025; longer segments are this project's."""
    segments = [(i, i) for i in range(len(blocks))] if segments is None else segments
    parameters = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    inputs, losses = (images,), [torch.zeros(()) for _ in blocks]
    for index, (block, head) in enumerate(zip(blocks, heads, strict=True)):
        z, *others = block(*inputs)
        for first, last, *_ in segments:
            if last != index:
                continue
            losses[index] = loss(head(z), target)
            reached = [p for those in parameters[first : index + 1] for p in those]
            grads = torch.autograd.grad(losses[index], reached, retain_graph=True, allow_unused=True)
            for p, grad in zip(reached, grads, strict=True):
                if grad is not None:  # the heads of earlier blocks get none from this loss
                    p.grad = grad if p.grad is None else p.grad + grad
        inputs = (normalize(z), *others)
        if not any(first <= index < last for first, last, *_ in segments):  # no gradient comes back over this cut
            inputs = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    for optimizer in optimizers:  # the Trainer updates and frees a block when the last loss that reaches it has come
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack([loss.detach().to(images.dtype) for loss in losses])
