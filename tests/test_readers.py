"""Data sets from tiny files in the official formats, every way they can be wrong."""

import sys

import numpy as np
import pytest
import torch

from fastff.training.data import Augment, DataError, load, read_image

pooch, Image = pytest.importorskip("pooch"), pytest.importorskip("PIL.Image")

from data_files import IDX, idx_bytes, message, write_cifar, write_idx, write_image  # noqa: E402
from oracle import pixels  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread_no_network")


# Formats


@pytest.mark.parametrize("name, subfolder", [("mnist", ""), ("mnist", "MNIST/raw"), ("fashion-mnist", "fashion-mnist")])
@pytest.mark.parametrize("zipped", [True, False])
def test_idx(tmp_path, name, subfolder, zipped):
    images, labels, test_images, test_labels = write_idx(tmp_path / subfolder, zipped=zipped)
    found = load(name, root=tmp_path)
    assert found.name == name and found.num_classes == 10 and found.input_shape == (1, 5, 4)
    assert torch.equal(found.train_images, images[:, None]) and torch.equal(found.train_labels, labels.long())
    assert torch.equal(found.test_images, test_images[:, None]) and torch.equal(found.test_labels, test_labels.long())
    assert found.augment == Augment(2, flip=name == "fashion-mnist")
    scaled = images.double() / 255
    assert found.mean == pytest.approx((float(scaled.mean()),))
    assert found.std == pytest.approx((float(scaled.std(unbiased=False)),))


def test_cifar10(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-bin", count=10)
    found = load("cifar10", root=tmp_path)
    assert found.train_images.shape == (50, 3, 32, 32) and found.test_images.shape == (10, 3, 32, 32)
    assert torch.equal(found.train_images[:10].flatten(1), pixels(10, 3072))
    assert found.train_labels.tolist() == list(range(10)) * 5 and found.classes[3] == "cat"
    assert len(found.mean) == len(found.std) == 3 and found.augment == Augment(4, flip=True)
    inside = load("cifar10", root=tmp_path / "cifar-10-batches-bin")
    assert torch.equal(inside.train_images, found.train_images)


def test_cifar100_takes_the_fine_label(tmp_path):
    write_cifar(tmp_path, "cifar100", count=100)
    found = load("cifar100", root=tmp_path)
    assert found.train_labels.tolist() == list(range(100))
    assert found.num_classes == 100 and found.classes == tuple(sorted(set(found.classes)))


def test_digits():
    found = load("digits")
    assert found.input_shape == (1, 8, 8) and found.augment is None
    assert len(found.train_images) + len(found.test_images) == 1797
    assert int(found.train_images.max()) == 255
    share = found.test_labels.bincount() / (found.train_labels.bincount() + found.test_labels.bincount())
    assert (share - 0.2).abs().max() < 0.01
    assert torch.equal(load("digits", seed=5).test_images, found.test_images)


@pytest.mark.parametrize("test_name", ["test", "val", "valid", "validation", "Val"])
def test_folder_with_splits(tmp_path, test_name):
    for split, count in (("train", 3), (test_name, 2)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                write_image(tmp_path / split / name / f"{i}.png", colour=(100 * label, 10, 20))
    (tmp_path / "train" / "ant" / ".hidden").write_text("passed over")
    (tmp_path / "notes.txt").write_text("outside of the class folders: passed over")
    found = load(str(tmp_path), image_size=6)
    assert found.classes == ("ant", "bee") and found.name == tmp_path.name
    assert found.train_images.shape == (6, 3, 6, 6) and found.test_images.shape == (4, 3, 6, 6)
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (found.train_images[:, 0] == 100 * found.train_labels[:, None, None]).all()
    assert found.augment == Augment(0, flip=True)
    assert load("folder", root=tmp_path).input_shape == (3, 64, 64)


def test_folders_as_they_come(tmp_path):
    """What systems leave behind is passed over, endings may be written large, and test images without classes are no test data."""
    for name in ("ant", "bee"):
        for i, ending in enumerate(("PNG", "jfif", "JPEG", "png", "bmp")):
            path = tmp_path / "train" / name / f"{i}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(path, format={"jfif": "jpeg"}.get(ending, ending.lower()))
        (tmp_path / "train" / name / "Thumbs.db").write_bytes(b"x")
        (tmp_path / "train" / name / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / "__MACOSX").mkdir()
    write_image(tmp_path / "test" / "0001.png")
    found = load(str(tmp_path), image_size=8)
    assert found.classes == ("ant", "bee")
    assert (len(found.train_images), len(found.test_images)) == (8, 2)  # every fifth
    for name in ("ant", "bee"):
        write_image(tmp_path / "valid" / name / "0.png")
    assert [len(load(str(tmp_path), image_size=8).test_images), len(found.classes)] == [2, 2]
    assert load(str(tmp_path), image_size=8).train_images.shape[0] == 10


def test_pixels_keep_their_values_scaled(tmp_path):
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    expected = torch.from_numpy((ramp * 255).round().astype(np.uint8))
    images = {
        "sixteen.png": Image.fromarray((ramp * 65535).round().astype(np.uint16)),
        "sixteen.tif": Image.fromarray((ramp * 65535).round().astype(np.uint16)),
        "integers.tif": Image.fromarray((ramp * 65535).round().astype(np.int32)),
        "float.tif": Image.fromarray(ramp.astype(np.float32)),
        "grey.png": Image.fromarray(expected.numpy()),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
        for channels in (1, 3):
            found = read_image(tmp_path / name, 8, channels)
            assert found.shape == (channels, 8, 8)
            assert (found.int() - expected.int()).abs().max() <= 1, name
    Image.fromarray((ramp * 300).astype(np.float32)).save(tmp_path / "large.tif")
    with pytest.raises(
        DataError, match=r"large.tif: not an image that can be read \(expected pixels from 0 to 1 .*got 0 to 300"
    ):
        read_image(tmp_path / "large.tif", 8)


def test_palettes_transparency_and_orientation(tmp_path):
    colour = Image.new("RGB", (8, 8), (200, 30, 60))
    colour.quantize(4).save(tmp_path / "palette.png")
    colour.convert("RGBA").save(tmp_path / "alpha.png")
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    for name in ("palette.png", "alpha.png", "cmyk.jpg"):
        found = read_image(tmp_path / name, 8)
        assert (found[:, 4, 4].int() - torch.tensor([200, 30, 60])).abs().max() <= 4, name
    sideways = Image.new("RGB", (8, 8))
    sideways.paste((255, 255, 255), (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it a quarter to the right
    sideways.save(tmp_path / "sideways.png", exif=exif)
    found = read_image(tmp_path / "sideways.png", 8, channels=1)[0]
    assert found[:, :4].max() == 0 and found[:, 4:].min() == 255


def test_folder_without_splits_holds_out_every_fifth(tmp_path):
    for name in ("ant", "bee"):
        for i in range(10):
            write_image(tmp_path / name / f"{i}.png", colour=(i, 0, 0))
    found = load(str(tmp_path), image_size=8)
    assert found.test_images[:, 0, 0, 0].tolist() == [1, 6, 1, 6]
    assert sorted(found.train_images[:, 0, 0, 0].tolist()) == sorted([0, 2, 3, 4, 5, 7, 8, 9] * 2)


def test_imagenette_folder(tmp_path):
    for split in ("train", "val"):
        for name in ("n03028079", "n01440764"):
            write_image(tmp_path / "imagenette2-160" / split / name / "a.jpg", size=(200, 160))
    found = load("imagenette", root=tmp_path)
    assert found.input_shape == (3, 160, 160) and found.classes == ("tench", "church")
    assert found.augment == Augment(20, flip=True)
    assert load("imagenette", root=tmp_path, image_size=64).augment.padding == 8


def test_read_image_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 255, 0), (10, 0, 20, 10))
    image.save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", 10)
    assert found.dtype == torch.uint8 and found.shape == (3, 10, 10) and (found[1] == 255).all()
    assert read_image(tmp_path / "a.png", (10, 20), channels=1).shape == (1, 10, 20)
    with pytest.raises(ValueError, match="channels: expected 1 or 3, got 2"):
        read_image(tmp_path / "a.png", 10, channels=2)


# Wrong files


@pytest.mark.parametrize(
    "replaced, file, texts",
    [
        ({"train_images": b"\0\0\x08\x03\0"}, 0, ["truncated", "header of 16 bytes, found 5 bytes", "fetch it again"]),
        ({"train_images": b"\x89PNG" + bytes(20)}, 0, ["magic number 00000803", "found 89504e47"]),
        ({"train_labels": idx_bytes(torch.zeros(2, 3, 4))}, 1, ["magic number 00000801", "found 00000803"]),
        ({"train_images": idx_bytes(pixels(20, 5, 4))[:-7]}, 0, ["truncated", "20x5x4, 416 bytes in all, found 409"]),
        ({"test_images": idx_bytes(pixels(10, 5, 4)) + b"x"}, 2, ["too long", "216 bytes in all, found 217"]),
        ({"train_images": idx_bytes(pixels(0, 5, 4))}, 0, ["announces no data (0x5x4)"]),
        ({"train_labels": idx_bytes(pixels(19) % 10)}, 1, ["19 labels", "holds 20 images"]),
        (
            {"test_labels": idx_bytes(torch.full((10,), 12, dtype=torch.uint8))},
            3,
            ["out of range", "label 12", "0 to 9"],
        ),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_wrong_idx(tmp_path, replaced, file, texts, zipped):
    write_idx(tmp_path, zipped=zipped, **replaced)
    text = message("mnist", root=tmp_path)
    assert text.startswith(str(tmp_path / IDX[file])) and all(part in text for part in texts), text


def test_damaged_gzip(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / (IDX[0] + ".gz")
    whole = path.read_bytes()
    for raw in (whole[:-20], whole[:30] + bytes(8) + whole[38:]):
        path.write_bytes(raw)
        text = message("mnist", root=tmp_path)
        assert text.startswith(f"{path}: the gzip stream is truncated or damaged")


def test_train_and_test_of_different_sizes(tmp_path):
    write_idx(tmp_path, test_images=idx_bytes(pixels(10, 7, 7)))
    assert "differ in size: [1, 5, 4] and [1, 7, 7]" in message("mnist", root=tmp_path)


def test_missing_idx_file_says_what_to_download(tmp_path):
    write_idx(tmp_path)
    (tmp_path / (IDX[3] + ".gz")).unlink()
    text = message("fashion-mnist", root=tmp_path)
    assert f"{tmp_path / IDX[3]}.gz: no such file" in text
    assert f"amazonaws.com/{IDX[3]}.gz" in text and "--root" in text


def test_wrong_cifar(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_2.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    text = message("cifar10", root=tmp_path)
    assert str(path) in text and "multiple of 3073 bytes, found 30720 (9 records and 3063 bytes)" in text
    path.write_bytes(b"")
    assert "found 0 (0 records" in message("cifar10", root=tmp_path)
    path.write_bytes(whole[:3073] + b"\x0b" + whole[3074:])
    assert f"{path}: label out of range: record 1 has the label 11, expected 0 to 9" in message(
        "cifar10", root=tmp_path
    )
    path.unlink()
    text = message("cifar10", root=tmp_path)
    assert f"{path}: no such file" in text and "cifar-10-binary.tar.gz" in text


def test_missing_root_and_empty_root(tmp_path):
    text = message("cifar100", root=tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'}: no such folder" in text and "cifar-100-binary.tar.gz" in text
    text = message("cifar100", root=tmp_path)
    assert f"{tmp_path / 'train.bin'}: no such file" in text and "--root" in text


def test_wrong_folders(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    assert f"{root}: expected at least two folders, one for each class, found 0" in message(str(root))
    for name in ("ant", "bee"):
        write_image(root / name / "0.png")
    assert f"{root / 'ant'}: one image cannot be split" in message(str(root))
    for name in ("ant", "bee"):
        write_image(root / name / "1.png")
    (root / "ant" / "2.png").write_bytes(b"no image at all")
    text = message(str(root))
    assert f"{root / 'ant' / '2.png'}: not an image that can be read" in text and "Remove or replace it" in text
    (root / "ant" / "2.png").write_bytes((root / "ant" / "1.png").read_bytes()[:40])
    assert f"{root / 'ant' / '2.png'}: not an image that can be read" in message(str(root))
    (root / "ant" / "2.png").rename(root / "ant" / "labels.csv")
    assert f"{root / 'ant' / 'labels.csv'}: not an image by its name" in message(str(root))
    (root / "ant" / "labels.csv").unlink()
    (root / "cow").mkdir()
    assert f"{root / 'cow'}: the class folder is empty" in message(str(root))


def test_classes_that_differ(tmp_path):
    for split, names in (("train", "abc"), ("val", "abd")):
        for name in names:
            write_image(tmp_path / split / name / "0.png")
    text = message(str(tmp_path))
    assert text.startswith(f"{tmp_path}: train and val need the same class folders")
    assert text.endswith("in one of them alone: c, d.")


def test_wrong_arguments(tmp_path):
    assert "data: expected one of digits, mnist" in message("imagenot")
    assert "root: expected the path of a folder" in message("folder")
    assert "image_size: expected none with digits" in message("digits", image_size=9)
    assert "image_size: expected a whole number of at least 1, got 0" in message(str(tmp_path), image_size=0)
    assert "no such folder" in message("folder", root=tmp_path / "nowhere")
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "nowhere.png", 8)


@pytest.mark.parametrize(
    "module, name", [("sklearn.datasets", "digits"), ("pooch", "mnist"), ("PIL.Image", "folder"), ("pooch", "cifar10")]
)
def test_missing_extra_names_the_command(monkeypatch, tmp_path, module, name):
    for folder in ("ant", "bee"):
        for i in range(2):
            write_image(tmp_path / folder / f"{i}.png")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "fastff\[train\]"'):
        load(name, root=tmp_path if name == "folder" else None)
