"""What a traced value would be: answers to a model's Python that asks for the size, the class or the length of what it computes with.

The nodes that a question depends on are run on two batches of different sizes, as tensors without memory (torch's FakeTensorMode): so no answer can
come from the values of images or parameters, and one that depends on the number of images is not given.
"""

import contextlib
import functools
import io

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from fastff.graph.snapshot import preserved

SIZES = {"shape", "size", "numel", "nelement", "stride"}


class Answers:
    """Answers about a module from two inputs of different numbers of images; without examples there are none.

    Attributes: busy (whether a node is being run now), sizes (whether an answer was given that depends on the size of the images)."""

    def __init__(self, root, examples):
        self.root, self.examples, self.busy, self.sizes = root, examples, False, False
        self.modes = [FakeTensorMode(allow_non_fake_inputs=True) for _ in examples]
        self.found = [{} for _ in examples]

    def ask(self, node, question):
        """question(value) of what a node computes. Raises LookupError where the two batches give different answers, or none."""
        needed, stack = set(), [node]
        while stack:
            needed.add(node := stack.pop())
            stack += [n for n in node.all_input_nodes if n not in needed]
        order = [n for n in node.graph.nodes if n in needed]
        self.busy = True
        try:
            values = [self._value(order, *parts) for parts in zip(self.modes, self.found, self.examples, strict=True)]
            if question is not type and any(isinstance(value, torch.Tensor) for value in values):
                raise TypeError("asks for the value of a tensor")
            first, second = map(question, values)
            agree = type(first) is type(second) and first == second
        except Exception as error:
            raise LookupError from error
        finally:
            self.busy = False
        if not agree:
            raise LookupError
        # how many dimensions there are is no matter of size
        if question is not type and not isinstance(values[0], torch.Size):
            self.sizes |= question is len or any(map(self._is_size, order))
        return first

    def _is_size(self, node):
        name = node.args[1] if node.target is getattr else node.target
        return name in SIZES or (name not in ("ndim", "dim") and type(self.found[0][node]) in (int, float))

    def _value(self, order, mode, found, example):
        for node in order:
            if node not in found:
                args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
                if node.op == "placeholder":
                    found[node] = args[0] if args else mode.from_tensor(example)
                elif node.op == "get_attr":
                    found[node] = mode.from_tensor(functools.reduce(getattr, node.target.split("."), self.root))
                else:
                    found[node] = self._call(node, args, kwargs, mode)
        return found[order[-1]]

    def _call(self, node, args, kwargs, mode):
        """Run a node apart from the trace that goes on meanwhile; the Python of a module leaves nothing behind."""
        module = self.root.get_submodule(node.target) if node.op == "call_module" else None
        function = module or node.target
        if node.op == "call_method":
            function, args = getattr(args[0], node.target), args[1:]
        kept = contextlib.nullcontext() if module is None else preserved(module)
        with _disable_current_modes(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), kept, mode:
            return function(*args, **kwargs)
