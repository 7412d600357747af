"""Sums the gradients of data-parallel ranks: a bucket for each large block, one for several small ones, reduced while the next blocks compute.

The update of a block needs the gradients of that block only, so it may happen at any time before the block's next forward pass: the large last
blocks of a network are reduced while the first blocks compute on the next minibatch. (Backpropagation has the largest gradients first, and must
wait for all of them at the end of each step.)

With a sharded optimizer each rank keeps the optimizer state of a part of the parameters. The gradients of these are summed on that rank, which
updates the parameters and broadcasts them.

Each of R ranks sends 2 (R - 1) / R n bytes for a block with n bytes of gradients (ring all-reduce). The sharded reduction sends about as many, over
gloo a third more.
"""

import torch
import torch.distributed as dist

from fastff.parallel.ranks import flattened, views_like

# Bytes: blocks with fewer are reduced together with those that are trained after them in the same step.
MESSAGE = 1 << 20


class _Bucket:
    """The gradients of some blocks while they are reduced.

    Args:
        rates: {index of a block: learning rates of its parameter groups when its gradients were complete}.
        parameters: those of the blocks; the ones without a gradient are left out.
        share: this rank's number of samples, in units common to all ranks. The gradients are averaged with this weight."""

    def __init__(self, rates, parameters, share):
        self.rates = rates
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
        self.small = []  # [(index, parameters, share, rates)] of blocks of this step that wait for others to share a bucket with

    def start(self, index, parameters, share):
        """Start to reduce the gradients of block `index`, without waiting for the result."""
        self.small.append((index, parameters, share, self._rates(index)))
        elements = [p for _, some, *_ in self.small for p in some if p.grad is not None]
        if sum(p.numel() * p.element_size() for p in elements) >= MESSAGE:
            self.send()
        self._progress()

    def send(self):
        """Start to reduce the gradients of the blocks that still wait for others. To be called when a step ends, too."""
        if self.small:
            indices, parameters, (share, *_), rates = zip(*self.small, strict=True)
            bucket = _Bucket(dict(zip(indices, rates, strict=True)), [p for some in parameters for p in some], share)
            self.small = []
            with self.ranks.watch.guard():
                bucket.works = [dist.all_reduce(flat, group=self.group, async_op=True) for flat, _ in bucket.flats]
            self.queue.append(bucket)

    def settle(self, index=None):
        """Wait for the update of block `index` and those started before it, or for all updates if `index` is None."""
        if index is None or any(index == waiting for waiting, *_ in self.small):
            self.send()
        while self.queue and (index is None or any(index in bucket.rates for bucket in self.queue)):
            self._finish(self.queue.pop(0))

    def _rates(self, index):
        return [group["lr"] for group in self.optimizers[index].param_groups]

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
        for index, rates in bucket.rates.items():
            groups, now = self.optimizers[index].param_groups, self._rates(index)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            self.update(index)
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
        parts = [_Bucket({index: self._rates(index)}, owned, share) for owned in by_owner]
        bucket = parts[self.ranks.data_rank]
        bucket.parts = parts
        with self.ranks.watch.guard():
            bucket.works = [
                dist.reduce(flat, group=self.group, group_dst=rank, async_op=True)
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
                    works.append(dist.broadcast(flat, group=self.group, group_src=rank, async_op=True))
        self.sending.append((*bucket.rates, bucket.parts, works))

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
