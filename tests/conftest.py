"""Which tests are left out where a folder of the source tree is missing, as beside an installed wheel."""

from pathlib import Path

import pytest
import torch

NEED = {
    "benchmarks": ("test_accelerate.py", "test_benchmarks.py", "test_report.py", "test_scale.py", "test_swap_in.py"),
    "csrc": ("test_cuda.py", "test_step_native.py"),
    "docs": ("test_docs.py",),
    "examples": ("test_notebook.py",),
}
ROOT = Path(__file__).resolve().parents[1]
collect_ignore = [name for folder, names in NEED.items() if not (ROOT / folder).exists() for name in names]


@pytest.fixture
def everywhere(monkeypatch):
    """All that can be done otherwise is, at any size and in float64, where the results can be told from wrong ones."""
    from fastff.swap_in import limits

    monkeypatch.setattr(limits, "DTYPES", (torch.float32, torch.float64))
    for name, least in (("SMALLEST", 1), ("FEWEST_POSITIONS", 1), ("FEWEST_CHANNELS", 1)):
        monkeypatch.setattr(limits, name, least)
