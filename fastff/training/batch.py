"""Minibatches as loaders give them: unpacked in one place, and checked before anything is computed."""

from collections.abc import Mapping

import torch

from fastff.arguments import kind_of

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

    labelled: False where the first half of the images is positive and the second negative, and the target None. amp: as of sff.check_images."""
    sff.check_images(images, amp)
    if not labelled:
        if target is not None:
            text = f"expected None for goodness {sff.goodness_name!r} with its loss of positive and negative images"
            raise TypeError(f"target: {text}, got {kind_of(target)}")
        if len(images) % 2:
            raise ValueError(f"images: expected positive ones and as many negative ones after them, got {len(images)}")
        return
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 labels, got {kind_of(target)}")
    if target.shape != (len(images),):
        raise ValueError(f"target: expected one label for each of {len(images)} images, got {list(target.shape)}")
