"""The batch loader: order, normalisation, crops and flips, positions to go on from, wrong arguments."""

import pytest
import torch
from oracle import pixels

from fastff.training.data import Augment, Loader


def make_loader(count=23, batch_size=5, shape=(2, 6, 7), **options):
    options = {"mean": (0.25, 0.5), "std": (0.2, 0.3)} | options
    return Loader(pixels(count, *shape), torch.arange(count, dtype=torch.int32), batch_size, **options)


def batches(loader, start=0):
    return list(loader.iter_from(start))


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_loader_normalises_in_order():
    loader = make_loader()
    found = batches(loader)
    assert len(loader) == len(found) == 5
    images, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert labels.dtype == torch.int64 and labels.tolist() == list(range(23))
    expected = (loader.images.double() / 255 - torch.tensor([0.25, 0.5])[:, None, None].double()) / torch.tensor(
        [0.2, 0.3], dtype=torch.float64
    ).view(2, 1, 1)
    assert images.dtype == torch.float32 and (images - expected).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_loader_dtypes(dtype):
    found, exact = batches(make_loader(dtype=dtype))[0][0], batches(make_loader(dtype=torch.float64))[0][0]
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps


def test_loader_channels_last_and_drop_last():
    loader = make_loader(channels_last=True, drop_last=True)
    found = batches(loader)
    assert len(loader) == len(found) == 4
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in found)
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(found, make_loader(), strict=False))


def test_each_epoch_is_a_new_order_of_all_images():
    loader = make_loader(shuffle=True, seed=4)
    orders = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        orders.append(torch.cat([y for _, y in loader]).tolist())
        plain = make_loader(batch_size=23)
        everything = next(iter(plain))[0]
        assert all(torch.equal(x, everything[y]) for x, y in loader)
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != list(range(23))


def test_batches_depend_on_seed_epoch_and_index_alone():
    options = {"shuffle": True, "augment": Augment(2, flip=True)}
    loader = make_loader(seed=7, **options)
    loader.set_epoch(3)
    whole = batches(loader)
    torch.manual_seed(0)  # the global generator plays no part, neither read nor written
    state = torch.get_rng_state()
    assert same(whole, batches(loader)) and torch.equal(state, torch.get_rng_state())
    fresh = make_loader(seed=7, **options)
    fresh.set_epoch(3)
    for start in range(6):
        assert same(whole[start:], batches(fresh, start))
    assert not same(whole, batches(make_loader(seed=7, **options)))
    other = make_loader(seed=8, **options)
    other.set_epoch(3)
    assert not same(whole, batches(other))


def test_a_running_iteration_keeps_its_epoch():
    loader = make_loader(shuffle=True)
    whole = batches(loader)
    running = iter(loader)
    first = next(running)
    loader.set_epoch(9)
    assert same(whole, [first, *running])


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_every_crop_is_a_real_window(padding, flip):
    loader = make_loader(count=1200, batch_size=400, augment=Augment(padding, flip))
    plain = make_loader(count=1200, batch_size=400)
    seen = set()
    for (augmented, labels), (originals, same_labels) in zip(loader, plain, strict=True):
        assert torch.equal(labels, same_labels)
        for new, old in zip(augmented, originals, strict=True):
            seen.add(find_window(new, old, padding, flip))
    assert len(seen) == (2 * padding + 1) ** 2 * (1 + flip)  # at most 98 possibilities, all of them seen


def find_window(new, old, padding, flip):
    """Which (top, left, flipped) gives `new`, by the slow way: pad, cut, mirror."""
    channels, height, width = old.shape
    padded = old.new_zeros(channels, height + 2 * padding, width + 2 * padding)
    padded[:, padding : padding + height, padding : padding + width] = old
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[:, top : top + height, left : left + width]
            for flipped in (False, True)[: 1 + flip]:
                if torch.equal(new, window.flip(2) if flipped else window):
                    return top, left, flipped
    raise AssertionError("not a window of the padded image")


def test_writing_into_a_batch_leaves_the_data():
    loader = make_loader()
    before = batches(loader)
    for images, labels in loader:
        images.zero_()
        labels.zero_()
    assert same(before, batches(loader))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size: expected a whole number of at least 1, got 2.0"),
        ({"batch_size": 24, "drop_last": True}, "batch_size: expected at most all 23 images with drop_last, got 24"),
        ({"count": 0}, "images: expected at least one image, got shape [0, 2, 6, 7]"),
        ({"mean": (0.5,)}, "mean: expected 2 numbers, one per channel, got 1"),
        ({"std": (0.5, 0)}, "std: expected numbers above 0, got [0.5, 0]"),
        ({"dtype": torch.int64}, "dtype: expected a floating dtype, got torch.int64"),
    ],
)
def test_wrong_loader_arguments(options, text):
    with pytest.raises(ValueError) as error:
        make_loader(**options)
    assert text in str(error.value)


def test_wrong_loader_tensors_and_positions():
    options = {"mean": (0.5,), "std": (0.5,)}
    images = pixels(4, 1, 2, 2)
    for wrong, labels, text in (
        (images, torch.arange(3), "labels: expected one for each of 4 images, got 3"),
        (images.float(), torch.arange(4), "images: expected uint8 [N, C, H, W], got torch.float32"),
        (images[:, 0], torch.arange(4), "images: expected uint8 [N, C, H, W], got torch.uint8 [4, 2, 2]"),
        (images, torch.rand(4), "labels: expected integers [N], got torch.float32 [4]"),
    ):
        with pytest.raises(ValueError) as error:
            Loader(wrong, labels, 2, **options)
        assert text in str(error.value)
    loader = Loader(images, torch.arange(4), 2, **options)
    with pytest.raises(ValueError, match="batch_index: expected 0 to 2, got 3"):
        loader.iter_from(3)
    with pytest.raises(ValueError, match="epoch: expected at least 0, got -1"):
        loader.set_epoch(-1)
    with pytest.raises(ValueError, match="padding: expected a whole number of at least 0, got -1"):
        Augment(-1)
