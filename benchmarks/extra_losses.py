"""Terms that others add to local losses, in plain PyTorch: each has been tried for rows of the table of plans (docs/learning.md).

    similarity       Samples of one class are to have similar features: the mean square of the difference between the cosine similarities of
                     the samples' features and those of their labels. The features are the standard deviation of each channel over the
                     positions, without the convolution that the source has before it. Source: Nokland and Eidnes 2019, arXiv 1901.06656;
                     weighted there with 0.99, beside cross-entropy with 0.01, which is a weight of 99.
    kinetic          The mean square of what each residual block adds to its shortcut, summed over the blocks of a segment. Source: Karkar et
                     al., Module-wise Training of Neural Networks via the Minimizing Movement Scheme, NeurIPS 2023, which calls the weight
                     1 / (2 tau).
    vote_before      The target of each loss is, in this proportion, the vote that the network gave the same training image in the epoch
                     before, and the label for the rest; in the first epoch the label alone.

`add` adds one of them to what a trainer minimizes. The heads of segments, or the residual blocks, then run under autograd, which is slower.
"""

import torch
import torch.nn.functional as F

import fastff.functional as ff
from fastff import spec
from fastff.models.resnet import BasicBlock

KINDS = ("similarity", "kinetic", "vote_before")


def add(kind, weight, trainer, loader):
    """Add `weight` times a term of KINDS to the losses that a new `trainer` minimizes.

    loader: the fastff Loader that it is trained with. Returns a list that gets the term's values as they are computed: one for each loss (or
    residual block) of a step and each part of the minibatch."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    sff, values = trainer.sff, []
    if kind == "kinetic":
        add_kinetic(weight, trainer, values)
        return values
    votes = Votes(sff, loader) if kind == "vote_before" else None
    for index in sff.plan.voters:
        own = votes.term(index) if votes else label_similarity
        add_to_loss(sff.heads[index], weight, own, values)
    return values


def add_to_loss(head, weight, term, values):
    """Make the local step of a head minimize its loss plus weight * term(head, x, g, target)."""

    def local_step(x, target=None, normalize=None, eps=1e-5, grad_scale=None, need_grad_x=True, epilogue=None):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            g = head(leaf)
            more = term(head, leaf, g, target)
            loss = head.loss(g, target) + weight * more
            (loss if grad_scale is None else loss * grad_scale).backward()
        values.append(float(more.detach()))
        normalized = None if normalize is None else ff.normalize(x, normalize, eps=eps)
        return spec.StepResult(loss.detach(), g.detach(), leaf.grad, normalized=normalized)

    head.takes_epilogue, head.local_step = False, local_step


def label_similarity(head, x, g, target):
    """The loss of similarity matching for a block's output x [B, C, H, W]."""
    labels = F.one_hot(target, head.num_classes).to(x.dtype)
    return F.mse_loss(similarities(x.flatten(2).std(2)), similarities(labels))


def similarities(rows):
    """Cosine similarities [B, B] of rows [B, D], each less its mean."""
    rows = F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    return rows @ rows.T


def add_kinetic(weight, trainer, values):
    """Add weight * mean(r^2) for what each residual block adds, r, to the loss whose gradient comes through the block."""

    def hook(module, inputs, output):
        if output.requires_grad:
            r, share = output.detach(), len(output) / trainer.engine.step.samples
            values.append(float(r.square().mean()))
            output.register_hook(lambda grad: grad + 2 * weight * share / r.numel() * r)

    for block in trainer.sff.modules():
        if isinstance(block, BasicBlock):
            block.bn2.register_forward_hook(hook)


class Votes:
    """The network's votes on the images of a loader in the epoch before, computed from what its heads said while they were trained."""

    def __init__(self, sff, loader):
        self.sff, self.before, self.batches, self.labels = sff, None, loader._batches, loader.labels
        shape = len(loader.labels), sff.num_classes
        self.goodness = {index: torch.zeros(shape, dtype=loader.dtype) for index in sff.plan.voters}
        # Images have their number as label in the loader, and get their label when the minibatch is handed out.
        loader.labels, loader._batches = torch.arange(len(loader.labels)), self._labelled

    def _labelled(self, epoch, first):
        if epoch:
            with torch.no_grad():
                self.before = self.sff.probabilities(self.sff.votes(list(self.goodness.values())))
        for images, numbers in self.batches(epoch, first):
            self.numbers, self.seen = numbers, dict.fromkeys(self.goodness, 0)
            yield images, self.labels[numbers]

    def term(self, index):
        """The cross-entropy with the votes as target less that with the labels, of the head of this block."""

        def difference(head, x, g, target):
            start = self.seen[index]  # the parts of a minibatch come one after the other
            self.seen[index] = start + len(g)
            numbers = self.numbers[start : start + len(g)]
            self.goodness[index][numbers] = g.detach()
            if self.before is None:
                return g.new_zeros(())
            z = head.logits(g)
            return F.cross_entropy(z, self.before[numbers]) - head.loss(g, target)

        return difference
