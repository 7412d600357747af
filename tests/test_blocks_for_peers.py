"""Blocks that stand in for the layers of other people's code: their eps, thresholds, devices, names, and what they want to log."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastff
import fastff.functional as ff
from fastff.nn import FFBlock, FFConv2d, FFLinear, LocalBlock
from fastff.ops import convolution


@pytest.mark.parametrize("normalize", ["rms", "l2", "layer_norm", "layer_norm_channels", None])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_eps(kind, normalize):
    """The eps of the normalization: in what is passed on in training and by next_input."""
    torch.manual_seed(0)
    options = {"goodness": "mean_of_squares", "normalize": normalize, "eps": 0.3, "dtype": torch.float64}
    block = FFLinear(4, 6, **options) if kind == "linear" else FFConv2d(3, 6, 3, **options)
    x = torch.randn(4, *((4,) if kind == "linear" else (3, 5, 5)), dtype=torch.float64)
    y = block.module(x).detach()
    want = y if normalize is None else ff.normalize(y, normalize, eps=0.3)
    following, _ = block.local_step(x)
    torch.testing.assert_close(following, want)
    torch.testing.assert_close(block.next_input(y), want)
    with pytest.raises(ValueError, match="eps: expected"):
        FFLinear(4, 6, goodness="mean_of_squares", eps=-1.0)


@pytest.mark.parametrize("impl", ["native", "torch", "reference"])
@pytest.mark.parametrize("loss", ["softplus", "swish"])
@pytest.mark.parametrize("positions", [False, True])
def test_a_pair_of_thresholds(impl, loss, positions):
    """Other thresholds for positive and negative samples, as SCFF has them, against plain PyTorch in float64."""
    torch.manual_seed(0)
    x = torch.rand(6, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    low, high = 1.0, 0.2
    g = x.pow(2).mean(1).flatten(1) if positions else x.pow(2).mean((1, 2, 3))[:, None]
    z = torch.cat([low - g[:3], g[3:] - high])
    want = (F.softplus(z) if loss == "softplus" else F.silu(z)).mean()
    (grad,) = torch.autograd.grad(want, x)
    step = ff.group_goodness_step(x.detach(), positions=positions, loss=loss, theta=(low, high), impl=impl)
    torch.testing.assert_close(step.loss, want.detach())
    torch.testing.assert_close(step.grad_x, grad)
    torch.testing.assert_close(ff.forward_forward_loss(g, loss, theta=(low, high)), want)


@pytest.mark.parametrize("stride", [1, 2])
def test_forward_has_quick_convolutions(stride, monkeypatch):
    """Its convolutions take the quickest way; values, gradients, second derivatives and hooks are those of the modules."""
    torch.manual_seed(0)
    block = FFConv2d(24, 40, 3, stride, norm=None, activation=nn.Tanh, num_classes=4)
    x = torch.randn(4, 24, 12, 12).contiguous(memory_format=torch.channels_last).requires_grad_()
    ways, hooked, way = [], [], convolution.way
    monkeypatch.setattr(convolution, "way", lambda *args: ways.append(way(*args)) or ways[-1])
    block.module[0].register_forward_hook(lambda *args: hooked.append(0))
    (y, g), plain = block(x), block.module(x)
    assert len(ways) == 1
    assert ways[0] == convolution.PYTORCH or stride == 2 or ways[0] == convolution.WINOGRAD
    assert len(hooked) == 2
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(g, block.head(plain))
    leaves = [x, *block.module.parameters()]
    first = [torch.autograd.grad(t.pow(2).sum(), leaves, create_graph=True) for t in (y, plain)]
    second = [torch.autograd.grad(sum(t.pow(2).sum() for t in each), leaves) for each in first]
    for a, b in (*zip(*first, strict=True), *zip(*second, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize(
    "options", [{"stride": 0}, {"padding": -1}, {"padding": "full"}, {"stride": (1, 2, 1)}, {"groups": 5}]
)
def test_wrong_options_raise_pytorchs_errors(options):
    x, weight = torch.randn(4, 24, 12, 12).contiguous(memory_format=torch.channels_last), torch.randn(24, 24, 3, 3)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        F.conv2d(x, weight, **options)
    with pytest.raises(type(expected.value)), convolution.Quick():
        F.conv2d(x, weight, **options)


def test_thresholds_of_blocks():
    torch.manual_seed(0)
    block = FFConv2d(3, 16, 3, goodness="position", theta=(1.0, 5.0))
    x = torch.randn(4, 3, 6, 6)
    _, loss, g = block.local_step(x, details=True)
    torch.testing.assert_close(loss, torch.cat([F.softplus(1 - g[:2]), F.softplus(g[2:] - 5)]).mean())
    for wrong in ((1.0, 2.0, 3.0), (1.0, "5"), "5"):
        with pytest.raises((TypeError, ValueError), match="theta: expected"):
            FFConv2d(3, 16, 3, goodness="position", theta=wrong)
    with pytest.raises((TypeError, ValueError), match="theta: expected"):
        ff.group_goodness_step(x, positions=True, loss="softplus", theta=(1.0, None))


def test_goodness_without_a_second_pass():
    """local_step(..., details=True) returns the goodness of before the update, from which accuracies of layers are logged."""
    torch.manual_seed(0)
    for block in (
        FFConv2d(3, 8, 3, num_classes=4),
        FFConv2d(3, 8, 3, num_classes=4, goodness="class_group", normalize=None),
    ):
        x, label = torch.randn(5, 3, 6, 6), torch.randint(4, (5,))
        _, want = block(x)
        following, loss, goodness = block.local_step(x, label, details=True)
        torch.testing.assert_close(goodness, want.detach())
        assert not goodness.requires_grad
        assert len(block.local_step(x, label)) == 2


def test_arguments_of_the_layers_they_replace():
    block = FFConv2d(3, 8, 3, num_classes=4, padding_mode="reflect", dtype=torch.float64, device="meta")
    assert block.module[0].padding_mode == "reflect"
    assert {(p.dtype, p.device.type) for p in block.parameters()} == {(torch.float64, "meta")}
    linear = FFLinear(4, 8, num_classes=4, dtype=torch.float64)
    assert {p.dtype for p in linear.parameters()} == {torch.float64}
    assert {p.dtype for p in FFLinear(4, 8, goodness="mean_of_squares", dtype=torch.float64).parameters()} == {
        torch.float64
    }
    with pytest.raises(ValueError, match=r"target: expected .* local_step\(x, target\), got None"):
        FFConv2d(3, 8, 3, num_classes=4).local_step(torch.randn(2, 3, 4, 4))


def test_names_of_subclasses():
    """A subclass has its own layers, tail and others; a module by a name that blocks have themselves would be hidden, and raises."""

    class Own(FFConv2d):
        def __init__(self, name):
            super().__init__(3, 8, 3, num_classes=2)
            setattr(self, name, nn.ModuleList([nn.Identity()]))

    for name in ("layers", "tail", "blocks", "norm", "conv", "goodness", "loss", "steps"):
        assert isinstance(getattr(Own(name), name), nn.ModuleList)
    with pytest.raises(AttributeError, match="outputs: expected another name for a module"):
        Own("outputs")


def test_verify_on_a_block_of_theirs():
    """The comparison that the documentation shows: theirs detaches its input, returns another tuple, or the normalised output."""

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 4, 3, padding=1, bias=False)

        def forward(self, x):
            y = self.c(x).relu()
            return y, y.view(len(y), 2, -1).mean(2)

    ours = FFConv2d(3, 4, 3, bias=False, norm=None, num_classes=2, goodness="class_group_mean")
    x = torch.rand(2, 3, 8, 8)
    assert fastff.verify(Theirs(), ours, x)
    assert fastff.verify(Theirs(), ours, x, outputs=lambda returned: returned[1])


@pytest.mark.parametrize("last", ["batch norm", "activation"])
@pytest.mark.parametrize("goodness", ["class_group", "sff"])
def test_without_a_normalization_the_epilogue_is_fused(goodness, last):
    """Batch norm, activation and goodness are one op also where the next block gets the output as it is; values are those of plain PyTorch."""
    torch.manual_seed(0)
    ending = [nn.ReLU(), nn.BatchNorm2d(16)] if last == "batch norm" else [nn.BatchNorm2d(16), nn.ReLU()]
    block = FFBlock(nn.Sequential(nn.Conv2d(3, 16, 3), *ending), 16, 2, goodness=goodness, normalize=None)
    wide, x, label = copy.deepcopy(block).double(), torch.randn(4, 3, 8, 8), torch.randint(2, (4,))
    assert "batch norm" in str(block.epilogue)
    following, loss = block.local_step(x, label)
    y, g = wide(x.double())
    want = wide.head.loss(g, label) if goodness == "sff" else F.cross_entropy(g, label)
    want.backward()
    torch.testing.assert_close(loss, want.detach().float())
    torch.testing.assert_close(following, y.detach().float(), rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(block.named_parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.float(), rtol=1e-3, atol=1e-5, msg=name)
    for p, q in zip(block.buffers(), wide.buffers(), strict=True):
        torch.testing.assert_close(p, q.to(p.dtype))


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_training_without_a_normalization(window, dtype, tolerance):
    """A block behind a fused epilogue gets its output, and gives back the gradient of that: training is that of the modules as they are."""
    torch.manual_seed(0)
    layers = [
        layer for c in (3, 6, 6) for layer in (nn.Conv2d(c, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    ]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).to(dtype)
    batches = [(torch.randn(4, 3, 8, 8, dtype=dtype), torch.randint(4, (4,))) for _ in range(3)]
    states, options = [], {"granularity": "layer", "window": window, "normalize": None, "hidden": 0}
    for fuse in (True, False):
        torch.manual_seed(1)
        sff = fastff.SFF(copy.deepcopy(net), 4, input_shape=(3, 8, 8), fuse=fuse, **options)
        assert all((block.epilogue is not None) == fuse for block in sff.local_blocks)
        trainer = fastff.Trainer(sff, lambda parameters: torch.optim.SGD(parameters, 0.01))
        for batch in batches:
            trainer.step(*batch)
        states.append(sff.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("normalize", [None, "layer_norm"])
def test_any_local_loss(normalize):
    """A block whose loss is an auxiliary network: the gradients of both, and what is passed on, are those of plain PyTorch in float64."""

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.classifier = nn.Conv2d(8, 3, 3, padding=1), nn.Linear(8, 4)

        def forward(self, y, target):
            image, label = target
            return F.mse_loss(self.decoder(y), image) + F.cross_entropy(self.classifier(y.mean((2, 3))), label)

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()).double()
    auxiliary = Auxiliary().double()
    block = LocalBlock(module, loss=auxiliary, normalize=normalize)
    target = torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.randint(4, (4,))
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    parameters = list(block.parameters())
    assert len(parameters) == 3 + 4
    y = module(x)
    want = auxiliary(y, target)
    grads = torch.autograd.grad(want, parameters)
    following, loss = block.local_step(x, target)
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(following, y.detach() if normalize is None else F.layer_norm(y.detach(), y.shape[1:]))
    for parameter, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    with pytest.raises(TypeError, match="head, loss: expected one of them"):
        LocalBlock(module)
    with pytest.raises(ValueError, match=r"loss: expected a function that returns a scalar tensor, got \[4\]"):
        LocalBlock(module, loss=lambda y, target: y.mean((1, 2, 3))).local_step(x)
