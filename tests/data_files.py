"""Tiny files in the formats of the published data sets."""

import gzip
import struct

import pytest
import torch
from oracle import pixels
from PIL import Image

from fastff.training import data
from fastff.training.data import DataError, load

IDX = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def idx_bytes(array):
    header = bytes([0, 0, 8, array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
    return header + array.numpy().tobytes()


def write_idx(folder, counts=(20, 10), size=(5, 4), zipped=True, **replaced):
    """The four IDX files; `replaced` maps a key such as train_labels to other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for n in counts:
        arrays += [pixels(n, *size, seed=n), (torch.arange(n) % 10).to(torch.uint8)]
    for name, array in zip(IDX, arrays, strict=True):
        raw = replaced.get(name.replace("t10k", "test").replace("-", "_").split("_idx")[0], idx_bytes(array))
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    return arrays


def write_cifar(folder, name="cifar10", count=10):
    folder.mkdir(parents=True, exist_ok=True)
    train, test, label_classes = data.CIFAR_FILES[name]
    for i, file in enumerate([*train, test]):
        columns = [(torch.arange(count) % n).to(torch.uint8)[:, None] for n in label_classes]
        (folder / file).write_bytes(torch.cat([*columns, pixels(count, 3072, seed=i)], 1).numpy().tobytes())


def write_image(path, size=(12, 8), colour=(200, 30, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def message(*args, **kwargs):
    with pytest.raises(DataError) as error:
        load(*args, **kwargs)
    return str(error.value)
