"""The models against torchvision's, and what torchvision does not have: the small stems, widths, grey images."""

import pytest
import torch
from torch import nn
from vision import import_torchvision

from fastff import models

NAMES = ["resnet18", "resnet34", "mobilenet_v3_small", "mobilenet_v3_large"]


@pytest.mark.parametrize("name", NAMES)
def test_loads_torchvision_weights_and_computes_the_same(name):
    torchvision = import_torchvision()
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=17).eval()
    ours = getattr(models, name)(num_classes=17).eval()
    for module in theirs.modules():  # statistics and affine as after training, not zeros and ones
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    state = theirs.state_dict()
    assert [(k, v.shape) for k, v in ours.named_parameters()] == [(k, v.shape) for k, v in theirs.named_parameters()]
    ours.load_state_dict(state, strict=True)
    norms = zip(_norms(ours), _norms(theirs), strict=True)
    assert all((a.eps, a.momentum) == (b.eps, b.momentum) for a, b in norms)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        assert (ours(images) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def _norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("width_mult", [0.35, 0.5, 1.3])
@pytest.mark.parametrize("name", NAMES[2:])
def test_width_multiplier_rounds_as_torchvision(name, width_mult):
    torchvision = import_torchvision()
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(width_mult=width_mult)
        ours = getattr(models, name)(width_mult=width_mult)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [8, 17, 32])
def test_cifar_stem_on_small_images(name, size):
    narrow = {"width": 8} if name.startswith("resnet") else {"width_mult": 0.25}
    model = getattr(models, name)(num_classes=5, stem="cifar", in_channels=1, **narrow)
    images = torch.randn(4, 1, size, size)
    assert model(images).shape == (4, 5)
    model(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "name, stem, divisor",
    [(n, s, d) for n in NAMES for s, d in [("imagenet", 32), ("cifar", 8 if n.startswith("resnet") else 16)]],
)
def test_resolution_before_pooling(name, stem, divisor):
    model = getattr(models, name)(num_classes=3, stem=stem).eval()
    seen = []
    model.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert seen == [(64 // divisor, 64 // divisor)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_traces_with_one_module_per_operation(name, stem):
    model = getattr(models, name)(num_classes=3, stem=stem).eval()
    graph = torch.fx.symbolic_trace(model).graph
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))
    leaves = {path for path, module in model.named_modules() if not list(module.children())}
    assert leaves == set(called)


@pytest.mark.parametrize("activation", ["relu6", "hardswish", "relu"])
def test_activation_choice(activation):
    kind = {"relu6": nn.ReLU6, "hardswish": nn.Hardswish, "relu": nn.ReLU}[activation]
    others = {nn.ReLU, nn.ReLU6, nn.Hardswish} - {kind, nn.ReLU}  # squeeze-excite keeps its ReLU
    found = {type(m) for m in models.mobilenet_v3_small(activation=activation).modules()}
    assert kind in found and not found & others


def test_initial_outputs_are_of_order_one():
    torch.manual_seed(0)
    model = models.resnet18(num_classes=10, stem="cifar", width=16)
    assert 0.05 < float(model(torch.randn(16, 3, 32, 32)).detach().std()) < 5


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("resnet18", {"stem": "mnist"}, "stem: expected one of imagenet, cifar, got 'mnist'"),
        ("resnet18", {"num_classes": 0}, "num_classes: expected a whole number of at least 1, got 0"),
        ("resnet18", {"num_classes": 2.5}, "num_classes: expected a whole number of at least 1, got 2.5"),
        ("resnet34", {"width": 0}, "width: expected a whole number of at least 1, got 0"),
        ("resnet18", {"in_channels": True}, "in_channels: expected a whole number of at least 1, got True"),
        ("resnet18", {"activation": "gelu"}, "activation: expected one of relu, relu6, got 'gelu'"),
        ("mobilenet_v3_small", {"stem": 3}, "stem: expected one of imagenet, cifar, got 3"),
        ("mobilenet_v3_large", {"num_classes": -1}, "num_classes: expected a whole number of at least 1, got -1"),
        ("mobilenet_v3_small", {"width_mult": 0}, "width_mult: expected a finite number above 0, got 0"),
        ("mobilenet_v3_small", {"width_mult": float("nan")}, "width_mult: expected a finite number above 0"),
        ("mobilenet_v3_small", {"dropout": 1.0}, "dropout: expected a number of at least 0 and below 1, got 1.0"),
        ("mobilenet_v3_small", {"in_channels": 0}, "in_channels: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError) as error:
        getattr(models, name)(**arguments)
    assert message in str(error.value)
