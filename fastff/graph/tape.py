"""Running a block's training graph, and going back through it to its inputs or to its parameters.

A tape is what one run leaves behind. It has

    outputs                          the graph's outputs, a tuple
    needed                           for each output, whether anything behind it wants its gradient
    to_inputs(grads)                 gradients of the inputs from those of the outputs; the tape can be used again
    backward(grads, only, inputs)    adds the gradients of the parameters to their .grad, and frees the tape; if `inputs`, returns those of
                                     the inputs as well, from the same pass

AutogradTape leaves all that to PyTorch. Steps makes tapes of its own for a graph of nothing but stand-ins (fastff/graph/fused.py), which saves
PyTorch's bookkeeping: about a third of the time that Python takes for a block, which on small images is much of a step.
"""

import contextlib

import torch

from fastff.graph.fused import Convolution, StandIn
from fastff.ops import epilogue as epilogue_op
from fastff.ops.gradients import Seed, add_gradient, without


def plus(old, new):
    """The sum of two gradients, of which either may be None."""
    return new if old is None else old if new is None else old + new


def _wanted(value):
    return isinstance(value, torch.Tensor) and value.requires_grad


def _taken(leaf):
    """The gradient of a leaf, which keeps none."""
    grad, leaf.grad = leaf.grad, None
    return grad


class AutogradTape:
    """The run of any function of `inputs` that PyTorch recorded."""

    def __init__(self, inputs, outputs):
        self.inputs, self.outputs = inputs, outputs
        self.needed = [_wanted(t) for t in outputs]

    def _pairs(self, grads):
        pairs = [(t, g) for t, g in zip(self.outputs, grads, strict=True) if g is not None and _wanted(t)]
        return [t for t, _ in pairs], [g for _, g in pairs]

    def to_inputs(self, grads):
        outputs, grads = self._pairs(grads)
        wanted = [t for t in self.inputs if _wanted(t)]
        if not outputs or not wanted:
            return [None] * len(self.inputs)
        with without("parameters"):
            found = iter(torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True))
        return [next(found) if _wanted(t) else None for t in self.inputs]

    def backward(self, grads, only=None, inputs=False):
        """grads: a list, which is emptied. only: the parameters that get gradients; None for all."""
        outputs, found = self._pairs(grads)
        grads.clear()
        leaves, self.inputs, self.outputs = self.inputs, None, None
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


class Steps:
    """The calls of a graph that calls stand-ins alone, in order. Values are numbered: the inputs, then the result of each call.

    Attributes: stand_ins; arguments (for each call, the numbers of its inputs); last (for each call, the values that nothing reads after
    it); results (the numbers of the graph's outputs, or None); inputs (their count); normalizes (whether a batch norm is among the calls)."""

    def __init__(self, stand_ins, arguments, results, inputs):
        self.stand_ins, self.arguments, self.results, self.inputs = stand_ins, arguments, results, inputs
        self.last, seen = [], {n for n in results if n is not None}
        for numbers in reversed(arguments):
            self.last.insert(0, [n for n in set(numbers) if n not in seen])
            seen |= set(numbers)
        self.normalizes = not all(isinstance(stand_in, Convolution) for stand_in in stand_ins)
        self._shapes = {}

    @classmethod
    def of(cls, graph_module):
        """The Steps of a GraphModule, or None if it calls anything but stand-ins."""
        numbers, stand_ins, arguments = {}, [], []
        for node in graph_module.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "call_module":
                stand_in = graph_module.get_submodule(node.target)
                if not isinstance(stand_in, StandIn) or node.kwargs or any(a not in numbers for a in node.args):
                    return None
                stand_ins.append(stand_in)
                arguments.append([numbers[a] for a in node.args])
            elif node.op != "placeholder":
                return None
            numbers[node] = len(numbers)
        results = [numbers.get(node) for node in node.args[0]]
        return cls(stand_ins, arguments, results, len(numbers) - len(stand_ins))

    def shapes(self, inputs):
        """The shapes of the graph's outputs for these inputs (None for an absent one), or None where the stand-ins have no kernels for them."""
        first = inputs[self.arguments[0][0]] if self.arguments else None
        if not isinstance(first, torch.Tensor) or not first.is_floating_point() or torch.compiler.is_compiling():
            return None
        if torch.is_autocast_enabled(first.device.type) or not all(stand_in.ready() for stand_in in self.stand_ins):
            return None
        learned = [p for stand_in in self.stand_ins for p in stand_in.learned() if p is not None]
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in learned):
            return None  # PyTorch calls them
        if self.normalizes and epilogue_op.kernel(first) is None:
            return None
        dtype = first.dtype
        shapes = tuple(t.shape if isinstance(t, torch.Tensor) and t.dtype == dtype else None for t in inputs)
        key = dtype, shapes
        if key not in self._shapes:
            self._shapes[key] = self._shapes_of(shapes)
        return self._shapes[key]

    def _shapes_of(self, shapes):
        shapes = list(shapes)
        for stand_in, numbers in zip(self.stand_ins, self.arguments, strict=True):
            given = [shapes[n] for n in numbers]
            shapes.append(None if None in given else stand_in.output_shape(*given))
            if shapes[-1] is None:
                return None
        return [None if n is None else shapes[n] for n in self.results]

    def run(self, inputs):
        """Run the graph on inputs for which `shapes` found some."""
        return Tape(self, inputs)


class Tape:
    """One run of Steps."""

    def __init__(self, steps, inputs):
        self.steps, values, self.calls = steps, list(inputs), []
        # of each value: whether an input's gradient, a parameter's gradient, goes through it
        self.to_input = [_wanted(t) for t in inputs]
        self.to_parameter = [False] * len(inputs)
        with torch.no_grad():
            for stand_in, numbers, last in zip(steps.stand_ins, steps.arguments, steps.last, strict=True):
                output, *kept = stand_in.record(*[values[n] for n in numbers])
                self.calls.append(kept)
                values.append(output)
                self.to_input.append(any(self.to_input[n] for n in numbers))
                self.to_parameter.append(stand_in.learns() or any(self.to_parameter[n] for n in numbers))
                for n in last:
                    values[n] = None
        self.outputs = tuple(None if n is None else values[n] for n in steps.results)
        self.needed = [n is not None and (self.to_input[n] or self.to_parameter[n]) for n in steps.results]

    def to_inputs(self, grads):
        return self._of_inputs(self._back(grads, self.to_input, parameters=False))

    def backward(self, grads, only=None, inputs=False):
        """grads: a list, which is emptied. only: not looked at; those that do not learn get no gradient."""
        self.outputs = None
        either = [a or b for a, b in zip(self.to_input, self.to_parameter, strict=True)]
        found = self._back(grads, either if inputs else self.to_parameter, parameters=True)
        return self._of_inputs(found) if inputs else None

    def _of_inputs(self, found):
        return [found[n] if self.to_input[n] else None for n in range(self.steps.inputs)]

    @torch.no_grad()
    def _back(self, grads, through, parameters):
        """Go back from gradients of the outputs through the values that `through` says. Returns the gradients of all values."""
        found = [None] * len(through)
        for n, grad in zip(self.steps.results, grads, strict=True):
            if n is not None:
                found[n] = plus(found[n], grad)
        if parameters:
            grads.clear()
        for index in reversed(range(len(self.calls))):
            n = self.steps.inputs + index
            grad, found[n] = found[n], None
            kept = self.calls[index]
            if parameters:
                self.calls[index] = None
            if grad is None or not through[n]:
                continue
            stand_in, numbers = self.steps.stand_ins[index], self.steps.arguments[index]
            of_inputs, of_parameters = stand_in.gradients(grad, *kept, [through[i] for i in numbers], parameters)
            del grad, kept
            for i, g in zip(numbers, of_inputs, strict=True):
                found[i] = plus(found[i], g)
            if parameters:
                for parameter, g in zip(stand_in.learned(), of_parameters, strict=True):
                    add_gradient(parameter, g)
        return found
