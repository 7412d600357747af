"""torchvision as an oracle of the tests, beside a CPU-only torch. The package itself never imports it."""

from functools import cache

import pytest
import torch


@cache
def import_torchvision():
    """Return the torchvision module; skips the calling test where it is not installed.

    torchvision's wheel was built against another torch than the CPU build of these tests, so its compiled operators
    may not load; its Python code then fails on registering fake kernels for operators nobody defined. They are
    defined here, by name only: constructing and running classifiers needs none of them.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    names = ["nms", "qnms"]
    for name in ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"):
        names += [name, f"_{name}_backward"]
    for name in names:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}() -> ()")
    module = pytest.importorskip("torchvision", exc_type=ImportError)
    module.operators_defined_for_tests = library  # a Library that is collected takes its definitions along
    return module
