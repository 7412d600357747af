"""Every layer of torch.nn as the first of a block: it trains as in plain PyTorch, in each layout and dtype, in training and in eval mode.

A block's input needs no gradient, which PyTorch's layers are rarely run with. All run in a process of their own, since some of them ended it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import fastff.functional as ff
from fastff import SFF, Trainer
from fastff.nn import FFBlock

C, SIZE, CLASSES = 8, 6, 3
WITHOUT_ARGUMENTS = (
    "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU RReLU "
    "ReLU ReLU6 SELU SiLU Sigmoid Softmax2d Softplus Softshrink Softsign Tanh Tanhshrink"
)
IMAGES = {
    name: (lambda name=name: getattr(nn, name)())
    for name in WITHOUT_ARGUMENTS.split()
} | {
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(4),
    "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(4),
    "AlphaDropout": lambda: nn.AlphaDropout(0.0),
    "AvgPool2d": lambda: nn.AvgPool2d(2),
    "BatchNorm2d": lambda: nn.BatchNorm2d(C),
    "ChannelShuffle": lambda: nn.ChannelShuffle(2),
    "CircularPad2d": lambda: nn.CircularPad2d(1),
    "ConstantPad2d": lambda: nn.ConstantPad2d(1, 2.0),
    "Conv2d": lambda: nn.Conv2d(C, C, 3, padding=1),
    "Conv2d of one tap": lambda: nn.Conv2d(C, C, 1),
    "Conv2d with a stride": lambda: nn.Conv2d(C, C, 1, stride=2, bias=False),
    "Conv2d of each channel": lambda: nn.Conv2d(C, C, 3, groups=C),
    "Conv2d that reflects": lambda: nn.Conv2d(C, C, 3, padding=1, dilation=1, padding_mode="reflect"),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(C, C, 2, stride=2),
    "Dropout": lambda: nn.Dropout(0.0),
    "Dropout2d": lambda: nn.Dropout2d(0.0),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.0),
    "GroupNorm": lambda: nn.GroupNorm(2, C),
    "GroupNorm without affine": lambda: nn.GroupNorm(2, C, affine=False),
    "GroupNorm behind layers": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 1).requires_grad_(False), nn.GroupNorm(1, C)),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
    "LPPool2d": lambda: nn.LPPool2d(2, 2),
    "LayerNorm": lambda: nn.LayerNorm([C, SIZE, SIZE]),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "PReLU of each channel": lambda: nn.PReLU(C),
    "PixelShuffle": lambda: nn.PixelShuffle(2),
    "PixelUnshuffle": lambda: nn.PixelUnshuffle(2),
    "RMSNorm": lambda: nn.RMSNorm([C, SIZE, SIZE]),
    "ReflectionPad2d": lambda: nn.ReflectionPad2d(1),
    "ReplicationPad2d": lambda: nn.ReplicationPad2d(1),
    "Softmax": lambda: nn.Softmax(1),
    "Softmin": lambda: nn.Softmin(1),
    "Threshold": lambda: nn.Threshold(0.1, 0.0),
    "Upsample": lambda: nn.Upsample(scale_factor=2),
    "UpsamplingBilinear2d": lambda: nn.UpsamplingBilinear2d(scale_factor=2),
    "UpsamplingNearest2d": lambda: nn.UpsamplingNearest2d(scale_factor=2),
    "ZeroPad2d": lambda: nn.ZeroPad2d(1),
}  # fmt: skip
# parts of the names of layers that are for other inputs, or that cannot begin a block
OTHERS = (
    "1d 3d Bilinear Embedding EmbeddingBag RNN LSTM GRU Cell Transformer MultiheadAttention Loss Container Sequential "
    "Module Parameter Lazy Distance Similarity Adaptive Sync Cross Unflatten Unfold Fold MaxUnpool FractionalMaxPool2d"
)
SEQUENCES = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(C),
    "Conv1d": lambda: nn.Conv1d(C, C, 3),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(C, C, 3),
    "Dropout1d": lambda: nn.Dropout1d(0.0),
    "GroupNorm of a sequence": lambda: nn.GroupNorm(2, C),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(C, affine=True),
    "MaxPool1d": lambda: nn.MaxPool1d(2),
    "AvgPool1d": lambda: nn.AvgPool1d(2),
}
FEATURES = {
    "Flatten": lambda: nn.Flatten(),
    "Linear": lambda: nn.Linear(C, C),
    "LayerNorm of features": lambda: nn.LayerNorm(C),
    "BatchNorm1d of features": lambda: nn.BatchNorm1d(C),
    "GroupNorm of features": lambda: nn.GroupNorm(2, C),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.mT.contiguous().mT
    ),
    "a slice": lambda x: (
        torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :C] if x.dim() == 4 else x
    ),
}
DTYPES = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def block_of(layer, shape, dtype):
    """A block that begins with the layer, with something behind it that learns and has an output of 5 channels."""
    torch.manual_seed(0)
    first = layer()
    channels = first(torch.rand(shape)).shape[1]
    then = {4: nn.Conv2d, 3: nn.Conv1d}.get(len(shape))
    behind = nn.Linear(channels, 5) if then is None else then(channels, 5, 1)
    return FFBlock(nn.Sequential(first, nn.ReLU(), behind), 5, CLASSES).to(dtype)


def gradients(block, x, target, plain):
    """The loss and the gradients of the block's parameters, by its own local step or by plain PyTorch."""
    block.zero_grad()
    if plain:
        h = block.module(x)
        loss = ff.goodness_loss(h, block.head.weight, None, target, impl="reference")
        loss.backward()
    else:
        loss = block.local_step(x, target)[1]
    return {"loss": loss.detach()} | {name: p.grad for name, p in block.named_parameters()}


def try_all():
    """Print each case before it runs, and what is wrong with it."""
    target = torch.arange(4) % CLASSES
    for shape, layers in (((4, C, SIZE, SIZE), IMAGES), ((4, C, SIZE), SEQUENCES), ((4, C), FEATURES)):
        for name, layer in layers.items():
            for dtype, tolerance in DTYPES.items():
                for training in (True, False):
                    torch.manual_seed(1)
                    x, block = torch.rand(shape).to(dtype), block_of(layer, shape, dtype).train(training)
                    expected = None
                    for layout, lay in LAYOUTS.items():
                        print(f"? {name}, {dtype}, training={training}, {layout}", flush=True)
                        if expected is None:
                            try:
                                expected = gradients(block, x.clone().requires_grad_(), target, plain=True)
                            except RuntimeError as error:  # PyTorch has no such kernel
                                assert "not implemented" in str(error), error
                                break
                            block.load_state_dict(block_of(layer, shape, dtype).state_dict())
                        given = lay(x)
                        found = gradients(block, given, target, plain=False)
                        if not torch.equal(given, x):
                            print("! the input was written to")
                        for what, right in expected.items():
                            off = (
                                0
                                if right is None is found[what]
                                else (found[what].double() - right.double()).abs().max()
                            )
                            if not off <= tolerance * (1 if right is None else max(1, right.abs().max())):
                                print(f"! {what} is off by {off}")


def test_every_layer():
    command = [sys.executable, "-c", "import test_first_layers; test_first_layers.try_all()"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=__file__.rsplit("/", 1)[0])
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended with {done.returncode} at {lines[-1]}\n{done.stderr}"
    wrong = [f"{lines[i - 1]}: {line}" for i, line in enumerate(lines) if line.startswith("!")]
    assert not wrong, "\n".join(wrong)


def test_no_layer_for_images_is_missing():
    """A layer that PyTorch adds must be tried, or be among OTHERS."""
    tried = {name.split()[0] for name in (*IMAGES, *SEQUENCES, *FEATURES)}
    layers = {name for name, thing in vars(nn).items() if isinstance(thing, type) and issubclass(thing, nn.Module)}
    missing = {name for name in layers - tried if not any(part in name for part in OTHERS.split())}
    assert not missing - {"ZeroPad1d", "DataParallel"}, missing


@pytest.mark.parametrize("window", [1, 2])
def test_networks_whose_blocks_begin_with_group_norm(window):
    script = f"import test_first_layers; test_first_layers.train({window})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=__file__.rsplit("/", 1)[0]
    )
    assert done.returncode == 0, done.stderr


def train(window):
    """Steps of a network with pre-activation by group norm, in channels_last: the losses are those of contiguous images."""
    from fastff import SFF, Trainer

    def layer(channels):
        return nn.Sequential(nn.GroupNorm(2, channels), nn.ReLU(), nn.Conv2d(channels, 8, 3, padding=1))

    losses = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Sequential(
            layer(4), layer(8), layer(8), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )
        net = net.to(memory_format=layout)
        sff = SFF(net, num_classes=3, granularity=["0", "1", "2"], input_shape=(4, 6, 6), window=window)
        trainer = Trainer(sff, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        images = torch.rand(6, 4, 6, 6).contiguous(memory_format=layout)
        losses.append(torch.stack([trainer.step(images, torch.arange(6) % 3) for _ in range(3)]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["l2", "l2_channels"])
@pytest.mark.parametrize("impl", ["native", "torch", "reference"])
def test_what_is_all_zero_stays_zero_and_gets_no_gradient(how, impl):
    """A dead ReLU: a sample, or a position, without a value above zero."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 5)
    x[0], x[1, :, 2, 3] = 0, 0
    x.requires_grad_()
    y = ff.normalize(x, how, impl=impl)
    grad = torch.randn_like(x)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    dead = torch.zeros(3, 1, 5, 5, dtype=torch.bool)
    dead[0] = True
    dead[1, :, 2, 3] = how == "l2_channels"
    dead = dead.expand_as(x)
    assert bool(y[dead].eq(0).all()) and bool(grad_x[dead].eq(0).all()) and bool(grad_x.isfinite().all())
    dims = (1, 2, 3) if how == "l2" else 1
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        exact / (exact.square().sum(dims, keepdim=True).add(1e-60).sqrt() + 1e-5), exact, grad.double()
    )
    torch.testing.assert_close(grad_x[~dead].double(), expected[~dead], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["l2", "l2_channels"])
def test_blocks_train_where_samples_are_all_zero(how):
    """Of a step whose block gives zeros alone, all gradients are finite; fused with its epilogue and by the modules."""
    torch.manual_seed(0)
    for fuse in (True, False):
        layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        nn.init.constant_(layers[1].bias, -50.0)
        following = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        model = nn.Sequential(layers, following, nn.Flatten(), nn.Linear(8 * 36, 5))
        trainer = Trainer(SFF(model, 5, ["0", "1"], (3, 6, 6), normalize=how, fuse=fuse))
        trainer.train_mode()
        for _ in range(2):
            losses = trainer.step(torch.randn(4, 3, 6, 6), torch.randint(5, (4,)))
        assert bool(losses.isfinite().all())
        assert all(bool(p.isfinite().all()) for p in model.parameters())
