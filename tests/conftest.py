"""Which tests are left out where a folder of the source tree is missing, as beside an installed wheel; what several files share."""

from pathlib import Path

import pytest
import torch

NEED = {
    "benchmarks": (
        "test_accelerate.py",
        "test_benchmarks.py",
        "test_gpu_run.py",
        "test_report.py",
        "test_scale.py",
        "test_swap_in.py",
    ),
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


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of 2 epochs, and what it printed."""
    from command_line import TINY, call

    folder = tmp_path_factory.mktemp("runs") / "a"
    return folder, call("train", *TINY, "--out", folder)[0]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Test images of digits as files."""
    from PIL import Image

    from fastff.training import data

    folder = tmp_path_factory.mktemp("pictures")
    digits = data.load("digits")
    for i, label in enumerate(digits.test_labels[:20].tolist()):
        Image.fromarray(digits.test_images[i, 0].numpy()).save(folder / f"{i:02d}-{label}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def one_thread_no_network(monkeypatch, tmp_path):
    """A cache folder of data sets that is empty, and no way to fill it."""
    import pooch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)

    def refuse(*args, **kwargs):
        raise AssertionError("a test tried to download")

    monkeypatch.setattr(pooch, "retrieve", refuse)
    yield
    torch.set_num_threads(before)
