"""One minibatch through the blocks of an SFF: forward, local loss, backward and update, segment by segment.

A step consists of segments (fastff/plan.py): losses, and the blocks that each of them trains. For a segment of one block: forward pass; goodness,
loss, gradient and next input in one op; the block's own backward pass with that gradient; optimiser step; gradients and activations released. In
a longer segment the blocks before the last run forward without a loss and keep their graphs; then the loss's gradient goes back through them,
and each is updated and released as soon as it has passed. Nothing waits for the device. Source: Krutsylo 2025, arXiv 2501.03176.

Peak memory is that of the largest segment. With micro-batches, or where a plan lets a segment take the minibatch in parts, the segment sees them
one after the other before the next segment starts, so that between segments only the tensors at the cut are held for the whole minibatch.

Where segments overlap (windows), a block gets gradients of several losses. The gradient of each goes back to the inputs of the blocks alone; a
block's parameters get the sum of all gradients that reach it in one backward pass, when the last has come.
"""

import functools
import itertools
import math

import torch

from fastff.nn.visit import detached
from fastff.ops.gradients import GroupNormGuard
from fastff.parallel.link import Part
from fastff.training.engine import loss_dtype

UNIT = 64  # samples: gradients of ranks with different numbers of samples are weighted in this unit, so that usual numbers scale exactly


class Route:
    """The order in which a step of these segments goes through blocks.

    Attributes: chains (successive ranges of blocks; gradients pass between the blocks of one, and not from one to another), parts ({first
    block of a chain: parts in which the chain takes a minibatch}), losses ({block: the Segment of its loss}), last_loss ({block: the last block
    whose loss trains it}). Blocks not in last_loss only run forward."""

    def __init__(self, segments, blocks):
        self.losses = {segment.last: segment for segment in segments}
        self.last_loss = {i: s.last for s in sorted(segments) for i in range(s.first, s.last + 1)}
        inner = {i for s in segments for i in range(s.first + 1, s.last + 1)}  # joined to the block before
        end = max(self.losses, default=-1) + 1
        starts = [i for i in blocks if i < end and i not in inner]
        ends = [*starts[1:], min(end, blocks.stop)] if starts else []
        self.chains = [range(start, stop) for start, stop in zip(starts, ends, strict=True)]
        self.parts = {c.start: max((s.parts for s in segments if s.last in c), default=1) for c in self.chains}


route_of = functools.lru_cache(256)(Route)


class LocalStep:
    """Takes minibatches through the blocks of an SFF.

    Args:
        blocks: LocalBlocks, in order.
        micro_batches: parts that a minibatch is cut into.
        autocast: a function that makes the context of forward passes.
        scalers: a GradScaler or None for each block.
        place: fastff.training.place.Place, which holds this rank's blocks and is told when the gradients of a block are complete.
        classifier: trained on the last block's detached output, or None.
    """

    def __init__(self, blocks, micro_batches, autocast, scalers, place, classifier=None):
        self.blocks, self.micro_batches = blocks, micro_batches
        self.autocast, self.scalers, self.place, self.classifier = autocast, scalers, place, classifier
        self.scales = {}  # tensors of `_grad_scale`

    def run(self, segments, images, target):
        """(losses [L], right answers [L], samples) of a minibatch; None for both tensors on ranks that get theirs from another.

        segments: a tuple of fastff.plan.Segment."""
        route = self.route(segments)
        parts = self.split(images, target) if self.place.ranks.feeds else self._received()
        del images, target
        for chain in route.chains:
            parts = self.train(route, chain, parts)
        if self.place.has_last:
            self._train_classifier(parts)
        self.place.end_step()
        return *self._statistics(), self.samples

    def route(self, segments):
        """The Route of these segments through this rank's blocks."""
        return route_of(segments, self.place.own)

    def split(self, images, target):
        """The minibatch as a list of Parts."""
        self._begin(images, len(images))
        parts = in_parts([Part((images,), target, 1.0, len(images))], self.micro_batches)
        self.parts = len(parts)
        return parts

    def _received(self):
        minibatch = self.place.link.minibatch()
        part, self.parts = next(minibatch)
        self._begin(part.alive[0], part.samples)
        return itertools.chain([part], (part for part, _ in minibatch))

    def _begin(self, like, samples):
        """Forget the results of the step before, for a minibatch of so many samples."""
        self.samples = samples
        self.zero, self.seen = like.new_zeros((), dtype=loss_dtype(like)), {}
        self.weight = 1 if self.place.reduction is None else samples / UNIT

    def train(self, route, chain, parts):
        """Train a chain of blocks; parts (a list, which is emptied, or an iterator) become those of the block behind it."""
        count = self.micro_batches * route.parts[chain.start]
        if self.samples < 4 * count:  # batch norm learns nothing from a single sample of one position
            count = self.micro_batches
        if count != self.parts:
            parts = in_parts(parts if isinstance(parts, list) else list(parts), count)
            self.parts = len(parts)
        done = []
        while len(done) < self.parts:
            part = parts.pop(0) if isinstance(parts, list) else next(parts)
            done.append(self._train_part(route, chain, part, update=len(done) + 1 == self.parts))
        return done

    def _train_part(self, route, chain, part, update):
        """Train on one micro-batch; the blocks are updated if it is the last. Returns the part for the block behind the chain."""
        waiting = []  # [(block, visit)] of those that have not got all their gradients
        for index in chain:
            self.place.settle(index)
            if index > chain.start:
                part = part._replace(alive=tuple(map(_requiring_grad, part.alive)))
            visit, following = self.visit(route, index, part)
            part = part._replace(alive=following)
            self.place.send(index, part, self.parts)
            del following
            if visit is not None:
                waiting.append((index, visit))
                del visit
                if index in route.losses:
                    self._back(route, route.losses[index], waiting, update)
        return part

    def visit(self, route, index, part):
        """(the block's Visit, or None where it is not trained; the next block's inputs)."""
        block = self.blocks[index]
        if index not in route.last_loss:
            with torch.no_grad():
                with self.autocast():
                    main, *others = block.outputs(*part.alive)
                return None, (block.next_input(main), *others)
        if index in route.losses:
            visit = block.visit(part.alive, part.target, self._grad_scale(index, part), self.autocast)
            self.seen.setdefault(index, []).append((visit.step.loss, visit.step.goodness, part.share, part.target))
        else:
            visit = block.visit(part.alive, None, autocast=self.autocast, has_loss=False)
        following, visit.following = visit.following, None
        return visit, following

    def _statistics(self):
        """(losses [L], right answers [L]): of all blocks at once at the end of a step, since on a GPU each operator is a launch."""
        losses, correct = ([self.zero] * len(self.blocks) for _ in range(2))
        alike = {}  # {(number of a part, its share of the minibatch): [(block, loss, goodness, target)]}
        for index, seen in self.seen.items():
            for number, (loss, goodness, share, target) in enumerate(seen):
                alike.setdefault((number, share), []).append((index, loss, goodness, target))
        for (number, share), results in sorted(alike.items()):
            indices, own, goodness, (target, *_) = zip(*results, strict=True)
            own = [loss.to(self.zero.dtype).reshape(()) for loss in own]
            if share != 1:
                own = torch._foreach_mul(own, share)
            if target is None:
                right = [self.zero.new_full((), math.nan)] * len(own)
            else:
                right = (torch.stack(goodness).argmax(2) == target).sum(1).to(self.zero.dtype).unbind()
            if number > 0:
                own = torch._foreach_add(own, [losses[index] for index in indices])
                right = torch._foreach_add(right, [correct[index] for index in indices])
            for index, loss, count in zip(indices, own, right, strict=True):
                losses[index], correct[index] = loss, count
        self.seen = {}
        return torch.stack(losses + correct).view(2, -1).unbind()

    def _grad_scale(self, index, part):
        """What multiplies a block's gradients: the shares of the micro-batch and the rank, times the scaler's factor; None for 1."""
        scaler, weight = self.scalers[index], part.share * self.weight
        if weight == 1 and scaler is None:
            return None
        key = weight, self.zero.device, self.zero.dtype
        if key not in self.scales:  # a launch, and a tensor that a recorded step reads
            self.scales[key] = torch.full((), weight, device=self.zero.device, dtype=self.zero.dtype)
        return self.scales[key] if scaler is None else scaler.scale(self.scales[key])

    def _back(self, route, segment, waiting, update):
        """Carry a loss's gradient back through its segment. Blocks that no later loss trains get their parameters' gradients, and are done."""
        grads, source = None, segment.last  # with respect to what block `source` gets, times its scaler's factor
        kept = []
        while waiting and waiting[-1][0] >= segment.first:
            index, visit = waiting.pop()
            done, goes_on = route.last_loss[index] == segment.last, index > segment.first
            alone = index == segment.last or not visit.reached  # whether this loss is the first to reach the block
            if grads is not None:
                ratio = self._scale_ratio(index, source)
                own = grads if ratio is None else [None if g is None else g * ratio for g in grads]
                if goes_on and not (alone and done):
                    grads = visit.through(grads)
                visit.add(own)
                del own
            elif goes_on and not done:
                grads, source = visit.input_gradients(), index
            if not done:
                kept.insert(0, (index, visit))
                continue
            inputs = goes_on and alone
            found = visit.backward(self.place.parameters[index], inputs)
            if inputs:
                grads, source = found, index
            del visit, found
            if update and self.place.parameters[index]:
                self.place.updated(index, self.weight)
        waiting += kept

    def _scale_ratio(self, to, source):
        if self.scalers[to] is None:
            return None
        one = torch.ones((), device=self.zero.device)
        return self.scalers[to].scale(one) / self.scalers[source].scale(one)

    def _train_classifier(self, parts):
        if self.classifier is None:
            return
        index = len(self.blocks)
        self.place.settle(index)
        for part in parts:
            with torch.enable_grad(), self.autocast(), GroupNormGuard():
                logits = self.classifier(*detached(part.alive))[0]
            loss = torch.nn.functional.cross_entropy(logits.to(self.zero.dtype), part.target)
            (loss * part.share * self.weight).backward()
        self.place.updated(index, self.weight)


def in_parts(parts, count):
    """The list `parts`, overwritten with the same minibatch in so many parts: as it is where the tensors alive have not one row for each sample."""
    part, sizes = parts[0], [round(part.share * part.samples) for part in parts]
    rows = all(
        len(t) == size for p, size in zip(parts, sizes, strict=True) for t in p.alive if isinstance(t, torch.Tensor)
    )
    if len(parts) == count or not rows:
        return parts
    halves = 1 if part.target is not None else 2  # positive images, then as many negative ones: so is each part
    size = -(-sum(sizes) // halves // count)

    def cut(values):
        if not isinstance(values[0], torch.Tensor):
            return itertools.repeat(values[0])
        by_half = zip(*(value.chunk(halves) for value in values), strict=True)
        pieces = [joined(half).split(size) for half in by_half]
        return map(joined, zip(*pieces, strict=True))

    def joined(tensors):
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    targets = cut([p.target for p in parts])
    alive = zip(*(cut(values) for values in zip(*(p.alive for p in parts), strict=True)), strict=False)
    samples = part.samples
    parts[:] = [Part(a, y, len(a[0]) / samples, samples) for a, y in zip(alive, targets, strict=False)]
    return parts


def _requiring_grad(value):
    return value.requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
