"""Measurements made on this machine, kept as small JSON files in the user's cache folder.

The folder is FASTFF_CACHE if that is set, else XDG_CACHE_HOME/fastff if that is set, else ~/.cache/fastff.
"""

import json
import os
from pathlib import Path


def file(name):
    """Path of the file `name` in the cache folder."""
    folder = os.environ.get("FASTFF_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastff")
    return Path(folder).expanduser() / name


def read(name):
    """Return the dict in the file `name`, or an empty one if there is no such file or it cannot be read."""
    try:
        found = json.loads(file(name).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(name, values):
    """Write the dict `values` to the file `name` in one atomic step, and return its path."""
    path = file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=1))
    temporary.replace(path)
    return path
