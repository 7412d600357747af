"""Image data sets as uint8 tensors: digits, MNIST, Fashion-MNIST, CIFAR-10 and -100, Imagenette, folders of images.

`load` gives a `Dataset`; its loaders (loader.py) make minibatches of it. The files' formats are read in readers.py.
"""

import hashlib
import tarfile
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastff.training.loader import Augment, Loader, generator
from fastff.training.readers import (
    DataError,
    held_out,
    optional,
    read_cifar,
    read_folder,
    read_idx_pair,
    read_image,
)

__all__ = ["NAMES", "Augment", "DataError", "Dataset", "Loader", "balanced", "load", "read_image"]


@dataclass(frozen=True)
class Dataset:
    """A data set in memory. Images are uint8 [N, C, H, W], labels int64 [N]; mean and std of pixels in 0..1."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return tuple(self.train_images.shape[1:])

    def train_loader(self, batch_size: int, **options) -> Loader:
        """Shuffled and augmented minibatches of the training images; `options` as of `Loader`, and override these."""
        options = {"mean": self.mean, "std": self.std, "augment": self.augment, "shuffle": True} | options
        return Loader(self.train_images, self.train_labels, batch_size, **options)

    def test_loader(self, batch_size: int, **options) -> Loader:
        """Minibatches of the test images in their order; `options` as of `Loader`."""
        options = {"mean": self.mean, "std": self.std} | options
        return Loader(self.test_images, self.test_labels, batch_size, **options)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from: files or an archive below each of `urls`, and folders a `root` may keep them in."""

    urls: tuple[str, ...]
    md5: dict[str, str]
    folders: tuple[str, ...]
    augment: Augment


# The hashes are those that the authors of the data sets (or of the mirrors) publish. They guard against damage.
SOURCES = {
    "mnist": Source(
        urls=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
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
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
CIFAR_FILES = {
    "cifar10": ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", (10,)),
    "cifar100": (["train.bin"], "test.bin", (20, 100)),
}


def load(
    name: str,
    root: str | Path | None = None,
    subset: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
    download: bool = True,
    test_subset: int | None = None,
) -> Dataset:
    """Load a data set.

    Args:
        name: one of `NAMES`, or the path of a folder of images by class ("folder" takes it from `root`): train/<class>
            beside test/<class> or val/<class>, or <class> alone, of which every fifth image becomes test data.
        root: folder that holds the official files, directly or in the subfolder they are published in; nothing is
            downloaded then. Default: a cache folder of the user, filled once by downloading.
        subset: draw this many training images, as equal per class as they allow. A smaller subset of the same seed is
            part of a larger one.
        seed: what the subsets depend on.
        image_size: height and width of images from folders (default 64) and Imagenette (160): the shorter side is
            resized, the centre cropped. The others have one size.
        download: whether missing files may be fetched into the cache folder.
        test_subset: as `subset`, for the test images.

    Raises:
        DataError (a ValueError): something is missing, damaged, of the wrong kind or out of range; the text names the
            file, what is wrong and what to do.
        ImportError: scikit-learn, pooch or pillow is needed and not installed.
    """
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
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise DataError(f"image_size: expected a whole number of at least 1, got {image_size!r}")

    if path is not None:
        data = _folder(path, image_size or 64)
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
    """Indices, ascending, of `count` items with classes as equally frequent as `labels` [N] allows: int64 [count].

    Raises DataError, naming `argument`, if `count` is below the number of classes or above N.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not num_classes <= count <= len(labels):
        text = f"expected a whole number from {num_classes} (one image per class) to {len(labels)} (all of them)"
        raise DataError(f"{argument}: {text}, got {count!r}")
    # The items of each class get ranks 0, 1, ... in random order; the `count` smallest ranks are taken, so a class that
    # runs out leaves its share to the others. Among equal ranks a random order of the classes decides.
    random = generator("subset", seed)
    priority = torch.randperm(num_classes, generator=random)
    shuffled = torch.randperm(len(labels), generator=random)
    rank = torch.empty(len(labels), dtype=torch.int64)
    for label in range(num_classes):
        members = shuffled[labels[shuffled] == label]
        rank[members] = torch.arange(len(members)) * num_classes + priority[label]
    return rank.argsort()[:count].sort().values


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, from histograms: exact, and without a floating copy of the images."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].flatten(), minlength=256).double() / images[:, channel].numel()
        mean = (share * values).sum()
        means.append(float(mean))
        # A channel without contrast is scaled by one grey level instead of by infinity.
        stds.append(max(float((share * (values - mean).square()).sum().sqrt()), 1 / 255))
    return tuple(means), tuple(stds)


def _digits():
    bunch = optional("sklearn.datasets", "the digits data set").load_digits()
    images = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = (labels == label).nonzero().flatten()
        test[members] = torch.tensor(held_out(len(members)))
    return images[~test], labels[~test], images[test], labels[test], DIGITS, None


def _folder(path: Path, size: int):
    return *read_folder(path, size), Augment(padding=size // 8, flip=True)


def _published(name: str, root: str | Path | None, image_size: int | None, download: bool):
    """Read one of `SOURCES`, from `root` or the cache folder."""
    source = SOURCES[name]
    if root is not None:
        place = Path(root).expanduser()
        if not place.is_dir():
            raise DataError(f"{place}: no such folder (root). {_by_hand(source)}")
    else:
        place = Path(optional("pooch", "the download of data sets").os_cache("fastff")) / name
    if name in CIFAR_FILES:
        train_files, test_file, label_classes = CIFAR_FILES[name]
        find = _unpacked(source, place, root is None and download, [*train_files, test_file])
        parts = [read_cifar(find / file, label_classes) for file in train_files]
        images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        classes = CIFAR10 if name == "cifar10" else CIFAR100
        return images, labels, *read_cifar(find / test_file, label_classes), classes, source.augment
    if name == "imagenette":
        size = image_size or 160
        *tensors, folders = read_folder(_unpacked(source, place, root is None and download, ["train", "val"]), size)
        classes = tuple(IMAGENETTE.get(folder, folder) for folder in folders)
        return *tensors, classes, replace(source.augment, padding=size // 8)
    train, train_labels, test, test_labels = (
        _idx_file(source, place, root is None and download, file) for file in source.md5
    )
    classes = DIGITS if name == "mnist" else FASHION
    return *read_idx_pair(train, train_labels, 10), *read_idx_pair(test, test_labels, 10), classes, source.augment


def _by_hand(source: Source) -> str:
    files = ", ".join(source.urls[0] + file for file in source.md5)
    return f"Download {files} by hand and give the folder they are in as root (--root)."


def _idx_file(source: Source, place: Path, download: bool, file: str) -> Path:
    """The path of an IDX file in `place`, plain or gzipped, after fetching it if allowed."""
    if download:
        return _fetch(source, place, file)
    plain = file.removesuffix(".gz")
    for folder in ("", *source.folders):
        for name in (file, plain, plain.replace("-idx", ".idx")):
            if (place / folder / name).is_file():
                return place / folder / name
    raise DataError(f"{place / file}: no such file, nor {plain}. {_by_hand(source)}")


def _unpacked(source: Source, place: Path, download: bool, needed: list[str]) -> Path:
    """The folder in `place` that holds the files `needed`, after unpacking the archive if that is what is there."""
    for folder in ("", *source.folders):
        found = [(place / folder / name).exists() for name in needed]
        if all(found):
            return place / folder
        if any(found):
            missing = place / folder / needed[found.index(False)]
            raise DataError(f"{missing}: no such file or folder, though others of the data set are. {_by_hand(source)}")
    [(archive, md5)] = source.md5.items()
    if download:
        _fetch(source, place, archive)
    elif not (place / archive).is_file():
        raise DataError(f"{place / needed[0]}: no such file or folder, nor is {archive} there. {_by_hand(source)}")
    else:
        _check_md5(place / archive, md5)
    return _unpack(place / archive, place / source.folders[0], needed)


def _fetch(source: Source, place: Path, file: str) -> Path:
    """Download a file into `place` unless it is there with the right hash; tries each mirror."""
    pooch = optional("pooch", "the download of data sets")
    reasons = []
    for url in source.urls:
        try:
            return Path(pooch.retrieve(url + file, f"md5:{source.md5[file]}", fname=file, path=place))
        except (OSError, ValueError) as error:  # no network and HTTP errors are OSError, a wrong hash is ValueError
            reasons.append(f"{url}: {error}")
    raise DataError(f"{file}: the download failed ({'; '.join(reasons)}). {_by_hand(source)}")


def _check_md5(path: Path, expected: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    if digest.hexdigest() != expected:
        text = f"expected MD5 {expected}, found {digest.hexdigest()} ({path.stat().st_size} bytes)"
        raise DataError(f"{path}: wrong or incomplete: {text}. Delete it and fetch it again.")


def _unpack(archive: Path, folder: Path, needed: list[str]) -> Path:
    """Unpack into a temporary folder first: an interrupted run must not leave half a data set that looks whole."""
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as temporary:
            with tarfile.open(archive) as tar:
                # Refuse members that point outside. Python before 3.10.12 and 3.11.4 has no such filter.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(temporary)
            inner = Path(temporary) / folder.name
            missing = [name for name in needed if not (inner / name).exists()]
            if missing:
                raise DataError(f"{archive}: holds no {folder.name}/{missing[0]}. Delete it and fetch it again.")
            inner.rename(folder)
    except (OSError, EOFError, tarfile.TarError) as error:
        if all((folder / name).exists() for name in needed):
            return folder  # another process was faster
        text = f"cannot be unpacked into {folder.parent} ({error})"
        raise DataError(f"{archive}: {text}. Unpack it by hand and give the folder as root (--root).") from error
    return folder
