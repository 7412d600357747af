"""One minibatch through the blocks of an SFF: forward, local loss, backward and update block by block.

For each block: forward pass; goodness, loss, gradient and next input in one op; the block's own backward pass with that gradient; optimiser
step; gradients and activations released. No gradient crosses a cut, nothing waits for the device. Source: Krutsylo 2025, arXiv 2501.03176.

Peak memory is that of the largest block. With micro-batches a block sees them one after the other before the next block starts, so that
between blocks only the tensors at the cut are held for the whole minibatch.

Window w (a choice of this project): the loss of block l also trains the w - 1 blocks before it. The blocks of a window keep their graphs. The
gradient of a loss goes back through them to their inputs alone; a block's parameters get the sum of all gradients that reach it in one backward
pass, when the last has come, and then the block is updated and freed.
"""

import contextlib
import math

import torch

from fastff.nn.visit import detached
from fastff.ops.gradients import GroupNormGuard
from fastff.parallel.link import Part

UNIT = 64  # samples: gradients of ranks with different numbers of samples are weighted in this unit, so that usual numbers scale exactly


class LocalStep:
    """Args:
        blocks: LocalBlocks, in order.
        window: of the losses.
        micro_batches: parts that a minibatch is cut into.
        autocast: a function that makes the context of forward passes, or None.
        scalers: a GradScaler or None for each block.
        place: fastff.training.place.Place, which holds this rank's blocks and is told when the gradients of a block are complete.
        classifier: trained on the last block's detached output, or None.

    `trained` (a set of block indices), `last` (the last block that runs) and `frozen` (the first blocks, of which only the heads may train)
    may change between minibatches."""

    def __init__(self, blocks, window, micro_batches, autocast, scalers, place, classifier=None):
        self.blocks, self.window, self.micro_batches = blocks, window, micro_batches
        self.autocast, self.scalers, self.place, self.classifier = autocast, scalers, place, classifier
        self.trained, self.last, self.frozen = set(range(len(blocks))), len(blocks) - 1, 0

    def run(self, images, target):
        """(losses [L], right answers [L], samples) of a minibatch; None for both tensors on ranks that get theirs from another."""
        parts = self.split(images, target) if self.place.ranks.feeds else self._received()
        if self.window == 1:
            for index in self.place.own:
                if index <= self.last:
                    parts = self.train_block(index, parts)
            if self.place.has_last:
                self._train_classifier(parts)
        else:
            for number, part in enumerate(parts):
                self._train_in_windows(part, update=number + 1 == len(parts))
        return self.losses, self.correct, self.samples

    def split(self, images, target):
        """The minibatch as a list of Parts."""
        if target is None:  # positive images, then as many negative ones: so is each part
            halves = [half.split(-(-len(half) // self.micro_batches)) for half in images.chunk(2)]
            parts = [images] if self.micro_batches == 1 else list(map(torch.cat, zip(*halves, strict=True)))
            cut = [(part, None) for part in parts]
        else:
            size = -(-len(images) // self.micro_batches)
            cut = list(zip(images.split(size), target.split(size), strict=True))
        self.begin(images, len(images), len(cut))
        return [Part((x,), y, len(x) / len(images), len(images)) for x, y in cut]

    def _received(self):
        for number, (part, parts) in enumerate(self.place.link.minibatch()):
            if number == 0:
                self.begin(part.alive[0], part.samples, parts)
            yield part

    def begin(self, like, samples, parts):
        """Set losses and right answers to zero, for a minibatch of so many samples in so many parts."""
        self.samples, self.parts = samples, parts
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.losses, self.correct = torch.zeros(2, len(self.blocks), device=like.device, dtype=dtype)
        self.weight = 1 if self.place.reduction is None else samples / UNIT

    def train_block(self, index, parts):
        """Train one block; parts (a list, overwritten, or an iterator) become the next block's."""
        self.place.settle(index)
        done = parts if isinstance(parts, list) else []
        for number, part in enumerate(parts):
            visit, following = self.visit(index, part)
            part = part._replace(alive=following)
            if done is parts:
                done[number] = part
            else:
                done.append(part)
            self.place.send(index, part, self.parts)
            del part, following
            if visit is not None:
                visit.backward()
                del visit
        if index in self.trained:
            self.place.updated(index, self.weight)
        return done

    def _train_in_windows(self, part, update):
        window = []
        for index in range(self.last + 1):
            self.place.settle(index)
            if index in self.trained and index > self.frozen:
                part = part._replace(alive=tuple(map(_requiring_grad, part.alive)))
            visit, following = self.visit(index, part)
            part = part._replace(alive=following)
            if visit is not None:
                window.append((index, visit))
                self._reach_back(window)
                if len(window) == self.window:
                    self._finish(*window.pop(0), update)
        while window:
            self._finish(*window.pop(0), update)
        self._train_classifier([part], update)

    def visit(self, index, part):
        """(the block's Visit, or None where it is not trained; the next block's inputs)."""
        block = self.blocks[index]
        if index not in self.trained:
            with torch.no_grad():
                with self._context():
                    main, *others = block.outputs(*part.alive)
                return None, (block.next_input(main), *others)
        scale = self._grad_scale(index, part)
        visit = block.visit(part.alive, part.target, scale, self.autocast)
        self.losses[index] += visit.step.loss * part.share
        if part.target is None:
            self.correct[index] = math.nan
        else:
            self.correct[index] += (visit.step.goodness.argmax(1) == part.target).sum()
        following, visit.following = visit.following, None
        return visit, following

    def _context(self):
        return contextlib.nullcontext() if self.autocast is None else self.autocast()

    def _grad_scale(self, index, part):
        """What multiplies a block's gradients: the shares of the micro-batch and the rank, times the scaler's factor; None for 1."""
        scaler, weight = self.scalers[index], part.share * self.weight
        if weight == 1 and scaler is None:
            return None
        scale = torch.full((), weight, device=self.losses.device, dtype=self.losses.dtype)
        return scale if scaler is None else scaler.scale(scale)

    def _reach_back(self, window):
        """Carry the newest loss's gradient through the window: into the outputs of every block before, but into no parameter yet."""
        (source, newest), *_ = reversed(window)
        grads = newest.input_gradients() if len(window) > 1 else None
        for position in range(len(window) - 2, -1, -1):
            index, visit = window[position]
            ratio = self._scale_ratio(index, source)
            visit.add(grads if ratio is None else [None if g is None else g * ratio for g in grads])
            if position > 0:
                grads = visit.through(grads)

    def _scale_ratio(self, to, source):
        if self.scalers[to] is None:
            return None
        one = torch.ones((), device=self.losses.device)
        return self.scalers[to].scale(one) / self.scalers[source].scale(one)

    def _finish(self, index, visit, update):
        visit.backward(self.place.parameters[index])
        if update:
            self.place.updated(index, self.weight)

    def _train_classifier(self, parts, update=True):
        if self.classifier is None:
            return
        index = len(self.blocks)
        self.place.settle(index)
        for part in parts:
            with torch.enable_grad(), self._context(), GroupNormGuard():
                logits = self.classifier(*detached(part.alive))[0]
            loss = torch.nn.functional.cross_entropy(logits.to(self.losses.dtype), part.target)
            (loss * part.share * self.weight).backward()
        if update:
            self.place.updated(index, self.weight)


def _requiring_grad(value):
    return value.requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
