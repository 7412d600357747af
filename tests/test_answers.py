"""Models whose Python asks for sizes, classes and lengths of what it computes with are opened; those that ask for values are not."""

import pytest
import torch
from torch import nn
from training_oracle import CLASSES, assert_same_training, batches, sgd, train

from fastff import SFF, Trainer
from fastff.graph.cut import CutError


class Layer(nn.Sequential):
    """One block: a class of the model's own."""

    def __init__(self):
        super().__init__(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))


class Encoder(nn.Module):
    """Two blocks, between which Python asks what its subclasses want to know."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(2))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        for block in self.blocks:
            x = block(x) * 2 if self.asks(x) else block(x)
        return x


class Class(Encoder):
    def asks(self, x):
        return isinstance(x, torch.Tensor) and isinstance(x.shape, tuple) and torch.is_tensor(x)


class Type(Encoder):
    def asks(self, x):
        return x.dtype == self.scale.dtype and x.is_floating_point() and x.ndim == 4


class Size(Encoder):
    def asks(self, x):
        *_, height, width = x.shape
        return height == 8 and sum(range(width // 2)) == 6 and len(x.shape) == 4


class Images(Encoder):
    def asks(self, x):
        return len(x) > 2


class Value(Encoder):
    def asks(self, x):
        return x.mean().item() > 0


class Parameter(Encoder):
    def asks(self, x):
        return float(self.scale.detach()) > 0


class Batch(Encoder):
    def asks(self, x):
        return x.shape[0] == 2


class Network(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.stem, self.encoder, self.fc = nn.Conv2d(3, 4, 3, padding=1), encoder, nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.fc(self.encoder(self.stem(x)).mean((2, 3)))


def made(kind, granularity="block", **options):
    torch.manual_seed(0)
    return SFF(Network(kind()).double(), CLASSES, granularity, (3, 8, 8), **options)


@pytest.mark.parametrize("kind", [Class, Type, Size])
def test_questions_with_one_answer_for_all_images(kind):
    sff, plain = made(kind), made(kind, fuse=False)
    assert [block.name for block in sff.blocks] == ["stem", "encoder.blocks.0", "encoder.blocks.1"]
    assert all(int(b) == 0 for name, b in sff.named_buffers() if name.endswith("num_batches_tracked"))
    train(Trainer(sff, sgd), batches(sff, 3))
    train(Trainer(plain, sgd), batches(sff, 3))
    assert_same_training(sff, plain, 1e-8)
    sff.eval()
    (x,) = images = batches(sff, 1)[0][:1]
    for block, module in zip(sff.blocks, (sff.model.stem, *sff.model.encoder.blocks), strict=True):
        x, images = module(x) if module is sff.model.stem else 2 * module(x), block(*images)
        torch.testing.assert_close(images[0], x)


def test_a_model_that_asks_for_sizes_takes_images_of_one_size():
    for kind, one_size in ((Class, False), (Type, False), (Size, True)):
        sff, images = made(kind).eval(), torch.randn(2, 3, 16, 16).double()
        if one_size:
            with pytest.raises(
                ValueError, match=r"images: expected \[B, 3, 8, 8\], got \[2, 3, 16, 16\]: .*this input_shape alone"
            ):
                sff(images)
        else:
            assert sff(images).shape == (2, CLASSES)


@pytest.mark.parametrize("kind", [Images, Value, Parameter, Batch])
def test_what_depends_on_the_images_is_asked_in_every_step(kind):
    sff = made(kind)
    assert [block.name for block in sff.blocks] == ["stem", "encoder"]
    assert "called as they are: encoder" in repr(sff)
    sff.eval()
    for size in (2, 3):
        images = torch.randn(size, 3, 8, 8).double()
        torch.testing.assert_close(sff.blocks[1](*sff.blocks[0](images))[0], sff.model.encoder(sff.model.stem(images)))
    with pytest.raises(CutError, match="encoder"):
        made(kind, ["encoder.blocks.0", "encoder.blocks.1"])
