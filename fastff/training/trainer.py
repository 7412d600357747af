"""Trainer: an SFF trained block by block (fastff/training/step.py), on one device or several (fastff/parallel).

Several devices: a block's gradients are summed over the data-parallel ranks while the next blocks compute, and its update waits for them at its
next forward pass at the latest. Where ranks share the blocks, each trains its own and sends the next input on before its backward pass.
"""

import copy

import torch

from fastff.parallel import placement
from fastff.parallel.ranks import Distributed, Ranks
from fastff.sff import SFF
from fastff.training import optim
from fastff.training.loop import Loop
from fastff.training.place import Place
from fastff.training.step import LocalStep

class Trainer(Loop):
    """Trains an SFF block by block.

    Args beyond those of Loop (lr_schedule, micro_batches, amp, clip_grad_norm, compile, cuda_graph):
        sff: fastff.SFF.
        optimizer: makes one optimiser for each block from its parameter groups; default AdamW, fused, 4e-3.
        schedule: "all" trains every block in every minibatch (the paper's); "greedy" one block after the other, `epochs` of fit each.
        window: overrides sff.window.
        frozen: the first blocks that are not trained and run in eval mode (transfer).
        train_frozen_heads: whether the heads of frozen blocks learn (they vote, so other classes or data need it).
        distributed: None; "data" (ranks share every minibatch), "block" (ranks share the blocks) or a fastff.Distributed, with one process
            a device (torchrun). Ranks that share blocks need window=1. A minibatch given to step or by a loader is this rank's share, except
            of a fastff Loader, which is shared out; ranks behind the first that shares a replica's blocks may give None.
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
        **options,
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
        ranks = self._ranks(Distributed.of(distributed), next(sff.parameters()).device, options)
        for index in range(frozen):
            still = sff.blocks[index].parameters() if train_frozen_heads else sff.block_parameters(index)
            for parameter in still:
                parameter.requires_grad_(False)
        self.parameters = [[p for p in sff.block_parameters(i) if p.requires_grad] for i in range(len(sff.blocks))]
        tail = sff.readout[0] if sff.readout else None
        if tail is not None:
            self.parameters.append([p for p in tail.parameters() if p.requires_grad])
        every = [optim.build(make, parameters) for parameters in self.parameters]
        self.block_optimizers = every[: len(sff.blocks)]
        self.readout_optimizer = every[-1] if tail is not None else None
        self.active = frozen  # the block in training, for the greedy schedule
        names = [block.name for block in sff.blocks]
        super().__init__(sff, names, [o for o in every if o is not None], ranks=ranks, **options)
        if self.compile:
            for block in sff.local_blocks:
                block.compile_forward()
        self.scalers = [self.make_scaler() for _ in sff.blocks]
        self.place = Place(ranks, sff, self.parameters, every, self._apply, self._measure)
        self.own, self.counted = self.place.own, self.place.counted().to(self.device)
        mine = [every[index] for index in self.place.indices]
        self.own_optimizers = [k for k, o in enumerate(self.optimizers) if any(o is m for m in mine)]
        classifier = tail if self.readout_optimizer is not None and schedule == "all" else None
        autocast = None if self.amp is None else self.autocast
        blocks = sff.local_blocks
        self.engine = LocalStep(blocks, self.window, self.micro_batches, autocast, self.scalers, self.place, classifier)
        self._select()

    def _ranks(self, distributed, device, options):
        """The processes that train together. Raises ValueError for what they cannot do."""
        if distributed is None:
            return Ranks()
        if options.get("cuda_graph"):
            raise ValueError("cuda_graph: expected False with distributed, whose ranks wait for each other, got True")
        if distributed.shard_optimizer and (options.get("clip_grad_norm") or options.get("amp") == "fp16"):
            text = "expected neither clip_grad_norm nor amp 'fp16' beside it: both look at all gradients of a block"
            raise ValueError(f"shard_optimizer: {text}")
        ranks = Ranks(distributed, device)
        if ranks.block_size > 1 and (self.window > 1 or self.schedule != "all"):
            got = f"window {self.window}" if self.window > 1 else f"schedule {self.schedule!r}"
            raise ValueError(
                f"distributed: expected window=1 and schedule='all' where ranks share the blocks, got {got}"
            )
        return ranks

    def _measure(self):
        """Seconds of each block, on a copy."""
        sff = copy.deepcopy(self.sff)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            images = torch.randn(16, *sff.input_shape, device=self.device, dtype=next(sff.parameters()).dtype)
            target = torch.arange(16, device=self.device) % sff.num_classes
            return placement.block_seconds(Trainer(sff, window=1), images, target)

    @property
    def phases(self):
        """Times that fit goes through its epochs: once, or once a block."""
        return len(self.sff.blocks) - self.frozen if self.schedule == "greedy" else 1

    def start_phase(self, phase):
        self.active = self.frozen + phase
        self._select()

    def _select(self):
        """Tell the engine which blocks train."""
        indices = range(self.frozen, len(self.sff.blocks)) if self.schedule == "all" else [self.active]
        self.engine.trained = {i for i in indices if self.block_optimizers[i] is not None}
        self.engine.last = indices[-1]

    def train_mode(self):
        self.sff.train()
        still = self.active if self.schedule == "greedy" else self.frozen
        for block in self.sff.blocks[:still]:
            block.eval()

    def run_step(self, images, target):
        losses, correct, self.samples = self.engine.run(images, target)
        return losses, correct

    def recorded_state(self):
        return self.active

    def _apply(self, index):
        if index == len(self.sff.blocks):
            self.optimizer_step(self.readout_optimizer, None, self.parameters[index])
        else:
            self.optimizer_step(self.block_optimizers[index], self.scalers[index], self.parameters[index])

    def settle(self, index=None):
        """Finish the update of a block that waits for other ranks' gradients; of all blocks for None."""
        self.place.settle(index)

    def synchronize(self):
        """Finish all updates, and bring the blocks of all ranks to every rank, batch norm's statistics averaged: before the weights are used
        otherwise than by this trainer's steps. fit, evaluate and save do it. Call it on all ranks."""
        self.place.synchronize()

    def own_state(self, optimizer, saved):
        return self.place.state_kept(optimizer, saved)

    @torch.no_grad()
    def scores(self, images):
        """{"vote": [B, K], "block 0": ..., "readout": ...}: what evaluate counts."""
        goodness, alive = [], (images,)
        for block in self.sff.local_blocks:
            with self.autocast():
                main, *others = block.outputs(*alive)
            goodness.append(block.head(main))
            alive = (block.next_input(main), *others)
        found = {"vote": self.sff.votes(goodness)} | {f"block {i}": g for i, g in enumerate(goodness)}
        if self.sff.readout:
            found["readout"] = self.sff.readout[0](*alive)[0]
        return found
