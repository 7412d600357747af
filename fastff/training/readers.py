"""Readers of image data sets: IDX files (MNIST, Fashion-MNIST), CIFAR's binary files, folders of images by class.

Each reader checks that a file has the expected format. Errors name the file, what is wrong and what to do.
"""

import gzip
import importlib
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEST_FOLDERS = ("test", "val", "valid", "validation")
NOT_IMAGES = ("thumbs.db", "desktop.ini", "__macosx")  # what systems leave in folders, like names that begin with a dot
AGAIN = "Delete it and fetch it again."


class DataError(ValueError):
    """Raised when a data file or folder is missing, damaged or of the wrong kind. The message names it and says what to do."""


def optional(module: str, purpose: str, extra: str = "train") -> ModuleType:
    """Import and return a module that is installed with an extra of the package.

    Raises ImportError, which says what `purpose` needs and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        text = f'{purpose} needs {package}, which cannot be imported ({error}): pip install "fastff[{extra}]"'
        raise ImportError(text) from error


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzipped: uint8 [N, H, W] for dimensions=3, [N] for dimensions=1.

    The file holds two zero bytes, the number 8 (unsigned bytes), the number of dimensions, the size of each dimension
    as a big-endian 32-bit integer, and the values in C order.

    Raises DataError: the file cannot be read, is truncated, too long or empty, or has another format."""
    try:
        raw = Path(path).read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip stream is truncated or damaged ({error}). {AGAIN}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error

    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if len(raw) < header:
        raise DataError(f"{path}: truncated: expected a header of {header} bytes, found {len(raw)} bytes. {AGAIN}")
    if raw[:4] != magic:
        text = f"expected the magic number {magic.hex()} of bytes in {dimensions} dimensions, found {raw[:4].hex()}"
        raise DataError(f"{path}: not such an IDX file: {text}. {AGAIN}")
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, header, 4)]
    expected = header + math.prod(shape)
    if len(raw) != expected:
        what = "truncated" if len(raw) < expected else "too long"
        text = f"the header announces {'x'.join(map(str, shape))}, {expected} bytes in all, found {len(raw)}"
        raise DataError(f"{path}: {what}: {text}. {AGAIN}")
    if expected == header:
        raise DataError(f"{path}: the header announces no data ({'x'.join(map(str, shape))}). {AGAIN}")
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).view(shape)


def read_idx_pair(images_path: Path, labels_path: Path, num_classes: int) -> tuple[Tensor, Tensor]:
    """Read the two IDX files of a split and return images uint8 [N, 1, H, W] and labels int64 [N].

    Raises DataError: as `read_idx`; or the files have different lengths, or a label is out of range."""
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        text = f"{len(labels)} labels, but {images_path} holds {len(images)} images"
        raise DataError(f"{labels_path}: {text}. Fetch both again: they must come from the same data set.")
    _check_labels(labels_path, labels, num_classes)
    return images.unsqueeze(1), labels.long()


def read_cifar(path: Path, label_classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Read a binary CIFAR file and return images uint8 [N, 3, 32, 32] and the last label of each record, int64 [N].

    A record holds one byte for each entry of `label_classes`, then 3072 bytes of pixels, channel by channel. An entry is
    the number of classes of that label; CIFAR-100 has a coarse label and then a fine one.

    Raises DataError: the file cannot be read, is empty, has an incomplete record, or a label is out of range."""
    try:
        raw = bytearray(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    size = len(label_classes) + 3072
    count, rest = divmod(len(raw), size)
    if rest or not count:
        text = f"expected a multiple of {size} bytes, found {len(raw)} ({count} records and {rest} bytes)"
        raise DataError(f"{path}: truncated or not a CIFAR binary file: {text}. {AGAIN}")
    records = torch.frombuffer(raw, dtype=torch.uint8).view(count, size)
    for column, classes in enumerate(label_classes):
        _check_labels(path, records[:, column], classes)
    images = records[:, len(label_classes) :].reshape(count, 3, 32, 32)
    return images, records[:, len(label_classes) - 1].long()


def _check_labels(path: Path, labels: Tensor, num_classes: int) -> None:
    wrong = (labels >= num_classes).nonzero()
    if len(wrong):
        first = int(wrong[0])
        text = f"record {first} has the label {int(labels[first])}, expected 0 to {num_classes - 1}"
        raise DataError(f"{path}: label out of range: {text}. The file is damaged or of another data set.")


def read_image(path: str | Path, size: tuple[int, int] | int, channels: int = 3) -> Tensor:
    """Read one image as uint8 [channels, H, W]. The shorter side is resized to fit `size`, then the centre is cropped out.

    Args:
        path: the image file.
        size: (height, width) in pixels, or one number for both.
        channels: 3 for RGB, 1 for grey.

    Raises:
        DataError: there is no such file, or it is not an image that pillow can read.
        ValueError: `channels` is neither 1 nor 3."""
    image_module, ops = (optional(f"PIL.{name}", "reading images") for name in ("Image", "ImageOps"))
    height, width = (size, size) if isinstance(size, int) else size
    longer = max(height, width)  # the orientation in the EXIF data may swap height and width
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise ValueError(f"channels: expected 1 or 3, got {channels!r}")
    try:
        with image_module.open(path) as image:
            # A JPEG file can be decoded at 1/2, 1/4 or 1/8 of its size, if that still covers the size asked for.
            image.draft(mode, (longer, longer))
            image = _eight_bits(ops.exif_transpose(image)).convert(mode)
            image = ops.fit(image, (width, height), image_module.Resampling.BILINEAR)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except (OSError, SyntaxError, ValueError, EOFError, image_module.DecompressionBombError) as error:
        raise DataError(f"{path}: not an image that can be read ({error}). Remove or replace it.") from error
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, channels).permute(2, 0, 1).contiguous()


def _eight_bits(image):
    """Scale a grey image of 16-bit numbers, or of floating-point numbers from 0 to 1, to bytes; pillow would cut off what is above 255.

    Raises ValueError for numbers outside of that range."""
    if not image.mode.startswith(("I", "F")):
        return image
    highest = 1.0 if image.mode == "F" else 65535.0
    values = torch.from_numpy(np.array(image, dtype=np.float64))
    if not bool(((values >= 0) & (values <= highest)).all()):
        low, high = (float(v) for v in values.aminmax())
        raise ValueError(
            f"expected pixels from 0 to {highest:g} in an image of mode {image.mode}, got {low:g} to {high:g}"
        )
    return optional("PIL.Image", "reading images").fromarray((values * (255 / highest)).round().to(torch.uint8).numpy())


def read_folder(root: Path, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Read a folder with one folder of images for each class.

    The images are root/train/<class>/<image> and root/test/<class>/<image> (or val, valid, validation), or they are
    root/<class>/<image>. Without test images by class, every fifth image of each class, in order of names, becomes test data.
    Hidden files and what systems leave behind (Thumbs.db, __MACOSX) are ignored.

    Returns: training images uint8 [N, 3, size, size], training labels int64 [N], test images, test labels, class names.

    Raises DataError: there are no classes, a class is empty, train and test have different classes, or a file is no image."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Expected one of images by class: <class>/<image>.")
    folders = {path.name.lower(): path for path in _listed(root) if path.is_dir()}
    train = folders.get("train", root)
    test = next((f for name in TEST_FOLDERS if (f := folders.get(name)) and any(p.is_dir() for p in _listed(f))), None)
    if train is root or test is None:
        by_class, test_by_class = _split(train, _files_by_class(train))
    else:
        by_class, test_by_class = _files_by_class(train), _files_by_class(test)
        if differing := ", ".join(sorted(by_class.keys() ^ test_by_class.keys())):
            text = f"{train.name} and {test.name} need the same class folders, these are in one of them alone"
            raise DataError(f"{root}: {text}: {differing}.")
    names = tuple(by_class)
    images, labels = _read_images(by_class, size)
    test_images, test_labels = _read_images(test_by_class, size)
    return images, labels, test_images, test_labels, names


def _listed(folder: Path) -> list[Path]:
    """Return what is in a folder, without hidden files and what systems leave there."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in NOT_IMAGES)


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    classes = [p for p in _listed(folder) if p.is_dir()]
    if len(classes) < 2:
        text = f"expected at least two folders, one for each class, found {len(classes)}"
        raise DataError(f"{folder}: {text}. Put the images of each class into a folder of its own.")
    found = {}
    for path in classes:
        files = _listed(path)
        for file in files:
            if file.suffix.lower() not in IMAGE_ENDINGS or file.is_dir():
                text = f"not an image by its name (expected one of {', '.join(IMAGE_ENDINGS)})"
                raise DataError(f"{file}: {text}. Move it out of the class folder.")
        if not files:
            raise DataError(f"{path}: the class folder is empty. Add images or remove it.")
        found[path.name] = files
    return found


def held_out(items):
    """Return those items of a class that become test data if a data set has none: every fifth."""
    return items[1::5]


def _split(root: Path, by_class: dict[str, list[Path]]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    train, test = {}, {}
    for name, files in by_class.items():
        if len(files) < 2:
            text = "one image cannot be split into train and test"
            raise DataError(f"{root / name}: {text}. Add images, or make folders train and test of classes.")
        test[name] = held_out(files)
        train[name] = sorted({*files} - {*test[name]})
    return train, test


def _read_images(by_class: dict[str, list[Path]], size: int) -> tuple[Tensor, Tensor]:
    files = [(file, label) for label, name in enumerate(by_class) for file in by_class[name]]
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def fill(index: int) -> None:
        images[index] = read_image(files[index][0], size)

    # Threads are enough: pillow releases the interpreter's lock while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, range(len(files))):
            pass
    return images, torch.tensor([label for _, label in files])
