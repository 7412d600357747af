"""SFF: an unmodified model cut into blocks (graph/cut.py), a goodness head on each, and their vote."""

import math
from typing import NamedTuple

import torch
from torch import nn

from fastff import plan as plans
from fastff.arguments import kind_of, number_between, plain, whole_number
from fastff.graph.cut import cut
from fastff.nn.block import LocalBlock, make_head
from fastff.nn.head import GoodnessHead
from fastff.ops.goodness import plan_for
from fastff.segment_memory import SegmentEstimate, SegmentMemory

VOTES = ("weighted", "softmax", "goodness", "last")


class Prediction(NamedTuple):
    """Of `SFF.predict`, one entry a sample: class [B] int64, confidence [B] (the vote's probability), block [B] int64 it left from."""

    label: torch.Tensor
    confidence: torch.Tensor
    block: torch.Tensor


class SFF(nn.Module):
    """A model trained block by block by local goodness losses (Krutsylo 2025, arXiv 2501.03176).

    Args:
        model: any nn.Module of one tensor argument; it is not changed, and shares its parameters: model.state_dict() keeps its names.
        num_classes: K.
        granularity: what a block is: "layer", "block", "stage", "model" (one block) or a list of module paths that end blocks
            (fastff/graph/cut.py). "auto" are blocks as "block" makes them, trained in the fewest segments of which none keeps more than 0.45
            of what all blocks keep, by a rule of thumb, or in segments of `memory`. A segment may take the minibatch in two halves.
        input_shape: of one sample, (C, H, W) for images.
        goodness: a name that fastff.nn.FFBlock knows: "sff", "projection", or without weights "class_group", "class_group_mean" and, of
            batches whose first half is positive and second half negative, "sum_of_squares", "mean_of_squares", "position".
        window: the loss of block l also trains the window - 1 blocks before it; 1 is the paper's. Default 2, but for "auto".
        plan: instead of a window, which losses the Trainer's steps have and which blocks each trains (fastff/plan.py): the blocks that end
            segments, such as [1, 3, 8]; several such lists, which take turns; "pairs" or "drawn" for cuts that move; fastff.plan.Segments,
            which may take the minibatch in parts; or a plan. Heads of blocks that never end a segment do not learn, and do not vote.
        memory: instead of a plan, what a step may take at most: a share of what backpropagation takes (at most 1) or bytes (above 1). The
            plan has the fewest segments that keep to it, which may take the minibatch in two halves, counted here for minibatches of
            `batch_size` (fastff/segment_memory.py); print(sff) shows them.
        batch_size: of the minibatches that `memory` is counted for.
        vote: "weighted" averages the blocks' log softmax(tau * goodness), the n-th voter's with weight n, since later ones know more (and takes
            the softmax of that); "softmax" averages their softmax; "goodness" their goodness; "last" takes the last block's goodness.
        normalize: between blocks: a name of fastff.spec.NORMALIZATIONS such as "layer_norm" (over a sample), or None.
        readout: keep the model's own classifier, trained on detached features beside the blocks; otherwise it is not used.
        channel_dim: of the blocks' outputs, 1 or -1; None finds out from their shapes.
        fuse: train opened blocks (fastff/graph/training.py): with faster gradients of convolutions, and BatchNorm2d [+ residual]
            [+ activation] in one pass, at a block's end together with the goodness step. Modules inside a block are not all called as such
            then; a hook on one of these turns it off for its block. Modules whose Python does more than compute with tensors are called as they
            are (fastff/graph/plain.py); print(sff) names them.
        head: the heads' further keywords: grid (default 4), hidden (default 64 where the grid has several cells), kernel_size, squares, bias,
            scale, tau, learn_tau, margin, label_smoothing, impl, algorithm of fastff.nn.GoodnessHead; loss, theta, alpha, ... of
            fastff.nn.GroupGoodness.
            The paper's setting: granularity="block", grid=0, scale=1, window=1, vote="goodness".

    Attributes: model, blocks (tuple of fastff.graph.cut.Block), heads (ModuleList), local_blocks (tuple of fastff.nn.LocalBlock: a block
    with its head), readout (a tuple with the classifier's Block, or None).
    """

    def __init__(
        self, model, num_classes, granularity="auto", input_shape=(3, 32, 32), *, goodness="sff", window=None, plan=None,
        memory=None, batch_size=64, vote="weighted", normalize="layer_norm", readout=False, channel_dim=None, fuse=True, **head,
    ):  # fmt: skip
        super().__init__()
        if vote not in VOTES:
            raise ValueError(f"vote: expected one of {', '.join(VOTES)}, got {vote!r}")
        num_classes, input_shape = plain(num_classes), plain(input_shape)
        if channel_dim not in (None, 1, -1):
            raise ValueError(f"channel_dim: expected 1, -1 or None, got {channel_dim!r}")
        blocks, classifier = cut(model, "block" if granularity == "auto" else granularity, input_shape, num_classes)
        if readout and classifier is None:
            raise ValueError("readout: the model has nothing behind its last block to keep")
        self.model = model
        self.blocks = tuple(blocks)  # not registered: their parameters are the model's
        self.readout = (classifier,) if readout else None
        self._check_shared()
        self.resting: list = []  # modules that a trainer has put into evaluation mode, and the next one puts back
        self.num_classes, self.input_shape, self.granularity = num_classes, tuple(input_shape), granularity
        self.vote, self.normalize, self.goodness_name = vote, normalize, goodness
        self.segment_memory = None
        like = next(model.parameters())
        self.heads = nn.ModuleList(
            _head(block, num_classes, goodness, channel_dim, {k: plain(v) for k, v in head.items()}, like)
            for block in blocks
        )
        self.local_blocks = tuple(
            LocalBlock(block, head, normalize, fuse, open_modules=True)
            for block, head in zip(blocks, self.heads, strict=True)
        )
        for block in self.local_blocks:
            block.graph  # noqa: B018  traced here, while the model is as the user made it
        self.set_plan(plan, window, memory, batch_size)

    def _check_shared(self):
        """Raise ValueError for a parameter of two blocks: one would update it while the other's graph still needs the former value."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        owners: dict = {}
        for index, block in enumerate((*self.blocks, *(self.readout or ()))):
            place = f"block {index} ({block.name})"
            for parameter in block.parameters():
                owner = owners.setdefault(id(parameter), place)
                if owner != place and parameter.requires_grad:
                    got = f"{names[id(parameter)]} in {owner} and {place}"
                    hint = "a granularity that puts both into one block, such as 'model', trains it"
                    raise ValueError(f"model: expected no parameter that two blocks share, got {got}; {hint}")

    def set_plan(self, plan=None, window=None, memory=None, batch_size=64):
        """Train by this plan, with this window or in this memory from the next Trainer on; the blocks with losses vote.

        The arguments are those of SFF. Raises TypeError, ValueError."""
        given = [name for name, value in (("plan", plan), ("window", window), ("memory", memory)) if value is not None]
        if len(given) > 1:
            raise ValueError(
                f"{given[1]}: expected None beside a {given[0]}, got {window if given[1] == 'window' else memory!r}"
            )
        count, self.window = len(self.blocks), None
        if plan is not None:
            self.plan = plans.of(plan, count)
        elif memory is not None:
            self.plan = self._within(memory, whole_number("batch_size", batch_size))
        elif window is None and self.granularity == "auto":
            kept = SegmentEstimate(self.blocks)
            self.plan = plans.Budget(kept, max(0.45 * kept.backprop, plans.least(kept)))
        else:
            self.window = whole_number("window", 2 if window is None else window)
            self.plan = plans.window(self.window, count)

    def _within(self, memory, batch_size):
        """The plan of the fewest segments within a share of backpropagation's memory, or bytes."""
        memory = number_between("memory", plain(memory), 0, math.inf, low_allowed=False)
        counted = self.segment_memory
        if counted is None or counted.batch_size != batch_size:
            self.plan = plans.window(1, len(self.blocks))
            counted = self.segment_memory = SegmentMemory(self, batch_size)
        budget = memory * counted.backprop if memory <= 1 else memory
        least = plans.least(counted)
        if budget < least:
            needed = f"{least / counted.backprop:.2f} (of backpropagation's) or {math.ceil(least)} bytes"
            text = f"which the largest block needs in minibatches of {batch_size}, got {memory!r}"
            raise ValueError(f"memory: expected at least {needed}, {text}")
        return plans.Budget(counted, budget)

    @property
    def labelled(self):
        """Whether the blocks learn from labels, and not from positive and negative images."""
        return self.heads[0].loss_name == "cross_entropy"

    def block_parameters(self, index, head=True):
        """The parameters of block `index`: its own and, with `head`, its head's."""
        return [*self.blocks[index].parameters(), *(self.heads[index].parameters() if head else ())]

    def learned_parameters(self, index):
        """The parameters of block `index` that a loss trains: its own, and its head's if it ends a segment."""
        return self.block_parameters(index, index in self.plan.voters)

    def outputs(self, images):
        """Yields (main output, goodness [B, K]) block by block; the goodness is None for blocks that do not vote."""
        alive, voters = (self.check_images(images),), self.plan.voters
        for index, block in enumerate(self.local_blocks):
            main, *others = block.module(*alive)
            yield main, block.head(main) if index in voters else None
            if index + 1 < len(self.blocks):
                alive = (block.next_input(main), *others)

    def check_images(self, images, amp=False):
        """Returns images. Raises TypeError or ValueError unless they are [B, *input_shape] in the dtype of the model's parameters.

        Other heights and widths pass where the model takes them. amp: whether autocast, which converts all but float64, is on in any case."""
        if not isinstance(images, torch.Tensor) or not images.is_floating_point():
            raise TypeError(f"images: expected a floating-point tensor, got {kind_of(images)}")
        dtype, autocast = next(self.parameters()).dtype, amp or torch.is_autocast_enabled(images.device.type)
        if images.dtype != dtype and not (autocast and torch.float64 not in (images.dtype, dtype)):
            raise TypeError(f"images: expected {dtype} as the model's parameters are, got {images.dtype}")
        if images.dim() != len(self.input_shape) + 1:
            raise ValueError(f"images: expected [B, {', '.join(map(str, self.input_shape))}], got {list(images.shape)}")
        if images.shape[1] != self.input_shape[0] and len(self.input_shape) == 3:
            raise ValueError(f"images: expected {self.input_shape[0]} channels, got {images.shape[1]}")
        if self.blocks[0].one_size and images.shape[1:] != self.input_shape:
            why = "since the model's Python looks at sizes, it was cut for this input_shape alone"
            raise ValueError(
                f"images: expected [B, {', '.join(map(str, self.input_shape))}], got {list(images.shape)}: {why}"
            )
        return images

    def goodness(self, images):
        """[goodness [B, K] of each block that votes]: all of them, unless the plan has losses for some alone."""
        return [g for _, g in self.outputs(images) if g is not None]

    def logits(self, goodness):
        """[tau * goodness [B, K]] of the blocks that vote, or of the first of them, of which the loss takes the softmax."""
        return [self.heads[i].logits(g) for i, g in zip(self.plan.voters, goodness, strict=False)]

    def votes(self, goodness):
        """What blocks with these goodness vectors, those that vote or the first of them, say together: [B, K]."""
        if self.vote == "last":
            return goodness[-1]
        logits = self.logits(goodness)
        if self.vote == "softmax":
            return torch.stack([z.softmax(1) for z in logits]).mean(0)
        if self.vote == "goodness":
            return torch.stack(goodness).mean(0)
        weight = 2 / (len(logits) * (len(logits) + 1))  # of the first voter; all weights are one together
        return sum(n * weight * z.log_softmax(1) for n, z in enumerate(logits, 1)).softmax(1)

    def probabilities(self, vote):
        """The probabilities [B, K] that a vote [B, K] means."""
        return vote if self.vote in ("weighted", "softmax") else self.heads[-1].logits(vote).softmax(1)

    def forward(self, images):
        """The vote of the blocks [B, K]: probabilities for vote="weighted" and "softmax", goodness otherwise."""
        return self.votes(self.goodness(images))

    @torch.no_grad()
    def predict(self, images, exit_threshold=None):
        """Classes, with early exit: a sample leaves at the first block that votes where the vote so far is at least `exit_threshold` sure.

        None runs all blocks. Returns Prediction. Run in eval mode (the model's mode is left as it is).
        """
        if exit_threshold is not None and not 0 < exit_threshold <= 1:
            raise ValueError(f"exit_threshold: expected a probability in (0, 1] or None, got {exit_threshold!r}")
        threshold = 2.0 if exit_threshold is None else exit_threshold
        size, device = len(images), images.device
        label = torch.zeros(size, dtype=torch.int64, device=device)
        block_of, confidence = label.clone(), torch.zeros(size, device=device)
        rows, alive, seen = torch.arange(size, device=device), (self.check_images(images),), []
        for index, block in enumerate(self.local_blocks):
            if len(rows) == 0:
                break
            main, *others = block.module(*alive)
            if index not in self.plan.voters:
                alive = (block.next_input(main), *others)
                continue
            seen.append(block.head(main))
            vote = self.votes(seen)
            sure, best = self.probabilities(vote).max(1)
            last = index + 1 == len(self.blocks)
            leave = torch.ones_like(sure, dtype=torch.bool) if last else sure >= threshold
            label[rows[leave]], confidence[rows[leave]], block_of[rows[leave]] = best[leave], sure[leave].float(), index
            stay = ~leave
            rows, seen = rows[stay], [g[stay] for g in seen]
            others = (t[stay] if rows else t for t, rows in zip(others, block.module.rows[1:], strict=True))
            alive = (block.next_input(main[stay]), *others)
        return Prediction(label, confidence, block_of)

    def __repr__(self):
        rows, total = [("block", "modules", "parameters", "output", "goodness", "epilogue")], 0
        for i, block in enumerate(self.local_blocks):
            name, called = block.module.name, block.module.modules_called
            modules = name if called == [name] or len(called) < 2 else f"{name} ({len(called)} modules)"
            goodness = _algorithm(block) if i in self.plan.voters else "none"  # a later block's loss trains it
            count = sum(p.numel() for p in self.learned_parameters(i))
            shape = " x ".join(map(str, block.module.output_shape))
            total += count
            rows.append((str(i), modules, f"{count:,}", shape, goodness, str(block.epilogue or "none")))
        name, blocks = type(self.model).__name__, f"{len(self.blocks)} blocks ({self.granularity})"
        head = f"SFF: {name} in {blocks}, {self.num_classes} classes, {total:,} parameters"
        plan = f"window={self.window}" if self.window else f"plan: {self.plan.name}"
        options = [plan, f"vote={self.vote}", f"normalize={self.normalize}"]
        if self.goodness_name == "sff":
            options.insert(2, f"grid={self.heads[0].grid[0]}")
            if self.heads[0].hidden_norm is not None:
                options.insert(3, f"hidden={self.heads[0].hidden_norm.num_features}")
        else:
            options.insert(0, f"goodness={self.goodness_name}")
        whole = {}
        for block in self.local_blocks:
            for module, reason in (block.module.whole | block.whole()).items():
                whole.setdefault(reason, {})[module] = None
        notes = [f"called as they are: {', '.join(modules)}: {reason}" for reason, modules in whole.items()]
        for block in self.blocks:
            if block.holds and self.granularity in ("auto", "block"):
                notes.append(
                    f"coarser than the model: {block.name} holds {len(block.holds)} of its blocks, {_few(block.holds)}"
                )
        options = ", ".join(options) + (", read-out kept" if self.readout else "")
        return "\n".join([head, *_aligned(rows), options, *self._segments(), *notes])

    def _segments(self):
        """Lines about the plan's segments: that there is one alone, and their memory where it was counted."""
        (first, last, parts), *others = self.plan.at(0)
        if (first, last) == (0, len(self.blocks) - 1) and not others and self.plan.voters == (last,):
            share = {1: "", 2: ", half a minibatch at a time"}.get(parts, f", a minibatch in {parts} parts")
            yield f"this plan is backpropagation through the whole model{share}"
        if not isinstance(getattr(self.plan, "memory", None), SegmentMemory):
            return
        counted, segments = self.plan.memory, self.plan.at(0)
        rows, largest = [("segment", "blocks", "parts", "memory", "of backpropagation's")], 0.0
        for number, (first, last, parts) in enumerate(segments):
            needed = counted(first, last, parts)
            share, largest = f"{needed / counted.backprop:.0%}", max(largest, needed)
            rows.append((str(number), f"{first} to {last}", str(parts), f"{needed / 2**20:,.1f} MiB", share))
        yield from _aligned(rows)
        share, whole = f"{largest / counted.backprop:.0%}", f"{counted.backprop / 2**20:,.1f} MiB"
        yield f"a step of {counted.batch_size} samples takes at most {share} of the {whole} of backpropagation"


def _few(names):
    return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}"


def _aligned(rows):
    """Lines of a table: the first and third column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(w) if i in (0, 2) else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _algorithm(block):
    """How the goodness of a block is computed, for a batch of 32."""
    head, shape = block.head, block.module.output_shape
    if not isinstance(head, GoodnessHead):
        return head.goodness
    if head.weight is None:
        return "grid"
    dims = (shape if head.channel_dim == 1 else (shape[-1], *shape[:-1])) if len(shape) > 1 else (*shape, 1)
    spatial = (math.prod(dims[1:-1]), dims[-1])
    x = head.weight.new_empty(1).expand(32, dims[0], *spatial)  # a shape, without its memory
    how = plan_for(x, head.weight, head.grid_weight, (head.kernel_size // 2,) * 2, head.algorithm, head.impl)
    return how.algorithm.replace("_", " ")


def _head(block, num_classes, goodness, channel_dim, options, like):
    """The head of a block: `options` are its keywords, beside those that the block's shape gives."""
    dim = channel_dim or block.channel_dim
    if goodness in ("sff", "projection"):
        grid = options.pop("grid", 4) if goodness == "sff" else max(block.output_shape)
        channels, options["grid"] = _sizes(block.output_shape, dim, grid)
        if goodness == "sff" and math.prod(options["grid"]) > 1:
            options.setdefault("hidden", 64)
        if len(block.output_shape) < 3:
            options.pop("kernel_size", None)
        options |= {"device": like.device, "dtype": torch.float64 if like.dtype == torch.float64 else torch.float32}
    else:
        channels, _ = _sizes(block.output_shape, dim, 0)
    try:
        return make_head(channels, num_classes, goodness, options | {"channel_dim": dim})
    except ValueError as error:
        raise ValueError(f"{error} (the head of block {block.name})") from error


def _sizes(shape, channel_dim, grid):
    """Channels and cells of the grid for an output of `shape`: at most one cell a position, tokens and vectors in one row."""
    if len(shape) == 1:
        spatial = (1, 1)
    elif len(shape) == 2:
        spatial = (1, shape[1] if channel_dim == 1 else shape[0])
    else:
        *rows, columns = shape[1:] if channel_dim == 1 else shape[:-1]
        spatial = (math.prod(rows), columns)
    grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
    channels = shape[0] if channel_dim == 1 or len(shape) == 1 else shape[-1]
    return channels, tuple(min(g, n) for g, n in zip(grid, spatial, strict=True))
