"""Trainer: an SFF trained block by block (fastff/training/step.py), on one device or several (fastff/parallel).

Several devices: a block's gradients are summed over the data-parallel ranks while the next blocks compute, and its update waits for them at its
next forward pass at the latest. Where ranks share the blocks, each trains its own and sends the next input on before its backward pass.
"""

import copy
import functools

import torch

from fastff import plan as plans
from fastff.arguments import number_between, plain
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
        optimizer: function that makes the optimiser of a block from its parameter groups; default fastff.training.optim.muon(4e-3):
            orthogonalised updates of convolutions, AdamW for the rest.
        schedule: "all" trains every block in every minibatch (as in the paper); "greedy" one block after the other, for `epochs` of fit each.
        window: the loss of each block also trains the window - 1 blocks before it; takes the place of the SFF's plan.
        plan: which losses a step has and which blocks each trains, as for SFF, whose plan it becomes.
        frozen: number of first blocks that are not trained and run in evaluation mode (transfer).
        train_frozen_heads: whether the heads of frozen blocks learn (they vote, so other classes or data need it).
        finish: in 0..1, how early the first block finishes: its learning rate reaches zero after 1 - finish of fit, and it is trained no more;
            the last block's at the end, those between in proportion. 0 trains all to the end.
        distributed: None; "data" (ranks share every minibatch), "block" (ranks share the blocks) or a fastff.Distributed, with one process
            for each device (torchrun). Ranks that share blocks need a plan whose segments lie in one rank each in every step, such as
            window=1 or a budget of memory. A minibatch given to step or by a loader is this rank's share, except that a fastff Loader is shared
            out; of the ranks that share a replica's blocks all but the first may give None.
        lr_schedule: "cosine" (with warm-up over the first 5 % of fit), "constant", or a function of progress in 0..1.
        options: of fastff.training.engine.Options: micro_batches, amp, clip_grad_norm, compile, cuda_graph, record_steps.

    Attributes: engine (the LocalEngine), state, history, correct, names, optimizers (those of the blocks, then the classifier's).

    Raises TypeError, ValueError."""

    def __init__(
        self,
        sff,
        optimizer=None,
        *,
        schedule="all",
        window=None,
        plan=None,
        frozen=0,
        train_frozen_heads=False,
        finish=0.0,
        distributed=None,
        lr_schedule="cosine",
        **options,
    ):
        if not isinstance(sff, SFF):
            raise TypeError(f"sff: expected fastff.SFF (wrap the model in it first), got {type(sff).__name__}")
        if schedule not in ("all", "greedy"):
            raise ValueError(f"schedule: expected 'all' or 'greedy', got {schedule!r}")
        frozen, count = plain(frozen), len(sff.blocks)
        if not isinstance(frozen, int) or isinstance(frozen, bool) or not 0 <= frozen < count:
            raise ValueError(f"frozen: expected 0 to {count - 1} blocks, got {frozen!r}")
        finish = number_between("finish", plain(finish), 0, 1, low_allowed=True)
        if schedule == "greedy":
            if window not in (None, 1):
                raise ValueError(
                    f"window: expected 1 with schedule='greedy', which trains one block alone, got {window}"
                )
            if plan is not None:
                raise ValueError(f"plan: expected none with schedule='greedy', which is one, got {plan!r}")
        elif window is not None or plan is not None:
            sff.set_plan(plan, window)
        plan = plans.Greedy(count, frozen) if schedule == "greedy" else sff.plan
        options = Options(**options)
        ranks = _ranks(Distributed.of(distributed), sff, plan, frozen, finish, options)
        for index in range(frozen):
            for parameter in sff.block_parameters(index, head=not train_frozen_heads):
                parameter.requires_grad_(False)
        make = optimizer or optim.muon(optim.LOCAL_LR)
        super().__init__(LocalEngine(sff, make, options, ranks, plan, frozen, finish), options, lr_schedule)


def _ranks(distributed, sff, plan, frozen, finish, options):
    """Return the Ranks that train together. Raises ValueError for what they cannot do."""
    if distributed is None:
        return Ranks()
    for name in ("cuda_graph", "record_steps"):
        if getattr(options, name) is True:
            raise ValueError(f"{name}: expected False with distributed, whose ranks wait for each other, got True")
    if distributed.shard_optimizer and (options.clip_grad_norm or options.amp == "fp16"):
        text = "expected neither clip_grad_norm nor amp 'fp16' beside it: both look at all gradients of a block"
        raise ValueError(f"shard_optimizer: {text}")
    ranks = Ranks(distributed, next(sff.parameters()).device)
    if ranks.block_size > 1 and not sff.labelled:
        text = f"expected a goodness with labels where ranks share the blocks, got {sff.goodness_name!r}"
        raise ValueError(f"distributed: {text}")
    if ranks.block_size > 1:
        most = len(plan.chains(frozen))
        if ranks.block_size > most:
            text = f"at most {most} to share the blocks, since no gradient may pass between ranks (plan {plan.name})"
            raise ValueError(f"distributed: expected {text}, got {ranks.block_size}; distributed='data' takes any plan")
        if finish and isinstance(plan, plans.Budget):
            text = "0 where ranks share the blocks under a budget of memory, whose segments change when blocks finish"
            raise ValueError(f"finish: expected {text}, got {finish}")
    return ranks


class LocalEngine:
    """Block-local training of an SFF; engine.py describes the interface.

    Args: make makes the optimiser of a block from its parameter groups; the others are those of Trainer, checked.

    Attributes beyond the interface: step (LocalStep), parameters (lists by block, then the classifier's), block_optimizers (optimiser or
    None by block), classifier_optimizer (or None), start (the first block that is still trained)."""

    checkpointing, recording_pays = False, True

    def __init__(self, sff, make, options, ranks, plan, frozen, finish):
        self.sff, self.module, self.plan, self.frozen, self.finish = sff, sff, plan, frozen, finish
        self.options, self.device = options, next(sff.parameters()).device
        self.names = [block.name for block in sff.blocks]
        self.phase, self.phases, self.start, self.voters = 0, plan.phases, frozen, plan.voters
        self.labelled, self.classifies = sff.labelled, sff.heads[0].num_classes is not None
        if sff.readout and not self.labelled:
            text = "expected False with a loss of positive and negative images, which has no labels for a classifier"
            raise ValueError(f"readout: {text}, got True")
        learned = [sff.block_parameters(i, i in self.voters) for i in range(len(sff.blocks))]
        classifier = sff.readout[0] if sff.readout else None
        if classifier is not None:
            learned.append(classifier.parameters())
        self.parameters = [[p for p in those if p.requires_grad] for those in learned]
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
        self.place = Place(ranks, sff, self.parameters, every, self._update, self._chains, self._measure)
        self.autocast = functools.partial(options.autocast, self.device)
        taught = classifier if self.classifier_optimizer is not None and self.phases == 1 else None
        self.step = LocalStep(sff.local_blocks, options.micro_batches, self.autocast, self.scalers, self.place, taught)
        self._counts = {}  # what `counted` returns, by the segments of a step

    def _measure(self):
        """Return the seconds of each chain of blocks, measured on a copy."""
        sff = copy.deepcopy(self.sff)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            images = torch.randn(16, *sff.input_shape, device=self.device, dtype=next(sff.parameters()).dtype)
            target = torch.arange(16, device=self.device) % sff.num_classes
            engine = LocalEngine(sff, optim.adamw(), Options(), Ranks(), self.plan, self.frozen, 0.0)
            return placement.chain_seconds(engine, self._chains(), images, target)

    def _chains(self):
        return self.plan.chains(self.frozen)

    def _update(self, *indices):
        """Update these blocks, whose gradients are complete; the index after the last block is the classifier's."""
        optimizers, scalers = [*self.block_optimizers, self.classifier_optimizer], [*self.scalers, None]
        self.update(*((optimizers[i], scalers[i], self.parameters[i]) for i in indices))

    def constants(self):
        return list(self.step.scales.values())

    def train_mode(self):
        """Put the network into training mode, the blocks that are not trained any more into evaluation mode.

        Modules that the user put into evaluation mode while the network was in training mode stay there."""
        for module in self.sff.resting:
            module.training = True
        train_mode(self.sff)
        still = self.start + (self.phase if self.phases > 1 else 0)
        self.sff.resting = [
            module for block in self.sff.blocks[:still] for module in block.modules() if module.training
        ]
        for module in self.sff.resting:
            module.training = False

    def set_progress(self, schedule, progress):
        """Set the learning rates for a step that ends at `progress` (0..1 of fit): with `finish`, each block's on a schedule of its own."""
        count, before = len(self.sff.blocks), self.start
        ends = [1 - self.finish * (1 - i / max(1, count - 1)) for i in range(count)]
        for optimizer, end in zip(self.block_optimizers, ends, strict=True):
            if optimizer is not None:
                optim.set_progress([optimizer], schedule, min(1.0, progress / end))
        if self.classifier_optimizer is not None:
            optim.set_progress([self.classifier_optimizer], schedule, progress)
        self.start = max(self.frozen, sum(progress > end for end in ends[:-1]))
        if self.start != before:  # less where fit goes on for more epochs
            self.train_mode()

    def segments(self, t):
        """The segments of step t, with one for the head of each frozen block that learns."""
        if self.phases > 1:
            return self.plan.at(t, self.start, self.phase)
        heads = [i for i in self.voters if i < self.frozen and self.block_optimizers[i] is not None]
        finished = self.start > self.frozen
        segments = self.plan.at(t, self.start) if finished else plans.starting_at(self.frozen, self.plan.at(t))
        return (*(plans.Segment(i, i) for i in heads), *segments)

    def counted(self, t):
        """Return [L], 1 for the blocks with a loss on this rank in step t, else 0."""
        segments = self.segments(t)
        if segments not in self._counts:
            here = {s.last for s in segments}.intersection(self.place.own)
            count = [float(i in here) for i in range(len(self.sff.blocks))]
            self._counts[segments] = torch.tensor(count, device=self.device)
        return self._counts[segments]

    def run_step(self, images, target, t):
        """Train on one minibatch, in step t. Returns StepResult."""
        return StepResult(*self.step.run(self.segments(t), images, target))

    @torch.no_grad()
    def scores(self, images):
        """Return {"vote": [B, K], "block 0": ..., "readout": ...}."""
        goodness, alive, voters = [], (images,), self.sff.plan.voters
        for index, block in enumerate(self.sff.local_blocks):
            with self.autocast():
                main, *others = block.outputs(*alive)
            if index in voters:
                goodness.append(block.head(main))
            alive = (block.next_input(main), *others)
        names = [f"block {i}" for i in voters]
        found = {"vote": self.sff.votes(goodness)} | dict(zip(names, goodness, strict=True))
        if self.sff.readout:
            with self.autocast():
                found["readout"] = self.sff.readout[0](*alive)[0]
        return found
