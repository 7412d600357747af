"""The epilogue op (batch norm, residual, activation, next input) forward and backward, against autograd of the eager sequence in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import EAGER, LAYOUTS, assert_as_exact, eager_layer_norm, same_bits
from torch import nn

import fastff
import fastff.functional as ff
from fastff import SFF, Trainer, reference, spec
from fastff.graph import fused
from fastff.graph.training import training_graph
from fastff.ops import epilogue as op

IMPLEMENTATIONS = [row.name for row in op.ROWS if row.name != "triton"]
SMOOTH = ("none", "silu", "gelu")  # activations without kinks
SHAPES = [(2, 3, 4, 5), (3, 16, 7, 7), (5, 33, 1, 3), (17, 8, 6, 6)]


def drawn(shape, dtype=torch.float64, seed=0, layout="contiguous"):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    lay = LAYOUTS[layout]
    tensors = {
        "y": lay(draw(*shape).mul(2).add(1).to(dtype))[0], "residual": lay(draw(*shape).to(dtype))[0], "grad": lay(draw(*shape).to(dtype))[0],
        "later": lay(draw(*shape).to(dtype))[0],
    }  # fmt: skip
    C = shape[1]
    return tensors | {"weight": draw(C).mul(0.3).add(1).to(dtype), "bias": draw(C).to(dtype)}


def eager(t, activation, dtype, residual=True):
    leaves = {k: t[k].detach().to(dtype, copy=True).requires_grad_() for k in ("y", "weight", "bias", "residual")}
    h = F.batch_norm(leaves["y"], None, None, leaves["weight"], leaves["bias"], training=True)
    return EAGER[activation](h + leaves["residual"] if residual else h), leaves


def skip_unless_it_runs(impl, y):
    row = next(row for row in op.ROWS if row.name == impl)
    if row.can_run(y) is not None:
        pytest.skip(row.can_run(y))
    return row.run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "every other", "transposed"])
@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_forward_and_gradients(impl, activation, layout, dtype):
    for number, shape in enumerate(SHAPES):
        t = drawn(shape, dtype, number, layout)
        skip_unless_it_runs(impl, t["y"])
        given = {k: t[k].detach().requires_grad_() for k in ("y", "weight", "bias", "residual")}
        x, mean, var = ff.epilogue(
            given["y"], bn_weight=given["weight"], bn_bias=given["bias"], residual=given["residual"], activation=activation, impl=impl
        )  # fmt: skip
        results = [x, *torch.autograd.grad(x, list(given.values()), t["grad"])]
        expected = []
        for wide in (torch.float64, dtype):
            want, leaves = eager(t, activation, wide)
            expected.append([want, *torch.autograd.grad(want, list(leaves.values()), t["grad"].to(wide))])
        size = torch.tensor(float(t["y"].abs().max() * t["grad"].abs().max() * shape[0] * shape[2] * shape[3]))
        for name, got, exact, plain in zip(("x", *given), results, *expected, strict=True):
            assert_as_exact(name, got, exact, plain, size)
        want_var, want_mean = torch.var_mean(t["y"].double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), want_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var.double(), want_var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["layer_norm", "layer_norm_channels", "rms"])
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "triton"])
def test_backward_through_normalization_with_another_loss_s_gradients(impl, name, channels_last, overwrite):
    """One pass for two losses: that of x, and a later one of the normalized x, against autograd of their sum in float64."""
    shape = (5, 16, 6, 6)
    t = drawn(shape, torch.float64, 3)
    normalization = spec.Normalization(name)
    want, leaves = eager(t, "silu", torch.float64)
    normalized = reference.normalized(want, name)
    exact = torch.autograd.grad((want, normalized), list(leaves.values()), (t["grad"], t["later"]))
    t = {k: v.float() for k, v in t.items()}
    layout = torch.channels_last if channels_last else torch.contiguous_format
    t = {k: v.contiguous(memory_format=layout) if v.dim() == 4 else v for k, v in t.items()}
    run = skip_unless_it_runs(impl, t["y"])
    e = spec.Epilogue(t["weight"], t["bias"], 1e-5, t["residual"], True, "silu")
    x, given, mean, var = run.forward(t["y"], e, normalization)
    torch.testing.assert_close(x.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given.double(), normalized.detach(), rtol=1e-4, atol=1e-5)
    again, *_ = run.forward(t["y"], e, statistics=(mean, var))
    torch.testing.assert_close(again, x, rtol=1e-6, atol=1e-6)
    own = run.backward(t["y"], e, mean, var, t["grad"])
    kept = t["grad"].clone(), t["later"].clone(), own.residual.clone()
    added = spec.EpilogueGradients(None, own.residual, own.weight, own.bias)
    both = run.backward(t["y"], e, mean, var, None, t["later"], normalization, added, overwrite)
    apart = run.backward(t["y"], e, mean, var, t["grad"], t["later"], normalization)
    for found in (both, apart):
        for got, wanted in zip((found.y, found.weight, found.bias, found.residual), exact, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=2e-4, atol=2e-5)
    assert same_bits(t["grad"], kept[0]) and same_bits(t["later"], kept[1])
    assert overwrite or same_bits(own.residual, kept[2])


@pytest.mark.parametrize("activation", spec.ACTIVATIONS)
def test_every_activation_away_from_its_kinks(activation):
    t = drawn((4, 8, 5, 5), torch.float32)
    results = []
    for impl in IMPLEMENTATIONS:
        if next(row for row in op.ROWS if row.name == impl).can_run(t["y"]) is None:
            y = t["y"].detach().requires_grad_()
            x, *_ = ff.epilogue(y, bn_weight=t["weight"], activation=activation, impl=impl)
            results.append((x.detach(), *torch.autograd.grad(x, y, t["grad"])))
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl):
    t = drawn((3, 4, 5, 5), torch.float32)
    skip_unless_it_runs(impl, t["y"])
    for residual in (None, t["residual"].requires_grad_()):
        arguments = (
            t["y"].detach().requires_grad_(),
            t["weight"],
            t["bias"],
            1e-5,
            residual,
            residual is not None,
            "silu",
            impl,
        )
        torch.library.opcheck(torch.ops.fastff.epilogue.default, arguments)
        _, mean, var = torch.ops.fastff.epilogue(*arguments)
        plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(
            torch.ops.fastff.epilogue_backward.default, (t["grad"], *plain[:-1], mean.detach(), var.detach(), impl)
        )


def test_threads_change_no_bit():
    t = drawn((9, 16, 12, 12), torch.float32)
    e = spec.Epilogue(t["weight"], t["bias"], 1e-5, t["residual"], True, "relu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x, normalized, mean, var = op.implementation(t["y"]).forward(t["y"], e, spec.Normalization("layer_norm"))
            gradients = op.implementation(t["y"]).backward(
                t["y"], e, mean, var, t["grad"], t["later"], spec.Normalization("layer_norm")
            )
            found.append((x, normalized, mean, var, *gradients))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"activation": "tanh"}, ValueError, "activation: expected one of"),
        ({"residual": torch.zeros(2, 3, 4, 4)}, ValueError, "residual: expected"),
        ({"bn_weight": torch.zeros(4)}, ValueError, "bn_weight: expected"),
        ({"impl": "cuda"}, RuntimeError, "epilogue"),
    ],
)
def test_bad_input(change, error, said):
    with pytest.raises(error, match=said):
        ff.epilogue(torch.randn(2, 3, 4, 5), **change)


# --- inside blocks


class Inner(nn.Module):
    """Every place where an epilogue may stand: before a convolution, before two readers, with a residual, at the end."""

    def __init__(self, channels=6):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(4))
        self.second, self.third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.activation = nn.SiLU()

    def forward(self, x):
        x = self.norms[0](self.first(x))
        y = self.second(self.activation(x))
        y = self.activation(self.norms[1](y) + x)
        z = self.depthwise(F.silu(self.norms[2](self.third(y))))
        return F.silu(self.norms[3](z) + y)


def test_a_block_s_training_graph_has_the_module_s_values_gradients_and_statistics():
    torch.manual_seed(0)
    module = Inner().train()
    plain = copy.deepcopy(module).double()
    graph = training_graph(module)
    kinds = {type(m).__name__ for m in graph.forward.modules()}
    assert {"EpilogueConvolution", "Epilogue", "Convolution"} <= kinds
    x = torch.randn(4, 3, 8, 8)
    (got,) = graph.forward(x)
    want = plain(x.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
        scale = float(q.grad.abs().max()) + 1  # gradients of biases in front of batch norm are zero but for roundings
        torch.testing.assert_close(
            p.grad.double(), q.grad, rtol=1e-3, atol=2e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    for a, b in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def test_statistics_and_modes_follow_the_modules():
    """momentum=None, no running statistics and evaluation mode are computed by the modules themselves."""
    x = torch.randn(4, 3, 6, 6)
    for change in ({"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.1}):
        norm = nn.BatchNorm2d(3, **change)
        other = copy.deepcopy(norm)
        stand_in = fused.Epilogue(norm, "none", nn.Identity())
        for _ in range(2):
            torch.testing.assert_close(stand_in(x), other(x), rtol=1e-4, atol=1e-5)
        for a, b in zip(norm.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        norm.eval(), other.eval()
        torch.testing.assert_close(stand_in(x), other(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("granularity", ["block", "stage"])
def test_fused_steps_equal_those_of_the_modules(granularity, window):
    """float32 with the compiled kernels inside and at the end of blocks, against the same step in float64 by the modules themselves."""
    torch.manual_seed(0)
    net = fastff.models.resnet18(num_classes=5, stem="cifar", width=8)
    options = {"granularity": granularity, "input_shape": (3, 16, 16), "window": window}
    fast = SFF(net, 5, **options)
    torch.manual_seed(1)
    exact = SFF(copy.deepcopy(net).double(), 5, fuse=False, **options)
    exact.heads.load_state_dict(fast.heads.state_dict())
    sgd = lambda groups: torch.optim.SGD(groups, lr=0.01)  # noqa: E731
    trainers = [Trainer(sff, sgd) for sff in (fast, exact)]
    images, target = torch.randn(6, 3, 16, 16), torch.randint(5, (6,))
    for trainer, dtype in zip(trainers, (torch.float32, torch.float64), strict=True):
        trainer.train_mode()
        trainer.step(images.to(dtype), target)
    for (name, a), b in zip(fast.state_dict().items(), exact.state_dict().values(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("goodness", ["sff", "projection", "class_group", "class_group_mean"])
@pytest.mark.parametrize("normalize", ["layer_norm", "l2", "group_norm", None])
def test_every_goodness_and_normalization_trains_a_network(goodness, normalize):
    """SFF takes what blocks take; fused and by modules it is the same network."""
    torch.manual_seed(0)
    net = fastff.models.resnet18(num_classes=4, stem="cifar", width=8)
    images, target = torch.randn(8, 3, 16, 16), torch.randint(4, (8,))
    losses = []
    for fuse in (True, False):
        sff = SFF(copy.deepcopy(net), 4, input_shape=(3, 16, 16), goodness=goodness, normalize=normalize, fuse=fuse)
        if losses:
            sff.heads.load_state_dict(heads)  # noqa: F821
        heads = copy.deepcopy(sff.heads.state_dict())  # noqa: F841
        trainer = Trainer(sff, lambda groups: torch.optim.SGD(groups, lr=0.01))
        trainer.train_mode()
        losses.append(torch.stack([trainer.step(images, target) for _ in range(2)]))
        assert sff.eval()(images).shape == (8, 4)
        assert (sff.local_blocks[0].epilogue is not None) == fuse
        assert goodness in repr(sff) or goodness == "sff"
    torch.testing.assert_close(*losses, rtol=2e-3, atol=1e-3)


def test_layer_norm_of_the_oracle_is_the_reference_s():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(reference.normalized(x, "layer_norm"), eager_layer_norm(x))


def test_hooks_on_parameters_run_in_a_step():
    """A gradient's hook changes what the parameter gets, as in plain PyTorch, and a hook on .grad is called once."""
    calls = []
    for granularity in ("layer", "block"):
        torch.manual_seed(0)
        net = fastff.models.resnet18(num_classes=5, stem="cifar", width=8)
        sff = SFF(net, 5, granularity, input_shape=(3, 8, 8), window=1)
        trainer = Trainer(sff, lambda groups: torch.optim.SGD(groups, lr=0.1))
        trainer.train_mode()
        weights = {name: p for name, p in net.named_parameters() if name.endswith("conv1.weight")}
        before = {name: p.detach().clone() for name, p in weights.items()}
        for p in weights.values():
            p.register_hook(torch.zeros_like)
            p.register_post_accumulate_grad_hook(calls.append)
        trainer.step(torch.randn(4, 3, 8, 8), torch.randint(5, (4,)))
        for name, p in weights.items():
            torch.testing.assert_close(p, before[name], rtol=0, atol=0, msg=name)
        assert len(calls) == len(weights), granularity
        calls.clear()
