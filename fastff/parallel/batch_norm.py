"""Batch norm with the statistics of the whole minibatch, which data-parallel ranks share. It runs on any device (torch's SyncBatchNorm needs a GPU).

Each layer adds up one small vector over the ranks in its forward pass, and that vector's gradient in its backward pass.

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167).
"""

import weakref

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# The Ranks of each module. They are kept here, and not as an attribute, so that modules can still be pickled and copied.
RANKS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the data-parallel ranks, through which gradients go back to all of them."""

    @staticmethod
    def forward(ctx, tensor, ranks):
        ctx.ranks = ranks
        return ranks.sum(tensor, ranks.data_group)

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.ranks), None


class SynchronizedBatchNorm(_BatchNorm):
    """Batch norm over all ranks, the class that `synchronize` gives to batch-norm modules.

    A copy of such a module is not in RANKS and uses the statistics of its own rank."""

    def _check_input_dim(self, input):
        pass  # BatchNorm1d, 2d and 3d differ only in this check; here x may have 2 to 5 dimensions, with channels second

    def forward(self, x):
        ranks = RANKS.get(self)
        if ranks is None or not self.training:
            return super().forward(x)
        wide = x if x.dtype == torch.float64 else x.float()
        local = torch.var_mean(wide, [d for d in range(x.dim()) if d != 1], correction=0)
        var, mean = (t.double() for t in local)  # in float64 the sum of squares, less the mean's, is exact enough
        count = x.numel() // x.shape[1]
        sums = _Sum.apply(torch.cat([count * mean, count * (var + mean.square()), mean.new_tensor([count])]), ranks)
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        var = square - mean.square()
        if self.track_running_stats:
            self.num_batches_tracked += 1
            rate = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
                self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), rate)
        scale = (var + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        shape = [1, -1] + [1] * (x.dim() - 2)
        return (wide * scale.to(wide.dtype).view(shape) + shift.to(wide.dtype).view(shape)).to(x.dtype)


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
