"""Trainer: the step that updates a block and frees it before the next one starts.

For each block: forward, goodness_step on its output (loss, gradient, next input in one op), the block's own backward with that gradient,
optimiser step, gradients and activations released. No gradient crosses a cut, nothing waits for the device. Source: Krutsylo 2025.

Peak memory is that of the largest block. With micro-batches a block sees them one after the other before the next block starts, so that
between blocks only the cut's tensors are held for the whole batch.

Window w (a choice of this project): the loss of block l also trains the w - 1 blocks before it. The blocks of a window keep their graphs;
a block is updated and freed when the last loss that reaches it has come, with one backward for the sum of these gradients.

Several devices (fastff/parallel): a block's gradients are summed over the data-parallel ranks while the next blocks compute, and its update waits
for them at its next forward pass at the latest. Where ranks share the blocks, each trains its own and sends the next input on before its backward.
"""

import copy

import torch

from fastff.nn.tail import Seed
from fastff.parallel import placement
from fastff.parallel.link import Part
from fastff.parallel.ranks import Distributed, Ranks
from fastff.sff import SFF
from fastff.training import optim
from fastff.training.engine import Options, StepResult, loss_dtype
from fastff.training.place import Place
from fastff.training.session import Session

UNIT = 64  # samples: gradients of ranks with different numbers of samples are weighted in this unit, so that usual numbers scale exactly


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


class Trainer(Session):
    """Trains an SFF block by block.

    Args:
        sff: fastff.SFF.
        optimizer: function that makes the optimiser of a block from its parameter groups; default AdamW, fused, 4e-3.
        schedule: "all" trains every block in every minibatch (as in the paper); "greedy" one block after the other, for `epochs` of fit each.
        window: overrides sff.window.
        frozen: number of first blocks that are not trained and run in evaluation mode (transfer).
        train_frozen_heads: whether the heads of frozen blocks learn (they vote, so other classes or data need it).
        distributed: None; "data" (ranks share every minibatch), "block" (ranks share the blocks) or a fastff.Distributed, with one process
            for each device (torchrun). Ranks that share blocks need window=1. A minibatch given to step or by a loader is this rank's share,
            except that a fastff Loader is shared out; of the ranks that share a replica's blocks all but the first may give None.
        lr_schedule: "cosine" (with warm-up over the first 5 % of fit), "constant", or a function of progress in 0..1.
        options: of fastff.training.engine.Options: micro_batches, amp, clip_grad_norm, compile, cuda_graph.

    Attributes: engine (the LocalEngine), state, history, correct, names, optimizers (those of the blocks, then the classifier's).

    Raises TypeError, ValueError.
    """

    def __init__(
        self,
        sff,
        optimizer=None,
        *,
        schedule="all",
        window=None,
        frozen=0,
        train_frozen_heads=False,
        distributed=None,
        lr_schedule="cosine",
        **options,
    ):
        if not isinstance(sff, SFF):
            raise TypeError(f"sff: expected fastff.SFF (wrap the model in it first), got {type(sff).__name__}")
        if schedule not in ("all", "greedy"):
            raise ValueError(f"schedule: expected 'all' or 'greedy', got {schedule!r}")
        if not isinstance(frozen, int) or not 0 <= frozen < len(sff.blocks):
            raise ValueError(f"frozen: expected 0 to {len(sff.blocks) - 1} blocks, got {frozen!r}")
        window = sff.window if window is None else window
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window: expected a whole number of at least 1, got {window!r}")
        if window > 1 and schedule == "greedy":
            raise ValueError(f"window: expected 1 with schedule='greedy', which trains one block alone, got {window}")
        options = Options(**options)
        ranks = _ranks(Distributed.of(distributed), next(sff.parameters()).device, window, schedule, options)
        for index in range(frozen):
            still = sff.blocks[index].parameters() if train_frozen_heads else sff.block_parameters(index)
            for parameter in still:
                parameter.requires_grad_(False)
        make = optimizer or optim.adamw(optim.LOCAL_LR)
        super().__init__(LocalEngine(sff, make, options, ranks, schedule, window, frozen), options, lr_schedule)


def _ranks(distributed, device, window, schedule, options):
    """Return the Ranks that train together. Raises ValueError for what they cannot do."""
    if distributed is None:
        return Ranks()
    if options.cuda_graph:
        raise ValueError("cuda_graph: expected False with distributed, whose ranks wait for each other, got True")
    if distributed.shard_optimizer and (options.clip_grad_norm or options.amp == "fp16"):
        text = "expected neither clip_grad_norm nor amp 'fp16' beside it: both look at all gradients of a block"
        raise ValueError(f"shard_optimizer: {text}")
    ranks = Ranks(distributed, device)
    if ranks.block_size > 1 and (window > 1 or schedule != "all"):
        got = f"window {window}" if window > 1 else f"schedule {schedule!r}"
        raise ValueError(f"distributed: expected window=1 and schedule='all' where ranks share the blocks, got {got}")
    return ranks


class LocalEngine:
    """Block-local training of an SFF; engine.py describes the interface.

    Args: make makes the optimiser of a block from its parameter groups; the others are those of Trainer, checked.

    Attributes beyond the interface: parameters (lists by block, then the classifier's), block_optimizers (optimiser or None by block),
    classifier_optimizer (or None), forwards (blocks), opened, bodies (their parts for training, or None).
    """

    def __init__(self, sff, make, options, ranks, schedule, window, frozen):
        self.sff, self.module, self.schedule, self.window, self.frozen = sff, sff, schedule, window, frozen
        self.options, self.ranks, self.device = options, ranks, next(sff.parameters()).device
        self.micro_batches, self.amp, self.compile = options.micro_batches, options.amp, options.compile
        self.names = [block.name for block in sff.blocks]
        self.phase, self.phases = 0, len(sff.blocks) - frozen if schedule == "greedy" else 1
        self.parameters = [[p for p in sff.block_parameters(i) if p.requires_grad] for i in range(len(sff.blocks))]
        if sff.readout:
            self.parameters.append([p for p in sff.readout[0].parameters() if p.requires_grad])
        every = [optim.build(make, parameters) for parameters in self.parameters]
        self.block_optimizers = every[: len(sff.blocks)]
        self.classifier_optimizer = every[-1] if sff.readout else None
        self.optimizers = [optimizer for optimizer in every if optimizer is not None]
        self.optimizer_step = optim.Updates(options.clip_grad_norm)
        self.scalers = [options.scaler(self.device) for _ in sff.blocks]
        self.forwards = [block.compiled(dynamic=False) if options.compile else block for block in sff.blocks]
        self.opened = [None if body is None else options.compiled(body.forward) for body in sff.bodies]
        tails = [sff.tail(index) for index in range(len(sff.blocks))]
        self.bodies = [None if tail is None else options.compiled(tail.body) for tail in tails]
        self.place = Place(ranks, sff, self.parameters, every, self._apply, self._measure)
        self.own = self.place.own

    def _measure(self):
        """Return the seconds of each block, measured on a copy."""
        sff = copy.deepcopy(self.sff)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            images = torch.randn(16, *sff.input_shape, device=self.device, dtype=next(sff.parameters()).dtype)
            target = torch.arange(16, device=self.device) % sff.num_classes
            engine = LocalEngine(sff, optim.adamw(), Options(), Ranks(), "all", 1, 0)
            return placement.block_seconds(engine, images, target)

    def autocast(self):
        return self.options.autocast(self.device)

    @property
    def active(self):
        """The first block in training, and the only one with the greedy schedule."""
        return self.frozen + self.phase

    def train_mode(self):
        """Put the network into training mode, the blocks that are not trained any more into evaluation mode."""
        self.sff.train()
        for block in self.sff.blocks[: self.active]:
            block.eval()

    def run_step(self, images, target):
        parts = self.split(images, target) if self.ranks.feeds else self._received()
        if self.window == 1:
            self._one_block_at_a_time(parts)
        else:
            for i, part in enumerate(parts):
                self._sliding_window(part, update=i + 1 == len(parts))
        return StepResult(self._losses, self._correct, self.samples)

    def split(self, images, target):
        """The minibatch as a list of Parts, losses and right answers set to zero."""
        size = -(-len(images) // self.micro_batches)
        cut = list(zip(images.split(size), target.split(size), strict=True))
        self._begin(images, len(target), len(cut))
        return [Part((x,), y, len(y) / len(target), len(target)) for x, y in cut]

    def _received(self):
        for number, (part, parts) in enumerate(self.place.link.minibatch()):
            if number == 0:
                self._begin(part.alive[0], part.samples, parts)
            yield part

    def _begin(self, like, samples, parts):
        self.samples, self.parts = samples, parts
        self._losses, self._correct = torch.zeros(2, len(self.sff.blocks), device=like.device, dtype=loss_dtype(like))
        self.weight = 1 if self.place.reduction is None else samples / UNIT

    def _trained(self, index):
        return self.block_optimizers[index] is not None and (self.schedule == "all" or index == self.active)

    def _last(self):
        return self.active if self.schedule == "greedy" else len(self.sff.blocks) - 1

    def _one_block_at_a_time(self, parts):
        for index in self.own[: self._last() + 1]:
            parts = self.train_block(index, parts)
        if self.place.has_last:
            self._train_classifier(parts)

    def train_block(self, index, parts):
        """Forward, goodness step and update of a block; parts (a list, overwritten, or an iterator) become the next block's."""
        self.settle(index)
        done = parts if isinstance(parts, list) else []
        for number, part in enumerate(parts):
            visit, alive = self._visit(index, part)
            part = part._replace(alive=alive)
            if done is parts:
                done[number] = part
            else:
                done.append(part)
            self.place.send(index, part, self.parts)
            del part, alive
            seed = None if visit is None else visit.seed()
            # Outputs and gradients, before the backward; with the graph all is gone before the next block starts.
            del visit
            if seed is not None:
                seed.backward()
                del seed
        if self._trained(index):
            self._update(index)
        return done

    def _sliding_window(self, part, update):
        window = []
        for index in range(self._last() + 1):
            self.settle(index)
            visit, alive = self._visit(index, part, keep=index > self.frozen)
            part = part._replace(alive=alive)
            if visit is not None:
                window.append(visit)
                self._reach_back(window)
                if len(window) == self.window:
                    self._finish(window.pop(0), update)
        while window:
            self._finish(window.pop(0), update)
        self._train_classifier([part], update)

    def _visit(self, index, part, keep=False):
        """Forward and goodness step of a block. Returns its _Visit (None if it is not trained) and the next block's inputs."""
        trained, alive = self._trained(index), part.alive
        if keep and trained:
            alive = tuple(
                t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in alive
            )
        body = self.sff.bodies[index] if trained else None
        body = body if body is not None and body.ready() else None
        tail = self.sff.tail(index) if body is not None and self.window == 1 else None
        if tail is not None and tail.ready():
            return self._visit_tail(index, tail, part)
        with torch.set_grad_enabled(trained), self.autocast():
            outputs = (self.forwards if body is None else self.opened)[index](*alive)
        return self._local_step(index, part._replace(alive=alive), outputs)

    def _local_step(self, index, part, outputs):
        """The goodness step on a block's outputs, or where it is not trained just the next block's inputs."""
        head, main, visit = self.sff.heads[index], outputs[0].detach(), None
        if self._trained(index):
            scale = self._grad_scale(index, part, main)
            step = head.local_step(main, part.target, self.sff.normalize, grad_scale=scale)
            self._count(index, step, part)
            visit = _Visit(index, part.alive, outputs, step.grad_x)
            main = main if step.normalized is None else step.normalized
        else:
            with torch.no_grad():
                (main,) = self.sff.next_input((main,), head)
        return visit, (main, *_detached(outputs[1:]))

    def _visit_tail(self, index, tail, part):
        """The same for a block that ends in a fused tail. A body of one convolution needs no graph: only its parameters learn."""
        single = tail.single if not self.compile and self.amp is None else None
        with torch.set_grad_enabled(single is None), self.autocast():
            y, residual, *others = self.bodies[index](*part.alive)
        if not tail.fits(y, residual):
            with torch.enable_grad(), self.autocast():
                outputs = (
                    self.forwards[index](*part.alive) if single is not None else (tail.finish(y, residual), *others)
                )
            return self._local_step(index, part, outputs)
        scale = self._grad_scale(index, part, y)
        step = tail.local_step(self.sff.heads[index], y, residual, part.target, self.sff.normalize, scale)
        self._count(index, step, part)
        following = (step.normalized, *_detached(others))
        if single is None:
            return _Visit(index, part.alive, (y, residual, *others), step.grad_y, step.grad_residual), following
        del y, residual, others
        with torch.no_grad(), self.autocast():
            single.add_gradients(step.grad_y, part.alive[0])
        return None, following

    def _count(self, index, step, part):
        self._losses[index] += step.loss * part.share
        self._correct[index] += (step.goodness.argmax(1) == part.target).sum()

    def _grad_scale(self, index, part, like):
        """What multiplies a block's gradients: the micro-batch's and the rank's share, times the scaler's factor; None for 1."""
        scaler, weight = self.scalers[index], part.share * self.weight
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
        """Update block `index` (the classifier for the index after the last): now, or when the gradients of all ranks are there."""
        self.place.updated(index, self.weight)

    def _apply(self, index):
        if index == len(self.sff.blocks):
            self.optimizer_step(self.classifier_optimizer, None, self.parameters[index])
        else:
            self.optimizer_step(self.block_optimizers[index], self.scalers[index], self.parameters[index])

    def settle(self, index=None):
        """Finish the update of a block that waits for other ranks, or of all blocks if index is None."""
        self.place.settle(index)

    def _train_classifier(self, parts, update=True):
        if self.classifier_optimizer is None or self.schedule == "greedy":
            return
        classifier = self.sff.readout[0]
        self.settle(len(self.sff.blocks))
        for part in parts:
            with self.autocast():
                logits = classifier(*_detached(part.alive))[0]
            loss = torch.nn.functional.cross_entropy(logits.to(self._losses.dtype), part.target)
            (loss * part.share * self.weight).backward()
        if update:
            self._update(len(self.sff.blocks))

    @torch.no_grad()
    def scores(self, images):
        """Return {"vote": [B, K], "block 0": ..., "readout": ...}."""
        goodness, alive = [], (images,)
        for block, head in zip(self.forwards, self.sff.heads, strict=True):
            with self.autocast():
                alive = block(*alive)
            goodness.append(head(alive[0]))
            alive = self.sff.next_input(alive, head)
        found = {"vote": self.sff.votes(goodness)} | {f"block {i}": g for i, g in enumerate(goodness)}
        if self.sff.readout:
            with self.autocast():
                found["readout"] = self.sff.readout[0](*alive)[0]
        return found
