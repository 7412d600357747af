"""Going back through one run of a block to its inputs or to its parameters."""

import contextlib

import torch

from fastff.ops.gradients import Seed, without


def plus(old, new):
    """The sum of two gradients, of which either may be None."""
    return new if old is None else old if new is None else old + new


def _wanted(value):
    return isinstance(value, torch.Tensor) and value.requires_grad


def _taken(leaf):
    """The gradient of a leaf, which keeps none."""
    grad, leaf.grad = leaf.grad, None
    return grad


class Tape:
    """One run of any function of `inputs`, which PyTorch recorded.

    Attributes: outputs (a tuple), needed (for each output, whether anything behind it wants its gradient)."""

    def __init__(self, inputs, outputs):
        self.inputs, self.outputs = inputs, outputs
        self.needed = [_wanted(t) for t in outputs]

    def _pairs(self, grads):
        pairs = [(t, g) for t, g in zip(self.outputs, grads, strict=True) if g is not None and _wanted(t)]
        return [t for t, _ in pairs], [g for _, g in pairs]

    def to_inputs(self, grads):
        """Gradients of the inputs from those of the outputs; the tape can be used again."""
        outputs, grads = self._pairs(grads)
        wanted = [t for t in self.inputs if _wanted(t)]
        if not outputs or not wanted:
            return [None] * len(self.inputs)
        with without("parameters"):
            found = iter(torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True))
        return [next(found) if _wanted(t) else None for t in self.inputs]

    def backward(self, grads, only=None, inputs=False):
        """Add the gradients of the parameters to their .grad, and free the tape. grads: those of the outputs, a list, which is emptied. only: the
        parameters that get gradients; None for all. With `inputs`, return the gradients of the inputs as well, from the same pass."""
        outputs, found = self._pairs(grads)
        grads.clear()
        leaves, self.inputs, self.outputs = self.inputs, None, None
        if only is not None:
            only = [p for p in only if p.requires_grad]  # one may have been frozen
        if inputs:
            only = [*only, *(t for t in leaves if _wanted(t))]
        if outputs and (only is None or only):
            seed = Seed.apply(found, *outputs)
            del outputs, found
            if only is None:
                seed.backward(seed.detach())
            else:
                with contextlib.nullcontext() if inputs else without("leaves"):
                    seed.backward(seed.detach(), inputs=only)
        return [_taken(t) if _wanted(t) else None for t in leaves] if inputs else None
