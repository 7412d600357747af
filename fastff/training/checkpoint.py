"""Checkpoint files: written whole or not at all, read without executing anything from them. state.py says what is in them."""

import os
from pathlib import Path

import torch


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another network; the message names the file and what is wrong."""


def write_atomically(path, write):
    """Call write(file) with a temporary file beside `path`, flush it to the disk, and rename it to `path`."""
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
        os.fsync(folder)  # so that the rename lasts
    finally:
        os.close(folder)


def save(path, state):
    """Write `state` (dicts, lists, tensors, numbers, strings) to `path` atomically."""
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
