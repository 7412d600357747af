"""Bad input: each kind has an error that names the argument, what was expected and what came."""

import re

import pytest
import torch
from torch import nn

import fastff
import fastff.functional as ff
from fastff import SFF, Backprop, Trainer
from fastff.graph.trace import CutError
from fastff.nn import FFBlock, FFConv2d, GoodnessHead
from fastff.training import data, optim
from fastff.training.fit import Diverged
from fastff.training.loader import Augment, Loader

X, W, Y = torch.randn(2, 3, 4, 4), torch.randn(5, 3), torch.tensor([0, 4])
IMAGES, LABELS = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def sff(**options):
    return SFF(net(), 3, **{"input_shape": (3, 8, 8)} | options)


def step(images=None, target=None, **options):
    images = torch.randn(2, 3, 8, 8) if images is None else images
    Trainer(sff(), **options).step(images, torch.tensor([0, 2]) if target is None else target)


def fit(batches, epochs=1, **options):
    Trainer(sff(), **options).fit(batches, epochs, progress=False)


def step_of(**options):
    ff.goodness_step(X, W, None, Y, **options)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return self.conv(x)


class TwoInputs(Branches):
    def forward(self, x, y):
        return self.conv(x + y)


BATCH = (torch.randn(2, 3, 8, 8), torch.tensor([0, 2]))

CASES = {
    # functional: x
    "a list as x": (lambda: ff.goodness([[1.0]], W), TypeError, "x: expected a tensor, got list"),
    "integers": (lambda: ff.goodness(X.long(), W), TypeError, "x: expected float32, .* got torch.int64"),
    "one dimension": (lambda: ff.goodness(X[0, 0, 0], W), ValueError, r"x: expected \[B, C\].* got shape \[4\]"),
    "six dimensions": (lambda: ff.goodness(X[None, None], W), ValueError, r"x: expected .* got shape \[1, 1, 2, 3, 4, 4\]"),
    "no positions": (lambda: ff.goodness(X[..., :0], W), ValueError, "x: expected at least .* position"),
    "an empty batch": (lambda: ff.goodness_step(X[:0], W, None, Y[:0]), ValueError, "x: .* got an empty batch"),
    "a map smaller than the kernel": (
        lambda: ff.goodness(X[..., :2], torch.randn(5, 3, 3, 3)), ValueError, r"x: expected at least \[3, 3\] positions",
    ),
    "a wrong channel_dim": (lambda: ff.goodness(X, W, channel_dim=2), ValueError, "channel_dim: expected 1 or -1, got 2"),
    # the head's parameters
    "other channels": (lambda: ff.goodness(X, torch.randn(5, 4)), ValueError, r"weight: expected \[K, 3\] .* got \[5, 4\]"),
    "no classes": (lambda: ff.goodness(X, W[:0]), ValueError, r"weight: expected .* K >= 1 .* got \[0, 3\]"),
    "integer weight": (lambda: ff.goodness(X, W.long()), TypeError, "weight: expected a floating-point tensor, got torch.int64"),
    "weight elsewhere": (lambda: ff.goodness(X, W.to("meta")), ValueError, "weight: expected on cpu as x is, got meta"),
    "no head": (lambda: ff.goodness(X, None), ValueError, "weight: expected .* got None for both"),
    "a bias of another length": (lambda: ff.goodness(X, W, torch.zeros(4)), ValueError, r"bias: expected \[5\], got \[4\]"),
    "a grid of other classes": (
        lambda: ff.goodness(X, W, grid_weight=torch.zeros(4, 3, 2, 2)), ValueError, r"grid_weight: expected \[5, 3, G, G\], got",
    ),
    "negative padding": (lambda: ff.goodness(X, W, padding=-1), ValueError, "padding: expected .* at least 0"),
    "second moment of 3 x 3": (
        lambda: ff.goodness(X, torch.randn(5, 3, 3, 3), algorithm="second_moment"), ValueError, "algorithm: second_moment needs kernel size 1",
    ),
    "an unknown algorithm": (lambda: ff.goodness(X, W, algorithm="fast"), ValueError, "algorithm: expected 'auto'.* got 'fast'"),
    "an unknown impl": (lambda: ff.goodness(X, W, impl="fast"), ValueError, "impl: expected 'auto' or names .* got 'fast'"),
    "an impl that cannot run": (lambda: ff.goodness(X, W, impl="cuda"), RuntimeError, "impl='cuda': no implementation of goodness"),
    # the loss
    "a label too large": (lambda: ff.goodness_step(X, W, None, torch.tensor([0, 5])), ValueError, r"target: expected labels in 0\.\.4, got 5"),
    "a negative label": (lambda: ff.goodness_loss(X, W, None, torch.tensor([0, -1])), ValueError, r"target: .* 0\.\.4, got -1"),
    "float labels": (lambda: ff.goodness_step(X, W, None, Y.float()), TypeError, "target: expected int64 class labels, got torch.float32"),
    "a list of labels": (lambda: ff.goodness_step(X, W, None, [0, 4]), TypeError, "target: expected int64 class labels, got list"),
    "too few labels": (lambda: ff.goodness_step(X, W, None, Y[:1]), ValueError, r"target: expected \[2\], .* got \[1\]"),
    "one-hot labels": (lambda: ff.goodness_loss(X, W, None, torch.eye(5)[Y].long()), ValueError, r"target: .* got \[2, 5\]"),
    "tau of zero": (lambda: step_of(tau=0.0), ValueError, "tau: expected a finite number above 0, got 0.0"),
    "tau with an axis": (lambda: step_of(tau=torch.ones(1)), ValueError, r"tau: .* without dimensions, got \[1\]"),
    "an infinite margin": (lambda: step_of(margin=float("inf")), ValueError, "margin: expected a finite number, got inf"),
    "label smoothing of one": (lambda: step_of(label_smoothing=1.0), ValueError, "label_smoothing: expected a number of at least 0"),
    "an unknown reduction": (lambda: step_of(reduction="max"), ValueError, "reduction: expected .* got 'max'"),
    "an unknown norm": (lambda: step_of(normalize="batch"), ValueError, "normalize: expected .* got 'batch'"),
    "a norm over nothing known": (lambda: ff.layer_norm(X, over="batch"), ValueError, "over: expected 'sample' or 'channels', got 'batch'"),
    # blocks
    "an even head": (lambda: GoodnessHead(3, 5, kernel_size=2), ValueError, "kernel_size: expected 1, 3 or 5, got 2"),
    "a head without classes": (lambda: GoodnessHead(3, 0), ValueError, "num_classes: expected .* at least 1, got 0"),
    "a head of fractions": (lambda: GoodnessHead(3.5, 2), ValueError, "channels: expected a whole number .* got 3.5"),
    "a head that never learns": (lambda: GoodnessHead(3, 2, scale=0), ValueError, "scale: expected a positive number"),
    "a head without terms": (lambda: GoodnessHead(3, 2, squares=False), ValueError, "squares: False needs a spatial term"),
    "a negative grid": (lambda: GoodnessHead(3, 2, grid=-1), ValueError, "grid: expected .* at least 0"),
    "a block of other channels": (
        lambda: FFBlock(nn.Conv2d(3, 4, 1), 6, 2).local_step(X, Y.clamp(max=1)), ValueError, "weight: expected .* for x of 4 channels",
    ),
    "a block's labels": (lambda: FFConv2d(3, 4, 3, num_classes=2).local_step(X, Y), ValueError, r"target: expected labels in 0\.\.1, got 4"),
    # the cut
    "an unknown granularity": (lambda: sff(granularity="blocks"), ValueError, "granularity: expected one of layer, .* got 'blocks'"),
    "an unknown path": (lambda: sff(granularity=["0", "7"]), ValueError, "granularity: .*'7'"),
    "a shape of zeros": (lambda: sff(input_shape=(3, 0, 8)), ValueError, r"input_shape: expected the positive sizes .* got \(3, 0, 8\)"),
    "a shape that does not fit": (lambda: sff(input_shape=(1, 8, 8)), CutError, "input_shape"),
    "a model that looks at its data": (lambda: SFF(Branches(), 2, input_shape=(3, 8, 8)), CutError, "if x.sum"),
    "a model of two inputs": (lambda: SFF(TwoInputs(), 2, input_shape=(3, 8, 8)), CutError, "must take one tensor"),
    "no model": (lambda: SFF(torch.relu, 2), (TypeError, ValueError), "model: expected"),
    "an unknown vote": (lambda: sff(vote="max"), ValueError, "vote: expected one of .* got 'max'"),
    "a window of zero": (lambda: sff(window=0), ValueError, "window: expected a whole number of at least 1, got 0"),
    "images of another size": (lambda: sff()(torch.randn(2, 1, 8, 8)), ValueError, "images: expected 3 channels, got 1"),
    "one image": (lambda: sff()(torch.randn(3, 8, 8)), ValueError, r"images: expected \[B, 3, 8, 8\], got \[3, 8, 8\]"),
    "float64 images, not in training": (lambda: sff()(BATCH[0].double()), TypeError, "images: expected torch.float32 .* got torch.float64"),
    "bytes to predict": (lambda: sff().predict(IMAGES), TypeError, "images: expected a floating-point tensor, got torch.uint8"),
    "an array to predict": (lambda: sff().predict(IMAGES.numpy()), TypeError, "images: expected a floating-point tensor, got ndarray"),
    "16-bit images' goodness": (lambda: sff().goodness(BATCH[0].half()), TypeError, "images: expected torch.float32 .* got torch.float16"),
    "a parallel model": (lambda: SFF(nn.DataParallel(net()), 3), TypeError, r"model: expected the model itself, got a DataParallel.* \.module"),
    "a compiled model": (lambda: SFF(torch.compile(net()), 3), TypeError, r"model: expected the model itself, got a OptimizedModule.* \._orig_mod"),
    "a scripted model": (lambda: SFF(torch.jit.script(net()), 3), TypeError, "model: expected one of Python code.*, got a ScriptModule"),
    "a lazy model": (lambda: SFF(nn.Sequential(nn.LazyConv2d(4, 3)), 3), ValueError, "model: expected initialized tensors, got 0.weight"),
    "a model without values": (lambda: SFF(net().to("meta"), 3), ValueError, "model: expected tensors with values, got 0.weight on the meta"),
    "a model that can't train": (lambda: SFF(torch.inference_mode(net)(), 3), ValueError, "model: expected tensors .* got 0.weight, made under"),
    "a cut in inference mode": (torch.inference_mode(sff), RuntimeError, r"model: expected to be cut outside of torch.inference_mode\(\)"),
    "an exit threshold": (lambda: sff().predict(BATCH[0], exit_threshold=90), ValueError, "exit_threshold: expected .* got 90"),
    # training
    "a model that is not cut": (lambda: Trainer(net()), TypeError, "sff: expected fastff.SFF .* got Sequential"),
    "an unknown schedule": (lambda: Trainer(sff(), schedule="lazy"), ValueError, "schedule: expected 'all' or 'greedy', got 'lazy'"),
    "everything frozen": (lambda: Trainer(sff(), frozen=2), ValueError, "frozen: expected 0 to 1 blocks, got 2"),
    "greedy with a window": (lambda: Trainer(sff(), schedule="greedy", window=2), ValueError, "window: expected 1 with schedule='greedy'"),
    "no micro-batches": (lambda: Trainer(sff(), micro_batches=0), ValueError, "micro_batches: expected .* at least 1, got 0"),
    "an unknown amp": (lambda: Trainer(sff(), amp="int8"), ValueError, "amp: expected None, 'bf16' or 'fp16', got 'int8'"),
    "a clip of zero": (lambda: Trainer(sff(), clip_grad_norm=0), ValueError, "clip_grad_norm: expected a positive number"),
    "an unknown learning-rate schedule": (lambda: Trainer(sff(), lr_schedule="steps"), ValueError, "lr_schedule: expected one of .* 'steps'"),
    "backpropagation without a classifier": (lambda: Backprop(sff()), ValueError, "readout"),
    "bytes as images": (lambda: step(IMAGES), TypeError, "images: expected a floating-point tensor, got torch.uint8"),
    "images of another dtype": (lambda: step(torch.randn(2, 3, 8, 8).double()), TypeError, "images: .* torch.float32 .* got torch.float64"),
    "no images": (lambda: step(torch.zeros(0, 3, 8, 8), LABELS[:0]), ValueError, "images: expected at least one image, got an empty batch"),
    "two lengths": (lambda: step(target=LABELS[:3]), ValueError, r"target: expected one label for each of 2 images, got \[3\]"),
    "labels of classes there are not": (lambda: step(target=torch.tensor([0, 3])), ValueError, r"target: expected labels in 0\.\.2, got 3"),
    "images of other channels": (lambda: step(torch.randn(2, 1, 8, 8)), ValueError, "images: expected"),
    "NaN in an image": (lambda: fit([(BATCH[0] * float("nan"), BATCH[1])]), Diverged, "block .* became NaN or infinite at step 1"),
    "no epochs": (lambda: fit([BATCH], 0), ValueError, "epochs: expected a whole number of at least 1, got 0"),
    "no batches": (lambda: fit([]), ValueError, "loader: expected at least one minibatch, got an empty loader"),
    "nothing to evaluate": (lambda: Trainer(sff()).evaluate([]), ValueError, "loader: expected at least one minibatch"),
    "no loader": (lambda: Trainer(sff()).evaluate(None), TypeError, "loader: expected an iterable of minibatches .*, got NoneType"),
    "a negative learning rate": (lambda: Trainer(sff(), optim.adamw(-1.0)), ValueError, "learning rate|lr"),
    "labels of classes backpropagation has not": (
        lambda: Backprop(sff(readout=True)).step(BATCH[0], torch.tensor([0, 3])), ValueError, r"target: expected labels in 0\.\.2, got 3",
    ),
    # data
    "an unknown data set": (lambda: data.load("imagenet21k"), ValueError, "imagenet21k"),
    "float pixels": (lambda: Loader(IMAGES / 1.0, LABELS, 2, mean=[0] * 3, std=[1] * 3), ValueError, "images: expected uint8"),
    "a batch of zero": (lambda: Loader(IMAGES, LABELS, 0, mean=[0] * 3, std=[1] * 3), ValueError, "batch_size: expected .* got 0"),
    "a mean of another length": (lambda: Loader(IMAGES, LABELS, 2, mean=[0], std=[1] * 3), ValueError, "mean: expected 3 numbers.* got 1"),
    "a crop outwards": (lambda: Augment(padding=-1), ValueError, "padding: expected .* at least 0, got -1"),
    # models
    "an unknown stem": (lambda: fastff.models.resnet18(stem="mnist"), ValueError, "stem: expected .* got 'mnist'"),
    "a network without classes": (lambda: fastff.models.mobilenet_v3_small(num_classes=0), ValueError, "num_classes: expected .* got 0"),
    "a width of zero": (lambda: fastff.models.resnet18(width=0), ValueError, "width: expected .* got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_says_what_is_wrong(name):
    call, error, text = CASES[name]
    with pytest.raises(error) as caught:
        call()
    assert re.search(text, str(caught.value), re.DOTALL), f"{type(caught.value).__name__}: {caught.value}"


def test_an_environment_variable_with_nonsense(monkeypatch):
    monkeypatch.setenv("FASTFF_IMPL", "quick")
    with pytest.raises(ValueError, match="FASTFF_IMPL: expected 'auto' or names .* got 'quick'"):
        ff.goodness(X, W)


def test_nothing_was_written():
    """By all of the above, into the tensors they were given."""
    torch.manual_seed(0)
    x, w, y = torch.randn(2, 3, 4, 4), torch.randn(5, 3), torch.tensor([0, 7])
    kept = [t.clone() for t in (x, w, y)]
    with pytest.raises(ValueError, match="target"):
        ff.goodness_step(x, w, None, y)
    assert all(map(torch.equal, (x, w, y), kept))
