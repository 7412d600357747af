"""Builds the networks that whole steps are measured on: those of fastff and, if it is installed, unchanged ones of torchvision."""

import contextlib
import sys
from functools import cache

import torch

from fastff import models

OWN = ("resnet18", "mobilenet_v3_small", "mobilenet_v3_large")
TORCHVISION = {
    "densenet121": {},
    # no stochastic depth, since a step in float64 must compute the same as one in float32
    "efficientnet_b0": {"stochastic_depth_prob": 0.0},
}
NAMES = (*OWN, *TORCHVISION)
WIDE = ("resnet18",)  # networks with a width


def build(name, classes, width=None, size=32):
    """Return the network with its classifier, for images [B, 3, size, size].

    Args:
        name: one of NAMES.
        classes: number of outputs.
        width: channels of the first stage, for networks in WIDE; None is the default of the network.
        size: height and width of the images. fastff's networks have the stem for small images up to 96 pixels.

    Raises:
        ValueError: `name` is unknown, or `width` is given for a network without one.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if width is not None and name not in WIDE:
        raise ValueError(f"width: expected None, since {name} has none to choose, got {width!r}")
    if name in TORCHVISION:
        return getattr(torchvision().models, name)(num_classes=classes, **TORCHVISION[name])
    chosen = {} if width is None else {"width": width}
    return getattr(models, name)(classes, stem="cifar" if size <= 96 else "imagenet", **chosen)


@cache
def torchvision():
    """Import and return torchvision, which also works with a CPU-only torch. Raises ImportError, which says how to install it.

    The wheel of torchvision is built for a torch with CUDA, so its compiled operators may not load with another one. Its Python code then fails
    when it registers fake kernels for operators that are not defined. They are defined here, by name only; classifiers use none of them. Where
    they do load, defining them as well would end the process.
    """
    with contextlib.suppress(ImportError, RuntimeError):
        import torchvision as module

        return module
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    names = ["nms", "qnms"]
    for name in ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"):
        names += [name, f"_{name}_backward"]
    for name in names:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}() -> ()")
    try:
        import torchvision as module
    except ImportError as error:
        raise ImportError(
            f"{', '.join(TORCHVISION)} are torchvision's, which cannot be imported here ({error}): "
            "pip install --no-deps torchvision, of the version in requirements-nodeps.txt"
        ) from error
    module.operators_defined_by_name = library  # keeps the Library alive, since its definitions vanish with it
    return module
