"""The states of random generators: what a checkpoint needs so that a resumed run draws the same numbers."""

import random

import numpy as np
import torch

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
    """Return (the torch.Generators that a DataLoader, its samplers and its data set keep, why a resumed run would draw other numbers or None)."""
    batches = getattr(loader, "batch_sampler", None)
    parts = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    parts.append(getattr(loader, "dataset", None))
    kept = [(part, value) for part in parts for value in getattr(part, "__dict__", {}).values()]
    found = list({id(value): value for _, value in kept if isinstance(value, torch.Generator)}.values())
    if getattr(loader, "persistent_workers", False):
        return found, "its workers are persistent, and their random states end with them"
    others = [f"{type(part).__name__} has a {type(value).__name__}" for part, value in kept if isinstance(value, OTHER)]
    return found, f"its {others[0]} of its own, whose state is not saved" if others else None
