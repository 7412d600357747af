"""torchvision as an oracle of the tests, beside a CPU-only torch. The package itself never imports it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def import_torchvision():
    """Return the torchvision module; skips the calling test where it is not installed."""
    try:
        from benchmarks.networks import torchvision

        return torchvision()
    except ImportError as error:
        pytest.skip(str(error))
