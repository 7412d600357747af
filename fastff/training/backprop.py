"""Backpropagation through the same loop: what block-local training is compared with, and its fairest memory-saving variants."""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastff.arguments import check_labels
from fastff.sff import SFF
from fastff.training import optim
from fastff.training.engine import Options, StepResult, loss_dtype, train_mode
from fastff.training.place import Alone
from fastff.training.session import Session


class Backprop(Session):
    """Trains the model of an SFF, with its own classifier, end to end.

    Args:
        sff: fastff.SFF made with readout=True. Its cut is used by the two options below; otherwise only its model is used.
        optimizer: function that makes the optimiser from parameter groups; default
            fastff.training.optim.muon(2e-3).
        checkpointing: keep only the tensors at the cuts, and compute each block again in the backward pass.
        deep_supervision: add the local loss of each block's head, with gradients through all blocks before it.
        lr_schedule, options: as in fastff.Trainer.

    Raises ValueError."""

    def __init__(
        self, sff, optimizer=None, *, checkpointing=False, deep_supervision=False, lr_schedule="cosine", **options
    ):
        if not isinstance(sff, SFF) or not sff.readout:
            raise ValueError("sff: expected fastff.SFF with readout=True, so that the model's classifier is kept")
        options, make = Options(**options), optimizer or optim.muon(optim.BACKPROP_LR)
        super().__init__(BackpropEngine(sff, make, options, checkpointing, deep_supervision), options, lr_schedule)


@contextlib.contextmanager
def _buffers_kept(block):
    """Within it, what a block that runs again writes to its buffers is put back: running statistics have seen the minibatch already."""
    kept = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.data.copy_(value)  # autograd, which holds some of them, need not know


def _run_again(block):
    return contextlib.nullcontext(), _buffers_kept(block)


class BackpropEngine:
    """End-to-end training of an SFF's model; engine.py describes the interface."""

    names, phases, phase = ["backprop"], 1, 0
    labelled = classifies = True
    recording_pays = False  # a recorded step takes 0.98 to 1.00 of an ordinary one (benchmarks/step.py)

    def __init__(self, sff, make, options, checkpointing, deep_supervision):
        self.sff, self.options = sff, options
        self.checkpointing, self.deep_supervision = checkpointing, deep_supervision
        self.module = sff if deep_supervision else sff.model
        self.parameters = list(self.module.parameters())
        self.optimizer = optim.build(make, self.parameters)
        self.device = self.parameters[0].device
        self.optimizers, self.scalers = [self.optimizer], [options.scaler(self.device)]
        self.update = optim.Updates(options.clip_grad_norm)
        self.place = Alone(1, 1)
        self.forward = options.compiled(self._forward)

    def constants(self):
        return []

    def train_mode(self):
        train_mode(self.sff)

    def segments(self, t):
        return "all of it"

    def counted(self, t):
        return torch.ones(1, device=self.device)

    def set_progress(self, schedule, progress):
        optim.set_progress(self.optimizers, schedule, progress)

    def _forward(self, images, supervised=None):
        """Return (logits, sum of the local losses). supervised: the target, or None for no local losses."""
        if not self.checkpointing and supervised is None:
            return self.sff.model(images), 0
        alive, local = (images,), 0
        for block, head in zip(self.sff.blocks, self.sff.heads, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                # torch.compile takes no contexts, and computes a block again without its writes
                around = {} if self.options.compile else {"context_fn": functools.partial(_run_again, block)}
                alive = checkpoint(block, *alive, use_reentrant=False, **around)
            else:
                alive = block(*alive)
            if supervised is not None:
                local = local + head.loss(head(alive[0]), supervised)
        return self.sff.readout[0](*alive)[0], local

    def run_step(self, images, target, t):
        """Train on one minibatch. Returns StepResult."""
        size = -(-len(images) // self.options.micro_batches)
        check_labels(target, self.sff.num_classes)
        losses, correct = torch.zeros(2, 1, device=self.device, dtype=loss_dtype(images))
        scaler = self.scalers[0]
        for x, y in zip(images.split(size), target.split(size), strict=True):
            weight = len(y) / len(target)
            with self.options.autocast(self.device):
                logits, local = self.forward(x, y if self.deep_supervision else None)
            loss = F.cross_entropy(logits.to(losses.dtype), y)
            total = (loss + local) * weight
            (total if scaler is None else scaler.scale(total)).backward()
            losses += loss.detach() * weight
            correct += (logits.detach().argmax(1) == y).sum()
            del logits, local, loss, total  # free the graph before the next micro-batch starts
        self.update((self.optimizer, scaler, self.parameters))
        return StepResult(losses, correct, len(target))

    @torch.no_grad()
    def scores(self, images):
        """Return {"vote": [B, K]}."""
        with self.options.autocast(self.device):
            return {"vote": self._forward(images)[0]}
