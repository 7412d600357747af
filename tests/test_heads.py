"""Heads by themselves: values, gradients, scale, state, and their hidden layer."""

import copy
import pickle

import pytest
import torch
from oracle import eager_goodness, eager_layer_norm, eager_loss
from test_nn import CLASSES, perturbed
from torch import nn

import fastff.functional as ff
from fastff.nn import FFConv2d, GoodnessHead
from fastff.nn.group_head import GOODNESS

HEADS = [
    {},
    {"grid": 2},
    {"grid": (2, 3), "squares": False},
    {"kernel_size": 3},
    {"kernel_size": 5, "grid": 1},
    {"bias": True, "tau": 0.5},
    {"learn_tau": True, "tau": 0.7, "bias": True},
    {"margin": 1.0, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens", "vectors"])
def test_head(options, layout):
    """goodness, the loss and every gradient of local_step."""
    torch.manual_seed(0)
    shape = (4, 6) if layout == "vectors" else (4, 6, 5, 7)
    if layout == "vectors" and options.get("kernel_size", 1) > 1:
        options = options | {"kernel_size": 1}
    dim = -1 if layout == "tokens" else 1
    head = perturbed(GoodnessHead(6, CLASSES, channel_dim=dim, dtype=torch.float64, **options))
    x, target = torch.randn(shape, dtype=torch.float64), torch.randint(CLASSES, (4,))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    given = x.permute(0, 2, 3, 1).contiguous() if layout == "tokens" else x
    eager, leaf = copy.deepcopy(head), x.clone().requires_grad_()
    wide = leaf if leaf.dim() == 4 else leaf[:, :, None, None]
    g = eager_goodness(wide, eager.weight, eager.bias, eager.grid_weight, padding=eager.kernel_size // 2)
    tau = eager.tau if eager.log_tau is None else eager.log_tau.exp()
    loss = eager_loss(g, target, tau, eager.margin, eager.label_smoothing)
    loss.backward()
    step = head.local_step(given, target)
    torch.testing.assert_close(head(given), g)
    torch.testing.assert_close(head.logits(head(given)), tau * g)
    torch.testing.assert_close(step.loss, loss.detach())
    back = (lambda t: t.permute(0, 3, 1, 2)) if layout == "tokens" else lambda t: t
    torch.testing.assert_close(back(step.grad_x), leaf.grad)
    torch.testing.assert_close(back(step.normalized), eager_layer_norm(x))
    names = [name for name, p in head.named_parameters()]
    assert names
    for name, p in head.named_parameters():
        torch.testing.assert_close(
            p.grad, dict(eager.named_parameters())[name].grad, msg=lambda t, name=name: f"{name}: {t}"
        )
    head.local_step(given, target)
    for name, p in head.named_parameters():
        torch.testing.assert_close(p.grad, 2 * dict(eager.named_parameters())[name].grad, msg="gradients add up")


def test_initial_scale():
    """The weight's deviation is `scale` times that of PyTorch's convolution: uniform in 1 / sqrt(C)."""
    torch.manual_seed(0)
    for options, scale in (({}, 4), ({"grid": 4}, 2), ({"scale": 1.0}, 1), ({"scale": 0.5, "grid": 4}, 0.5)):
        head = GoodnessHead(64, 1000, **options)
        plain = nn.Conv2d(64, 1000, 1).weight
        assert float(head.weight.detach().std() / plain.detach().std()) == pytest.approx(scale, rel=0.05)
    spread = float(GoodnessHead(48, 1000, grid=4).grid_weight.detach().std())
    assert spread == pytest.approx(0.5 / (3 * 48) ** 0.5, rel=0.05)


def test_heads_without_weights():
    """Nothing in their state, and the blocks load what their modules have."""
    for goodness in GOODNESS:
        block = FFConv2d(3, 17, 3, num_classes=CLASSES, goodness=goodness)
        assert block.head.state_dict() == {}
        assert list(block.head.parameters()) == []
        assert all(name.startswith("module.") for name in block.state_dict())
        block.module.load_state_dict({k.removeprefix("module."): v for k, v in block.state_dict().items()})


def hidden_head(**options):
    torch.manual_seed(0)
    return GoodnessHead(6, CLASSES, grid=3, hidden=8, **options)


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_running_statistics_of_a_hidden_layer(momentum):
    """Those of nn.BatchNorm2d on the same cells, by forward passes in training mode and by steps, once each."""
    head, x, target = hidden_head(), torch.randn(5, 6, 7, 4) + 1, torch.tensor([0, 1, 2, 3, 0])
    norm = copy.deepcopy(head.hidden_norm)
    head.hidden_norm.momentum = norm.momentum = momentum
    for scale in (1.0, 2.0, 0.5):
        norm(
            nn.functional.conv2d(nn.functional.adaptive_avg_pool2d(scale * x, 3), head.hidden_weight[:, :, None, None])
        )
        head.local_step(scale * x, target) if scale != 2.0 else head(scale * x)
        for got, want in zip(head.hidden_norm.buffers(), norm.buffers(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_hidden_layer_in_evaluation_mode():
    """A sample's goodness is the same alone as in a batch; a step uses the running statistics and leaves them as they are."""
    head, x, target = (
        hidden_head().double(),
        torch.randn(5, 6, 7, 4, dtype=torch.float64),
        torch.tensor([0, 1, 2, 3, 0]),
    )
    head(x + 1)
    assert not torch.allclose(head(x)[:2], head(x[:2])), "in training mode samples depend on the batch"
    head.eval()
    before = [t.clone() for t in head.buffers()]
    torch.testing.assert_close(head(x), torch.cat([head(x[i : i + 1]) for i in range(5)]))
    leaf = x.clone().requires_grad_()
    head.loss(head(leaf), target).backward()
    expected = [p.grad for p in head.parameters()]
    head.zero_grad()
    step = head.local_step(x, target)
    torch.testing.assert_close([step.grad_x, *(p.grad for p in head.parameters())], [leaf.grad, *expected])
    assert all(map(torch.equal, before, head.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"squares": False, "learn_tau": True}, {"kernel_size": 3, "bias": True}])
def test_the_step_of_a_hidden_layer_is_its_forward_and_backward(options, dtype):
    """The gradients of all parameters in .grad, for tokens as for images."""
    for shape, channel_dim in (((5, 6, 7, 4), 1), ((5, 9, 6), -1)):
        if channel_dim == -1 and "kernel_size" in options:
            continue
        head = hidden_head(channel_dim=channel_dim, margin=0.3, label_smoothing=0.1, **options).to(dtype)
        x, target = torch.randn(shape, dtype=dtype, requires_grad=True), torch.tensor([0, 1, 2, 3, 0])
        twin = copy.deepcopy(head)
        loss = head.loss(head(x), target)
        loss.backward()
        step = twin.local_step(x.detach(), target)
        torch.testing.assert_close(step.loss, loss.detach())
        torch.testing.assert_close(step.grad_x, x.grad, rtol=1e-4, atol=1e-6)
        for (name, a), b in zip(twin.named_parameters(), head.parameters(), strict=True):
            assert a.grad is not None and a.grad.dtype == dtype, name
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(twin.state_dict(), head.state_dict())


def test_state_of_a_hidden_layer():
    head, x = hidden_head(), torch.randn(4, 6, 5, 5)
    head(x)
    names = {"weight", "grid_weight", "hidden_weight", "hidden_norm.weight", "hidden_norm.bias"}
    names |= {f"hidden_norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(head.state_dict()) == names
    other = GoodnessHead(6, CLASSES, grid=3, hidden=8)
    other.load_state_dict(head.state_dict())
    for same in (other, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(same.eval()(x), head.eval()(x))
    assert set(GoodnessHead(6, CLASSES, grid=3).state_dict()) == {"weight", "grid_weight"}
    assert "hidden=8" in repr(head)


def test_what_a_hidden_layer_refuses():
    with pytest.raises(ValueError, match="hidden: expected 0 without a spatial term"):
        GoodnessHead(6, CLASSES, hidden=8)
    with pytest.raises(ValueError, match="hidden: expected a whole number of at least 0, got -1"):
        GoodnessHead(6, CLASSES, grid=2, hidden=-1)
    head, x, target = hidden_head(), torch.randn(1, 6, 1, 1), torch.tensor([0])
    for call in (head, lambda x: head.local_step(x, target)):
        with pytest.raises(
            ValueError, match=r"x: expected more than one sample or cell for the batch statistics .* got 1 of shape"
        ):
            call(x)
    assert head(torch.randn(1, 6, 1, 2)).shape == head.eval()(x).shape == (1, CLASSES)
    x, V, hidden = torch.randn(4, 6, 5, 5), torch.randn(3, 8, 2, 2), ff.Hidden(torch.randn(8, 6))
    for change, said in (
        ({"hidden": hidden._replace(weight=torch.randn(8, 5))}, r"hidden_weight: expected \[M, 6\]"),
        ({"hidden": hidden._replace(bn_bias=torch.randn(7))}, r"hidden_bn_bias: expected \[8\], got \[7\]"),
        ({"hidden": hidden._replace(mean=torch.zeros(8))}, "hidden_mean, hidden_var: expected both or neither"),
        ({"hidden": hidden._replace(eps=-1.0)}, "hidden_eps: expected a finite number of at least 0"),
        ({"grid_weight": torch.randn(3, 6, 2, 2)}, r"grid_weight: expected \[3, 8, G, G\]"),
        ({"grid_weight": None}, "hidden: expected None without grid_weight"),
    ):
        with pytest.raises(ValueError, match=said):
            ff.goodness(x, torch.randn(3, 6), **({"grid_weight": V, "hidden": hidden} | change))
    with pytest.raises(TypeError, match="hidden: expected a fastff.spec.Hidden or None, got Tensor"):
        ff.goodness(x, None, grid_weight=V, hidden=hidden.weight)


def test_a_hidden_layer_compiled_in_training_mode():
    head, x = hidden_head(), torch.randn(4, 6, 5, 5)
    twin = copy.deepcopy(head)
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="aot_eager")(x), twin(x))
    torch.testing.assert_close(head.state_dict(), twin.state_dict())


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("hidden", [0, 4])
def test_a_head_inside_the_users_autocast(impl, hidden):
    """A step, and a head with a hidden layer, compute in float32 as they do without it."""
    torch.manual_seed(0)
    head, x, target = (
        GoodnessHead(6, CLASSES, grid=2, hidden=hidden, impl=impl),
        torch.randn(4, 6, 5, 5),
        torch.arange(4),
    )
    expected = head.local_step(x, target), head(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close((head.local_step(x, target), head(x)), expected, rtol=0, atol=0)
