"""SFF: an unmodified model cut into blocks (cut.py), a goodness head on each, and their vote."""

from typing import NamedTuple

import torch
from torch import nn

import fastff.functional as ff
from fastff.body import find
from fastff.cut import cut
from fastff.nn.head import GoodnessHead
from fastff.ops.goodness import plan_for

VOTES = ("softmax", "goodness", "last")
NORMALIZATIONS = ("layer_norm", "layer_norm_channels", None)


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
        granularity: "layer", "block", "stage", "model" (one block) or a list of module paths that end blocks (fastff/cut.py).
        input_shape: of one sample, (C, H, W) for images.
        grid, kernel_size, squares, bias, scale, tau, learn_tau, margin, label_smoothing: of the heads (fastff.nn.GoodnessHead).
            The paper's setting: grid=0, scale=1, window=1, vote="goodness".
        window: the loss of block l also trains the window - 1 blocks before it (used by the Trainer); 1 is the paper's, and takes about
            two thirds of the time and half the memory of 2, which learns better (docs/learning.md).
        vote: "softmax" averages the blocks' softmax(tau * goodness), "goodness" averages goodness, "last" takes the last block's.
        normalize: between blocks: "layer_norm" over a sample, "layer_norm_channels" at each position, or None.
        readout: keep the model's own classifier, trained on detached features beside the blocks; otherwise it is not used.
        channel_dim: of the blocks' outputs, 1 or -1; None finds out from their shapes.
        fuse: train opened blocks (fastff/body.py): their convolutions by the quickest way to their gradients, and with window=1 BatchNorm2d
            [+ residual] [+ activation] at their end and the goodness step as one op. Modules inside a block are not all called as such then; a
            hook on one of these turns it off for its block.

    Attributes: model, blocks (tuple of fastff.cut.Block), heads (ModuleList of GoodnessHead), readout (Block or None), bodies (for each
    block fastff.body.Body or None).
    """

    def __init__(
        self, model, num_classes, granularity="block", input_shape=(3, 32, 32), *, grid=4, kernel_size=1, squares=True, bias=False, scale=None,
        tau=1.0, learn_tau=False, margin=0.0, label_smoothing=0.0, window=2, vote="softmax", normalize="layer_norm", readout=False,
        channel_dim=None, impl="auto", algorithm="auto", fuse=True,
    ):  # fmt: skip
        super().__init__()
        if vote not in VOTES:
            raise ValueError(f"vote: expected one of {', '.join(VOTES)}, got {vote!r}")
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: expected 'layer_norm', 'layer_norm_channels' or None, got {normalize!r}")
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window: expected a whole number of at least 1, got {window!r}")
        if channel_dim not in (None, 1, -1):
            raise ValueError(f"channel_dim: expected 1, -1 or None, got {channel_dim!r}")
        blocks, tail = cut(model, granularity, input_shape)
        if readout and tail is None:
            raise ValueError("readout: the model has nothing behind its last block to keep")
        self.model = model
        self.blocks = tuple(blocks)  # not registered: their parameters are the model's
        self.readout = (tail,) if readout else None
        self.num_classes, self.input_shape, self.granularity = num_classes, tuple(input_shape), granularity
        self.window, self.vote, self.normalize = window, vote, normalize
        like = next(model.parameters())
        heads = []
        for block in blocks:
            dim = channel_dim or block.channel_dim
            channels, cells = _sizes(block.output_shape, dim, grid)
            heads.append(
                GoodnessHead(
                    channels, num_classes, kernel_size if len(block.output_shape) == 3 else 1, cells, squares=squares, bias=bias, scale=scale,
                    tau=tau, learn_tau=learn_tau, margin=margin, label_smoothing=label_smoothing, channel_dim=dim, impl=impl,
                    algorithm=algorithm, device=like.device, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32,
                )
            )  # fmt: skip
        self.heads = nn.ModuleList(heads)
        self.bodies = tuple(find(block) if fuse else None for block in blocks)

    def tail(self, index):
        """The fastff.nn.tail.Tail that block `index` can be trained with, or None."""
        body, head = self.bodies[index], self.heads[index]
        images = head.channel_dim == 1 and len(self.blocks[index].output_shape) == 3
        return body.tail if body is not None and images and self.normalize is not None else None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for block in (*self.blocks, *(self.readout or ())):
            block.rebind(block.graph_module, block.train_graph_module)
        for block, body in zip(self.blocks, self.bodies, strict=True):
            if body is not None:
                block.rebind(*body.graph_modules())
        return self

    def block_parameters(self, index):
        """The parameters that block `index` trains: its own and its head's."""
        return [*self.blocks[index].parameters(), *self.heads[index].parameters()]

    def next_input(self, alive, head):
        """The tensors alive after a block, with the main one (the first) normalised for the next block."""
        main, *others = alive
        if self.normalize is not None:
            over = "sample" if self.normalize == "layer_norm" else "channels"
            main = ff.layer_norm(main, over=over, channel_dim=head.channel_dim)
        return (main, *others)

    def outputs(self, images):
        """Yields (main output, goodness [B, K]) block by block."""
        alive = (self.check_images(images),)
        for index, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            alive = block(*alive)
            yield alive[0], head(alive[0])
            if index + 1 < len(self.blocks):
                alive = self.next_input(alive, head)

    def check_images(self, images):
        """Returns images. Raises ValueError unless they are [B, *input_shape]; other heights and widths pass."""
        if not isinstance(images, torch.Tensor) or images.dim() != len(self.input_shape) + 1:
            got = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            raise ValueError(f"images: expected [B, {', '.join(map(str, self.input_shape))}], got {got}")
        if images.shape[1] != self.input_shape[0] and len(self.input_shape) == 3:
            raise ValueError(f"images: expected {self.input_shape[0]} channels, got {images.shape[1]}")
        return images

    def goodness(self, images):
        """[goodness [B, K] of each block]."""
        return [g for _, g in self.outputs(images)]

    def votes(self, goodness):
        """What blocks with these goodness vectors say together: [B, K]."""
        if self.vote == "last":
            return goodness[-1]
        if self.vote == "softmax":
            goodness = [head.logits(g).softmax(1) for g, head in zip(goodness, self.heads, strict=False)]
        return torch.stack(goodness).mean(0)

    def forward(self, images):
        """The vote of the blocks [B, K]: probabilities for vote="softmax", goodness otherwise."""
        return self.votes(self.goodness(images))

    @torch.no_grad()
    def predict(self, images, exit_threshold=None):
        """Classes, with early exit: a sample leaves at the first block where the vote so far is at least `exit_threshold` sure.

        None runs all blocks. Returns Prediction. Run in eval mode (the model's mode is left as it is).
        """
        if exit_threshold is not None and not 0 < exit_threshold <= 1:
            raise ValueError(f"exit_threshold: expected a probability in (0, 1] or None, got {exit_threshold!r}")
        size, device = len(images), images.device
        label = torch.zeros(size, dtype=torch.int64, device=device)
        block_of, confidence = label.clone(), torch.zeros(size, device=device)
        rows, alive, seen = torch.arange(size, device=device), (self.check_images(images),), []
        for index, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            if len(rows) == 0:
                break
            alive = block(*alive)
            seen.append(head(alive[0]))
            vote = self.votes(seen)
            probabilities = vote if self.vote == "softmax" else head.logits(vote).softmax(1)
            sure, best = probabilities.max(1)
            last = index + 1 == len(self.blocks)
            leave = (
                torch.ones_like(sure, dtype=torch.bool)
                if last
                else (sure >= (2.0 if exit_threshold is None else exit_threshold))
            )
            label[rows[leave]], confidence[rows[leave]], block_of[rows[leave]] = best[leave], sure[leave].float(), index
            stay = ~leave
            rows, seen = rows[stay], [g[stay] for g in seen]
            alive = self.next_input(tuple(t[stay] if isinstance(t, torch.Tensor) else t for t in alive), head)
        return Prediction(label, confidence, block_of)

    def __repr__(self):
        rows = [("block", "modules", "parameters", "output", "goodness", "tail")]
        for i, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            called = block.modules_called
            modules = (
                block.name if called == [block.name] or len(called) < 2 else f"{block.name} ({len(called)} modules)"
            )
            count = sum(p.numel() for p in self.block_parameters(i))
            shape = " x ".join(map(str, block.output_shape))
            rows.append(
                (str(i), modules, f"{count:,}", shape, self._algorithm(block, head), str(self.tail(i) or "none"))
            )
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [
            "  ".join(
                cell.rjust(w) if i in (0, 2) else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        total = sum(p.numel() for i in range(len(self.blocks)) for p in self.block_parameters(i))
        head = f"SFF: {type(self.model).__name__} in {len(self.blocks)} blocks ({self.granularity}), {self.num_classes} classes, {total:,} parameters"
        kept = ", read-out kept" if self.readout else ""
        has_tails = any(self.tail(i) is not None for i in range(len(self.blocks)))
        fused = "" if self.window == 1 or not has_tails else " (tails are fused with window=1)"
        tail = f"window={self.window}{fused}, vote={self.vote}, grid={self.heads[0].grid[0]}, normalize={self.normalize}{kept}"
        return "\n".join([head, *(line.rstrip() for line in lines), tail])

    def _algorithm(self, block, head):
        if head.weight is None:
            return "grid"
        shape = block.output_shape
        dims = (shape if head.channel_dim == 1 else (shape[-1], *shape[:-1])) if len(shape) > 1 else (*shape, 1)
        spatial = dims[1:] if len(dims) == 3 else (1, *dims[1:])
        x = head.weight.new_empty(1).expand(32, dims[0], *spatial)  # a shape, without its memory
        how = plan_for(x, head.weight, head.grid_weight, (head.kernel_size // 2,) * 2, head.algorithm, head.impl)
        return how.algorithm.replace("_", " ")


def _sizes(shape, channel_dim, grid):
    """Channels and cells of the grid for an output of `shape`: at most one cell a position, tokens and vectors in one row."""
    if len(shape) == 1:
        spatial = (1, 1)
    elif len(shape) == 2:
        spatial = (1, shape[1] if channel_dim == 1 else shape[0])
    else:
        spatial = shape[1:] if channel_dim == 1 else shape[:2]
    grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
    channels = shape[0] if channel_dim == 1 or len(shape) == 1 else shape[-1]
    return channels, tuple(min(g, n) for g, n in zip(grid, spatial, strict=True))
