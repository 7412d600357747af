"""Batch norm over the minibatch of all data-parallel ranks, on any device (torch's SyncBatchNorm needs a GPU). Two small collectives a layer:
means and variances in the forward pass, two sums a channel in the backward pass.

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167); merging means and variances of parts: Chan, Golub and LeVeque 1983.
"""

import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

RANKS: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # of each module; not in it, so that the module still pickles and copies


class SynchronizedBatchNorm(_BatchNorm):
    """What `synchronize` makes of batch-norm modules. A copy of it, which no Trainer knows, normalises by itself."""

    def _check_input_dim(self, input):
        pass  # the class that it was of has done its part: 2 to 5 dimensions, channels second

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
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide, dims, correction=0)
        own = torch.cat([mean, var, mean.new_full((1,), x.numel() / x.shape[1])])
        every = own.new_empty(ranks.data_size, len(own))
        with ranks.watch.guard():
            dist.all_gather(list(every), own, group=ranks.data_group)
        channels = x.shape[1]
        means, variances, counts = every[:, :channels], every[:, channels:-1], every[:, -1:]
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean).square()) * counts).sum(0) / count
        shape = [1, -1] + [1] * (x.dim() - 2)
        invstd = (var + eps).rsqrt()
        normal = (wide - mean.view(shape)) * invstd.view(shape)
        out = normal if weight is None else normal * weight.view(shape) + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.ranks = ranks
        ctx.mark_non_differentiable(mean, var, count)
        return out.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, invstd, count = ctx.saved_tensors
        dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)
        grad = grad.to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(shape)) * invstd.view(shape)
        sums = torch.cat([grad.sum(dims), (grad * normal).sum(dims)])
        grad_bias, grad_weight = (None, None) if weight is None else sums.clone().chunk(2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            with ctx.ranks.watch.guard():
                dist.all_reduce(sums, group=ctx.ranks.data_group)
            over, along = (s.view(shape) / count for s in sums.chunk(2))
            scale = invstd if weight is None else invstd * weight
            grad_x = ((grad - over - normal * along) * scale.view(shape)).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def synchronize(model, ranks):
    """Turn the batch-norm modules of `model` into synchronised ones, in place; hooks, parameters and references to them stay."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, SynchronizedBatchNorm):
            module.__class__ = SynchronizedBatchNorm
            RANKS[module] = ranks
