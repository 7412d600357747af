"""accelerate on modules it should and should not touch, each against its copy; verify; undo."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastff
import fastff.functional as ff


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(6, 12, 1)
        self.head = nn.Conv2d(12, 4, 1, bias=False)
        self.linear = nn.Linear(12, 5)
        self.classes = 4

    def features(self, x):
        return torch.relu(self.body(x))


class Squares(Base):
    def forward(self, x):
        return self.head(self.features(x)).pow(2).mean((2, 3))


class SquaresOtherwise(Base):
    def forward(self, x):
        y = self.features(x)
        return torch.mean(self.head(y) ** 2, dim=[-1, -2]), self.head(y).square().mean(dim=(2, 3), keepdim=False)


class SquaresInTwoSteps(Base):
    def forward(self, x):
        y = self.features(x)
        a = self.head(y)
        g = a.pow(2).mean((2, 3))
        return y, g


class SquaresOfUsedTwice(Base):
    def forward(self, x):
        a = self.head(self.features(x))
        g = a.pow(2).mean((2, 3))
        return a, g


class SquaresOfThree(Base):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(12, 4, 3, bias=False)

    def forward(self, x):
        return self.head(self.features(x)).pow(2).mean((2, 3))


class SquaresInALoop(Base):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(12, 4, 1) for _ in range(3))

    def forward(self, x, first=None):
        y, found = self.features(x), []
        for i, head in enumerate(self.heads):
            if first is None or i < first:
                found.append(head(y).pow(2).mean((2, 3)))
        return torch.stack(found)


class OneByOneSum(Base):
    def forward(self, x):
        return self.head(self.features(x)).pow(2).sum((2, 3))


class OneByOneOfAll(Base):
    def forward(self, x):
        return self.head(self.features(x)).pow(2).mean((1, 2, 3))


class Groups(Base):
    def forward(self, x):
        y = self.features(x)
        batch, channels, height, width = y.shape
        return y.view(batch, self.classes, channels // self.classes, height, width).pow(2).mean((2, 3, 4))


class GroupsOfMeans(Base):
    def forward(self, x):
        y = self.features(x)
        return y.reshape(y.shape[0], self.classes, -1).mean(-1)


class GroupsOverChannels(Base):
    """Not groups of channels with all positions: averaged over one dimension of three."""

    def forward(self, x):
        y = self.features(x)
        return y.view(len(y), 4, 3, -1).pow(2).mean(2)


class GroupsAcrossChannels(Base):
    """12 channels of 30 positions seen as 5 groups: a group ends inside a channel."""

    def forward(self, x):
        y = self.features(x)
        return y.reshape(len(y), 5, -1).pow(2).mean(2)


class Length(Base):
    def forward(self, x):
        z = self.features(x).mean((2, 3))
        return self.linear(z / (z.norm(2, 1, keepdim=True) + 1e-4))


class LengthOtherwise(Base):
    def forward(self, x):
        z = self.features(x).mean((2, 3))
        return self.linear(F.normalize(z)), self.linear(torch.nn.functional.normalize(z, dim=1))


class RootMeanSquare(Base):
    def forward(self, x):
        z = self.features(x).mean((2, 3))
        return self.linear(z / (z.pow(2).mean(1, keepdim=True) + 1e-5).sqrt())


class LengthOfColumns(Base):
    def forward(self, x):
        z = self.features(x).mean((2, 3))
        return F.normalize(z, dim=0), z / (z.norm(2, 0, keepdim=True) + 1e-4), z / (z.norm(1, 1, keepdim=True) + 1e-4)


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6)
        )

    def forward(self, x):
        return self.layers(x)


class OddConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.dilated = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6)
        self.grouped = nn.Conv2d(6, 12, 3, padding=1, groups=2)
        self.named = nn.Conv2d(12, 12, 3, padding="same")
        self.wrapped = nn.Conv2d(12, 12, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.wrapped(self.named(self.grouped(self.dilated(x))))


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x):
        return self.head(self.features(x)).pow(2).mean((2, 3))


def twice(method):
    return lambda self, x: 2 * method(self, x)


class DecoratedOtherwise(Base):
    @twice
    def forward(self, x):
        return self.head(self.features(x)).pow(2).mean((2, 3))


class WithSuper(Squares):
    def __init__(self):
        super().__init__()
        self.scale = 2.0

    def forward(self, x, *, power=1.0):
        """Calls what it inherits, has effects."""
        self.called = True
        z = super().forward(x)
        return self.scale * power * z / (z.norm(2, 1, keepdim=True) + 1e-4), F.normalize(z)


class Plain(Base):
    def forward(self, x):
        return self.linear(self.features(x).mean((2, 3)))


GOODNESS, GROUPS, NORM, CONV, DEPTHWISE = (
    "1 x 1 goodness", "class-group goodness", "normalization", "convolution", "depthwise convolution",
)  # fmt: skip
# module: (patterns replaced, patterns left)
MODULES = {
    Squares: ([GOODNESS], []),
    SquaresOtherwise: ([GOODNESS] * 2, []),
    SquaresInTwoSteps: ([GOODNESS], []),
    SquaresOfUsedTwice: ([], []),
    SquaresOfThree: ([GOODNESS, CONV], []),
    SquaresInALoop: ([GOODNESS], []),
    OneByOneSum: ([], [GOODNESS]),
    OneByOneOfAll: ([], [GOODNESS]),
    Groups: ([GROUPS], []),
    GroupsOfMeans: ([GROUPS], []),
    GroupsOverChannels: ([GROUPS], []),
    GroupsAcrossChannels: ([GROUPS], []),
    Length: ([NORM], []),
    LengthOtherwise: ([NORM] * 2, []),
    RootMeanSquare: ([NORM], []),
    LengthOfColumns: ([], [NORM]),
    Depthwise: ([DEPTHWISE] * 2, []),
    OddConvolutions: ([], [DEPTHWISE, CONV, CONV, CONV]),
    Decorated: ([GOODNESS], []),
    DecoratedOtherwise: ([], []),
    WithSuper: ([NORM], []),
    Plain: ([], []),
}
CALLS = {GOODNESS: "goodness", GROUPS: "group_goodness", NORM: "normalize"}
# where the values met decide against our op, or another method runs
NOT_CALLED = {SquaresOfThree, GroupsOverChannels, GroupsAcrossChannels}


@pytest.fixture
def calls(monkeypatch):
    """The ops of fastff.functional that run, by name."""
    made = []

    def counted(name, function):
        def call(*args, **kwargs):
            made.append(name)
            return function(*args, **kwargs)

        return call

    for name in CALLS.values():
        monkeypatch.setattr(ff, name, counted(name, getattr(ff, name)))
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_modules(kind, dtype, calls):
    """What is replaced and left, the same outputs and gradients, our op called where it fits, and everything back after undo."""
    torch.manual_seed(0)
    module = kind().to(dtype)
    before, keys = copy.deepcopy(module), list(module.state_dict())
    x = torch.randn(3, 6, 5, 6, dtype=dtype)
    report = fastff.accelerate(module)
    replaced, left = MODULES[kind]
    assert sorted(e.pattern for e in report.replaced) == sorted(replaced), str(report)
    assert sorted({e.pattern for e in report.left}) == sorted(set(left)), str(report)
    assert isinstance(module, kind)
    assert list(module.state_dict()) == keys
    found = fastff.verify(before, module, x, tolerance=1e-10 if dtype == torch.float64 else 1e-4)
    assert found, str(found)
    wanted = {CALLS[p] for p in replaced if p in CALLS} if kind not in NOT_CALLED else set()
    assert set(calls) == wanted
    for entry in report.entries:
        assert entry.path in str(report)
    report.undo()
    assert type(module) is kind
    assert all(type(m) is type(n) for m, n in zip(module.modules(), before.modules(), strict=True))


def test_recipes_before():
    """The programs of examples/swap_in, whose blocks are modules."""
    from examples.swap_in import groups_before, outputs_before

    torch.manual_seed(0)
    for kind, x in ((groups_before.Block, torch.randn(4, 3, 8, 8)), (outputs_before.Block, torch.randn(4, 3, 8, 8))):
        block = kind(3, 20)
        before = copy.deepcopy(block)
        report = fastff.accelerate(block)
        assert len(report.replaced) == 2, str(report)
        assert fastff.verify(before, block, x)


def test_hooks_still_run():
    torch.manual_seed(0)
    module, seen = Squares(), []
    fastff.accelerate(module)
    module.head.register_forward_hook(lambda *_: seen.append("head"))
    module.register_forward_hook(lambda *_: seen.append("module"))
    module(torch.randn(2, 6, 4, 4))
    assert seen == ["head", "module"]


def test_attributes_are_read_at_every_call():
    torch.manual_seed(0)
    module = WithSuper()
    fastff.accelerate(module)
    x = torch.randn(2, 6, 4, 4)
    first = module(x)[0]
    module.scale = 6.0
    torch.testing.assert_close(module(x)[0], 3 * first)
    torch.testing.assert_close(module(x, power=2.0)[0], 6 * first)
    assert module.called


def test_other_objects_of_the_class_stay():
    one, other = Squares(), Squares()
    fastff.accelerate(one)
    assert type(other) is Squares
    assert Squares.forward is not type(one).forward


def test_copies_and_files():
    """A deep copy stays accelerated, a pickle is of the module's own class, a state_dict goes both ways."""
    torch.manual_seed(0)
    module = Squares()
    fastff.accelerate(module)
    x = torch.randn(2, 6, 4, 4)
    twin = copy.deepcopy(module)
    assert type(twin) is type(module)
    assert twin.head is not module.head
    loaded = pickle.loads(pickle.dumps(module))
    assert type(loaded) is Squares
    torch.testing.assert_close(loaded(x), module(x))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    Squares().load_state_dict(torch.load(file, weights_only=True))


def test_under_torch_compile():
    torch.manual_seed(0)
    module = Squares()
    fastff.accelerate(module)
    x = torch.randn(2, 6, 4, 4)
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_bad_input():
    with pytest.raises(TypeError, match=r"module: expected an nn\.Module, got str"):
        fastff.accelerate("resnet18")
    module = Squares()
    fastff.accelerate(module)
    with pytest.raises(ValueError, match="module: expected one that is not accelerated yet"):
        fastff.accelerate(module)


def test_verify_finds_differences():
    torch.manual_seed(0)
    before, x = Squares(), torch.randn(2, 6, 4, 4)

    class Off(Squares):
        def forward(self, x):
            return 1.001 * super().forward(x)

    found = fastff.verify(before, Off(), x)
    assert not found
    assert "differs" in str(found)
    assert "not the same" in str(found)
    assert fastff.verify(before, Off(), x, tolerance=1e-2)
    state = [p.clone() for p in before.parameters()]
    assert fastff.verify(before, Squares(), (x,), loss=lambda g: g.square().sum())
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), state, strict=True))
    assert all(p.grad is None for p in before.parameters())


def test_verify_bad_input():
    x = torch.randn(2, 6, 4, 4)
    with pytest.raises(ValueError, match="after: expected the parameters of before"):
        fastff.verify(Squares(), Depthwise(), x)
    with pytest.raises(ValueError, match="after: expected 8 outputs and gradients as before has, got 7"):
        fastff.verify(SquaresInTwoSteps(), Squares(), x)
    with pytest.raises(TypeError, match=r"before, after: expected nn\.Modules, got function"):
        fastff.verify(lambda x: x, Squares(), x)
