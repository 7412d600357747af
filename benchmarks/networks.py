"""The networks that whole steps are measured on, by name: fastff's own and, where it is installed, torchvision's as they are."""

from functools import cache

import torch

from fastff import models

OWN = ("resnet18", "mobilenet_v3_small", "mobilenet_v3_large")
TORCHVISION = {
    "densenet121": {},
    # nothing drawn: a step in float64 must do the same as one in float32
    "efficientnet_b0": {"stochastic_depth_prob": 0.0},
}
NAMES = (*OWN, *TORCHVISION)
WIDE = ("resnet18",)  # those with a width


def build(name, classes, width=None, size=32):
    """The network with its own classifier, for 3-channel images of size x size.

    Args:
        name: one of NAMES.
        width: channels of the first stage, of networks in WIDE only; None is the usual.
        size: fastff's networks have the stem for small images up to 96 and ImageNet's above; torchvision's have theirs at any size.
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
    """The torchvision module, beside a CPU-only torch too; ImportError says what to do where it is not installed.

    torchvision's wheel was built against another torch than a CPU build, so its compiled operators may not load; its Python code then fails on
    registering fake kernels for operators nobody defined. They are defined here, by name only: classifiers need none of them.
    """
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
    module.operators_defined_by_name = library  # a Library that is collected takes its definitions along
    return module
