"""What a rank trains: which blocks, how their gradients and outputs go to other ranks, and which rank has the weights of which block."""

import itertools

from fastff.parallel import batch_norm, placement
from fastff.parallel.link import Link
from fastff.parallel.ranks import Ranks
from fastff.parallel.reduce import Reduction, ShardedReduction
from fastff.training.muon import Muon

# Bytes of gradients: blocks with fewer wait, and Muon updates them together. With 2^18, a step of a ResNet18 of width 16 (2.8 MB) took 4 %
# longer; with 2^22 it took as long and more memory.
TOGETHER = 1 << 20


class Alone:
    """The place of an engine that trains everything in one process, where nothing waits. The interface is that of Place."""

    def __init__(self, losses, optimizers):
        self.ranks, self.own, self.own_optimizers = Ranks(), range(losses), range(optimizers)

    def settle(self):
        pass

    def synchronize(self):
        pass

    def state_kept(self, optimizer, saved):
        return saved


class Place:
    """The place of a rank among those that train an SFF. A single process trains all blocks and waits for nothing.

    Args:
        ranks: fastff.parallel.ranks.Ranks.
        sff: fastff.SFF; takes over rank 0's weights.
        parameters, optimizers: lists by block, then the classifier's; an optimiser is None if nothing of it is trained.
        update: function of blocks' indices, called when their gradients are those of all ranks.
        chains: function that returns ranges of blocks between which no gradient passes, called if ranks share the blocks.
        measure: function that returns the seconds of each chain, called on rank 0 if ranks share the blocks and the user has not placed them.

    Attributes: own (range of this rank's blocks), own_optimizers (their places among the optimisers that are not None), placed (the
    blocks of each rank that shares them), link (to the neighbours, or None), reduction (or None)."""

    def __init__(self, ranks, sff, parameters, optimizers, update, chains, measure):
        self.ranks, self.sff, self.parameters, self.optimizers, self.update = ranks, sff, parameters, optimizers, update
        self.link, self.reduction = None, None
        self.sizes = [sum(p.numel() * p.element_size() for p in block) for block in parameters]  # bytes of gradients
        self.waiting = []  # indices of blocks with complete gradients, less than TOGETHER bytes, that are not updated yet
        self.placed = [range(len(sff.blocks))]
        if ranks.size > 1:
            self._agree()
        if ranks.block_size > 1:
            self.placed = self._placed(chains(), measure)
            self.link = Link(ranks, next(sff.parameters()).device)
        self.own = self.placed[ranks.block_rank]
        made = [index for index, optimizer in enumerate(optimizers) if optimizer is not None]
        self.own_optimizers = [k for k, index in enumerate(made) if index in self.indices]
        if ranks.data_size > 1:
            if ranks.distributed.batch_norm == "synchronized":
                batch_norm.synchronize(sff.model, ranks)
            if ranks.distributed.shard_optimizer:
                self.reduction = ShardedReduction(ranks, optimizers, update, parameters)
            else:
                self.reduction = Reduction(ranks, optimizers, update)

    def _agree(self):
        """Give all ranks the weights of rank 0. Raises ValueError if their networks differ."""
        form = [(name, tuple(t.shape), t.stride(), str(t.dtype)) for name, t in self.sff.state_dict().items()]
        for rank, other in enumerate(self.ranks.gather(form)):
            if other != form:
                raise ValueError(f"sff: expected the same network on every rank, rank {rank} has another")
        self.ranks.broadcast_([*self.sff.parameters(), *self.sff.buffers()], 0)

    def _placed(self, chains, measure):
        ranks = self.ranks
        if ranks.distributed.placement is not None:
            counts = placement.checked(ranks.distributed.placement, chains, ranks.block_size)
            ends = list(itertools.accumulate(counts))
        else:
            counts = placement.balanced(ranks.gather(measure() if ranks.leads else None)[0], ranks.block_size)
            ends = [chains[end - 1].stop for end in itertools.accumulate(counts)]
        return [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]

    @property
    def has_last(self):
        """Whether this rank has the last block, and with it the classifier."""
        return self.own.stop == len(self.sff.blocks)

    @property
    def indices(self):
        """Indices into `parameters` of the groups this rank trains."""
        return [*self.own, *range(len(self.sff.blocks), len(self.parameters))] if self.has_last else [*self.own]

    def send(self, index, part, count):
        """Send a part of a minibatch to the next rank if block `index` is the last of this rank and not of the network."""
        if self.link is not None and index + 1 == self.own.stop and not self.has_last:
            self.link.send(part, count)

    def updated(self, index, weight):
        """Update a block whose gradients are complete on this rank: now, small blocks with Muon together, or when those of all ranks have come."""
        if self.reduction is not None:
            self.reduction.start(index, self.parameters[index], weight)
        elif not isinstance(self.optimizers[index], Muon):
            self.update(index)
        else:
            self.waiting.append(index)
            if sum(self.sizes[i] for i in self.waiting) >= TOGETHER:
                self._update_waiting()

    def _update_waiting(self):
        if self.waiting:
            self.update(*self.waiting)
            self.waiting = []

    def end_step(self):
        """Update the blocks that still wait, or send other ranks what they still have to get of this step."""
        self._update_waiting()
        if self.reduction is not None:
            self.reduction.send()

    def settle(self, index=None):
        """Finish the update of a block that waits for other ranks, or of all blocks if index is None."""
        if self.reduction is not None:
            self.reduction.settle(index)

    def synchronize(self):
        """Finish all updates, average the statistics of batch norm, and give every rank the weights of all blocks."""
        self.settle()
        ranks = self.ranks
        if ranks.data_size > 1:  # heads use the statistics of their own rank in any case
            local = [self.sff.heads, *([self.sff.blocks] if ranks.distributed.batch_norm == "local" else [])]
            ranks.mean_([b for modules in local for index in self.own for b in modules[index].buffers()])
        if ranks.block_size > 1:
            for rank, own in enumerate(self.placed):
                ranks.broadcast_([t for index in own for t in self._tensors(index)], rank, ranks.block_group)

    def _tensors(self, index):
        """Parameters and buffers of a block; those of the classifier belong to the last one."""
        sff = self.sff
        modules = [sff.blocks[index], sff.heads[index]]
        if sff.readout and index + 1 == len(sff.blocks):
            modules.append(sff.readout[0])
        return [t for module in modules for t in (*module.parameters(), *module.buffers())]

    def state_kept(self, optimizer, saved):
        """Return the part of an optimiser's saved state that this rank keeps."""
        if not isinstance(self.reduction, ShardedReduction):
            return saved
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kept = {index: value for index, value in saved["state"].items() if self.reduction.owns(parameters[index])}
        return saved | {"state": kept}

    def __str__(self):
        ranks = self.ranks
        text = f"{ranks.size} ranks: {ranks.data_size} share each minibatch"
        if ranks.distributed.shard_optimizer:
            text += " and the optimiser's state"
        if ranks.block_size > 1:
            text += f", {ranks.block_size} share the blocks ({', '.join(str(len(own)) for own in self.placed)})"
        return f"{text}; batch norm {ranks.distributed.batch_norm}"
