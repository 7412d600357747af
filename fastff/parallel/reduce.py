"""Data-parallel gradients: one flat bucket a block, summed over the ranks while the next blocks compute.

A block's update needs its own gradients alone, so it can come any time before its next forward pass: the large last blocks of a network are reduced
beside the first blocks of the next minibatch. (Backpropagation has its largest gradients first and must wait for all at the end of each step.)

With a sharded optimiser each rank has the state of its parameters only: their gradients are summed to it, it updates, and sends the parameters on.

Bytes that a rank of R sends for a block of n bytes, in a ring: 2 (R - 1) / R n; sharded about as many: its share of both ways.
"""

import torch
import torch.distributed as dist

from fastff.parallel.ranks import flattened, laid_out


class _Bucket:
    """Gradients of one block on their way. `share` is this rank's number of samples, in units common to all ranks."""

    def __init__(self, index, parameters, share, rates):
        self.index, self.rates = index, rates
        self.parameters = [p for p in parameters if p.grad is not None]
        self.flats = []
        # By the parameters' strides, which are the same on all ranks; the gradients' may differ.
        for flat, views, own in flattened(self.parameters, lambda p: p.grad, spare=1):
            flat[-1] = share
            for p, view in zip(own, views, strict=True):
                p.grad = view
            self.flats.append((flat, own))

    def average(self):
        for flat, _ in self.flats:
            flat.div_(flat[-1].clone())


class Reduction:
    """Sums gradients and calls update(index) for each block when its own are there.

    Args:
        ranks: of the mesh.
        optimizers: [optimiser or None] by index; their learning rates are those of the start of a reduction when it is applied.
        update: called once a block's gradients are the average over the samples of all data-parallel ranks.
    """

    def __init__(self, ranks, optimizers, update):
        self.ranks, self.optimizers, self.update = ranks, optimizers, update
        self.group, self.queue = ranks.data_group, []

    def start(self, index, parameters, share):
        """Send the gradients of block `index` off."""
        bucket = _Bucket(index, parameters, share, [group["lr"] for group in self.optimizers[index].param_groups])
        with self.ranks.watch.guard():
            self._launch(bucket)
        self.queue.append(bucket)
        self._progress()

    def settle(self, index=None):
        """Finish the update of block `index`, and those started before it; of all blocks for None."""
        while self.queue and (index is None or any(bucket.index == index for bucket in self.queue)):
            self._finish(self.queue.pop(0))

    def _launch(self, bucket):
        bucket.works = [dist.all_reduce(flat, group=self.group, async_op=True) for flat, _ in bucket.flats]

    def _progress(self):
        """Finish what has arrived, so that its gradients are freed."""
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
    """The same with each parameter's optimiser state on one rank. Collectives come in one order on all ranks, so a reduction is finished one
    block later, whether or not it has arrived before."""

    def __init__(self, ranks, optimizers, update, parameters):
        super().__init__(ranks, optimizers, update)
        self.owner = _owners([p for block in parameters for p in block], ranks.data_size)
        self.sending = []

    def owns(self, parameter):
        return self.owner[parameter] == self.ranks.data_rank

    def start(self, index, parameters, share):
        by_owner = [[p for p in parameters if self.owner[p] == rank] for rank in range(self.ranks.data_size)]
        rates = [group["lr"] for group in self.optimizers[index].param_groups]
        parts = [_Bucket(index, own, share, rates) for own in by_owner]
        whole = parts[self.ranks.data_rank]
        whole.parts = parts
        with self.ranks.watch.guard():
            whole.works = [
                dist.reduce(flat, self.ranks.global_rank(self.group, rank), group=self.group, async_op=True)
                for rank, part in enumerate(parts)
                for flat, _ in part.flats
            ]
        self.queue.append(whole)
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
            for flat, own in part.flats:
                if rank == self.ranks.data_rank:
                    torch._foreach_copy_(laid_out(flat, own), [p.detach() for p in own])
                with self.ranks.watch.guard():
                    source = self.ranks.global_rank(self.group, rank)
                    works.append(dist.broadcast(flat, source, group=self.group, async_op=True))
        self.sending.append((bucket.index, bucket.parts, works))

    @torch.no_grad()
    def _receive(self, index, parts, works):
        self._wait(works)
        for rank, part in enumerate(parts):
            for flat, own in part.flats:
                if rank != self.ranks.data_rank:
                    torch._foreach_copy_([p.detach() for p in own], laid_out(flat, own))


def _owners(parameters, size):
    """{parameter: rank}: the largest first, each to the rank with the least so far."""
    load, owner = [0] * size, {}
    for p in sorted(dict.fromkeys(parameters), key=lambda p: -p.numel()):
        owner[p] = load.index(min(load))
        load[owner[p]] += p.numel()
    return owner
