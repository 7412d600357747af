"""Loads image data sets as uint8 tensors: digits, MNIST, Fashion-MNIST, CIFAR-10 and -100, Imagenette, folders of images.

`load` returns a `Dataset`, whose loaders (loader.py) make minibatches. The file formats are read in readers.py.
"""

import hashlib
import tarfile
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastff.arguments import whole_number
from fastff.training.loader import Augment, Loader, generator
from fastff.training.readers import DataError, held_out, optional, read_cifar, read_folder, read_idx_pair, read_image

__all__ = ["NAMES", "Augment", "DataError", "Dataset", "Loader", "balanced", "load", "read_image"]


@dataclass(frozen=True, repr=False)
class Dataset:
    """A data set in memory.

    Fields:
        name: name of the data set or of its folder.
        train_images, test_images: uint8 [N, C, H, W].
        train_labels, test_labels: int64 [N].
        classes: names of the classes.
        mean, std: C numbers each, of the training pixels scaled to 0..1.
        augment: the augmentation that `train_loader` uses, or None."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | None

    def __repr__(self) -> str:
        counts = f"{len(self.train_images):,} training and {len(self.test_images):,} test images"
        return f"Dataset({self.name}: {counts} of {list(self.input_shape)}, {self.num_classes} classes)"

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return tuple(self.train_images.shape[1:])

    def train_loader(self, batch_size: int, **options) -> Loader:
        """Return a Loader of the training images, shuffled and augmented. `options` are arguments of `Loader`."""
        options = {"mean": self.mean, "std": self.std, "augment": self.augment, "shuffle": True} | options
        return Loader(self.train_images, self.train_labels, batch_size, **options)

    def test_loader(self, batch_size: int, **options) -> Loader:
        """Return a Loader of the test images, in their order. `options` are arguments of `Loader`."""
        options = {"mean": self.mean, "std": self.std} | options
        return Loader(self.test_images, self.test_labels, batch_size, **options)


@dataclass(frozen=True)
class Source:
    """Where the files of a data set come from.

    Fields:
        urls: mirrors; each holds all files.
        md5: {file: MD5 hash}, of the files or of one archive.
        folders: subfolders of `root` in which the files may lie, the official one first.
        augment: the augmentation of the training images."""

    urls: tuple[str, ...]
    md5: dict[str, str]
    folders: tuple[str, ...]
    augment: Augment


# The hashes are those that the authors of the data sets or of the mirrors publish. They detect damaged files.
SOURCES = {
    "mnist": Source(
        urls=("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        md5={
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        folders=("mnist", "MNIST/raw"),
        augment=Augment(padding=2),
    ),
    "fashion-mnist": Source(
        urls=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        md5={
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        folders=("fashion-mnist", "FashionMNIST/raw"),
        augment=Augment(padding=2, flip=True),
    ),
    "cifar10": Source(
        urls=("https://www.cs.toronto.edu/~kriz/",),
        md5={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        folders=("cifar-10-batches-bin",),
        augment=Augment(padding=4, flip=True),
    ),
    "cifar100": Source(
        urls=("https://www.cs.toronto.edu/~kriz/",),
        md5={"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
        folders=("cifar-100-binary",),
        augment=Augment(padding=4, flip=True),
    ),
    "imagenette": Source(
        urls=("https://s3.amazonaws.com/fast-ai-imageclas/",),
        md5={"imagenette2-160.tgz": "e793b78cc4c9e9a4ccc0c1155377a412"},
        folders=("imagenette2-160", "imagenette2-320", "imagenette2"),
        augment=Augment(padding=20, flip=True),
    ),
}

NAMES = ("digits", *SOURCES, "folder")

DIGITS = tuple("0123456789")
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""
CIFAR100 = tuple(_CIFAR100.split())
IMAGENETTE = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
}  # fmt: skip
CIFAR_FILES = {
    "cifar10": ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", (10,)),
    "cifar100": (["train.bin"], "test.bin", (20, 100)),
}


def load(
    name: str, root: str | Path | None = None, subset: int | None = None, seed: int = 0, image_size: int | None = None,
    download: bool = True, test_subset: int | None = None,
) -> Dataset:  # fmt: skip
    """Load a data set.

    Args:
        name: one of `NAMES`, or the path of a folder of images by class; "folder" takes this path from `root`. The folder
            holds train/<class> and test/<class> (or val, valid, validation), or no test images by class; then every fifth image
            becomes test data.
        root: folder that holds the official files, directly or in the subfolder that their archive has. Nothing is
            downloaded then. By default the files are in the user's cache folder and are downloaded once.
        subset: number of training images to draw, with equally many of each class as far as possible. A smaller subset
            is contained in a larger one with the same seed.
        seed: seed of the subsets.
        image_size: height and width in pixels of images from folders (default 64) and Imagenette (default 160). The
            shorter side is resized and the centre cropped out. The other data sets have one size.
        download: whether missing files may be downloaded into the cache folder.
        test_subset: number of test images to draw, as `subset`.

    Returns: a Dataset.

    Raises:
        DataError (a ValueError): something is missing, damaged, of the wrong kind or out of range. The message names
            the file, what is wrong and what to do.
        ImportError: scikit-learn, pooch or pillow is needed and not installed."""
    path = None
    if name not in NAMES:
        path = Path(name).expanduser()
        if not path.is_dir():
            raise DataError(f"data: expected one of {', '.join(NAMES)}, or a folder of images by class, got {name!r}")
    elif name == "folder":
        if root is None:
            raise DataError("root: expected the path of a folder of images by class (--root), got None")
        path = Path(root).expanduser()
    if image_size is not None:
        if path is None and name != "imagenette":
            raise DataError(f"image_size: expected none with {name}, whose images have one size, got {image_size}")
        image_size = whole_number("image_size", image_size, error=DataError)

    if path is not None:
        size = image_size or 64
        data = *read_folder(path, size), Augment(padding=size // 8, flip=True)
    elif name == "digits":
        data = _digits()
    else:
        data = _published(name, root, image_size, download)

    images, labels, test_images, test_labels, classes, augment = data
    if images.shape[1:] != test_images.shape[1:]:
        shapes = f"{list(images.shape[1:])} and {list(test_images.shape[1:])}"
        raise DataError(f"{name}: training and test images differ in size: {shapes}. They are of different data sets.")
    if subset is not None:
        chosen = balanced(labels, subset, len(classes), seed, argument="subset")
        images, labels = images[chosen], labels[chosen]
    if test_subset is not None:
        chosen = balanced(test_labels, test_subset, len(classes), seed, argument="test_subset")
        test_images, test_labels = test_images[chosen], test_labels[chosen]
    mean, std = _statistics(images)
    title = name if path is None else path.resolve().name
    return Dataset(title, images, labels, test_images, test_labels, classes, mean, std, augment)


def balanced(labels: Tensor, count: int, num_classes: int, seed: int = 0, argument: str = "subset") -> Tensor:
    """Draw `count` items with classes as equally frequent as `labels` [N] allows; returns their indices, int64 [count], sorted.

    Raises DataError, which names `argument`, if `count` is below the number of classes or above N."""
    if isinstance(count, bool) or not isinstance(count, int) or not num_classes <= count <= len(labels):
        text = f"expected a whole number from {num_classes} (one image per class) to {len(labels)} (all of them)"
        raise DataError(f"{argument}: {text}, got {count!r}")
    # The items of each class get ranks 0, 1, ... in random order, and the items with the `count` smallest ranks are taken.
    # So a class with too few items leaves its share to the others. A random order of the classes decides between equal
    # ranks.
    random = generator("subset", seed)
    priority = torch.randperm(num_classes, generator=random)
    shuffled = torch.randperm(len(labels), generator=random)
    rank = torch.empty(len(labels), dtype=torch.int64)
    for label in range(num_classes):
        indices = shuffled[labels[shuffled] == label]
        rank[indices] = torch.arange(len(indices)) * num_classes + priority[label]
    return rank.argsort()[:count].sort().values


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel. Histograms make them exact and avoid a floating-point copy of the images."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].flatten(), minlength=256).double() / images[:, channel].numel()
        mean = (share * values).sum()
        means.append(float(mean))
        # The standard deviation is at least one grey level, so that a constant channel does not cause a division by zero.
        stds.append(max(float((share * (values - mean).square()).sum().sqrt()), 1 / 255))
    return tuple(means), tuple(stds)


def _digits():
    bunch = optional("sklearn.datasets", "the digits data set").load_digits()
    images = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        test[held_out((labels == label).nonzero().flatten())] = True
    return images[~test], labels[~test], images[test], labels[test], DIGITS, None


def _published(name: str, root: str | Path | None, image_size: int | None, download: bool):
    """Read one of `SOURCES` from `root` or from the cache folder."""
    source, download = SOURCES[name], download and root is None
    if root is not None:
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder (root). {_manual_download(source)}")
    else:
        folder = Path(optional("pooch", "the download of data sets").os_cache("fastff")) / name
    if name in CIFAR_FILES:
        train_files, test_file, label_classes = CIFAR_FILES[name]
        unpacked = _archive_folder(source, folder, download, [*train_files, test_file])
        parts = [read_cifar(unpacked / file, label_classes) for file in train_files]
        images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        classes = CIFAR10 if name == "cifar10" else CIFAR100
        return images, labels, *read_cifar(unpacked / test_file, label_classes), classes, source.augment
    if name == "imagenette":
        size = image_size or 160
        unpacked = _archive_folder(source, folder, download, ["train", "val"])
        *tensors, class_folders = read_folder(unpacked, size)
        classes = tuple(IMAGENETTE.get(name, name) for name in class_folders)
        return *tensors, classes, replace(source.augment, padding=size // 8)
    train, train_labels, test, test_labels = (_idx_file(source, folder, download, file) for file in source.md5)
    classes = DIGITS if name == "mnist" else FASHION
    return *read_idx_pair(train, train_labels, 10), *read_idx_pair(test, test_labels, 10), classes, source.augment


def _manual_download(source: Source) -> str:
    files = ", ".join(source.urls[0] + file for file in source.md5)
    return f"Download {files} by hand and give the folder they are in as root (--root)."


def _idx_file(source: Source, place: Path, download: bool, file: str) -> Path:
    """Return the path of an IDX file in `place`, plain or gzipped. The file is downloaded first if `download` is set."""
    if download:
        return _fetch(source, place, file)
    plain = file.removesuffix(".gz")
    for folder in ("", *source.folders):
        for name in (file, plain, plain.replace("-idx", ".idx")):
            if (place / folder / name).is_file():
                return place / folder / name
    raise DataError(f"{place / file}: no such file, nor {plain}. {_manual_download(source)}")


def _archive_folder(source: Source, place: Path, download: bool, needed: list[str]) -> Path:
    """Return the folder in `place` that holds the files `needed`. The archive is downloaded and unpacked if necessary."""
    for folder in ("", *source.folders):
        found = [(place / folder / name).exists() for name in needed]
        if all(found):
            return place / folder
        if any(found):
            missing = place / folder / needed[found.index(False)]
            text = "no such file or folder, though others of the data set are"
            raise DataError(f"{missing}: {text}. {_manual_download(source)}")
    [(archive, md5)] = source.md5.items()
    if download:
        _fetch(source, place, archive)
    elif not (place / archive).is_file():
        text = f"no such file or folder, nor is {archive} there"
        raise DataError(f"{place / needed[0]}: {text}. {_manual_download(source)}")
    else:
        _check_md5(place / archive, md5)
    return _unpack(place / archive, place / source.folders[0], needed)


def _fetch(source: Source, place: Path, file: str) -> Path:
    """Download a file into `place`, from the first mirror that works, unless it is there and has the right hash."""
    pooch = optional("pooch", "the download of data sets")
    reasons = []
    for url in source.urls:
        try:
            return Path(pooch.retrieve(url + file, f"md5:{source.md5[file]}", fname=file, path=place))
        except (OSError, ValueError) as error:  # no network and HTTP errors are OSError, a wrong hash is ValueError
            reasons.append(f"{url}: {error}")
    raise DataError(f"{file}: the download failed ({'; '.join(reasons)}). {_manual_download(source)}")


def _check_md5(path: Path, expected: str) -> None:
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != expected:
        text = f"expected MD5 {expected}, found {found} ({path.stat().st_size} bytes)"
        raise DataError(f"{path}: wrong or incomplete: {text}. Delete it and fetch it again.")


def _unpack(archive: Path, folder: Path, needed: list[str]) -> Path:
    """Unpack an archive into a temporary folder and rename that, so that an interrupted run leaves no incomplete folder."""
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as temporary:
            with tarfile.open(archive) as tar:
                # The filter refuses indices that would be written outside the folder. Python before 3.10.12 and 3.11.4
                # has no such filter.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(temporary)
            inner = Path(temporary) / folder.name
            missing = [name for name in needed if not (inner / name).exists()]
            if missing:
                raise DataError(f"{archive}: holds no {folder.name}/{missing[0]}. Delete it and fetch it again.")
            inner.rename(folder)
    except (OSError, EOFError, tarfile.TarError) as error:
        if all((folder / name).exists() for name in needed):
            return folder  # another process has unpacked it in the meantime
        text = f"cannot be unpacked into {folder.parent} ({error})"
        raise DataError(f"{archive}: {text}. Unpack it by hand and give the folder as root (--root).") from error
    return folder
