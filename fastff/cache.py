"""What was measured on this machine, as small JSON files in the user's cache folder.

The folder: FASTFF_CACHE, else XDG_CACHE_HOME/fastff, else ~/.cache/fastff.
"""

import json
import os
from pathlib import Path


def file(name):
    """Path of a file there."""
    folder = os.environ.get("FASTFF_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastff")
    return Path(folder).expanduser() / name


def read(name):
    """The dict in a file; empty where there is none that can be read."""
    try:
        found = json.loads(file(name).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(name, values):
    """Replace a file at once. Returns its path."""
    path = file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=1))
    temporary.replace(path)
    return path
