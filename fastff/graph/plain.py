"""Traces of modules that are proved to be all that the modules do.

torch.fx runs a module's Python once and records what happens to its tensors. Whatever else that Python does (a random choice, a context such as
torch.no_grad, statistics updated by hand, a counter, a print) would happen while tracing and never again. `trace` notices it: the module at fault
is then called as it is, so that its Python runs in every step, and the trace starts again without opening it. The model is left as it was.
"""

import collections
import contextlib
import gc
import operator
import sys
import weakref
from typing import NamedTuple
from unittest import mock

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastff.arguments import first_line
from fastff.graph.answers import Answers
from fastff.graph.snapshot import Snapshot, is_plain, random_states, same

IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


class NotPlain(Exception):
    """A module whose trace is not all that it does: its name, and the reason as a phrase that follows the name."""

    def __init__(self, name, reason):
        super().__init__(f"{name or 'the model itself'}: {reason}")
        self.name, self.reason = name, reason


class Trace(NamedTuple):
    """graph; whole: {name: reason} of modules that are called as they are because their trace would not be plain; reads: {module that was
    opened: names of the attributes that were read}; sizes: whether it is for images of the examples' size alone."""

    graph: fx.Graph
    whole: dict
    reads: dict
    sizes: bool = False


def trace(root, opens, needed=lambda name: False, in_order=True, examples=()):
    """Trace a module.

    opens(module, name): whether a module may be opened. needed(name): whether it must be. in_order: whether all nodes will run, in their order,
    or only those whose results are used. examples: two inputs of different numbers of images, by which questions for sizes and classes are
    answered. Raises NotPlain for the root and for modules that are needed."""
    whole = {}
    while True:
        found, faults = _trace(root, opens, needed, whole, in_order, examples)
        for fault in faults:
            if not fault.name or needed(fault.name):
                raise fault
            whole[fault.name] = fault.reason
        if not faults:
            return found


def _trace(root, opens, needed, whole, in_order, examples):
    """(Trace, faults)"""
    modules = dict(root.named_modules())
    tracer = _Tracer(modules, opens, needed, whole, Answers(root, examples))
    before = Snapshot(modules)
    try:
        with _watched(tracer):
            graph = tracer.trace(root)
    except Exception as error:
        fault = tracer.note(f"cannot be traced ({type(error).__name__}: {first_line(error)})")
        if error is not fault:
            fault.__cause__ = error
        return None, [fault]
    finally:
        changed = before.restore()
    _forget_batch_norm_counts(graph, tracer)
    if tracer.fault:
        return None, [tracer.fault]
    faults = []
    for names, what in changed:
        name = next((n for n in map(tracer.opened_at, names) if n in tracer.opened), "")
        faults.append(NotPlain(name, what))
    unused = [tracer.scopes.get(node, "") for node in _unused(graph, modules)]
    faults += [] if in_order else [NotPlain(name, "computes what it does not use") for name in unused]
    tracer.parameters.clear()
    for generation in range(3):  # a proxy in a cycle is not kept
        if any(ref() is not None for ref, _ in tracer.proxies):
            gc.collect(generation)
    faults += [NotPlain(name, "keeps a tensor for later") for ref, name in tracer.proxies if ref() is not None]
    reads = {modules[name]: tracer.reads[modules[name]] for name in tracer.opened}
    return Trace(graph, dict(whole), reads, tracer.answers.sizes), faults


def _asking(question):
    return lambda proxy: proxy.tracer.answer(proxy, question)


class _Proxy(fx.Proxy):
    """A traced value: of a tensor isinstance(x, torch.Tensor) is False, so it notices that a model's code asks for it."""

    @property  # type: ignore[misc]
    def __class__(self):
        frame = sys._getframe(1)
        named = frame.f_code.co_names + frame.f_code.co_freevars
        asks = "Tensor" in named or "Parameter" in named
        if frame.f_code is torch.is_tensor.__code__:
            frame, asks = frame.f_back, True
        if frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "fastff"):
            return type(self)
        return self.tracer.class_of(self, asks)

    def __getattr__(self, name):
        return _Attribute(self, name)

    __float__, __int__, __complex__ = _asking(float), _asking(int), _asking(complex)
    __index__, __len__ = _asking(operator.index), _asking(len)


class _Attribute(_Proxy, fx.proxy.Attribute):
    """x.name: the method or the value, as it turns out."""

    __init__ = fx.proxy.Attribute.__init__


class _Tracer(fx.Tracer):
    """Notes the first thing that a module does beside computing with traced tensors, and stops."""

    proxy_buffer_attributes = True

    def __init__(self, modules, opens, needed, whole, answers):
        super().__init__()
        self.answers = answers
        self.modules, self.opens, self.needed, self.whole = modules, opens, needed, whole
        self.names = {id(t): n for m in (modules[""].named_buffers, modules[""].named_parameters) for n, t in m()}
        self.stack, self.opened = [""], {""}
        self.fault, self.scopes, self.proxies, self.parameters = None, {}, [], {}
        self.reads = collections.defaultdict(set)
        self.state = None

    def note(self, reason):
        """Note a fault of the module that runs now, for good: its Python may catch the error."""
        self.fault = self.fault or NotPlain(self.stack[-1], reason)
        return self.fault

    def opened_at(self, name):
        """The name of the innermost opened module that holds the module `name`."""
        while name and name not in self.opened:
            name = name.rpartition(".")[0]
        return name

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """Arguments with default values, *args and **kwargs are left out, as in a call of the module without them."""
        *_, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        given = [arguments[0]]
        for number, argument in enumerate(arguments[1:]):
            if number and argument.node.args or argument.node.target.startswith("*"):
                self.graph.erase_node(argument.node)
            else:
                argument.node.args = ()
                given.append(argument)
        return root_fn, given

    def is_leaf_module(self, module, name):
        return name in self.whole or not self.opens(module, name)

    def call_module(self, module, forward, args, kwargs):
        if self.answers.busy:
            return forward(*args, **kwargs)
        name = self.path_of_module(module)
        if self.is_leaf_module(module, name):
            return super().call_module(module, forward, args, kwargs)
        self.stack.append(name)
        self.opened.add(name)
        before = random_states()
        try:
            result = super().call_module(module, module.forward, args, kwargs)  # without hooks, which would run once
        except NotPlain:
            raise
        except Exception as error:
            raise self.note(f"cannot be traced ({type(error).__name__}: {first_line(error)})") from error
        if not same(random_states(), before):
            raise self.note("draws random numbers in Python")
        self.stack.pop()
        return result

    def getattr(self, attr, value, cache):
        name = self.names.get(id(value)) if isinstance(value, torch.Tensor) else None
        if name is None or self.answers.busy:
            return value
        if name not in self.parameters:
            self.parameters[name] = self.create_proxy("get_attr", name, (), {})
        return self.parameters[name]

    def get_fresh_qualname(self, prefix):
        raise self.note("makes a tensor in Python, which would be a constant")

    def create_node(self, kind, target, args, kwargs, *rest, **options):
        if self.state is not None and _state() != self.state:
            raise self.note("computes under torch.no_grad, inference mode or autocast of its own")
        if _writes(kind, target, kwargs) and args and (attribute := _attribute_behind(args[0])):
            name = self.stack[-1]
            counts = f"{name}.num_batches_tracked".lstrip(".")
            if attribute != counts or not isinstance(self.modules[name], nn.BatchNorm2d):
                raise self.note(f"writes to {attribute.rpartition('.')[2]} in place")
        node = super().create_node(kind, target, args, kwargs, *rest, **options)
        self.scopes[node] = self.stack[-1]
        return node

    def proxy(self, node):
        proxy = _Proxy(node, self)
        self.proxies.append((weakref.ref(proxy), self.stack[-1]))
        return proxy

    def answer(self, proxy, question, reason="needs the value of a tensor"):
        """question(value) of what a proxy stands for, where that is the same for every number of images and can be told from sizes."""
        try:
            return self.answers.ask(proxy.node, question)
        except LookupError:
            raise self.note(reason) from None

    def class_of(self, proxy, asks):
        """The class that a proxy's value has, where that can be told."""
        try:
            found = self.answers.ask(proxy.node, type)
            return torch.Tensor if issubclass(found, torch.Tensor) else found
        except LookupError:
            pass
        if asks and self.stack[-1] and not self.needed(self.stack[-1]):
            raise self.note("asks for the class of a tensor")
        return _Proxy

    def to_bool(self, obj):
        return self.answer(obj, bool)

    def iter(self, obj):
        count = self.answer(obj, len, "goes through a tensor or a tuple of unknown length")
        return iter([obj[i] for i in range(count)])

    def keys(self, obj):
        return self.answer(obj, lambda value: list(value.keys()), "goes through a dict of unknown keys")


@contextlib.contextmanager
def _watched(tracer):
    """Tracing under the tracer's eyes: what it runs into stops the trace."""

    class NoTensors(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            raise tracer.note(f"computes {op.__name__} on tensors of its own")

    class NoPrint:
        def write(self, *text):
            raise tracer.note("prints")

        flush = write

    def no_autocast(context, enter=torch.autocast.__enter__):
        if tracer.answers.busy:
            return enter(context)
        raise tracer.note("has an autocast context of its own")

    def recorded(module, name, get=object.__getattribute__):
        value = get(module, name)
        if is_plain(value) and not name.startswith("__"):
            tracer.reads[module].add(name)
        return value

    with (
        contextlib.redirect_stdout(NoPrint()),
        mock.patch.object(torch.autocast, "__enter__", no_autocast),
        mock.patch.object(nn.Module, "__getattribute__", recorded, create=True),
        torch.inference_mode(False),
        torch.enable_grad(),
        NoTensors(),
    ):
        tracer.state = _state()
        yield


def _state():
    autocast = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _writes(kind, target, kwargs):
    """Whether a node writes to its first argument."""
    name = target if kind == "call_method" else getattr(target, "__name__", "") if kind == "call_function" else ""
    return target in IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True


def writes(node, modules):
    """Whether a node of a graph writes to its first argument."""
    if node.op == "call_module":
        return getattr(modules.get(node.target), "inplace", False) is True
    return bool(node.all_input_nodes) and _writes(node.op, node.target, node.kwargs)


def _attribute_behind(node):
    """The parameter or buffer that a node's value is, or is a view of as far as can be told; None for others."""
    while isinstance(node, fx.Node) and node.op in ("call_method", "call_function") and node.args:
        views = node.op == "call_method" or node.target in (getattr, operator.getitem)
        node = node.args[0] if views else None
    return node.target if isinstance(node, fx.Node) and node.op == "get_attr" else None


# In names of functions that draw random numbers, update statistics or change what autograd does.
HAVE_EFFECTS = (
    "drop", "rand", "bernoulli", "normal", "multinomial", "rrelu", "batch_norm", "instance_norm", "backward", "hook", "retain",
)  # fmt: skip


def _is_harmless(node, modules):
    """Whether a node has no effect but its result, as far as is known."""
    if node.op == "get_attr":
        return True
    if node.op == "call_module":
        module = modules[node.target]
        name, where = type(module).__name__.lower(), type(module).__module__
        known = where.startswith("torch.nn.modules.") and not list(module.children()) and not list(module.buffers())
    else:
        name = node.target if node.op == "call_method" else node.target.__name__
        where = "torch" if node.op == "call_method" else (getattr(node.target, "__module__", None) or "torch")
        spaces = [torch.Tensor] if node.op == "call_method" else [torch, nn.functional]
        known = where in ("_operator", "builtins", "math") or (
            where.startswith("torch") and any(hasattr(space, name) for space in spaces)
        )
    return known and not writes(node, modules) and not any(word in name for word in HAVE_EFFECTS)


def _unused(graph, modules):
    """Nodes whose results nobody uses and that may have an effect; those without one are erased, but for assertions."""
    found = []
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and node.target is not torch._assert:
            if _is_harmless(node, modules):
                graph.erase_node(node)
            else:
                found.append(node)
    return found


def _forget_batch_norm_counts(graph, tracer):
    """Make an opened subclass of BatchNorm2d in training a call of the base class in the graph: a node of the module, marked "batch_norm".

    This is so where it does just that by hand: counts the batch, and calls F.batch_norm with its own tensors. Otherwise it is at fault."""
    for name in tracer.opened:
        norm = tracer.modules[name]
        if not isinstance(norm, nn.BatchNorm2d) or not norm.training:
            continue
        inside = [node for node in graph.nodes if tracer.scopes.get(node) == name]
        calls = [node for node in inside if node.target is nn.functional.batch_norm]
        counts = [node for node in inside if node.target == "add_" and _attribute_behind(node.args[0])]
        if not (len(calls) == 1 and name and _is_base_call(norm, name, calls[0], counts)):
            tracer.fault = tracer.fault or NotPlain(name, "has statistics of its own")
            return
        with graph.inserting_before(calls[0]):
            node = graph.call_module(name, (calls[0].args[0],))
        node.meta["batch_norm"] = True
        tracer.scopes[node] = name
        calls[0].replace_all_uses_with(node)
        asserts = [node for node in inside if node.target is torch._assert]
        for gone in (calls[0], *counts, *asserts):
            graph.erase_node(gone)


def _is_base_call(norm, name, call, counts):
    """Whether a node of F.batch_norm, and those that count, do what nn.BatchNorm2d does with this module in training."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    tracked = norm.track_running_stats and norm.running_mean is not None
    for key in names[1:5]:
        tensor = getattr(norm, key)
        expected = None if tensor is None or (key.startswith("running") and not tracked) else f"{name}.{key}"
        if _attribute_behind(given.get(key)) != expected:
            return False
    counted = [tuple(node.args[1:]) for node in counts if not node.users and not node.kwargs]
    same_rate = not tracked or (norm.momentum is not None and given.get("momentum", 0.1) == norm.momentum)
    same_options = given.get("training") is True and given.get("eps", 1e-5) == norm.eps and same_rate
    return same_options and len(counts) == len(counted) and counted == [(1,)] * bool(tracked) and "input" in given


def is_norm(node, modules):
    """Whether a node calls nn.BatchNorm2d's own forward."""
    if node.op != "call_module" or node.target not in modules or "forward" in vars(modules[node.target]):
        return False
    return type(modules[node.target]) is nn.BatchNorm2d or "batch_norm" in node.meta
