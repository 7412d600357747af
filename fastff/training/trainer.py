"""Trainer: an SFF trained block by block (fastff/training/step.py), on one device or several (fastff/parallel).

Several devices: a block's gradients are summed over the data-parallel ranks while the next blocks compute, and its update waits for them at its
next forward pass at the latest. Where ranks share the blocks, each trains its own and sends the next input on before its backward pass.
"""

import copy

import torch

from fastff.arguments import plain, whole_number
from fastff.parallel import placement
from fastff.parallel.ranks import Distributed, Ranks
from fastff.sff import SFF
from fastff.training import optim
from fastff.training.engine import Options, StepResult, train_mode
from fastff.training.place import Place
from fastff.training.session import Session
from fastff.training.step import LocalStep


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

    Raises TypeError, ValueError."""

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
        frozen = plain(frozen)
        if not isinstance(frozen, int) or isinstance(frozen, bool) or not 0 <= frozen < len(sff.blocks):
            raise ValueError(f"frozen: expected 0 to {len(sff.blocks) - 1} blocks, got {frozen!r}")
        window = sff.window if window is None else whole_number("window", window)
        if window > 1 and schedule == "greedy":
            raise ValueError(f"window: expected 1 with schedule='greedy', which trains one block alone, got {window}")
        options = Options(**options)
        ranks = _ranks(Distributed.of(distributed), sff, window, schedule, options)
        for index in range(frozen):
            still = sff.blocks[index].parameters() if train_frozen_heads else sff.block_parameters(index)
            for parameter in still:
                parameter.requires_grad_(False)
        make = optimizer or optim.adamw(optim.LOCAL_LR)
        super().__init__(LocalEngine(sff, make, options, ranks, schedule, window, frozen), options, lr_schedule)


def _labelled(sff):
    """Whether the blocks learn from labels, and not from positive and negative images."""
    return sff.heads[0].loss_name == "cross_entropy"


def _ranks(distributed, sff, window, schedule, options):
    """Return the Ranks that train together. Raises ValueError for what they cannot do."""
    if distributed is None:
        return Ranks()
    if options.cuda_graph:
        raise ValueError("cuda_graph: expected False with distributed, whose ranks wait for each other, got True")
    if distributed.shard_optimizer and (options.clip_grad_norm or options.amp == "fp16"):
        text = "expected neither clip_grad_norm nor amp 'fp16' beside it: both look at all gradients of a block"
        raise ValueError(f"shard_optimizer: {text}")
    ranks = Ranks(distributed, next(sff.parameters()).device)
    if ranks.block_size > 1 and not _labelled(sff):
        text = f"expected a goodness with labels where ranks share the blocks, got {sff.goodness_name!r}"
        raise ValueError(f"distributed: {text}")
    if ranks.block_size > 1 and (window > 1 or schedule != "all"):
        got = f"window {window}" if window > 1 else f"schedule {schedule!r}"
        raise ValueError(f"distributed: expected window=1 and schedule='all' where ranks share the blocks, got {got}")
    return ranks


class LocalEngine:
    """Block-local training of an SFF; engine.py describes the interface.

    Args: make makes the optimiser of a block from its parameter groups; the others are those of Trainer, checked.

    Attributes beyond the interface: step (LocalStep), parameters (lists by block, then the classifier's), block_optimizers (optimiser or
    None by block), classifier_optimizer (or None)."""

    def __init__(self, sff, make, options, ranks, schedule, window, frozen):
        self.sff, self.module, self.schedule, self.frozen = sff, sff, schedule, frozen
        self.options, self.device = options, next(sff.parameters()).device
        self.names = [block.name for block in sff.blocks]
        self.phase, self.phases = 0, len(sff.blocks) - frozen if schedule == "greedy" else 1
        self.labelled, self.classifies = _labelled(sff), sff.heads[0].num_classes is not None
        if sff.readout and not self.labelled:
            text = "expected False with a loss of positive and negative images, which has no labels for a classifier"
            raise ValueError(f"readout: {text}, got True")
        self.parameters = [[p for p in sff.block_parameters(i) if p.requires_grad] for i in range(len(sff.blocks))]
        classifier = sff.readout[0] if sff.readout else None
        if classifier is not None:
            self.parameters.append([p for p in classifier.parameters() if p.requires_grad])
        heads = {id(p) for p in sff.heads.parameters()}
        every = [optim.build(make, parameters, heads) for parameters in self.parameters]
        self.block_optimizers = every[: len(sff.blocks)]
        self.classifier_optimizer = None if classifier is None else every[-1]
        self.optimizers = [optimizer for optimizer in every if optimizer is not None]
        self.update = optim.Updates(options.clip_grad_norm)
        self.scalers = [options.scaler(self.device) for _ in sff.blocks]
        if options.compile:
            for block in sff.local_blocks:
                block.compile_forward()
        self.place = Place(ranks, sff, self.parameters, every, self._update, self._measure)
        autocast = None if options.amp is None else self._autocast
        taught = classifier if self.classifier_optimizer is not None and schedule == "all" else None
        self.step = LocalStep(
            sff.local_blocks, window, options.micro_batches, autocast, self.scalers, self.place, taught
        )

    def _measure(self):
        """Return the seconds of each block, measured on a copy."""
        sff = copy.deepcopy(self.sff)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            images = torch.randn(16, *sff.input_shape, device=self.device, dtype=next(sff.parameters()).dtype)
            target = torch.arange(16, device=self.device) % sff.num_classes
            engine = LocalEngine(sff, optim.adamw(), Options(), Ranks(), "all", 1, 0)
            return placement.block_seconds(engine, images, target)

    def _autocast(self):
        return self.options.autocast(self.device)

    def _update(self, index):
        """Update block `index`, or the classifier for the index after the last, whose gradients are complete."""
        if index == len(self.sff.blocks):
            self.update(self.classifier_optimizer, None, self.parameters[index])
        else:
            self.update(self.block_optimizers[index], self.scalers[index], self.parameters[index])

    def train_mode(self):
        """Put the network into training mode, the blocks that are not trained any more into evaluation mode.

        Modules that the user put into evaluation mode while the network was in training mode stay there."""
        for module in self.sff.resting:
            module.training = True
        train_mode(self.sff)
        done = self.sff.blocks[: self.frozen + self.phase]
        self.sff.resting = [module for block in done for module in block.modules() if module.training]
        for module in self.sff.resting:
            module.training = False

    def _trained(self):
        """Return (the indices of the blocks that the present phase trains, the last block that it runs)."""
        last = self.frozen + self.phase if self.schedule == "greedy" else len(self.sff.blocks) - 1
        first = last if self.schedule == "greedy" else 0  # of frozen blocks the heads may train
        return {i for i in range(first, last + 1) if self.block_optimizers[i] is not None}, last

    def counted(self):
        """Return [L], 1 for the blocks that this rank trains in the present phase, else 0."""
        here = self._trained()[0].intersection(self.place.own)
        return torch.tensor([float(i in here) for i in range(len(self.sff.blocks))], device=self.device)

    def run_step(self, images, target):
        """Train on one minibatch. Returns StepResult."""
        self.step.frozen = self.frozen
        self.step.trained, self.step.last = self._trained()
        return StepResult(*self.step.run(images, target))

    @torch.no_grad()
    def scores(self, images):
        """Return {"vote": [B, K], "block 0": ..., "readout": ...}."""
        goodness, alive = [], (images,)
        for block in self.sff.local_blocks:
            with self._autocast():
                main, *others = block.outputs(*alive)
            goodness.append(block.head(main))
            alive = (block.next_input(main), *others)
        found = {"vote": self.sff.votes(goodness)} | {f"block {i}": g for i, g in enumerate(goodness)}
        if self.sff.readout:
            with self._autocast():
                found["readout"] = self.sff.readout[0](*alive)[0]
        return found
