"""Batch norm with the statistics of the whole minibatch, which data-parallel ranks share. It runs on any device (torch's SyncBatchNorm needs a GPU).

Each layer needs two small collectives: one gathers the means and variances in the forward pass, one adds up two sums per channel in the
backward pass.

Sources: Ioffe and Szegedy 2015 (arXiv 1502.03167); the formula that merges means and variances: Chan, Golub and LeVeque 1983.
"""

import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# The Ranks of each module. They are kept here, and not as an attribute, so that modules can still be pickled and copied.
RANKS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class SynchronizedBatchNorm(_BatchNorm):
    """Batch norm over all ranks, the class that `synchronize` gives to batch-norm modules.

    A copy of such a module is not in RANKS and uses the statistics of its own rank."""

    def _check_input_dim(self, input):
        pass  # BatchNorm1d, 2d and 3d differ only in this check; here x may have 2 to 5 dimensions, with channels second

    def forward(self, x):
        ranks = RANKS.get(self)
        if ranks is None or not self.training:
            return super().forward(x)
        out, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps, ranks)
        if self.track_running_stats:
            self.num_batches_tracked += 1
            rate = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
                self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), rate)
        return out


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, ranks):
        dims = [d for d in range(x.dim()) if d != 1]
        x_wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(x_wide, dims, correction=0)
        local = torch.cat([mean, var, mean.new_full((1,), x.numel() / x.shape[1])])
        gathered = local.new_empty(ranks.data_size, len(local))
        with ranks.watch.guard():
            dist.all_gather(list(gathered), local, group=ranks.data_group)
        channels = x.shape[1]
        means, variances, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean).square()) * counts).sum(0) / count
        shape = [1, -1] + [1] * (x.dim() - 2)
        invstd = (var + eps).rsqrt()
        normalized = (x_wide - mean.view(shape)) * invstd.view(shape)
        out = normalized if weight is None else normalized * weight.view(shape) + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.ranks = ranks
        ctx.mark_non_differentiable(mean, var, count)
        return out.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, invstd, count = ctx.saved_tensors
        dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)
        grad = grad.to(mean.dtype)
        normalized = (x.to(mean.dtype) - mean.view(shape)) * invstd.view(shape)
        sums = torch.cat([grad.sum(dims), (grad * normalized).sum(dims)])
        grad_bias, grad_weight = (None, None) if weight is None else sums.clone().chunk(2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            with ctx.ranks.watch.guard():
                dist.all_reduce(sums, group=ctx.ranks.data_group)
            mean_grad, mean_product = (s.view(shape) / count for s in sums.chunk(2))
            scale = invstd if weight is None else invstd * weight
            grad_x = ((grad - mean_grad - normalized * mean_product) * scale.view(shape)).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def synchronize(model, ranks):
    """Make every batch-norm module of `model` a SynchronizedBatchNorm, in place.

    Only the class of a module changes, so hooks, parameters and references to the module stay valid.

    Args:
        model: nn.Module; its BatchNorm1d, BatchNorm2d and BatchNorm3d are changed, subclasses of these are not.
        ranks: the Ranks whose data-parallel group shares the statistics."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, SynchronizedBatchNorm):
            module.__class__ = SynchronizedBatchNorm
            RANKS[module] = ranks
