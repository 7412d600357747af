"""What crosses a cut: tuples, several tensors, tensors that are written to, and which of their dimensions counts the images."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastff
from fastff import SFF
from fastff.graph.cut import CutError, cut
from fastff.models.resnet import BasicBlock


class Halves(nn.Module):
    """Two tensors from one chunk cross the first two cuts."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        u, v = self.first(x).relu().chunk(2, 1)
        u = self.second(u).relu()
        x = self.third(torch.cat((u, v), 1)).relu()
        return self.fc(x.mean((2, 3)))


class Overwrites(nn.Module):
    """A block's own loss needs what the next block overwrites."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Sigmoid())
        self.second = nn.Sequential(nn.Hardtanh(0.4, 0.6, inplace=True), nn.Conv2d(6, 6, 3), nn.Sigmoid())
        self.third = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), nn.Sigmoid())
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.third(self.second(self.first(x))).mean((2, 3)))


class TokensFirst(nn.Module):
    """[L, B, C] between the blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0) for _ in range(3)))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).permute(2, 0, 1)
        return self.fc(self.blocks(x).mean(0))


class Windows(nn.Module):
    """Rows of images folded into the minibatch between two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)
        self.outer, self.last, self.fc = nn.Linear(8, 8), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x).relu()
        b, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1).reshape(b * h, w, c)
        x = self.inner(x).relu()
        x = self.outer(x).relu()
        x = x.reshape(b, h, w, c).permute(0, 3, 1, 2)
        return self.fc(self.last(x).relu().mean((2, 3)))


class GivesDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.extra, self.fc = nn.Linear(6, 2), nn.Linear(6, 5)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu().mean((2, 3))
        found = {"extra": self.extra(x), "logits": self.fc(x)}
        return found if self.training else found["logits"]


def by_hand(sff, images, target, window):
    """Gradients of all parameters of the blocks by plain PyTorch: the loss of block l goes through the window - 1 blocks before it."""
    sff = copy.deepcopy(sff).train()
    parameters = [p for block in sff.blocks for p in block.parameters()]
    alive, total = [((images,), None)], [torch.zeros_like(p) for p in parameters]
    with torch.no_grad():
        for block in sff.local_blocks:
            main, *others = block.module(*(t.clone() if isinstance(t, torch.Tensor) else t for t in alive[-1][0]))
            alive.append(((block.next_input(main), *others), None))
    for last, head in enumerate(sff.heads):
        first = max(0, last - window + 1)
        values = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in alive[first][0])
        for index in range(first, last + 1):
            main, *others = sff.blocks[index](*values)
            values = (sff.local_blocks[index].next_input(main).clone(), *others)
        grads = torch.autograd.grad(head.loss(head(main), target), parameters, allow_unused=True)
        total = [t if g is None else t + g for t, g in zip(total, grads, strict=True)]
    return total


@pytest.mark.parametrize("normalize", ["layer_norm", None])
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("make", [Halves, Overwrites, TokensFirst, Windows])
def test_gradients_are_those_of_plain_pytorch(make, window, normalize):
    torch.manual_seed(0)
    model = make().double()
    granularity = ["first", "second", "third"] if make is Overwrites else "layer"
    sff = SFF(model, 5, granularity, (3, 8, 8), window=window, normalize=normalize)
    assert len(sff.blocks) > 1
    images, target = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    kept = images.clone()
    want = by_hand(sff, images, target, window)
    before = [p.detach().clone() for block in sff.blocks for p in block.parameters()]
    trainer = fastff.Trainer(sff, lambda p: torch.optim.SGD(p, lr=1.0), window=window)
    trainer.step(images, target)
    after = [p for block in sff.blocks for p in block.parameters()]
    for old, new, grad in zip(before, after, want, strict=True):
        torch.testing.assert_close(old - new, grad, rtol=1e-8, atol=1e-10)
    assert torch.equal(images, kept)


@pytest.mark.parametrize("make", [Halves, Overwrites, TokensFirst, Windows, GivesDict])
def test_blocks_and_classifier_are_the_model(make):
    torch.manual_seed(0)
    model = make().eval()
    blocks, classifier = cut(model, "layer", (3, 8, 8), 5)
    images = torch.randn(6, 3, 8, 8)
    alive = (images,)
    for block in blocks:
        alive = block(*alive)
        assert all(len(t) == 6 for t, rows in zip(alive, block.rows, strict=True) if rows)
    torch.testing.assert_close(classifier(*alive)[0], model(images))


def test_images_are_not_mixed_where_tokens_come_first():
    """As many images as tokens: only the dimension that counts images may be the first."""
    torch.manual_seed(0)
    sff = SFF(TokensFirst(), 5, "block", (3, 8, 8)).eval()
    assert [block.output_shape for block in sff.blocks[1:]] == [(4, 8)] * 3
    images = torch.randn(4, 3, 8, 8)
    changed = images.clone()
    changed[0] += 1
    for a, b in zip(sff.goodness(images), sff.goodness(changed), strict=True):
        torch.testing.assert_close(a[1:], b[1:])
        assert not torch.equal(a[0], b[0])


def test_no_cut_where_parts_of_images_are_rows():
    model = Windows()
    assert [block.name for block in SFF(model, 5, "layer", (3, 8, 8)).blocks] == ["first", "outer", "last"]
    with pytest.raises(CutError, match=r"behind 'inner': .* has no row for each image"):
        SFF(model, 5, ["inner", "last"], (3, 8, 8))


def test_several_outputs_have_one_that_classifies():
    sff = SFF(GivesDict(), 5, "layer", (3, 8, 8), readout=True)
    assert torch.isfinite(fastff.Trainer(sff).step(torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 4]))).all()


def test_videos():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv3d(c, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU()) for c in (3, 6)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 5))
    sff = SFF(model, 5, "layer", (3, 4, 8, 8), readout=True)
    assert [block.output_shape for block in sff.blocks] == [(6, 4, 8, 8)] * 2
    images = torch.randn(3, 3, 4, 8, 8)
    losses = [fastff.Trainer(sff).step(images, torch.tensor([0, 1, 2])) for _ in range(2)]
    assert torch.isfinite(torch.stack(losses)).all()
    head, x = sff.heads[0], torch.randn(2, 6, 4, 8, 8)
    torch.testing.assert_close(head(x), head(x.flatten(2, 3)))


def test_a_cut_coarser_than_the_model_is_said():
    class Shared(nn.Module):
        """Every block reads the first one's input too."""

        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.blocks = nn.ModuleList(BasicBlock(6, 6, 1, nn.ReLU) for _ in range(3))
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            x = first = self.stem(x)
            for block in self.blocks:
                x = block(x) + first
            return self.fc(F.relu(x).mean((2, 3)))

    sff = SFF(Shared(), 5, "block", (3, 8, 8))
    assert len(sff.blocks) == 2
    assert "coarser than the model: blocks holds 3 of its blocks, blocks.0, blocks.1, blocks.2" in repr(sff)
