"""The losses of fastff/spec.py from goodness g, with their gradient: plain PyTorch for all kernels that do not fuse them."""

import torch
import torch.nn.functional as F

from fastff import reference


def loss_of(g, loss):
    """Compute the reduced loss of goodness g [B, K], differentiable with respect to g and a learned tau."""
    if loss.name != "cross_entropy":
        losses = reference.forward_forward_losses(g, loss.name, loss.theta, loss.alpha)
        return reference.reduced(losses, loss.reduction)
    u = g * (loss.tau if loss.learned_tau is None else loss.tau * loss.learned_tau)
    if loss.margin:
        u = u - loss.margin * (loss.target[:, None] == torch.arange(g.shape[1], device=g.device))
    return F.cross_entropy(u, loss.target, label_smoothing=loss.label_smoothing, reduction=loss.reduction)


def loss_gradient(g, loss, scale, part=slice(None)):
    """Return losses, d = dL/dg and dL/d(learned tau), which is None for a number tau.

    g is [b, K], of the samples `part` of a batch; losses are [b], or [b/2] for losses of pairs, which need a whole batch; scale is
    d(reduced loss) / d(one of the losses). Formulas: reference.goodness_gradient, reference.forward_forward_gradient."""
    if loss.grad_scale is not None:
        scale = scale * loss.grad_scale.to(g.dtype)
    if loss.name != "cross_entropy":
        losses = reference.forward_forward_losses(g, loss.name, loss.theta, loss.alpha)
        return losses, reference.forward_forward_gradient(g, loss.name, loss.theta, loss.alpha, scale), None
    return _cross_entropy(g, loss, scale, loss.target[part])


def _cross_entropy(g, loss, scale, target):
    """A label outside 0..K-1 makes its sample's loss NaN or infinite on a GPU, where the host would have to wait to see it."""
    K, smoothing = g.shape[1], loss.label_smoothing
    tau = loss.tau if loss.learned_tau is None else loss.tau * loss.learned_tau.to(g.dtype)
    q = (target[:, None] == torch.arange(K, device=g.device)).to(g.dtype)
    hits = q.sum(1) if g.is_cuda else 1
    u = g if isinstance(tau, float) and tau == 1 else g * tau
    if loss.margin:
        u = torch.sub(u, q, alpha=loss.margin)
    if smoothing:
        q = q.mul_(1 - smoothing).add_(smoothing / K)
    log_p = u.log_softmax(1)
    losses = (log_p * q).sum(1).div_(-hits)
    d = log_p.exp_().sub_(q).mul_(scale)
    if loss.learned_tau is not None:
        return losses, d * tau, (d * g).sum() * loss.tau
    return losses, d if tau == 1 else d.mul_(tau), None
