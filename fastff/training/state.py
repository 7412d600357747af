"""Everything needed to go on with a training run: how far it has come, and its checkpoints."""

import math
from dataclasses import dataclass, field

import torch

from fastff.training import checkpoint
from fastff.training.checkpoint import CheckpointError


@dataclass
class State:
    """How far training has come. A checkpoint holds this, the weights, the optimisers and the random states.

    Attributes:
        steps: number of steps made.
        position: {"epoch": epochs done, "batch": minibatches done in the next one}.
        history: list with one dict per epoch.
        totals: [3, L], sums of losses, right answers and samples over the epoch so far, or None.
        epoch_random: random state at the start of the epoch.
        meta: what the user wants to have kept, or None."""

    steps: int = 0
    position: dict = field(default_factory=lambda: {"epoch": 0, "batch": 0})
    history: list = field(default_factory=list)
    totals: torch.Tensor | None = None
    epoch_random: dict | None = None
    meta: dict | None = None

    def add(self, result, counted):
        """Count a step. counted [L] is 1 for the losses that this rank computes, else 0."""
        # These sums are exact in float64: they are the same at any number of ranks and after any number of restarts.
        losses = result.losses.detach()
        wide = torch.float32 if losses.device.type == "mps" else torch.float64
        samples = counted.to(losses) * result.samples
        now = torch.stack([losses * result.samples, result.correct, samples]).to(wide)
        self.totals = now if self.totals is None else self.totals + now
        self.steps += 1
        self.position["batch"] += 1


def means(totals):
    """Return (losses, accuracies), lists of L numbers, from totals [3, L]. NaN stands for a block of another rank. Waits for the device."""
    *sums, count = totals.tolist()
    losses, accuracies = ([v / n if n else math.nan for v, n in zip(s, count, strict=True)] for s in sums)
    return losses, accuracies


def save(path, trainer):
    """Write a checkpoint of `trainer` atomically.

    All ranks have to call it, and rank 0 writes; the file does not depend on how many they are."""
    trainer.synchronize()
    engine, state, place = trainer.engine, trainer.state, trainer.engine.place
    ranks = place.ranks
    optimizers = {k: engine.optimizers[k].state_dict() for k in place.own_optimizers}
    scalers = {k: engine.scalers[k].state_dict() for k in place.own if engine.scalers[k] is not None}
    totals = None if state.totals is None else ranks.sum(state.totals)
    needed = ranks.data_rank == 0 or ranks.distributed.shard_optimizer  # other replicas have the same
    if (parts := ranks.collect((optimizers, scalers) if needed else ({}, {}))) is None:
        return
    scalers = {k: saved for _, part in parts for k, saved in part.items()}
    checkpoint.save(path, {
        "format": "fastff", "version": 1, "kind": type(trainer).__name__, "names": list(engine.names), "meta": state.meta,
        "module": engine.module.state_dict(),
        "optimizers": [_joined([part[k] for part, _ in parts if k in part]) for k in range(len(engine.optimizers))],
        "scalers": [scalers.get(k) for k in range(len(engine.scalers))], "random": random_state(), "epoch_random": state.epoch_random,
        "steps": state.steps, "position": dict(state.position), "history": state.history, "totals": totals,
    })  # fmt: skip


def load(path, trainer):
    """Bring `trainer` to where the checkpoint was saved. Raises CheckpointError for a damaged file or another network."""
    engine, place = trainer.engine, trainer.engine.place
    saved = checkpoint.load(path, engine.device)
    _check_fits(path, saved, type(trainer).__name__, engine)
    try:
        engine.module.load_state_dict(saved["module"])
        pairs = list(zip(engine.optimizers, saved["optimizers"], strict=True))
        for optimizer, state in (pairs[k] for k in place.own_optimizers):
            optimizer.load_state_dict(place.state_kept(optimizer, state))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: its optimisers do not fit this trainer: {reason}") from error
    for scaler, state in zip(engine.scalers, saved["scalers"], strict=True):
        if scaler is not None and state is not None:
            scaler.load_state_dict(state)
    set_random_state(saved["random"])
    totals = saved["totals"]  # of all ranks: rank 0 goes on with them
    if totals is not None and not place.ranks.leads:
        totals = torch.zeros_like(totals)
    trainer.state = State(
        saved["steps"], saved["position"], saved["history"], totals, saved["epoch_random"], saved["meta"]
    )


def _check_fits(path, saved, kind, engine):
    """Raise CheckpointError before anything is written."""
    if saved["kind"] != kind or saved["names"] != list(engine.names):
        text = f"it has {saved['kind']} of {saved['names']}, expected {kind} of {list(engine.names)}"
        raise CheckpointError(f"{path}: of another network or cut: {text}")
    has, expected = (
        {name: tuple(t.shape) for name, t in d.items()} for d in (saved["module"], engine.module.state_dict())
    )
    if has != expected:
        name = next(n for n in (*expected, *has) if has.get(n) != expected.get(n))
        text = f"{name} is {has.get(name, 'nothing')} there, expected {expected.get(name, 'nothing')}"
        raise CheckpointError(f"{path}: its weights do not fit this network: {text}")


def _joined(states):
    """One optimiser's state_dict from those of the ranks, each with the state of some of its parameters."""
    whole = dict(max(states, key=lambda state: len(state["state"])))
    whole["state"] = {index: value for state in states for index, value in state["state"].items()}
    return whole


def random_state():
    """Return the states of torch's random generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state):
    """Set torch's random generators to what `random_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
