"""Checkpoint files: written whole or not at all, read without executing anything from them. state.py says what is in them."""

import contextlib
import os
import platform
import zipfile
from pathlib import Path

import torch
from torch.utils.serialization import config

from fastff.arguments import first_line

VERSION = 1  # of the form that state.py gives a checkpoint


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another network; the message names the file and what is wrong."""


def write_atomically(path, write):
    """Call write(file) with a temporary file beside `path`, flush it to the disk, and rename it to `path`.

    Raises OSError, with the path, where that fails (a full disk); what was at `path` is intact then."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save ends with an error of its own
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the rename lasts
        finally:
            os.close(folder)


def _remove_left(path):
    """Remove the temporary files of processes of this machine that were killed while they wrote to `path`."""
    start = f".{path.name}.{platform.node()}."
    for name in os.listdir(path.parent):
        number = name.removeprefix(start).removesuffix(".tmp")
        if name == f"{start}{number}.tmp" and number.isdecimal() and not _runs(int(number)):
            with contextlib.suppress(OSError):
                (path.parent / name).unlink()


def _runs(process):
    if os.name == "nt":  # there a signal would end it; a file that it has open cannot be removed anyway
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def save(path, state):
    """Write `state` (dicts, lists, tensors, numbers, strings) to `path` atomically, with a checksum of every part."""
    with config.patch("save.compute_crc32", True):
        write_atomically(path, lambda file: torch.save(state, file))


def load(path, map_location=None):
    """Read what `save` wrote. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as parts:
            if (damaged := parts.testzip()) is not None:
                raise ValueError(f"the checksum of its part {damaged} is wrong")
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        text = f"not a readable fastff checkpoint, it is damaged or of another kind ({first_line(error)})"
        raise CheckpointError(f"{path}: {text}") from error
    if not isinstance(state, dict) or state.get("format") != "fastff":
        raise CheckpointError(f"{path}: expected a fastff checkpoint, got a file with something else in it")
    version = state.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        text = f"expected version 1 to {VERSION} of the form of checkpoints, got {version!r}"
        raise CheckpointError(f"{path}: {text}; a newer fastff reads newer ones")
    return state
