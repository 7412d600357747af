"""The machine, the versions and the commit that a measurement belongs to."""

import platform
import subprocess
from pathlib import Path

import torch

import fastff


def commit():
    """The checkout's commit, with a + where files differ from it."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "fastff", "csrc"], cwd=folder, capture_output=True, text=True
        ).stdout.strip()
        return head + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor():
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def environment():
    """One dict for the columns of every CSV."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "fastff": fastff.__version__, "commit": commit(),
    }  # fmt: skip
