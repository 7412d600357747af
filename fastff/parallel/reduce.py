"""Sums the gradients of data-parallel ranks: a bucket for each large block, one for several small ones, reduced while the next blocks compute.

The update of a block needs the gradients of that block only, so it may happen at any time before the block's next forward pass: the large last
blocks of a network are reduced while the first blocks compute on the next minibatch. (Backpropagation has the largest gradients first, and must
wait for all of them at the end of each step.)

With a sharded optimizer each rank keeps the optimizer state of a part of the parameters. The gradients of these are summed on that rank, which
updates the parameters and broadcasts them.

Each of R ranks sends 2 (R - 1) / R n bytes for a block with n bytes of gradients (ring all-reduce). The sharded reduction sends about as many, over
gloo a third more.
"""

import itertools

import torch
import torch.distributed as dist

# Bytes: blocks with fewer are reduced together with those that are trained after them in the same step.
MESSAGE = 1 << 20


class _Bucket:
    """The gradients of some blocks while they are reduced.

    Args:
        rates: {index of a block: learning rates of its parameter groups when its gradients were complete}.
        parameters: those of the blocks that have a gradient, a list for each rank that updates some of them, or one list.
        share: this rank's number of samples, in units common to all ranks. The gradients are averaged with this weight."""

    def __init__(self, rates, parameters, share):
        self.rates, self.works = rates, []
        self.flats = []  # [(number of the list, vector of the gradients and the share, views of the gradients, parameters)]
        for number, some in enumerate(parameters):
            for dtype in dict.fromkeys(p.dtype for p in some):
                same_dtype = [p for p in some if p.dtype == dtype]
                sizes = [p.numel() for p in same_dtype]
                flat = same_dtype[0].new_empty(sum(sizes) + 1)
                flat[-1] = share
                pieces = zip(flat[:-1].split(sizes), same_dtype, strict=True)
                views = [piece.as_strided(p.shape, _dense_strides(p)) for piece, p in pieces]
                torch._foreach_copy_(views, [p.grad for p in same_dtype])
                for p, view in zip(same_dtype, views, strict=True):
                    p.grad = view
                self.flats.append((number, flat, views, same_dtype))


def _dense_strides(p):
    """Strides of the gradient of p in a bucket. They follow from p's, which all ranks have alike; the gradients' own may differ."""
    dense = p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))
    return p.stride() if dense else torch.empty(p.shape, device="meta").stride()


class Reduction:
    """Sums the gradients of data-parallel ranks, and calls update(index) for a block when its gradients are complete.

    Args:
        ranks: the Ranks of this process.
        optimizers: optimizer of each block, or None. An update uses the learning rates of the moment when its reduction started.
        update: function of a block's index, called when the gradients of that block are the averages over the samples of all ranks."""

    def __init__(self, ranks, optimizers, update):
        self.ranks, self.optimizers, self.update = ranks, optimizers, update
        self.group, self.queue = ranks.data_group, []
        # of blocks of this step that wait for others to share a bucket with
        self.rates, self.parameters, self.share = {}, [], 0.0

    def start(self, index, parameters, share):
        """Start to reduce the gradients of block `index`, without waiting for the result."""
        self.rates[index], self.share = self._rates(index), share
        self.parameters += [p for p in parameters if p.grad is not None]
        if sum(p.numel() * p.element_size() for p in self.parameters) >= MESSAGE:
            self.send()
        self._progress()

    def send(self):
        """Start to reduce the gradients of the blocks that still wait for others. To be called when a step ends, too."""
        if self.rates:
            bucket = _Bucket(self.rates, self._lists(self.parameters), self.share)
            self.rates, self.parameters = {}, []
            with self.ranks.watch.guard():
                bucket.works = [self._reduce(flat, number) for number, flat, *_ in bucket.flats]
            self.queue.append(bucket)

    def settle(self, index=None):
        """Wait for the update of block `index` and those started before it, or for all updates if `index` is None."""
        if index is None or index in self.rates:
            self.send()
        while self.queue and (index is None or any(index in bucket.rates for bucket in self.queue)):
            self._finish(self.queue.pop(0))

    def _rates(self, index):
        return [group["lr"] for group in self.optimizers[index].param_groups]

    def _lists(self, parameters):
        return [parameters]

    def _reduce(self, flat, number):
        return dist.all_reduce(flat, group=self.group, async_op=True)

    def _progress(self):
        """Apply the updates whose gradients have arrived, which frees these gradients."""
        while self.queue and all(work.is_completed() for work in self.queue[0].works):
            self._finish(self.queue.pop(0))

    def _finish(self, bucket):
        self.ranks.watch.wait(bucket.works)
        for _, flat, *_ in bucket.flats:
            flat.div_(flat[-1].clone())  # the sum of the shares
        for index, rates in bucket.rates.items():
            groups, now = self.optimizers[index].param_groups, self._rates(index)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            self.update(index)
            for group, rate in zip(groups, now, strict=True):
                group["lr"] = rate


class ShardedReduction(Reduction):
    """Reduction for a sharded optimizer: each parameter is updated on one rank, which broadcasts it.

    All ranks must call collectives in the same order. Therefore a reduction is always finished when the next one has started, even if it
    has arrived earlier."""

    def __init__(self, ranks, optimizers, update, parameters):
        super().__init__(ranks, optimizers, update)
        self.sending, self.owner, load = [], {}, [0] * ranks.data_size
        # the largest first, each to the rank that has the fewest elements so far
        for p in sorted(dict.fromkeys(itertools.chain(*parameters)), key=lambda p: -p.numel()):
            self.owner[p] = load.index(min(load))
            load[self.owner[p]] += p.numel()

    def owns(self, parameter):
        """Whether this rank keeps the optimizer state of `parameter`."""
        return self.owner[parameter] == self.ranks.data_rank

    def settle(self, index=None):
        super().settle(index)
        while self.sending and (index is None or any(index in bucket.rates for bucket in self.sending)):
            self._receive(self.sending.pop(0))

    def _lists(self, parameters):
        return [[p for p in parameters if self.owner[p] == rank] for rank in range(self.ranks.data_size)]

    def _reduce(self, flat, number):
        return dist.reduce(flat, group=self.group, group_dst=number, async_op=True)

    def _progress(self):
        while len(self.queue) > 1:
            self._finish(self.queue.pop(0))

    def _finish(self, bucket):
        others = [p for rank, *_, same_dtype in bucket.flats if rank != self.ranks.data_rank for p in same_dtype]
        for p in others:  # the optimizer leaves out what has no gradient
            p.grad = None
        super()._finish(bucket)
        bucket.works = []
        for rank, flat, views, same_dtype in bucket.flats:
            if rank == self.ranks.data_rank:
                torch._foreach_copy_(views, [p.detach() for p in same_dtype])
            with self.ranks.watch.guard():
                bucket.works.append(dist.broadcast(flat, group=self.group, group_src=rank, async_op=True))
        self.sending.append(bucket)

    @torch.no_grad()
    def _receive(self, bucket):
        self.ranks.watch.wait(bucket.works)
        for rank, _, views, same_dtype in bucket.flats:
            if rank != self.ranks.data_rank:
                torch._foreach_copy_([p.detach() for p in same_dtype], views)
