"""The state of a model beside its tensors: what Python code may change when a model runs, copied, compared and put back."""

import builtins
import collections
import contextlib
import functools
import random
import sys
import types

import numpy as np
import torch
from torch import nn

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
LARGEST = 1000  # entries of a container that is looked into


def _access(holder):
    """(a function that copies what an object holds, a function that puts a copy back), or None where nothing is known of it."""
    if isinstance(holder, type):
        own = lambda: {k: v for k, v in vars(holder).items() if not k.startswith("__")}  # noqa: E731
        return own, lambda old: _reset(holder, old)
    if isinstance(holder, dict):
        drop = lambda old: [holder.pop(k) for k in holder.keys() - old.keys()]  # noqa: E731
        return lambda: dict(dict.items(holder)), lambda old: (drop(old), holder.update(old))
    if isinstance(holder, (list, collections.deque)):
        return lambda: list(holder), lambda old: (holder.clear(), holder.extend(old))
    if isinstance(holder, set):
        return lambda: set(holder), lambda old: (holder.clear(), holder.update(old))
    if isinstance(holder, np.ndarray):
        return holder.copy, lambda old: holder.__setitem__(..., old)
    if isinstance(holder, random.Random):
        return holder.getstate, holder.setstate
    if isinstance(holder, (np.random.RandomState, torch.Generator)):
        return holder.get_state, holder.set_state
    if isinstance(holder, np.random.Generator):
        bits = holder.bit_generator
        return lambda: bits.state, lambda old: setattr(bits, "state", old)
    skipped = (nn.Module, torch.Tensor, types.ModuleType, types.FunctionType)
    inside = getattr(holder, "__dict__", None)
    return _access(inside) if isinstance(inside, dict) and not isinstance(holder, skipped) else None


def _reset(cls, old):
    for name, value in list(vars(cls).items()):
        if not name.startswith("__") and name not in old:
            delattr(cls, name)
        elif old.get(name, value) is not value:
            setattr(cls, name, old[name])


@functools.cache
def global_generators():
    """The generators behind the functions of Python, NumPy and torch."""
    return random.random.__self__, np.random.random.__self__, torch.default_generator  # type: ignore[attr-defined]


def random_states():
    """The states of the global generators of Python and NumPy."""
    return [_access(generator)[0]() for generator in global_generators()[:2]]


def same(a, b):
    """Whether two values are the same: equal plain values, equal arrays, otherwise one object."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, torch.Tensor):  # the state of a generator
        return a.dtype == b.dtype == torch.uint8 and torch.equal(a, b)
    return isinstance(a, (*PLAIN, set)) and a == b


def is_plain(value):
    """Whether a value is a number, a text, None, or a tuple, list or dict of these."""
    if isinstance(value, dict):
        return is_plain(list(value.values()))
    if isinstance(value, (tuple, list)):
        return len(value) <= LARGEST and all(map(is_plain, value))
    return type(value) in PLAIN


class Snapshot:
    """What the Python of modules can change beside tensors: attributes, what is in these, classes, globals of their files, random states.

    `restore` puts it back and returns [(names of the modules that it may belong to, what was changed)]."""

    def __init__(self, modules):
        self.kept, self.seen = [], {id(m) for m in modules.values()}
        users = collections.defaultdict(list)
        for name, module in modules.items():
            for cls in type(module).__mro__:
                if not cls.__module__.startswith(("torch.", "builtins", "fastff.")):
                    users[cls].append(name)
                    if cls.__module__ in sys.modules:
                        users[cls.__module__].append(name)
            self._keep([name], vars(module), 4, "changes its attributes")
        for owner, names in users.items():
            holder = owner if isinstance(owner, type) else vars(sys.modules[owner])
            self._keep(names, holder, 1, "changes attributes of its class or globals of its file")
        for generator in global_generators():
            self._keep([""], generator, 0, "draws random numbers in Python")

    def _keep(self, names, holder, depth, what):
        if id(holder) in self.seen:
            return
        self.seen.add(id(holder))
        inside = holder if isinstance(holder, tuple) else None
        if inside is None and (access := _access(holder)) is not None:
            inside = access[0]()
            self.kept.append((names, access, inside, what))
        if depth and isinstance(inside, (dict, list, set, tuple)) and len(inside) <= LARGEST:
            for value in inside.values() if isinstance(inside, dict) else inside:
                if not isinstance(value, (*PLAIN, type)) and value is not vars(builtins):
                    self._keep(names, value, depth - 1, what)

    def restore(self):
        changed = []
        for names, (get, put), old, what in self.kept:
            if not same(get(), old):
                put(old)
                changed.append((names, what))
        return changed


@contextlib.contextmanager
def preserved(model):
    """Run a model inside this context, and nothing of it is changed afterwards: buffers, attributes, random states."""
    before = Snapshot(dict(model.named_modules()))
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=cuda_devices(model)):
            yield
    finally:
        before.restore()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def cuda_devices(model):
    """The CUDA devices of a model's parameters."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
