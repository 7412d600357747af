"""Everything needed to go on with a training run: how far it has come, and its checkpoints."""

import math
from dataclasses import dataclass, field

import torch

from fastff.training import checkpoint, fits
from fastff.training.checkpoint import CheckpointError
from fastff.training.randomness import random_state, set_random_state


@dataclass
class State:
    """How far training has come. A checkpoint holds this, the weights, the optimisers and the random states.

    Attributes:
        steps: number of steps made.
        position: {"epoch": epochs done, "batch": minibatches done in the next one}.
        history: list with one dict per epoch.
        totals: [3, L], sums of losses, right answers and samples over the epoch so far, or None.
        epoch_random: random state at the start of the epoch.
        meta: what the user wants to have kept, or None.
        generators: the torch.Generators of the loader that fit goes through.
        loader_random: random state of the checkpoint that was loaded, until fit has set these generators to it; then None."""

    steps: int = 0
    position: dict = field(default_factory=lambda: {"epoch": 0, "batch": 0})
    history: list = field(default_factory=list)
    totals: torch.Tensor | None = None
    epoch_random: dict | None = None
    meta: dict | None = None
    generators: list = field(default_factory=list)
    loader_random: dict | None = None

    def add(self, result, counted):
        """Add a step to the totals. counted [L] is 1 for the losses that this rank computes, else 0."""
        # These sums are exact in float64: they are the same at any number of ranks and after any number of restarts.
        losses = result.losses.detach()
        wide = torch.float32 if losses.device.type == "mps" else torch.float64
        samples = counted.to(losses) * result.samples
        now = torch.stack([losses * result.samples, result.correct, samples]).to(wide)
        self.totals = now if self.totals is None else self.totals + now
        self.position["batch"] += 1


def means(totals):
    """Return (losses, accuracies), lists of L numbers, from totals [3, L]. NaN stands for a block of another rank. Waits for the device."""
    *sums, count = totals.tolist()
    return tuple([v / n if n else math.nan for v, n in zip(s, count, strict=True)] for s in sums)


def save(path, trainer):
    """Write a checkpoint of `trainer` atomically.

    All ranks have to call it, and rank 0 writes; the file does not depend on how many they are."""
    trainer.synchronize()
    engine, state, place = trainer.engine, trainer.state, trainer.engine.place
    ranks = place.ranks
    used = ((k, engine.optimizers[k]) for k in place.own_optimizers)
    optimizers = {k: o.state_dict() | {"class": type(o).__name__} for k, o in used}
    scalers = {k: engine.scalers[k].state_dict() for k in place.own if engine.scalers[k] is not None}
    totals = None if state.totals is None else ranks.sum(state.totals)
    needed = ranks.data_rank == 0 or ranks.distributed.shard_optimizer  # other replicas have the same
    if (parts := ranks.gather((optimizers, scalers) if needed else ({}, {}), everywhere=False)) is None:
        return
    scalers = {k: saved for _, part in parts for k, saved in part.items()}
    checkpoint.save(path, {
        "format": "fastff", "version": checkpoint.VERSION, "kind": type(trainer).__name__, "names": list(engine.names), "meta": state.meta,
        "module": engine.module.state_dict(),
        "optimizers": [_joined([part[k] for part, _ in parts if k in part]) for k in range(len(engine.optimizers))],
        "scalers": [scalers.get(k) for k in range(len(engine.scalers))], "random": random_state(state.generators), "epoch_random": state.epoch_random,
        "steps": state.steps, "position": dict(state.position), "history": state.history, "totals": totals,
    })  # fmt: skip


def load(path, trainer):
    """Bring `trainer` to where the checkpoint was saved: all of it or nothing. Raises CheckpointError for a damaged file or another network."""
    engine, place = trainer.engine, trainer.engine.place
    saved = checkpoint.load(path, engine.device)
    try:
        fits.check(saved, type(trainer).__name__, engine)
    except CheckpointError as error:
        kept = saved.get("optimizers")
        old = isinstance(kept, list) and any("class" not in o for o in kept if isinstance(o, dict))
        defaults = "granularity='block', window=2, hidden=0 and optimizer=fastff.training.optim.adamw(...)"
        hint = f" (written by fastff 0.1, whose defaults were {defaults})" if old else ""
        raise CheckpointError(f"{path}: {error}{hint}") from error.__cause__
    for k in place.own_optimizers:
        optimizer, kept = engine.optimizers[k], saved["optimizers"][k]
        groups = fits.groups_here(optimizer, kept["param_groups"])
        optimizer.load_state_dict(place.state_kept(optimizer, kept | {"param_groups": groups}))
    engine.module.load_state_dict(saved["module"])
    for scaler, state in zip(engine.scalers, saved["scalers"], strict=True):
        if scaler is not None and state is not None:
            scaler.load_state_dict(state)
    set_random_state(saved["random"])
    totals = saved["totals"]  # of all ranks: rank 0 goes on with them
    if totals is not None and not place.ranks.leads:
        totals = torch.zeros_like(totals)
    trainer.state = State(
        saved["steps"], saved["position"], saved["history"], totals, saved["epoch_random"], saved["meta"],
        loader_random=saved["random"],
    )  # fmt: skip


def _joined(states):
    """One optimiser's state_dict from those of the ranks, each with the state of some of its parameters."""
    whole = dict(max(states, key=lambda state: len(state["state"])))
    whole["state"] = {index: value for state in states for index, value in state["state"].items()}
    return whole
