"""Trainer: the step that updates a block and frees it before the next one starts.

For each block: forward, goodness_step on its output (loss, gradient, next input in one op), the block's own backward with that gradient,
optimiser step, gradients and activations released. No gradient crosses a cut, nothing waits for the device. Source: Krutsylo 2025.

Peak memory is that of the largest block. With micro-batches a block sees them one after the other before the next block starts, so that
between blocks only the cut's tensors are held for the whole batch.

Window w (a choice of this project): the loss of block l also trains the w - 1 blocks before it. The blocks of a window keep their graphs;
a block is updated and freed when the last loss that reaches it has come, with one backward for the sum of these gradients.
"""

import torch

from fastff.nn.tail import Seed
from fastff.sff import SFF
from fastff.training import optim
from fastff.training.loop import Loop, loss_dtype


class _Visit:
    """One block on one micro-batch, before its backward: inputs and outputs with their graph, and the gradients of the outputs."""

    def __init__(self, index, inputs, outputs, *grads):
        self.index, self.inputs, self.outputs = index, inputs, outputs
        self.grads = [*grads, *[None] * (len(outputs) - len(grads))]

    def add(self, grads):
        self.grads = [
            new if old is None else old if new is None else old + new
            for old, new in zip(self.grads, grads, strict=True)
        ]

    def pairs(self):
        return [(o, g) for o, g in zip(self.outputs, self.grads, strict=True) if g is not None and o.requires_grad]

    def backward(self, parameters):
        if pairs := self.pairs():
            torch.autograd.backward(*zip(*pairs, strict=True), inputs=parameters)

    def seed(self):
        """A scalar to call backward on, which alone holds the graph then; None where nothing is to be done."""
        if not (pairs := self.pairs()):
            return None
        outputs, grads = zip(*pairs, strict=True)
        return Seed.apply(list(grads), *outputs)


def _detached(values):
    return tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in values)


class Trainer(Loop):
    """Trains an SFF block by block.

    Args beyond those of Loop (lr_schedule, micro_batches, amp, clip_grad_norm, compile, cuda_graph):
        sff: fastff.SFF.
        optimizer: makes one optimiser for each block from its parameter groups; default AdamW, fused, 4e-3.
        schedule: "all" trains every block in every minibatch (the paper's); "greedy" one block after the other, `epochs` of fit each.
        window: overrides sff.window.
        frozen: the first blocks that are not trained and run in eval mode (transfer).
        train_frozen_heads: whether the heads of frozen blocks learn (they vote, so other classes or data need it).
    """

    def __init__(
        self, sff, optimizer=None, *, schedule="all", window=None, frozen=0, train_frozen_heads=False, **options
    ):
        if not isinstance(sff, SFF):
            raise TypeError(f"sff: expected fastff.SFF (wrap the model in it first), got {type(sff).__name__}")
        if schedule not in ("all", "greedy"):
            raise ValueError(f"schedule: expected 'all' or 'greedy', got {schedule!r}")
        if not isinstance(frozen, int) or not 0 <= frozen < len(sff.blocks):
            raise ValueError(f"frozen: expected 0 to {len(sff.blocks) - 1} blocks, got {frozen!r}")
        self.sff, self.schedule, self.frozen = sff, schedule, frozen
        self.window = sff.window if window is None else window
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window: expected a whole number of at least 1, got {window!r}")
        if self.window > 1 and schedule == "greedy":
            raise ValueError(
                f"window: expected 1 with schedule='greedy', which trains one block alone, got {self.window}"
            )
        make = optimizer or optim.adamw(optim.LOCAL_LR)
        for index in range(frozen):
            still = sff.blocks[index].parameters() if train_frozen_heads else sff.block_parameters(index)
            for parameter in still:
                parameter.requires_grad_(False)
        self.parameters = [[p for p in sff.block_parameters(i) if p.requires_grad] for i in range(len(sff.blocks))]
        self.block_optimizers = [optim.build(make, parameters) for parameters in self.parameters]
        tail = sff.readout[0] if sff.readout else None
        self.readout_optimizer = optim.build(make, tail.parameters()) if tail is not None else None
        self.active = frozen  # the block in training, for the greedy schedule
        names = [block.name for block in sff.blocks]
        optimizers = [o for o in (*self.block_optimizers, self.readout_optimizer) if o is not None]
        super().__init__(sff, names, optimizers, **options)
        self.forwards = [block.compiled(dynamic=False) if self.compile else block for block in sff.blocks]
        self.opened = [None if body is None else self._compiled(body.forward) for body in sff.bodies]
        tails = [sff.tail(index) for index in range(len(sff.blocks))]
        self.bodies = [None if tail is None else self._compiled(tail.body) for tail in tails]
        self.scalers = [self.make_scaler() for _ in sff.blocks]

    def _compiled(self, module):
        return torch.compile(module, dynamic=False) if self.compile else module

    @property
    def phases(self):
        """Times that fit goes through its epochs: once, or once a block."""
        return len(self.sff.blocks) - self.frozen if self.schedule == "greedy" else 1

    def start_phase(self, phase):
        self.active = self.frozen + phase

    def train_mode(self):
        self.sff.train()
        still = self.active if self.schedule == "greedy" else self.frozen
        for block in self.sff.blocks[:still]:
            block.eval()

    def run_step(self, images, target):
        size = -(-len(images) // self.micro_batches)
        images, target = images.split(size), target.split(size)
        weights = [len(t) / sum(map(len, target)) for t in target]
        self._losses, self._correct = torch.zeros(
            2, len(self.sff.blocks), device=target[0].device, dtype=loss_dtype(images[0])
        )
        if self.window == 1:
            self._one_block_at_a_time(images, target, weights)
        else:
            for i, (x, y, weight) in enumerate(zip(images, target, weights, strict=True)):
                self._sliding_window(x, y, weight, update=i + 1 == len(target))
        return self._losses, self._correct

    def recorded_state(self):
        return self.active

    def _trained(self, index):
        return self.block_optimizers[index] is not None and (self.schedule == "all" or index == self.active)

    def _last(self):
        return self.active if self.schedule == "greedy" else len(self.sff.blocks) - 1

    def _one_block_at_a_time(self, images, target, weights):
        alive = [(x,) for x in images]
        del images
        for index in range(self._last() + 1):
            for part, (y, weight) in enumerate(zip(target, weights, strict=True)):
                visit, alive[part] = self._visit(index, alive[part], y, weight)
                seed = None if visit is None else visit.seed()
                del (
                    visit
                )  # outputs and gradients, before the backward; with the graph all is gone before the next block starts
                if seed is not None:
                    seed.backward()
                    del seed
            if self._trained(index):
                self._update(index)
        self._train_readout(alive, target, weights)

    def _sliding_window(self, x, y, weight, update):
        alive, window = (x,), []
        for index in range(self._last() + 1):
            visit, alive = self._visit(index, alive, y, weight, keep=index > self.frozen)
            if visit is not None:
                window.append(visit)
                self._reach_back(window)
                if len(window) == self.window:
                    self._finish(window.pop(0), update)
        while window:
            self._finish(window.pop(0), update)
        self._train_readout([alive], [y], [weight], update)

    def _visit(self, index, alive, target, weight, keep=False):
        """Forward and goodness step of a block. Returns its _Visit (None if it is not trained) and the next block's inputs."""
        trained = self._trained(index)
        if keep and trained:
            alive = tuple(
                t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in alive
            )
        body = self.sff.bodies[index] if trained else None
        body = body if body is not None and body.ready() else None
        tail = self.sff.tail(index) if body is not None and self.window == 1 else None
        if tail is not None and tail.ready():
            return self._visit_tail(index, tail, alive, target, weight)
        with torch.set_grad_enabled(trained), self.autocast():
            outputs = (self.forwards if body is None else self.opened)[index](*alive)
        return self._local_step(index, alive, outputs, target, weight)

    def _local_step(self, index, alive, outputs, target, weight):
        """The goodness step on a block's outputs, or where it is not trained just the next block's inputs."""
        head, main, visit = self.sff.heads[index], outputs[0].detach(), None
        if self._trained(index):
            step = head.local_step(main, target, self.sff.normalize, grad_scale=self._grad_scale(index, weight, main))
            self._count(index, step, target, weight)
            visit = _Visit(index, alive, outputs, step.grad_x)
            main = main if step.normalized is None else step.normalized
        else:
            with torch.no_grad():
                (main,) = self.sff.next_input((main,), head)
        return visit, (main, *_detached(outputs[1:]))

    def _visit_tail(self, index, tail, alive, target, weight):
        """The same for a block that ends in a fused tail. A body of one convolution needs no graph: only its parameters learn."""
        single = tail.single if not self.compile and self.amp is None else None
        with torch.set_grad_enabled(single is None), self.autocast():
            y, residual, *others = self.bodies[index](*alive)
        if not tail.fits(y, residual):
            with torch.enable_grad(), self.autocast():
                outputs = self.forwards[index](*alive) if single is not None else (tail.finish(y, residual), *others)
            return self._local_step(index, alive, outputs, target, weight)
        scale = self._grad_scale(index, weight, y)
        step = tail.local_step(self.sff.heads[index], y, residual, target, self.sff.normalize, scale)
        self._count(index, step, target, weight)
        following = (step.normalized, *_detached(others))
        if single is None:
            return _Visit(index, alive, (y, residual, *others), step.grad_y, step.grad_residual), following
        del y, residual, others
        with torch.no_grad(), self.autocast():
            single.add_gradients(step.grad_y, alive[0])
        return None, following

    def _count(self, index, step, target, weight):
        self._losses[index] += step.loss * weight
        self._correct[index] += (step.goodness.argmax(1) == target).sum()

    def _grad_scale(self, index, weight, like):
        """What multiplies a block's gradients: the micro-batch's share, times the scaler's factor; None for 1."""
        scaler = self.scalers[index]
        if weight == 1 and scaler is None:
            return None
        scale = torch.full((), weight, device=like.device, dtype=self._losses.dtype)
        return scale if scaler is None else scaler.scale(scale)

    def _reach_back(self, window):
        """Carry the newest loss's gradient through the window: into the outputs of every block before, but into no parameter yet."""
        newest = window[-1]
        grads = newest.grads
        for visit, before in zip(reversed(window[1:]), reversed(window[:-1]), strict=True):
            pairs = [(o, g) for o, g in zip(visit.outputs, grads, strict=True) if g is not None and o.requires_grad]
            inputs = [t for t in visit.inputs if isinstance(t, torch.Tensor) and t.requires_grad]
            if not pairs or not inputs:
                return
            outputs, weights = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True))
            grads = [next(found) if any(t is i for i in inputs) else None for t in visit.inputs]
            grads[0] = self._through_normalisation(before, grads[0])
            ratio = self._scale_ratio(before.index, visit.index)
            if ratio is not None:
                grads = [None if g is None else g * ratio for g in grads]
            before.add(grads)

    def _through_normalisation(self, visit, grad):
        if grad is None or self.sff.normalize is None:
            return grad
        with torch.enable_grad():
            main = visit.outputs[0].detach().requires_grad_()
            (normalised,) = self.sff.next_input((main,), self.sff.heads[visit.index])
        return torch.autograd.grad(normalised, main, grad)[0]

    def _scale_ratio(self, to, source):
        if self.scalers[to] is None:
            return None
        one = torch.ones((), device=self.device)
        return self.scalers[to].scale(one) / self.scalers[source].scale(one)

    def _finish(self, visit, update):
        own = [p for p in self.sff.blocks[visit.index].parameters() if p.requires_grad]
        if own:
            visit.backward(own)
        if update:
            self._update(visit.index)

    def _update(self, index):
        self.optimizer_step(self.block_optimizers[index], self.scalers[index], self.parameters[index])

    def _train_readout(self, alive, target, weights, update=True):
        if self.readout_optimizer is None or self.schedule == "greedy":
            return
        tail = self.sff.readout[0]
        for inputs, y, weight in zip(alive, target, weights, strict=True):
            with self.autocast():
                logits = tail(*(t.detach() if isinstance(t, torch.Tensor) else t for t in inputs))[0]
            (torch.nn.functional.cross_entropy(logits.to(self._losses.dtype), y) * weight).backward()
        if update:
            self.optimizer_step(self.readout_optimizer, None, list(tail.parameters()))

    @torch.no_grad()
    def scores(self, images):
        """{"vote": [B, K], "block 0": ..., "readout": ...}: what evaluate counts."""
        goodness, alive = [], (images,)
        for block, head in zip(self.forwards, self.sff.heads, strict=True):
            with self.autocast():
                alive = block(*alive)
            goodness.append(head(alive[0]))
            alive = self.sff.next_input(alive, head)
        found = {"vote": self.sff.votes(goodness)} | {f"block {i}": g for i, g in enumerate(goodness)}
        if self.sff.readout:
            found["readout"] = self.sff.readout[0](*alive)[0]
        return found
