"""Backpropagation on the same loop: what block-local training is compared with, and its fairest memory-saving variants."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastff.sff import SFF
from fastff.spec import check_labels
from fastff.training import optim
from fastff.training.loop import Loop, loss_dtype


class Backprop(Loop):
    """Trains the model of an SFF, with its own classifier, end to end.

    Args beyond those of Loop:
        sff: fastff.SFF made with readout=True, for the cut that the options below need; otherwise only its model is used.
        optimizer: makes the optimiser from parameter groups; default AdamW, fused, 2e-3.
        checkpointing: keep only the tensors at the cuts and compute each block again in the backward pass.
        deep_supervision: add the local loss of each block's head, with gradients through all blocks before it.
    """

    def __init__(self, sff, optimizer=None, *, checkpointing=False, deep_supervision=False, **options):
        if not isinstance(sff, SFF) or not sff.readout:
            raise ValueError("sff: expected fastff.SFF with readout=True, so that the model's classifier is kept")
        self.sff, self.checkpointing, self.deep_supervision = sff, checkpointing, deep_supervision
        parameters = list(sff.parameters()) if deep_supervision else list(sff.model.parameters())
        self.optimizer = optim.build(optimizer or optim.adamw(optim.BACKPROP_LR), parameters)
        self.parameters = parameters
        super().__init__(sff if deep_supervision else sff.model, ["backprop"], [self.optimizer], **options)
        self.forward = torch.compile(self._forward, dynamic=False) if self.compile else self._forward
        self.scalers = [self.make_scaler()]

    def train_mode(self):
        self.sff.train()

    def _forward(self, images, supervised=None):
        """(logits, local losses summed): supervised is the target, or None."""
        if not self.checkpointing and supervised is None:
            return self.sff.model(images), 0
        alive, local = (images,), 0
        for block, head in zip(self.sff.blocks, self.sff.heads, strict=True):
            alive = (
                checkpoint(block, *alive, use_reentrant=False)
                if self.checkpointing and torch.is_grad_enabled()
                else block(*alive)
            )
            if supervised is not None:
                local = local + head.loss(head(alive[0]), supervised)
        return self.sff.readout[0](*alive)[0], local

    def run_step(self, images, target):
        size = -(-len(images) // self.micro_batches)
        check_labels(target, self.sff.num_classes)
        losses, correct = torch.zeros(2, 1, device=self.device, dtype=loss_dtype(images))
        scaler = self.scalers[0]
        for x, y in zip(images.split(size), target.split(size), strict=True):
            weight = len(y) / len(target)
            with self.autocast():
                logits, local = self.forward(x, y if self.deep_supervision else None)
            loss = F.cross_entropy(logits.to(losses.dtype), y)
            total = (loss + local) * weight
            (total if scaler is None else scaler.scale(total)).backward()
            losses += loss.detach() * weight
            correct += (logits.detach().argmax(1) == y).sum()
            del logits, local, loss, total  # the graph, before the next micro-batch starts
        self.optimizer_step(self.optimizer, scaler, self.parameters)
        return losses, correct

    @torch.no_grad()
    def scores(self, images):
        with self.autocast():
            return {"vote": self._forward(images)[0]}
