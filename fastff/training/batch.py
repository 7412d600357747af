"""Minibatches as loaders give them: unpacked in one place, and checked before anything is computed."""

from collections.abc import Mapping

import torch

IMAGES = ("image", "images", "pixel_values", "x", "input", "inputs", "img", "data")
LABELS = ("label", "labels", "target", "targets", "y")


def unpack(batch, labelled=True):
    """Return (images, target) of a minibatch: a tuple or list (images, target, ...), or a dict with a key of IMAGES and one of LABELS.

    labelled: whether a target is wanted. Otherwise the target is None, and the minibatch may also be the images alone. Raises TypeError."""
    if isinstance(batch, Mapping):
        images, target = (next((batch[key] for key in keys if key in batch), None) for keys in (IMAGES, LABELS))
        got = f"a dict of {', '.join(map(str, batch))}"
    elif isinstance(batch, (tuple, list)):
        images, target = (*batch, None, None)[:2]
        got = f"a {type(batch).__name__} of {len(batch)}"
    else:
        images, target, got = batch, None, type(batch).__name__
    if images is None or (labelled and target is None):
        text = "minibatches (images, target, ...)" if labelled else "minibatches (images, ...), tensors of images"
        keys = f"images ({', '.join(IMAGES)})" + (f" and labels ({', '.join(LABELS)})" if labelled else "")
        raise TypeError(f"loader: expected {text}, or dicts with {keys}, got {got}")
    return images, target if labelled else None


def check_batch(sff, images, target, labelled=True, amp=False):
    """Raise TypeError or ValueError unless images [B, *sff.input_shape] and target [B] make a minibatch.

    labelled: False where the first half of the images is positive and the second negative, and the target None. amp: whether autocast, which
    converts all but float64, is on in any case."""
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        raise TypeError(f"images: expected a floating-point tensor, got {_kind(images)}")
    dtype, autocast = next(sff.parameters()).dtype, amp or torch.is_autocast_enabled(images.device.type)
    if images.dtype != dtype and not (autocast and torch.float64 not in (images.dtype, dtype)):
        raise TypeError(f"images: expected {dtype} as the model's parameters are, got {images.dtype}")
    sff.check_images(images)
    if not labelled:
        if target is not None:
            text = f"expected None for goodness {sff.goodness_name!r} with its loss of positive and negative images"
            raise TypeError(f"target: {text}, got {_kind(target)}")
        if len(images) % 2:
            raise ValueError(f"images: expected positive ones and as many negative ones after them, got {len(images)}")
        return
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 labels, got {_kind(target)}")
    if target.shape != (len(images),):
        raise ValueError(f"target: expected one label for each of {len(images)} images, got {list(target.shape)}")


def _kind(value):
    return value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
