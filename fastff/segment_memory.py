"""How much memory a step needs while it trains a segment of blocks, known before anything is trained.

SegmentEstimate is a rule of thumb, by which default plans are made. SegmentMemory counts: every block is run once by itself on small
minibatches of two sizes, forward and backward, with and without a loss, while each allocation is recorded. From what a block needs at most and
what it keeps between its passes follows the peak of any segment; a line through the two sizes gives other sizes. Backpropagation through the whole
model is measured in the same way.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastff.memory import phases

SIZES = 4, 8  # samples of the minibatches that are measured
UPDATE = 2.25  # bytes of a block's gradients and of what Muon makes of them by PyTorch's operators, in those of the gradients


class SegmentEstimate:
    """What segments keep for their backward passes, relative to each other, by a rule of thumb that runs nothing: each layer with a weight of two or
    more dimensions keeps one value for each of its channels at each position of its block's output. The interface is that of SegmentMemory,
    in values of one sample.

    Args: blocks, of fastff.graph.cut."""

    def __init__(self, blocks):
        self.sizes = [_values_kept(block) for block in blocks]
        self.blocks, self.backprop = len(blocks), sum(self.sizes)

    def __call__(self, first, last, parts=1):
        return sum(self.sizes[first : last + 1]) / parts


def _values_kept(block):
    shape = block.output_shape
    positions = math.prod(shape) // shape[0 if block.channel_dim == 1 else -1]
    return positions * sum(p.shape[0] for p in block.parameters() if p.dim() > 1)


class Block(NamedTuple):
    """What a block needs, in bytes: `forward` at most in its forward pass (and goodness step), its input included; `kept` after it; `output`,
    what it hands on; `backward` at most in its backward pass, of which `kept` is there already."""

    forward: float
    kept: float
    output: float
    backward: float


class SegmentMemory:
    """Peak memory of segments of an SFF's blocks, and of backpropagation, beyond parameters and optimiser state.

    Args:
        sff: fastff.SFF; it is left as it is (copies are run).
        batch_size: samples in a minibatch.

    Attributes: backprop (bytes), blocks (their number), batch_size."""

    def __init__(self, sff, batch_size=64):
        self.batch_size, self.blocks = batch_size, len(sff.blocks)
        device = next(sff.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            measured = [_measure(copy.deepcopy(sff).train(), size, device) for size in SIZES]
        (self.low, low), (self.high, high) = measured
        self.backprop = self._extended(low, high, batch_size)
        self.gradients = [
            sum(p.numel() * p.element_size() for p in sff.block_parameters(i)) for i in range(self.blocks)
        ]

    def _extended(self, low, high, samples):
        return high + (high - low) / (SIZES[1] - SIZES[0]) * (samples - SIZES[1])

    def _block(self, samples, *key):
        return Block(
            *(self._extended(low, high, samples) for low, high in zip(self.low[key], self.high[key], strict=True))
        )

    def __call__(self, first, last, parts=1):
        """Bytes at most while a step trains the blocks first to last by the loss of the last, on a minibatch that they take in so many parts."""
        samples = math.ceil(self.batch_size / parts)
        blocks = [self._block(samples, index, index == last, index > first) for index in range(first, last + 1)]
        held, peak = 0.0, 0.0
        for block in blocks:
            peak = max(peak, held + block.forward)
            held += block.kept
        for index, block in reversed([*enumerate(blocks, first)]):
            held -= block.kept
            update = UPDATE * self.gradients[index]
            peak = max(peak, held + max(block.backward, update) + blocks[-1].output)
        if parts > 1:  # what the other parts left, or wait with: gradients, outputs and inputs
            given = self._block(samples, first - 1, False, False).output if first else 0.0
            peak += sum(self.gradients[first : last + 1]) + (parts - 1) * max(given, blocks[-1].output)
        return peak


def _measure(sff, size, device):
    """({(block, has a loss, is not the first of its segment): Block}, bytes of backpropagation) for a minibatch of this size."""
    like = next(sff.parameters())
    images = torch.randn(size, *sff.input_shape, device=device, dtype=like.dtype)
    if images.dim() == 4 and any(_channels_last(p) for p in sff.parameters()):
        images = images.to(memory_format=torch.channels_last)
    classes = torch.arange(size, device=device) % sff.num_classes
    target = classes if sff.labelled else None
    table, alive = {}, (images,)
    for index, block in enumerate(sff.local_blocks):
        for has_loss in (False, True):
            for inner in (False, True) if index else (False,):
                table[index, has_loss, inner] = _block(block, alive, target, has_loss, inner)
        with torch.no_grad():
            main, *others = block.outputs(*alive)
            alive = (block.next_input(main), *others)
        del main, others

    def backprop(mark):
        output = sff.model(images)
        if not isinstance(output, torch.Tensor):
            output = next(iter(output.values() if isinstance(output, dict) else output))
        loss = F.cross_entropy(output, classes) if output.dim() == 2 else output.square().mean()
        del output
        loss.backward()

    (found,) = phases(backprop, device)
    return table, found.peak


def _channels_last(p):
    """Whether the weight of a convolution lies in channels_last, and only so."""
    return p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()


def _block(block, alive, target, has_loss, inner):
    """The Block of a LocalBlock on these inputs; inner: whether gradients of the inputs are asked for."""
    parameters = [p for p in (*block.module.parameters(), *block.head.parameters()) if p.requires_grad]
    device = alive[0].device

    def step(mark):
        inputs = tuple(t.detach().clone() if isinstance(t, torch.Tensor) else t for t in alive)
        for t in inputs if inner else ():
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                t.requires_grad_()
        visit = block.visit(inputs, target if has_loss else None, has_loss=has_loss)
        del inputs
        mark()
        following, visit.following = visit.following, None
        likes = [_meta(t) for t in following]
        del following
        mark()
        if not has_loss:
            visit.add([None if t is None else torch.ones_like(t, device=device) for t in likes])
        visit.backward(parameters, inner)

    forward, kept, backward = phases(step, device)
    for p in parameters:
        p.grad = None
    return Block(forward.peak, kept.left, forward.left - kept.left, backward.peak)


def _meta(value):
    """A tensor like a floating-point one, without its memory; None for other values."""
    return value.to("meta") if isinstance(value, torch.Tensor) and value.is_floating_point() else None
