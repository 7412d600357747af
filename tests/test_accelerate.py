"""accelerate runs code as it is written and gets the same: the expressions that people write, each both ways; layouts; reports; verify."""

import copy
import io
import pickle
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastff
import fastff.functional as ff
from benchmarks.strangers import CONVOLUTIONAL, STYLES, difference
from fastff.swap_in import calls, layouts, limits, optimizers

B, C, K = 4, 12, 3


@pytest.fixture
def everywhere(monkeypatch):
    """All that can be done otherwise is, at any size and in float64, where the results can be told from wrong ones."""
    monkeypatch.setattr(limits, "DTYPES", (torch.float32, torch.float64))
    for name, least in (("SMALLEST", 1), ("FEWEST_POSITIONS", 1), ("FEWEST_CHANNELS", 1)):
        monkeypatch.setattr(limits, name, least)


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


# What people write of an activation [B, C, H, W], section 2 of the trial: {name: (function, whether its goodness is computed by fastff)}
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
    "length of a vector": (lambda y: length(y.mean((2, 3)), 1), None),
    "length of a sample": (lambda y: length(y, (1, 2, 3)), None),
    "eps first": (lambda y: y / (1e-4 + torch.linalg.vector_norm(y, dim=1, keepdim=True)), None),
    "root mean square": (lambda y: y / (torch.sqrt(torch.mean(y**2, dim=1, keepdim=True)) + 1e-8), None),
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
    "numpy": (lambda y: torch.from_numpy(y.detach().numpy().copy()).flatten(), None),
}  # fmt: skip


class Around(nn.Module):
    """A convolution, an expression of its output, and what only runs in eager mode as it should: another convolution behind it."""

    def __init__(self, expression):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, 5, (3, 1), (1, 2), padding="valid")
        self.expression = expression

    def forward(self, x):
        y = torch.tanh(self.first(x))
        return self.expression(y), self.second(y), y


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


class Conv(nn.Conv2d):
    """A layer that is a convolution and trains itself: returns what people return."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=0.01)

    def forward(self, x):
        return torch.relu(self._conv_forward(x, self.weight, self.bias))

    def fit(self, x):
        y = self.forward(x)
        self.optimizer.zero_grad()
        y.view(len(y), -1).pow(2).mean(1).sub(1).exp().mean().backward()
        self.optimizer.step()
        self.seen = y.detach()
        return y.detach()


def train(layers, x):
    for layer in layers:
        x = layer.fit(x)
    return x


class Trainer:
    """Not a module, and its layers are in a list."""

    def __init__(self):
        self.layers = [Conv(3, 8), Conv(8, 8)]

    def train_batch(self, x):
        return train(self.layers, x)


def equal(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", ["object", "list", "function", "net", "each"])
def test_what_can_be_given(way, everywhere):
    """Plain objects, lists, functions, modules whose layers are in a list, and layers alone: the same parameters after three steps."""
    torch.manual_seed(0)
    trainer = Trainer()
    for layer in trainer.layers:
        layer.double()
    other, x = copy.deepcopy(trainer), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    run, report = trainer.train_batch, None
    if way == "object":
        report = fastff.accelerate(trainer)
    elif way == "list":
        report = fastff.accelerate(trainer.layers)
    elif way == "function":
        made = fastff.accelerate(train)
        run, report = lambda x: made(trainer.layers, x), made.report
    elif way == "net":
        net = nn.Module()
        net.layers = trainer.layers
        report = fastff.accelerate(net)
    else:
        report = fastff.accelerate(trainer.layers[0])
    for _ in range(3):
        equal([run(x)], [other.train_batch(x)])
    for one, two in zip(trainer.layers, other.layers, strict=True):
        equal(one.parameters(), two.parameters())
        state, wanted = (layer.optimizer.state_dict() for layer in (one, two))
        assert state["param_groups"] == wanted["param_groups"]
        equal(state["state"][0].values(), wanted["state"][0].values())
        assert one.seen.stride() == two.seen.stride()
    assert {e.pattern for e in report.replaced} >= {"convolution", "goodness", "Adam.step"}, str(report)
    report.undo()
    assert type(trainer) is Trainer
    assert all(type(layer) is Conv for layer in trainer.layers)


def test_statements_stay():
    """Nothing is deleted: the statement before a goodness is its own."""

    class Block(nn.Module):
        def forward(self, x):
            y = x + 1
            g = x.view(len(x), 2, -1).pow(2).mean(2)
            return y, g

    block, x = Block(), torch.rand(4, 6)
    fastff.accelerate(block)
    y, g = block(x)
    assert torch.equal(y, x + 1)
    torch.testing.assert_close(g, x.view(4, 2, 3).pow(2).mean(2))


def test_report_says_what_ran():
    """Replaced is what ran, and the reason where something ran as it was written."""

    class Net(nn.Module):
        def __init__(self, channels=64):
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 4, 3)

        def forward(self, x):
            return self.narrow(self.wide(x))

    net = Net()
    report = fastff.accelerate(net)
    assert not report.entries
    assert "nothing has run yet" in str(report)
    net(torch.randn(8, 3, 16, 16))
    (replaced,), (left,) = report.replaced, report.left
    assert (replaced.path, replaced.pattern, replaced.calls) == ("wide", "convolution", 1)
    assert replaced.place.startswith("forward, test_accelerate.py:")
    assert left.path == "narrow"
    assert left.result == "to 4 channels: pays from 16 on"
    report.measure = False  # else calls take turns
    net.double()(torch.randn(8, 3, 16, 16, dtype=torch.float64))
    assert report.entries[-1].result == "of float64"
    with torch.autocast("cpu", torch.bfloat16):
        net.float()(torch.randn(8, 3, 16, 16))
    assert report.entries[-1].result == "under autocast"
    net(torch.randn(1, 3, 8, 8))
    assert "positions of the batch: pays from 1024 on" in str(report)


def test_a_gradient_can_be_differentiated(everywhere, monkeypatch):
    """The kernels' gradients are not differentiable: PyTorch's are taken where that is asked for."""
    torch.manual_seed(0)
    monkeypatch.setattr("fastff.ops.convolution.way", lambda *args: "kernel")
    x, weight = torch.randn(2, 16, 5, 5, requires_grad=True), torch.randn(16, 16, 3, 3, requires_grad=True)

    def second(convolution):
        (grad,) = torch.autograd.grad(convolution(x, weight).pow(3).sum(), weight, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), (x, weight))

    from fastff.ops.convolution import convolve

    for got, want in zip(
        second(lambda x, w: convolve(x, w, None, 1, 1, 1)), second(lambda x, w: F.conv2d(x, w, padding=1)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_fused_updates_only_of_what_lies_alike(everywhere):
    """The fused kernel goes through memory in its order: a state or gradient in another layout is left to PyTorch's loop."""
    torch.manual_seed(0)
    layers = [Conv(3, 8), Conv(3, 8)]
    layers[1].load_state_dict(layers[0].state_dict())
    fastff.accelerate(layers[1])
    for layer in layers:
        layer.weight.grad = torch.ones(8, 3, 3, 3).cumsum(0).contiguous(memory_format=torch.channels_last)
        layer.step = lambda optimizer=layer.optimizer: optimizer.step()
    with calls.Faster(lambda *_: None):
        layers[1].optimizer.step()
    layers[0].optimizer.step()
    torch.testing.assert_close(layers[0].weight, layers[1].weight)


class Two(nn.Module):
    """Two convolutions, one of which learns from the second step on only."""

    def __init__(self, kind, options):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.optimizer = kind(self.parameters(), **options)

    def train_batch(self, x):
        self.optimizer.zero_grad()
        y = self.one(x)
        (self.two(y) if self.optimizer.state else y).pow(2).mean().backward()
        self.optimizer.step()


OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.RMSprop, {"lr": 0.01}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_optimizers(kind, options, everywhere):
    """The same parameters and settings after four steps in float64, also where some parameters have no gradient at first."""
    torch.manual_seed(0)
    one = Two(kind, options).double()
    other, x = copy.deepcopy(one), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    report = fastff.accelerate(one)
    for _ in range(4):
        one.train_batch(x)
        other.train_batch(x)
    equal(one.parameters(), other.parameters())
    assert one.optimizer.state_dict()["param_groups"] == other.optimizer.state_dict()["param_groups"]
    assert any(e.pattern.endswith(".step") for e in report.replaced) == (kind is not torch.optim.RMSprop)


def test_a_step_that_fails(everywhere):
    """An optimizer's step that raises an error leaves its settings as they were, and the calls after it are looked at again."""

    class Net(Two):
        def train_batch(self, x):
            self.one(x).sum().backward()
            self.optimizer.state[self.one.weight] = {"step": "wrong"}
            with pytest.raises(Exception, match=r"."):
                self.optimizer.step()
            return self.again(x)

        def again(self, x):
            y = self.one(x)
            return y.view(len(y), -1)

    net = Net(torch.optim.Adam, {"lr": 0.01})
    report = fastff.accelerate(net)
    assert net.train_batch(torch.randn(2, 3, 8, 8)).shape == (2, 288)
    assert net.optimizer.param_groups[0]["fused"] is None
    assert sum(e.calls for e in report.replaced if e.pattern == "convolution") == 2
    with calls.Faster(lambda *_: None) as mode:
        assert mode.step.unseen is None


def test_hooks_checkpoints_and_own_functions(everywhere):
    """Python code that runs in the backward pass sees tensors that can be viewed."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view(len(x), -1).view(x.shape) * 2

        @staticmethod
        def backward(ctx, grad):
            return grad.view(len(grad), -1).mul(2).view(grad.shape)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            y = self.one(x)
            y.register_hook(lambda grad: grad.view(len(grad), -1).add(1).view(grad.shape))
            y = torch.utils.checkpoint.checkpoint(lambda y: Own.apply(self.two(y)), y, use_reentrant=False)
            loss = y.pow(2).mean()
            loss.backward()
            return loss.detach()

    torch.manual_seed(0)
    net = Net().double()
    before = copy.deepcopy(net)
    fastff.accelerate(net)
    assert fastff.verify(before, net, torch.randn(2, 3, 8, 8, dtype=torch.float64), tolerance=1e-11)


def test_other_objects_files_and_copies():
    """Other objects of the class stay; a deep copy stays accelerated; a pickle is of the own class; a state_dict goes both ways."""
    torch.manual_seed(0)
    module, other = Conv(3, 8), Conv(3, 8)
    del module.optimizer
    fastff.accelerate(module)
    assert type(other) is Conv
    assert isinstance(module, Conv)
    x = torch.randn(2, 3, 4, 4)
    twin = copy.deepcopy(module)
    assert type(twin) is type(module)
    assert twin.weight is not module.weight
    loaded = pickle.loads(pickle.dumps(module))
    assert type(loaded) is Conv
    torch.testing.assert_close(loaded(x), module(x))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize(("module", "name", "instead"), [(layouts, "USES", None), (optimizers, "UNSEEN", nullcontext)])
def test_without_undocumented_functions(module, name, instead, everywhere, monkeypatch):
    """Where PyTorch lacks a function that it does not document, the same is trained."""
    monkeypatch.setattr(module, name, instead)
    torch.manual_seed(0)
    trainer = Trainer()
    for layer in trainer.layers:
        layer.double()
    other, x = copy.deepcopy(trainer), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    fastff.accelerate(trainer).measure = False
    for _ in range(3):
        equal([trainer.train_batch(x)], [other.train_batch(x)])


def test_under_torch_compile_and_transforms(everywhere):
    torch.manual_seed(0)
    module = Around(lambda y: y.pow(2).mean((1, 2, 3)))
    before = copy.deepcopy(module)
    fastff.accelerate(module)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager")(x)[0], before(x)[0])
    parameters = dict(before.named_parameters())

    def loss(p, m):
        return torch.func.functional_call(m, p, (x,))[0].sum()

    got, want = (torch.func.grad(loss)(parameters, m) for m in (module, before))
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name])


class Keeps(Around):
    def forward(self, x):
        self.kept = self.first(x)
        raise KeyError


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_what_is_left_behind(mode, everywhere):
    """Layouts, and what shares memory, are as without accelerate: of results in each mode, and of what an exception leaves."""
    torch.manual_seed(0)
    module = Around(lambda y: (y.view(len(y), -1), y.detach()))
    before, x = copy.deepcopy(module), torch.randn(2, 3, 6, 6)
    fastff.accelerate(module).measure = False
    with mode():
        results = [torch.utils._pytree.tree_leaves(m(x)) for m in (module, before)]
        for got, want in zip(*results, strict=True):
            assert got.stride() == want.stride()
            assert got.is_inference() == want.is_inference()
        with torch.no_grad():
            for flat, *_, y in results:
                flat.zero_()
                assert not y.any()
    keeps = Keeps(None)
    fastff.accelerate(keeps)
    with pytest.raises(KeyError):
        keeps(x)
    keeps.kept.view(2, -1).sum().backward()
    assert calls.current() is None


def test_bad_input():
    with pytest.raises(TypeError, match=r"module: expected an nn\.Module, a list of them, .* got str"):
        fastff.accelerate("resnet18")
    with pytest.raises(TypeError, match="got list"):
        fastff.accelerate([])
    module = Around(lambda y: y)
    fastff.accelerate(module)
    with pytest.raises(ValueError, match="module: expected one that is not accelerated yet"):
        fastff.accelerate(module)


class Returns(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, function, detached=False):
        super().__init__()
        self.linear, self.function, self.detached = nn.Linear(4, 6), function, detached

    def forward(self, x):
        return self.function(self.linear(x.detach() if self.detached else x))


def test_verify_finds_differences():
    torch.manual_seed(0)
    before, off, x = Returns(lambda y: y), Returns(lambda y: 1.001 * y), torch.randn(3, 4)
    found = fastff.verify(before, off, x)
    assert not found
    assert "differs" in str(found)
    assert "not the same" in str(found)
    assert fastff.verify(before, off, x, tolerance=1e-2)
    state = [p.clone() for p in before.parameters()]
    assert fastff.verify(before, Returns(lambda y: y), (x,), loss=lambda y: y.square().sum())
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), state, strict=True))
    assert all(p.grad is None for p in before.parameters())


class Trains(nn.Module):
    """Trains itself in its forward and returns a detached loss."""

    def __init__(self, lr):
        super().__init__()
        self.l, self.lr = nn.Linear(4, 2), lr

    def forward(self, x):
        loss = self.l(x).pow(2).mean()
        (grad,) = torch.autograd.grad(loss, self.l.weight)
        with torch.no_grad():
            self.l.weight -= self.lr * grad
        return loss.detach()

    def train_(self, x):
        self.forward(x)


def test_verify_compares_what_training_leaves_behind():
    x = torch.rand(3, 4)
    found = fastff.verify(Trains(0.1), Trains(10.0), x)
    assert not found
    assert [row.name for row in found.rows if row.difference > row.allowed] == ["parameter l.weight"]
    assert fastff.verify(Trains(0.1), Trains(0.1), x)
    for lr, same in ((0.1, True), (10.0, False)):
        assert bool(fastff.verify(Trains(0.1), Trains(lr), x, call=lambda m, x: m.train_(x))) == same


def test_verify_says_what_only_one_has():
    """A gradient that is None, an output too many, another size, a normalised output."""
    torch.manual_seed(0)
    x = torch.rand(3, 4)
    found = fastff.verify(Returns(lambda y: y, detached=True), Returns(lambda y: y), x)
    assert [(r.name, r.note) for r in found.rows if r.difference > r.allowed] == [
        ("gradient of input 0", "none before")
    ]
    pair = Returns(lambda y: (y, y.pow(2).mean(1)))
    found = fastff.verify(Returns(lambda y: y), pair, x)
    assert ("output 1", "none before") in [(r.name, r.note) for r in found.rows]
    assert fastff.verify(Returns(lambda y: y), pair, x, outputs=(None, lambda returned: returned[0]))
    found = fastff.verify(Returns(lambda y: y[:, :2]), Returns(lambda y: y), x)
    assert found.rows[0].note == "[3, 2] before, [3, 6] after"
    found = fastff.verify(Returns(lambda y: F.layer_norm(y, y.shape[1:])), Returns(lambda y: y), x)
    assert found.rows[0].note == "the same if that of after is normalized by layer_norm"
    assert fastff.verify(Returns(lambda y: None), Returns(lambda y: None), x)


def test_verify_bad_input():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="after: expected the parameters of before"):
        fastff.verify(Returns(lambda y: y), Trains(0.1), x)
    with pytest.raises(TypeError, match=r"before, after: expected nn\.Modules, got function"):
        fastff.verify(lambda x: x, Trains(0.1), x)
    with pytest.raises(TypeError, match="outputs: expected a function or a pair of functions, got 1"):
        fastff.verify(Trains(0.1), Trains(0.1), x, outputs=1)


@pytest.mark.parametrize("style", STYLES)
def test_styles_in_float64(style):
    """The programs of examples/styles have the same parameters after two steps, with every replacement made that can be."""
    exact, report = difference(style, batch=4)
    assert exact < 1e-7  # Adam divides gradients that are zero but for rounding, 1e-17, by its eps of 1e-8
    replaced = {e.pattern for e in report.replaced}
    assert ("convolution" in replaced) == (style in CONVOLUTIONAL), str(report)


def test_slower_ways_are_left(monkeypatch, everywhere):
    """The first calls take turns, and if those done otherwise take longer, the next ones run as they are written."""
    clock = iter(range(10**6))
    times = {True: 3, False: 1}
    module = Around(lambda y: y)
    report, seen = fastff.accelerate(module), []
    module.expression = lambda y: seen.append(calls.current().calls) or y
    now = [0]

    def counter():
        if next(clock) % 2:
            now[0] += times[seen[-1]]
        return now[0]

    monkeypatch.setattr(sys.modules["fastff.swap_in.accelerate"].time, "perf_counter", counter)
    for _ in range(18):
        module(torch.randn(2, 3, 6, 6))
    assert seen == [True, False] * 7 + [False] * 4
    assert report.left[-1].result.startswith("as written from now on: 1000.00 ms, otherwise 3000.00 ms")
    report.measure = False
    module(torch.randn(2, 3, 6, 6))
    assert seen[-1]
