"""accelerate computes the expressions that people write of activations with the same values, gradients and layouts: each both ways."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerated import Around, B, C, K

import fastff
import fastff.functional as ff
from fastff.kernels import native


def length(x, dim, eps=1e-4):
    return x / (x.norm(2, dim, keepdim=True) + eps)


def reassigned(y):
    g = y.view(len(y), K, -1)
    g = g.mean(dim=2)
    return g, g.softmax(1)


def in_place_in_a_view(y):
    y = y * 1
    flat = y.view(len(y), -1)
    flat[:, :5] = 0
    flat += 1
    return y.sin(), flat


def in_place_behind_a_view(y):
    y = y * 1
    flat = y.view(len(y), -1)
    part = flat[:, 3:9]
    y.mul_(2)
    return part.exp(), y


def slice_of_a_view(y):
    y = y * 1
    part = y.view(len(y), -1)[:, 3:9]
    part.zero_()
    return y


def gradient_of_the_square(y):
    z = y.pow(2)
    return torch.autograd.grad(z.mean((1, 2, 3)).exp().sum(), z)[0], y


def gradient_of_a_named_view(y):
    g = y.view(len(y), -1)
    return torch.autograd.grad(g.pow(2).mean(1).exp().sum(), g)[0], y


def written_between(y):
    y = y.detach().clone()
    return [y.pow(2), y.mul_(3)][0].mean(1), y


def split_loop(y):
    return torch.stack([s.pow(2).mean((1, 2, 3)) for s in torch.split(y, C // K, dim=1)], 1), y


def split_twice(y):
    parts = torch.chunk(y, K, 1)
    return [p.square().sum((1, 2, 3)) + p.pow(2).mean((1, 2, 3)) for p in parts]


def gradient_of_a_part(y):
    parts = torch.split(y, C // K, dim=1)
    g = torch.stack([s.pow(2).mean((1, 2, 3)) for s in parts], 1)
    return torch.autograd.grad(g.sin().sum(), parts[1], create_graph=True)[0], y


def second_derivative(y):
    g = y.pow(2).mean((1, 2, 3))
    (grad,) = torch.autograd.grad(g.exp().sum(), y, create_graph=True)
    return grad.square().sum(), g


def second_derivative_of_a_mean(y):
    g = y.view(len(y), K, -1)
    g = g.mean(dim=-1)
    (grad,) = torch.autograd.grad(g.exp().sum(), y, create_graph=True)
    return grad.square().sum(), g


# What people write of an activation [B, C, H, W], section 2 of the trial: {name: (function, whether its goodness is computed by fastff)}
def batch_norm(y, **options):
    """What follows may be in place; running statistics are returned, too."""
    mean, var, weight = torch.zeros(C).to(y), torch.ones(C).to(y), torch.linspace(1, 2, C).to(y).requires_grad_()
    normal = F.batch_norm(y, mean, var, weight, weight - 1, **({"training": True, "momentum": 0.3} | options)).relu_()
    return normal, torch.autograd.grad(normal.sum(), weight, retain_graph=True)[0], mean, var


def second_derivative_of_batch_norm(y):
    if not y.requires_grad:
        return y
    normal = F.batch_norm(y, None, None, training=True)
    (grad,) = torch.autograd.grad(normal.pow(3).sum(), y, create_graph=True)
    return grad.pow(2).sum()


EXPRESSIONS = {
    "mean of squares at positions": (lambda y: y.pow(2).mean(1), True),
    "sum of squares at positions": (lambda y: torch.sum(y**2, dim=1), True),
    "of a sample": (lambda y: y.pow(2).mean(dim=(1, 2, 3)), True),
    "of a sample, torch": (lambda y: torch.mean(torch.square(y), dim=(1, 2, 3)), True),
    "of a sample, negative": (lambda y: (y * y).sum((-1, -2, -3)), True),
    "flattened": (lambda y: y.pow(2).flatten(1).mean(1), True),
    "flattened before": (lambda y: y.view(len(y), -1).pow(2).mean(-1), True),
    "reshaped": (lambda y: y.reshape(len(y), -1).square().sum(1), True),
    "classes": (lambda y: y.view(len(y), K, -1).pow(2).mean(2), True),
    "classes, five dimensions": (lambda y: y.view(len(y), K, C // K, *y.shape[2:]).pow(2).mean((2, 3, 4)), True),
    "classes of means": (lambda y: y.reshape(len(y), K, -1).mean(-1), True),
    "channels": (lambda y: y.pow(2).mean((2, 3)), True),
    "keepdim": (lambda y: y.pow(2).mean((1, 2, 3), keepdim=True), False),
    "another dtype": (lambda y: y.pow(2).mean((1, 2, 3), dtype=torch.float64), False),
    "across channels": (lambda y: y.reshape(len(y), 8, -1).pow(2).mean(2), False),
    "over channels of groups": (lambda y: y.view(len(y), K, C // K, -1).pow(2).mean(2), False),
    "cubes": (lambda y: y.pow(3).mean((1, 2, 3)), False),
    "all": (lambda y: y.pow(2).mean(), False),
    "named square": (lambda y: [z.mean((1, 2, 3)) + z.sum((1, 2, 3)) for z in [y.pow(2)]], False),
    "g reassigned": (reassigned, False),
    "split loop": (split_loop, True),
    "split twice": (split_twice, True),
    "uneven split": (lambda y: [s.pow(2).mean((1, 2, 3)) for s in torch.split(y, 5, 1)], None),
    "gradient of a part": (gradient_of_a_part, True),
    "gradient of the square": (gradient_of_the_square, False),
    "gradient of a named view": (gradient_of_a_named_view, False),
    "written between": (written_between, False),
    "second derivative": (second_derivative, True),
    "second derivative of a mean": (second_derivative_of_a_mean, False),
    "length of a vector": (lambda y: length(y.mean((2, 3)), 1), None),
    "length of a sample": (lambda y: length(y, (1, 2, 3)), None),
    "eps first": (lambda y: y / (1e-4 + torch.linalg.vector_norm(y, dim=1, keepdim=True)), None),
    "root mean square": (lambda y: y / (torch.sqrt(torch.mean(y**2, dim=1, keepdim=True)) + 1e-8), None),
    "batch norm": (batch_norm, None),
    "batch norm with given statistics": (lambda y: batch_norm(y, training=False), None),
    "batch norm without statistics": (lambda y: F.batch_norm(y, None, None, training=True), None),
    "second derivative of batch norm": (second_derivative_of_batch_norm, None),
    "group norm": (lambda y: F.group_norm(y, K), None),
    "group norm of a detached one": (lambda y: F.group_norm(y.detach(), K, torch.ones(C).to(y).requires_grad_()), None),
    "layer norm": (lambda y: F.layer_norm(y, y.shape[1:]), None),
    "softplus by hand": (lambda y: torch.log(1 + torch.exp(y.pow(2).mean((1, 2, 3)) - 1)).mean(), True),
    "standardised": (lambda y: (y - y.view(len(y), -1).mean(1)[:, None, None, None]) / y.view(len(y), -1).std(1)[:, None, None, None], None),
    "deviation of a sample": (lambda y: y.detach().std((1, 2, 3)) + torch.std(y, dim=(1, 2, 3), correction=0), None),
    "deviation, dimension kept": (lambda y: y.detach().std(1, unbiased=False, keepdim=True), None),
    "deviation of one": (lambda y: y.detach()[:, :1].std(1), None),
    "dropout": (lambda y: F.dropout(y, 0.5) + torch.rand_like(y), None),
    "noise in place": (lambda y: torch.empty_like(y).normal_() + torch.zeros_like(y).uniform_(), None),
    "strides": (lambda y: (y * 1).as_strided((5, 7), (11, 2)), None),
    "in place in a view": (in_place_in_a_view, None),
    "in place behind a view": (in_place_behind_a_view, None),
    "slice of a view": (slice_of_a_view, None),
    "options of one number": (lambda y: F.conv2d(y, torch.ones(16, C, 3, 3).to(y), stride=(2,), padding=(1,)), None),
    "numpy": (lambda y: torch.from_numpy(y.detach().numpy().copy()).flatten(), None),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions(name, everywhere, monkeypatch):
    """Values, gradients and random numbers are those of the code as it is, in float64, and so are the layouts of what it returns."""
    expression, goodness = EXPRESSIONS[name]
    computed, group_goodness = [], ff.group_goodness
    monkeypatch.setattr(ff, "group_goodness", lambda *a, **k: computed.append(0) or group_goodness(*a, **k))
    torch.manual_seed(0)
    module = Around(expression).double()
    before, x = copy.deepcopy(module), torch.randn(B, 3, 6, 6, dtype=torch.float64)
    report = fastff.accelerate(module)
    found = fastff.verify(before, module, x, tolerance=1e-11)
    assert found, f"{found}\n{report}"
    if goodness is not None:
        assert bool(computed) == goodness
    assert any(e.pattern == "convolution" for e in report.replaced), str(report)
    torch.manual_seed(1)
    returned = module(x)
    torch.manual_seed(1)
    for got, want in zip(
        torch.utils._pytree.tree_leaves(returned), torch.utils._pytree.tree_leaves(before(x)), strict=True
    ):
        assert got.stride() == want.stride()
        assert got.requires_grad == want.requires_grad


@pytest.mark.skipif(bool(native.reason()), reason=native.reason())
@pytest.mark.parametrize("name", [name for name in EXPRESSIONS if "batch norm" in name])
def test_batch_norm(name, everywhere):
    """In float32, for which there is a kernel: values, gradients, second derivatives and running statistics are PyTorch's."""
    torch.manual_seed(0)
    module = Around(EXPRESSIONS[name][0])
    before, x = copy.deepcopy(module), torch.randn(B, 3, 6, 6)
    report = fastff.accelerate(module)
    found = fastff.verify(before, module, x)
    assert found, f"{found}\n{report}"
    assert any(e.pattern == "batch norm" for e in report.replaced) == ("given" not in name), str(report)
