"""Data sets: downloads, archives, subsets, what load returns."""

import hashlib
import io
import tarfile
from dataclasses import replace

import pytest
import torch

from fastff.training import data
from fastff.training.data import Augment, balanced, load

pooch, Image = pytest.importorskip("pooch"), pytest.importorskip("PIL.Image")

from data_files import IDX, idx_bytes, message, write_cifar, write_idx  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread_no_network")


# Downloads, with pooch replaced


def test_download_tries_each_mirror_then_says_what_to_do(monkeypatch, tmp_path):
    tried = []

    def fail(url, known_hash, fname, path):
        tried.append(url)
        raise OSError("no network")

    monkeypatch.setattr(pooch, "retrieve", fail)
    text = message("mnist")
    assert tried == [url + IDX[0] + ".gz" for url in data.SOURCES["mnist"].urls]
    assert text.startswith(f"{IDX[0]}.gz: the download failed") and "no network" in text and "--root" in text
    tried.clear()
    assert "no such file" in message("mnist", download=False) and not tried


def test_download_of_idx_files(monkeypatch, tmp_path):
    write_idx(tmp_path / "remote")
    asked = {}

    def retrieve(url, known_hash, fname, path):
        asked[fname] = known_hash
        return str(tmp_path / "remote" / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert len(load("mnist").train_images) == 20
    assert asked == {file: f"md5:{md5}" for file, md5 in data.SOURCES["mnist"].md5.items()}


def test_wrong_hash_of_a_download(monkeypatch):
    def retrieve(url, known_hash, fname, path):
        raise ValueError(f"MD5 hash of downloaded file ({fname}) does not match")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    text = message("cifar10")
    assert "cifar-10-binary.tar.gz: the download failed" in text and "does not match" in text


def archive_of(folder):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return buffer.getvalue()


def expect_md5(monkeypatch, name, raw):
    [archive] = data.SOURCES[name].md5
    source = replace(data.SOURCES[name], md5={archive: hashlib.md5(raw).hexdigest()})
    monkeypatch.setitem(data.SOURCES, name, source)
    return archive


def test_downloaded_archive_is_unpacked_once(monkeypatch, tmp_path):
    write_cifar(tmp_path / "remote" / "cifar-10-batches-bin")
    raw = archive_of(tmp_path / "remote" / "cifar-10-batches-bin")
    expect_md5(monkeypatch, "cifar10", raw)
    calls = []

    def retrieve(url, known_hash, fname, path):
        calls.append(url)
        path.mkdir(parents=True)
        (path / fname).write_bytes(raw)
        return str(path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    first, second = load("cifar10"), load("cifar10", download=False)
    assert len(calls) == 1 and torch.equal(first.train_images, second.train_images)
    left = {p.name for p in (tmp_path / "cache" / "fastff" / "cifar10").iterdir()}
    assert left == {"cifar-10-binary.tar.gz", "cifar-10-batches-bin"}


def test_archive_in_root(monkeypatch, tmp_path):
    write_cifar(tmp_path / "remote" / "cifar-100-binary", "cifar100")
    raw = archive_of(tmp_path / "remote" / "cifar-100-binary")
    root = tmp_path / "root"
    root.mkdir()
    (root / "cifar-100-binary.tar.gz").write_bytes(raw)
    text = message("cifar100", root=root)  # not the published archive
    assert f"{root / 'cifar-100-binary.tar.gz'}: wrong or incomplete: expected MD5 03b5dce" in text
    expect_md5(monkeypatch, "cifar100", raw)
    assert len(load("cifar100", root=root).train_images) == 10


def test_archive_that_is_none_or_lacks_files(monkeypatch, tmp_path):
    raw = b"not a tar file"
    archive = expect_md5(monkeypatch, "cifar10", raw)
    (tmp_path / archive).write_bytes(raw)
    text = message("cifar10", root=tmp_path)
    assert f"{tmp_path / archive}: cannot be unpacked" in text and "by hand" in text
    (tmp_path / "remote" / "cifar-10-batches-bin").mkdir(parents=True)
    raw = archive_of(tmp_path / "remote" / "cifar-10-batches-bin")
    expect_md5(monkeypatch, "cifar10", raw)
    (tmp_path / archive).write_bytes(raw)
    assert "holds no cifar-10-batches-bin/data_batch_1.bin" in message("cifar10", root=tmp_path)
    assert not list(tmp_path.glob(".unpack-*"))


# Subsets


def test_subset_is_balanced_nested_and_deterministic():
    labels = torch.arange(1000) % 10
    small, large = balanced(labels, 33, 10, seed=1), balanced(labels, 200, 10, seed=1)
    assert small.dtype == torch.int64 and small.tolist() == sorted(set(small.tolist()))
    assert sorted(labels[small].bincount().tolist()) == [3] * 7 + [4] * 3
    assert labels[large].bincount().tolist() == [20] * 10
    assert set(small.tolist()) < set(large.tolist())
    assert torch.equal(small, balanced(labels, 33, 10, seed=1))
    assert not torch.equal(small, balanced(labels, 33, 10, seed=2))
    assert torch.equal(balanced(labels, 1000, 10), torch.arange(1000))


def test_subset_of_unequal_classes_gives_the_share_of_the_rare_to_the_others():
    labels = torch.tensor([0] * 3 + [1] * 50 + [2] * 50)
    assert labels[balanced(labels, 43, 3)].bincount().tolist() == [3, 20, 20]


def test_subset_of_a_data_set_leaves_the_test_images():
    whole, part = load("digits"), load("digits", subset=100, seed=3)
    assert part.train_labels.bincount().tolist() == [10] * 10
    assert torch.equal(part.test_images, whole.test_images)
    assert load("digits", test_subset=50).test_labels.bincount().tolist() == [5] * 10


@pytest.mark.parametrize("argument, most", [("subset", 1435), ("test_subset", 362)])
@pytest.mark.parametrize("value", [9, 2000, -1, 3.5, True])
def test_wrong_subset(argument, most, value):
    text = message("digits", **{argument: value})
    expected = f"from 10 (one image per class) to {most} (all of them), got {value!r}"
    assert text.startswith(f"{argument}: ") and expected in text


def test_dataset_loaders():
    digits = load("digits", subset=100)
    train, test = digits.train_loader(32, seed=1, drop_last=True), digits.test_loader(100)
    assert train.shuffle and len(train) == 3 and not test.shuffle and len(test.images) == 362
    everything = torch.cat([x for x, _ in digits.train_loader(32)])
    assert abs(float(everything.mean())) < 1e-5 and abs(float(everything.std(unbiased=False)) - 1) < 1e-5
    assert digits.train_loader(32, shuffle=False, augment=Augment(1)).augment == Augment(1)


def test_a_constant_channel_does_not_divide_by_zero(tmp_path):
    write_idx(tmp_path, train_images=idx_bytes(torch.full((20, 5, 4), 7, dtype=torch.uint8)))
    assert all(x.isfinite().all() for x, _ in load("mnist", root=tmp_path).train_loader(5))


def test_a_data_set_prints_as_one_line():
    text = repr(load("digits", subset=100))
    assert text == "Dataset(digits: 100 training and 362 test images of [1, 8, 8], 10 classes)"
