"""The states of random generators: what a checkpoint needs so that a resumed run draws the same numbers."""

import collections
import functools
import random
import types

import numpy as np
import torch

from fastff.graph.snapshot import LARGEST, global_generators

OTHER = (np.random.Generator, np.random.RandomState, random.Random)


def random_state(generators=()):
    """Return the states of the global generators of torch, numpy and Python, and those of `generators` as "loader"."""
    name, keys, *rest = np.random.get_state()
    state = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = (name, torch.from_numpy(keys.astype(np.int64)), *rest)
    state["loader"] = [generator.get_state() for generator in generators]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state, generators=()):
    """Set the generators to what `random_state` returned. Files of version 0.1 have torch's global ones alone."""
    torch.set_rng_state(state["cpu"].cpu())
    if "python" in state:
        random.setstate(state["python"])
    if "numpy" in state:
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    for generator, saved in zip(generators, state.get("loader", ()), strict=False):
        generator.set_state(saved.cpu())
    for device, saved in zip(range(torch.cuda.device_count()), state.get("cuda", ()), strict=False):
        torch.cuda.set_rng_state(saved.cpu(), device)


def generators_of(loader):
    """Return (the torch.Generators that a loader holds, or anything that it holds, why a resumed run would draw other numbers or None)."""
    found, others, rest = [], [], collections.deque([(loader, loader)])
    seen = {id(generator) for generator in global_generators()}  # of these the states are saved
    while rest and len(seen) < 10_000:
        holder, value = rest.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Generator):
            found.append(value)
        elif isinstance(value, OTHER):
            others.append(f"{type(holder).__name__} has a {type(value).__name__}")
        else:
            named = hasattr(value, "__dict__") and not isinstance(value, types.FunctionType)
            rest += [(value if named else holder, inside) for inside in _held(value)]
    if getattr(loader, "persistent_workers", False):
        return found, "its workers are persistent, and their random states end with them"
    return found, f"its {others[0]} of its own, whose state is not saved" if others else None


def _held(value):
    """What an object holds: entries, attributes, what a function finds outside of itself, and what the methods of its class find there."""
    attributes = () if isinstance(value, (type, types.ModuleType)) else getattr(value, "__dict__", {}).values()
    for container, entries in ((dict, dict.values), (list, list.__iter__), (tuple, tuple.__iter__)):
        # of a class of the user's, without running its code
        if isinstance(value, container) and container.__len__(value) <= LARGEST:
            return *attributes, *entries(value)
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    is_function = isinstance(value, types.FunctionType)
    if ((value if is_function else type(value)).__module__ or "").partition(".")[0] in ("torch", "numpy", "builtins"):
        return tuple(attributes)
    if is_function:
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        return *cells, *(value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__)
    methods = [f for cls in type(value).__mro__ for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    return *attributes, *methods
