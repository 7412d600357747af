"""One block on one minibatch between its forward and its backward pass.

A visit holds the block's graph and the gradient of its own loss, if it has one. A later block's loss may send a gradient back into it (`add`);
`backward` then runs once, with the sum of all, and frees everything. With an epilogue at the block's end, loss and gradient come from one op that
starts at the last convolution's output, and a later loss's gradient goes back through normalization and epilogue in one pass.
"""

import torch

from fastff.graph.tape import plus
from fastff.ops.epilogue import implementation
from fastff.ops.gradients import add_gradient
from fastff.spec import EpilogueGradients


def detached(values):
    """A tuple of values with its tensors detached."""
    return tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in values)


def _without_images(step):
    """A step's result without its tensors of x's size, which are held elsewhere for as long as they are needed."""
    return step._replace(grad_x=None, grad_residual=None, normalized=None)


class Visit:
    """A block whose loss is computed on its output.

    Attributes: tape (fastff/graph/tape.py; its first output is the one that the goodness is of), step (spec.StepResult; its loss is None for
    a block without one), following (the next block's inputs, detached), reached (whether it has the gradient of a loss). relu: whether a
    ReLU was applied over the first output, which has still to be gone back through."""

    def __init__(self, tape, step, following, normalize, relu=False):
        self.tape, self.step, self.following = tape, _without_images(step), following
        self.normalize, self.relu, self.reached = normalize, relu, step.loss is not None
        self.grads = [self._through_relu(step.grad_x), *[None] * (len(tape.outputs) - 1)]

    def input_gradients(self):
        """Gradients of this block's own loss with respect to its inputs; the graph is kept."""
        return self.tape.to_inputs(self.grads)

    def through(self, grads):
        """Gradients with respect to the inputs, from those of a later loss with respect to `following`; the graph is kept."""
        return self.tape.to_inputs(self._to_outputs(grads))

    def add(self, grads):
        """Take in a later loss's gradients with respect to `following`."""
        self.reached = True
        self.grads = [plus(old, new) for old, new in zip(self.grads, self._to_outputs(grads), strict=True)]

    def backward(self, parameters=None, inputs=False):
        """Add the gradients of the block's parameters (or of these alone) to their .grad, and let go of the graph.

        With `inputs`, return the gradients of the inputs, from all losses that the visit has taken in."""
        tape, grads = self.tape, self._final()
        self.tape = self.grads = self.step = None
        return tape.backward(grads, parameters, inputs)

    def _final(self):
        return self.grads

    def _to_outputs(self, grads):
        main, *others = grads
        if main is not None and self.normalize is not None:
            leaf = self.tape.outputs[0].detach().requires_grad_()
            with torch.enable_grad():
                normalized = self.normalize(leaf)
            (main,) = torch.autograd.grad(normalized, leaf, main)
        return [self._through_relu(main), *others]

    def _through_relu(self, grad):
        """dL/dy from dL/drelu(y), where the first output is y overwritten by relu(y)."""
        if not self.relu or grad is None:
            return grad
        return torch.ops.aten.threshold_backward(grad, self.tape.outputs[0].detach(), 0)


class EpilogueVisit(Visit):
    """A block whose loss is computed together with its epilogue: the tape's outputs are (y, residual or None, *others).

    ending: fused.Epilogue; normalization: spec.Normalization of `following`."""

    def __init__(self, tape, step, following, ending, epilogue, normalization):
        self.tape, self.step, self.following = tape, _without_images(step), following
        self.ending, self.epilogue, self.normalization, self.later = ending, epilogue, normalization, None
        self.reached = step.loss is not None
        self.grads = [step.grad_y, step.grad_residual, *[None] * (len(tape.outputs) - 2)]
        # the gradients of both losses can be added before batch norm's backward pass where all of these are there
        self.adds_early = all(g is not None for g in (step.grad_residual, step.grad_bn_weight, step.grad_bn_bias))

    def add(self, grads):
        main, *others = grads
        self.reached = True
        self.later = plus(self.later, main)
        self.grads[2:] = [plus(old, new) for old, new in zip(self.grads[2:], others, strict=True)]
        if self.later is not None and self.adds_early:
            self.grads[0] = None  # `_final` computes it from dL/dh

    def _epilogue_backward(self, grad, added=None):
        y, step = self.tape.outputs[0].detach(), self.step
        grads = (grad, None) if self.normalization.name == "none" else (None, grad)
        with torch.no_grad():
            return implementation(y).backward(
                y, self.epilogue, step.mean, step.var, *grads, self.normalization, added, overwrite=True
            )

    def _to_outputs(self, grads):
        main, *others = grads
        if main is None:
            return [None, None, *others]
        found = self._epilogue_backward(main)
        return [found.y, found.residual, *others]

    def _final(self):
        step, later = self.step, self.later
        grad_y, grad_residual, *others = self.grads
        grad_weight, grad_bias = step.grad_bn_weight, step.grad_bn_bias
        if later is not None and self.adds_early:
            added = EpilogueGradients(None, grad_residual, grad_weight, grad_bias)
            grad_y, grad_residual, grad_weight, grad_bias = self._epilogue_backward(later, added)
        elif later is not None:
            found = self._epilogue_backward(later)
            grad_y = found.y if grad_y is None else found.y.add_(grad_y)
            grad_residual = plus(grad_residual, found.residual)
            grad_weight, grad_bias = plus(grad_weight, found.weight), plus(grad_bias, found.bias)
        for parameter, grad in zip(self.ending.learned(), (grad_weight, grad_bias), strict=True):
            add_gradient(parameter, grad)
        self.later = self.epilogue = None  # with it the residual, before the backward pass starts
        return [grad_y, grad_residual, *others]
