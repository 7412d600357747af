"""Sums the gradients of data-parallel ranks: one bucket for each block, reduced while the next blocks compute.

The update of a block needs the gradients of that block only, so it may happen at any time before the block's next forward pass: the large last
blocks of a network are reduced while the first blocks compute on the next minibatch. (Backpropagation has the largest gradients first, and must
wait for all of them at the end of each step.)

With a sharded optimizer each rank keeps the optimizer state of a part of the parameters. The gradients of these are summed on that rank, which
updates the parameters and broadcasts them.

Each of R ranks sends 2 (R - 1) / R n bytes for a block with n bytes of gradients (ring all-reduce). The sharded reduction sends about as many.
"""

import torch
import torch.distributed as dist

from fastff.parallel.ranks import flattened, views_like


class _Bucket:
    """The gradients of one block while they are reduced.

    Args:
        index: of the block.
        parameters: those of the block; the ones without a gradient are left out.
        share: this rank's number of samples, in units common to all ranks. The gradients are averaged with this weight.
        rates: learning rates of the block's parameter groups when the reduction starts."""

    def __init__(self, index, parameters, share, rates):
        self.index, self.rates = index, rates
        self.parameters = [p for p in parameters if p.grad is not None]
        self.flats = []
        # The layout is that of the parameters, which is the same on all ranks; the gradients' strides may differ between ranks.
        for flat, views, same_dtype in flattened(self.parameters, lambda p: p.grad, spare=1):
            flat[-1] = share
            for p, view in zip(same_dtype, views, strict=True):
                p.grad = view
            self.flats.append((flat, same_dtype))

    def average(self):
        """Divide the summed gradients by the sum of the shares, which is the last element of each vector."""
        for flat, _ in self.flats:
            flat.div_(flat[-1].clone())


class Reduction:
    """Sums the gradients of data-parallel ranks, and calls update(index) for a block when its gradients are complete.

    Args:
        ranks: the Ranks of this process.
        optimizers: optimizer of each block, or None. An update uses the learning rates of the moment when its reduction started.
        update: function of a block's index, called when the gradients of that block are the averages over the samples of all ranks."""

    def __init__(self, ranks, optimizers, update):
        self.ranks, self.optimizers, self.update = ranks, optimizers, update
        self.group, self.queue = ranks.data_group, []

    def start(self, index, parameters, share):
        """Start to reduce the gradients of block `index`, without waiting for the result."""
        bucket = _Bucket(index, parameters, share, [group["lr"] for group in self.optimizers[index].param_groups])
        with self.ranks.watch.guard():
            self._launch(bucket)
        self.queue.append(bucket)
        self._progress()

    def settle(self, index=None):
        """Wait for the update of block `index` and those started before it, or for all updates if `index` is None."""
        while self.queue and (index is None or any(bucket.index == index for bucket in self.queue)):
            self._finish(self.queue.pop(0))

    def _launch(self, bucket):
        bucket.works = [dist.all_reduce(flat, group=self.group, async_op=True) for flat, _ in bucket.flats]

    def _progress(self):
        """Apply the updates whose gradients have arrived, which frees these gradients."""
        while self.queue and all(work.is_completed() for work in self.queue[0].works):
            self._finish(self.queue.pop(0))

    def _wait(self, works):
        with self.ranks.watch.guard():
            for work in works:
                work.wait()

    def _finish(self, bucket):
        self._wait(bucket.works)
        bucket.average()
        self._apply(bucket)

    def _apply(self, bucket):
        groups = self.optimizers[bucket.index].param_groups
        now = [group["lr"] for group in groups]
        for group, rate in zip(groups, bucket.rates, strict=True):
            group["lr"] = rate
        self.update(bucket.index)
        for group, rate in zip(groups, now, strict=True):
            group["lr"] = rate


class ShardedReduction(Reduction):
    """Reduction for a sharded optimizer: each parameter is updated on one rank, which broadcasts it.

    All ranks must call collectives in the same order. Therefore a reduction is always finished when the next block starts its own, even if it
    has arrived earlier."""

    def __init__(self, ranks, optimizers, update, parameters):
        super().__init__(ranks, optimizers, update)
        self.owner = _owners([p for block in parameters for p in block], ranks.data_size)
        self.sending = []

    def owns(self, parameter):
        """Whether this rank keeps the optimizer state of `parameter`."""
        return self.owner[parameter] == self.ranks.data_rank

    def start(self, index, parameters, share):
        by_owner = [[p for p in parameters if self.owner[p] == rank] for rank in range(self.ranks.data_size)]
        rates = [group["lr"] for group in self.optimizers[index].param_groups]
        parts = [_Bucket(index, owned, share, rates) for owned in by_owner]
        bucket = parts[self.ranks.data_rank]
        bucket.parts = parts
        with self.ranks.watch.guard():
            bucket.works = [
                dist.reduce(flat, self.ranks.global_rank(self.group, rank), group=self.group, async_op=True)
                for rank, part in enumerate(parts)
                for flat, _ in part.flats
            ]
        self.queue.append(bucket)
        while len(self.queue) > 1:
            self._finish(self.queue.pop(0))

    def settle(self, index=None):
        super().settle(index)
        while self.sending and (index is None or any(number == index for number, *_ in self.sending)):
            self._receive(*self.sending.pop(0))

    def _finish(self, bucket):
        self._wait(bucket.works)
        bucket.average()
        for rank, part in enumerate(bucket.parts):
            if rank != self.ranks.data_rank:
                for p in part.parameters:
                    p.grad = None
        self._apply(bucket)
        works = []
        for rank, part in enumerate(bucket.parts):
            for flat, same_dtype in part.flats:
                if rank == self.ranks.data_rank:
                    torch._foreach_copy_(views_like(flat, same_dtype), [p.detach() for p in same_dtype])
                with self.ranks.watch.guard():
                    source = self.ranks.global_rank(self.group, rank)
                    works.append(dist.broadcast(flat, source, group=self.group, async_op=True))
        self.sending.append((bucket.index, bucket.parts, works))

    @torch.no_grad()
    def _receive(self, index, parts, works):
        self._wait(works)
        for rank, part in enumerate(parts):
            for flat, same_dtype in part.flats:
                if rank != self.ranks.data_rank:
                    torch._foreach_copy_([p.detach() for p in same_dtype], views_like(flat, same_dtype))


def _owners(parameters, size):
    """Return {parameter: rank}. Parameters are assigned in order of size, the largest first, to the rank with the fewest elements so far."""
    load, owner = [0] * size, {}
    for p in sorted(dict.fromkeys(parameters), key=lambda p: -p.numel()):
        owner[p] = load.index(min(load))
        load[owner[p]] += p.numel()
    return owner
