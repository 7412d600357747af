"""Describes where a result was measured (machine, versions, commit), and lists which implementations of each op run on this machine."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import fastff
from fastff import cache
from fastff.ops import TABLES
from fastff.ops.table import choose, concerns


def commit():
    """Return the commit of the checkout that fastff was imported from, with a + if its files were changed, or None if it is no checkout."""
    root = Path(fastff.__file__).parents[1]
    if not (root / ".git").exists():  # without this, git would find a repository that contains the virtual environment
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "fastff", "csrc"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def processor():
    """Return the name of the processor and the vector instructions that PyTorch uses on it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def environment(device):
    """Return a dict of strings and numbers that describes `device`, versions, system and commit."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastff": fastff.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
    }


def check_implementations(device):
    """Raises ValueError if FASTFF_IMPL names an implementation that cannot run on `device`. Called before any work is done."""
    for op, rows in TABLES.items():
        if op == "convolution" and not concerns(rows):  # the convolution is PyTorch's then
            continue
        try:
            choose(op, rows, "auto", torch.empty(1, 1, 1, 1, device=device))
        except RuntimeError as error:
            raise ValueError(str(error)) from error


def implementations():
    """Return rows (op, implementation, device type, note) for `fastff info`, in the order in which "auto" tries them.

    The note says whether the implementation runs on this machine, whether "auto" chooses it, or why not."""
    found = []
    for op, rows in TABLES.items():
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            x = torch.empty(1, 64, 1, 1, device=device)
            try:
                chosen, problem = choose(op, rows, "auto", x), None
            except (RuntimeError, ValueError) as error:
                chosen, problem = None, str(error)
            for row in rows:
                skipped = row.skip_reason(x)
                runs = f"runs; auto skips it: {skipped}" if skipped else "runs" + ", auto takes it" * (row is chosen)
                note = f"; {row.note}" if row.note else ""
                found.append((op, row.name, device, row.can_run(x) or runs + note))
            if problem:
                found.append((op, "auto", device, problem))
    return found


def versions():
    """Return {component: version or state}, for `fastff info`."""
    from fastff.kernels import native

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed: the GPU kernels do not run"
    compiled = f"loaded, for {native.level()} (FASTFF_CPU overrides it)"
    if native.reason():
        compiled = f"not loaded: {native.reason()}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fastff": fastff.__version__ + (f" (commit {commit()})" if commit() else ""),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": f"{platform.python_version()} ({sys.executable})",
        "compiled library": compiled,
        "CPU": f"{processor()}, {torch.get_num_threads()} threads",
        "GPU": ", ".join(gpus) or "none that this torch can use",
        "FASTFF_IMPL": os.environ.get("FASTFF_IMPL") or "not set",
    }


def tuned_sizes():
    """Return a sentence about the block sizes that `fastff bench --tune` has measured for the GPUs of this machine."""
    found, path = cache.read("blocks.json"), cache.file("blocks.json")
    names = ", ".join(f"{len(sizes)} launches measured on {name}" for name, sizes in found.items())
    return (
        f"{names} ({path})" if found else f"by the table; bench --tune measures them on a GPU and keeps them in {path}"
    )
