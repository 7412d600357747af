"""A training step on a CPU without the Python around its operators: recorded once as a list of operators, then called one after the other.

Python and autograd take a few milliseconds of a step, which on small networks is a tenth of it (docs/cpu.md). A recording is a Python function of
the minibatch: a line for each operator that PyTorch's dispatcher saw, with the same arguments, each result deleted behind the last line that reads
it. The same operators run in the same order, so that results have the same bits. What must run as Python in every step, such as the updates of
optimizers, is a line that calls it.
"""

import contextlib
import math
import operator

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from fastff.arguments import check_labels, labels_checked
from fastff.graph.module import HOOKS, Watch
from fastff.graph.snapshot import is_plain
from fastff.kernels import triton

UNFORESEEN = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Recording(TorchDispatchMode):
    """Within it, each operator that runs is written down as a line of a function.

    Args: named is {name: tensor} of what the function is given or finds.

    Attributes: reason (why the function would not be the step, or None)."""

    calls_kernels = True  # ops of fastff call their kernels as they do without a mode (fastff/ops/table.py)

    def __init__(self, named):
        super().__init__()
        self.reason = "Triton's kernels, which are interpreted, are no operators" if triton.INTERPRETED else None
        self.lines, self.results = [], 0
        self.found = {}  # {id of a value that the function finds: (its name, the value)}
        self.names = WeakTensorKeyDictionary()
        for name, tensor in named.items():
            self.names[tensor] = name

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not isinstance(function, torch._ops.OpOverload) or UNFORESEEN.intersection(function.tags):
            self.reason = self.reason or f"what {function} gives depends on values"
        reads = []
        arguments = [self._text(value, reads) for value in args]
        arguments += [f"{name}={self._text(value, reads)}" for name, value in (kwargs or {}).items()]
        several = isinstance(result, (tuple, list))
        names = [self._new(value) for value in (result if several else [result])]
        call = f"{self._constant(getattr(function, '_op', function))}({', '.join(arguments)})"
        if set(names) <= {"_"}:
            self.lines.append(([], call, reads))
        else:
            self.lines.append((names, f"{', '.join(names)}{',' * several} = {call}", reads))
        return result

    def _text(self, value, reads):
        """A value as the function writes it. The names of tensors are added to `reads`."""
        if isinstance(value, torch.Tensor):
            name = self.names.get(value)
            if name is None:
                self.reason = self.reason or f"a tensor {list(value.shape)} comes from outside"
            reads.append(str(name))
            return reads[-1]
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(self._text(v, reads) for v in value)}]"
        exact = isinstance(value, (bool, int, str, type(None))) or (isinstance(value, float) and math.isfinite(value))
        return repr(value) if exact else self._constant(value)

    def _constant(self, value):
        """The name of a value that the function finds."""
        return self.found.setdefault(id(value), (f"k{len(self.found)}", value))[0]

    def _new(self, value):
        """The name of a result; "_" for one that is no tensor, or an argument that the operator wrote to and gives back."""
        if not isinstance(value, torch.Tensor) or value in self.names:
            return "_"
        self.names[value] = f"t{self.results}"
        self.results += 1
        return self.names[value]

    def call(self, function, *args):
        """Call a function that is not recorded, and write down that it is called."""
        self.lines.append(([], f"{self._constant(lambda: function(*args))}()", []))
        with _disable_current_modes():
            return function(*args)

    def give_gradients(self, parameters):
        """Write down that parameters get the gradients that they have."""
        for p in parameters:
            if p.grad is not None:
                reads = []
                self.lines.append(([], f"{self._text(p, reads)}.grad = {self._text(p.grad, reads)}", reads))

    def function(self, given, constants, results):
        """The function of arguments with the names `given` that returns a list of these results. constants: {name: tensor} of what it finds."""
        reads, lines = [], []
        last = f"return {self._text(results, reads)}"
        read = {*given, *constants, *reads}  # by the lines behind the present one
        for names, line, reads in reversed(self.lines):
            done = [name for name in dict.fromkeys((*names, *reads)) if name not in read]
            lines += [f"del {', '.join(done)}", line] if done else [line]
            read.update(reads)
        source = "\n    ".join([f"def step({', '.join(given)}):", *reversed(lines), last])
        found = constants | dict(self.found.values())
        exec(compile(source, "<recorded step>", "exec"), found)
        return found["step"]


class Operators:
    """Runs functions of (images, target) with the modules of `roots`, and records them; the recorder of a Recorded (recording.py) on a CPU.

    Args:
        roots: modules; all that the functions depend on.
        classes: number of classes that labels are checked for.
        constants: returns tensors that the functions read beside images, target, parameters and buffers.
        around: around(recording) is the context that a function runs in while it is recorded.

    Attributes: changes (how often the modules were found to have changed, after which no recording made before holds)."""

    name, most, warns = "as lists of operators", 256, False

    def __init__(self, roots, classes, constants=list, around=contextlib.nullcontext):
        self.roots, self.classes, self.constants, self.around = roots, classes, constants, around
        self.watch, self.changes = None, 0

    def __getstate__(self):
        return vars(self) | {"watch": None}

    def run(self, function):
        return function()

    def record(self, function, images, target):
        """Run and record a function. Returns (a function that replays it, or the reason why none does; its result, a tuple)."""
        if target is not None:
            check_labels(target, self.classes)
        constants = {f"c{i}": t for i, t in enumerate([*self.tensors, *self.constants()])}
        recording = Recording(constants | {"images": images} | ({} if target is None else {"target": target}))
        with self.around(recording), labels_checked(), recording:
            result = function(images, target)
            recording.give_gradients(self.tensors)
        if recording.reason is not None:
            return recording.reason, result
        step, classes = recording.function(("images", "target"), constants, result), self.classes
        make = getattr(result, "_make", tuple)

        @torch.no_grad()
        def replay(images, target):
            if target is not None:
                check_labels(target, classes)
            return make(step(images, target))

        return replay, result

    def _tensors(self):
        return [t for m in self.modules for held in (m._parameters, m._buffers) for t in held.values() if t is not None]

    def ready(self):
        """Whether a recording may be made or replayed now. What changed in the modules is counted."""
        if self.watch is None or not self._unchanged():
            self.changes += self.watch is not None
            self._look()
        outside = (
            torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or torch.is_anomaly_enabled()
        )
        if outside or self.hooked or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        return not any(t.grad is not None or t._backward_hooks or t._post_accumulate_grad_hooks for t in self.tensors)

    def _look(self):
        """Remember what the modules hold: a recording holds as long as they do."""
        self.modules = list(dict.fromkeys(m for root in self.roots for m in root.modules()))
        self.hooked = any(vars(module)[hooks] for module in self.modules for hooks in HOOKS)
        self.watch = Watch({module: _plain_attributes(module) for module in self.modules})
        self.tensors = self._tensors()
        self.sizes = self._sizes(self.tensors)

    def _sizes(self, tensors):
        return [t.stride() for t in tensors], [len(vars(m)) for m in self.modules]  # an attribute may replace a method

    def _unchanged(self):
        tensors = self._tensors()
        same = len(tensors) == len(self.tensors) and all(map(operator.is_, tensors, self.tensors))
        return same and self._sizes(tensors) == self.sizes and self.watch.unchanged()


def _plain_attributes(module):
    """The names of a module's attributes that are plain values, those of its classes (but PyTorch's) included."""
    classes = (vars(cls) for cls in type(module).__mro__ if not cls.__module__.startswith(("torch.", "builtins")))
    holders = vars(module), *classes
    return {name for held in holders for name, value in held.items() if is_plain(value) and not name.startswith("__")}
