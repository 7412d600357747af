"""Checkpoints: written whole or not at all, read without executing anything from them."""

import os
from pathlib import Path

import torch


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another network; the text names the file and what is wrong."""


def write_atomically(path, write):
    """write(file) into a temporary file beside `path`, flushed to the disk, then renamed onto it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def save(path, state):
    """Write `state` (dicts, lists, tensors, numbers, strings) atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path, map_location=None):
    """Read what `save` wrote. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable fastff checkpoint, it is damaged or of another kind ({reason})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != "fastff":
        raise CheckpointError(f"{path}: expected a fastff checkpoint, got a file with something else in it")
    return state


def joined(states):
    """One optimiser's state_dict from those of the ranks, each with the state of some of its parameters."""
    whole = dict(max(states, key=lambda state: len(state["state"])))
    whole["state"] = {index: value for state in states for index, value in state["state"].items()}
    return whole


def random_state():
    """The states of torch's generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state):
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
