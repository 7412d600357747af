"""A rank's place in the training of an SFF: which blocks are its own, how their gradients and outputs go to other ranks, whose weights are whose.

By itself (one process) it owns all blocks and does nothing.
"""

import torch

from fastff.parallel import batch_norm, placement
from fastff.parallel.link import Link
from fastff.parallel.reduce import Reduction, ShardedReduction


class Place:
    """Args:
        ranks: fastff.parallel.ranks.Ranks.
        sff: fastff.SFF; takes over rank 0's weights.
        parameters, optimizers: by block, then the readout's.
        update: called with a block's index when its gradients are those of all ranks.
        measure: returns seconds of each block; called on rank 0 where ranks share the blocks and the user has not placed them.

    Attributes: own (range of blocks), placed (those of each rank that shares them), link (to the neighbours, or None), reduction (or None).
    """

    def __init__(self, ranks, sff, parameters, optimizers, update, measure):
        self.ranks, self.sff, self.parameters, self.update = ranks, sff, parameters, update
        self.link, self.reduction = None, None
        self.placed = [range(len(sff.blocks))]
        if ranks.size > 1:
            self._agree()
        if ranks.block_size > 1:
            self.placed = self._placed(measure)
            self.link = Link(ranks, next(sff.parameters()).device)
        self.own = self.placed[ranks.block_rank]
        if ranks.data_size > 1:
            if ranks.distributed.batch_norm == "synchronized":
                batch_norm.synchronize(sff.model, ranks)
            if ranks.distributed.shard_optimizer:
                self.reduction = ShardedReduction(ranks, optimizers, update, parameters)
            else:
                self.reduction = Reduction(ranks, optimizers, update)

    def _agree(self):
        """One network on all ranks, with rank 0's weights."""
        form = [(name, tuple(t.shape), t.stride(), str(t.dtype)) for name, t in self.sff.state_dict().items()]
        for rank, other in enumerate(self.ranks.gather(form)):
            if other != form:
                raise ValueError(f"sff: expected the same network on every rank, rank {rank} has another")
        self.ranks.broadcast_([*self.sff.parameters(), *self.sff.buffers()], 0)

    def _placed(self, measure):
        ranks, count = self.ranks, len(self.sff.blocks)
        if ranks.distributed.placement is not None:
            counts = placement.checked(ranks.distributed.placement, count, ranks.block_size)
        else:
            counts = placement.balanced(ranks.from_leader(measure() if ranks.leads else None), ranks.block_size)
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [range(end - n, end) for end, n in zip(ends, counts, strict=True)]

    @property
    def has_last(self):
        """Whether this rank has the last block, and with it the readout."""
        return self.own.stop == len(self.sff.blocks)

    @property
    def indices(self):
        """Of the parameters that this rank trains."""
        return [*self.own, *range(len(self.sff.blocks), len(self.parameters))] if self.has_last else [*self.own]

    def send(self, index, part, count):
        """Hand a part of a minibatch to the next rank, if block `index` is this one's last and not the network's."""
        if self.link is not None and index + 1 == self.own.stop and not self.has_last:
            self.link.send(part, count)

    def updated(self, index, weight):
        """A block's gradients are complete here: update it, now or when those of all ranks have come."""
        if self.reduction is None:
            self.update(index)
        else:
            self.reduction.start(index, self.parameters[index], weight)

    def settle(self, index=None):
        """Finish the update of a block that waits for other ranks; of all blocks for None."""
        if self.reduction is not None:
            self.reduction.settle(index)

    def synchronize(self):
        """Finish all updates; batch norm's statistics averaged, and every rank has the weights of all."""
        self.settle()
        ranks = self.ranks
        if ranks.data_size > 1 and ranks.distributed.batch_norm == "local":
            ranks.mean_([b for index in self.own for b in self.sff.blocks[index].buffers()])
        if ranks.block_size > 1:
            for rank, own in enumerate(self.placed):
                ranks.broadcast_([t for index in own for t in self._tensors(index)], rank, ranks.block_group)

    def _tensors(self, index):
        """Parameters and buffers of a block; the last has the readout's with it."""
        sff = self.sff
        modules = [sff.blocks[index], sff.heads[index]]
        if sff.readout and index + 1 == len(sff.blocks):
            modules.append(sff.readout[0])
        return [t for module in modules for t in (*module.parameters(), *module.buffers())]

    def state_kept(self, optimizer, saved):
        """What this rank keeps of an optimiser's saved state."""
        if not isinstance(self.reduction, ShardedReduction):
            return saved
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kept = {index: value for index, value in saved["state"].items() if self.reduction.owns(parameters[index])}
        return saved | {"state": kept}

    def counted(self):
        """[L]: 1 for this rank's blocks, whose losses it sees, else 0."""
        return torch.tensor([float(index in self.own) for index in range(len(self.sff.blocks))])

    def __str__(self):
        ranks = self.ranks
        text = f"{ranks.size} ranks: {ranks.data_size} share each minibatch"
        if ranks.distributed.shard_optimizer:
            text += " and the optimiser's state"
        if ranks.block_size > 1:
            text += f", {ranks.block_size} share the blocks ({', '.join(str(len(own)) for own in self.placed)})"
        return f"{text}; batch norm {ranks.distributed.batch_norm}"
