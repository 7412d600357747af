"""torchvision as an oracle of the tests. The package itself never imports it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def import_torchvision():
    """Return the torchvision module; skips the calling test where it is not installed, or its operators do not load with this torch."""
    try:
        try:
            from benchmarks.networks import torchvision
        except ModuleNotFoundError:  # beside an installed wheel
            import torchvision

            return torchvision
        return torchvision()  # with a CPU-only torch too
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
