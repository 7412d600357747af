"""GoodnessHead and the blocks: values and local gradients against eager PyTorch, no gradient across blocks, training."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import eager_loss, same_bits
from torch import nn

from fastff import reference
from fastff.nn import FFBlock, FFConv2d, FFDepthwiseConv2d, FFLinear, GoodnessHead, LocalBlock
from fastff.nn.group_head import GOODNESS
from fastff.spec import LOSSES

CLASSES = 5


def perturbed(module):
    """Away from zeros, so that every parameter matters."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


BLOCKS = {
    "convolution": (lambda: FFConv2d(3, 6, 3, num_classes=CLASSES, grid=2), (4, 3, 8, 8), (4, 6, 8, 8)),
    "strided": (lambda: FFConv2d(3, 6, 3, 2, num_classes=CLASSES, norm=None, head_kernel_size=3), (4, 3, 8, 8), (4, 6, 4, 4)),
    "depthwise": (lambda: FFDepthwiseConv2d(6, 5, 2, num_classes=CLASSES), (4, 6, 9, 9), (4, 6, 5, 5)),
    "linear": (lambda: FFLinear(7, 9, num_classes=CLASSES, bias=False), (4, 7), (4, 9)),
    "tokens": (lambda: FFLinear(7, 9, num_classes=CLASSES, channel_dim=-1), (4, 10, 7), (4, 10, 9)),
    "any module": (
        lambda: FFBlock(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU()), 4, CLASSES, normalize=None), (4, 3, 5, 5), (4, 4, 5, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    """Shapes, and local_step against autograd through an ordinary forward."""
    make, shape, out = BLOCKS[name]
    torch.manual_seed(0)
    block, x, target = make().double(), torch.randn(shape, dtype=torch.float64), torch.randint(CLASSES, (4,))
    eager = copy.deepcopy(block)
    output, goodness = eager(x)
    assert output.shape == out
    assert goodness.shape == (4, CLASSES)
    assert output.requires_grad and goodness.requires_grad
    eager_loss(goodness, target).backward()
    given = x.clone().requires_grad_()
    following, loss = block.local_step(given, target)
    assert given.grad is None, "a gradient left the block"
    assert not following.requires_grad and not loss.requires_grad
    torch.testing.assert_close(loss, eager_loss(goodness, target).detach())
    torch.testing.assert_close(following, eager.next_input(output).detach())
    for (n, p), q in zip(block.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, n=n: f"{n}: {text}")
    again = make().double()
    again.load_state_dict(block.state_dict())
    block.eval()
    again.eval()
    torch.testing.assert_close(again(x)[1], block(x)[1])


def test_a_network_of_blocks_learns_without_gradients_across():
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        [
            FFConv2d(3, 8, 3, num_classes=3, grid=2),
            FFDepthwiseConv2d(8, 3, num_classes=3),
            FFConv2d(8, 8, 1, num_classes=3),
        ]
    )
    optimizers = [torch.optim.Adam(block.parameters(), 2e-2) for block in blocks]
    x, target = torch.randn(24, 3, 8, 8), torch.arange(24) % 3
    history = []
    for _ in range(40):
        alive, losses = x, []
        for i, (block, optimizer) in enumerate(zip(blocks, optimizers, strict=True)):
            before = [
                None if p.grad is None else p.grad.clone()
                for j, b in enumerate(blocks)
                if j != i
                for p in b.parameters()
            ]
            alive, loss = block.local_step(alive, target)
            after = [p.grad for j, b in enumerate(blocks) if j != i for p in b.parameters()]
            assert all(a is None if b is None else torch.equal(a, b) for a, b in zip(after, before, strict=True))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        history.append(losses)
    assert all(last < 0.8 * first for first, last in zip(history[0], history[-1], strict=True)), history


def test_frozen_parameters_get_no_gradient():
    block = FFConv2d(3, 4, 3, num_classes=CLASSES)
    block.module[0].weight.requires_grad_(False)
    block.head.weight.requires_grad_(False)
    block.local_step(torch.randn(2, 3, 6, 6), torch.tensor([0, 1]))
    assert block.module[0].weight.grad is None
    assert block.head.weight.grad is None
    assert block.module[1].weight.grad is not None


# --- goodness by name


def any_module(norm, activation, **options):
    last = [make for make in (norm and norm(17), activation and activation()) if make]
    layers = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, 17, 3, padding=1), *last)
    return FFBlock(layers, 17, **options)


BY_NAME = {
    "linear": (lambda norm, **options: FFLinear(7, 17, **options), (6, 7)),
    "tokens": (lambda norm, **options: FFLinear(7, 17, channel_dim=-1, **options), (6, 4, 7)),
    "convolution": (lambda **options: FFConv2d(3, 17, 3, 2, **options), (6, 3, 7, 9)),
    "depthwise": (lambda **options: FFDepthwiseConv2d(17, 3, **options), (6, 17, 5, 4)),
    "any module": (any_module, (6, 3, 5, 4)),
}
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}
SUMS = {"theta": 30.0, "alpha": 0.05}  # where goodness is a sum over so many


def near(got, want, scale=None):
    """Within a tolerance of `scale`, the largest element of what is wanted."""
    scale = float(want.detach().abs().max() if scale is None else scale)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[want.dtype] * scale)


def as_images(x):
    """[B, C, H, W] of [B, C] and tokens [B, N, C] too."""
    return x if x.dim() == 4 else x.view(len(x), -1, x.shape[-1]).mT[:, :, None]


def passed_on(output, normalize, groups):
    """The next block's input."""
    if normalize is None:
        return output
    y = reference.normalized(as_images(output), normalize, groups)
    return y if output.dim() == 4 else y.flatten(2).mT.reshape(output.shape)


def assert_steps_as_eager(block, x, target, goodness, normalize, steps=1):
    """loss, next input, every gradient and running statistic of local_step are those of a copy's ordinary forward and backward."""
    eager, given = copy.deepcopy(block), x.clone().requires_grad_()
    for _ in range(steps):
        output, g = eager(x)
        if goodness in GOODNESS:
            by_class, *how = GOODNESS[goodness]
            near(g, reference.group_goodness(as_images(output), CLASSES if by_class else 1, *how))
        want = eager.head.loss(g, target)
        if want.requires_grad:
            want.backward()
        following, loss = block.local_step(given, target)
        near(loss, want.detach(), 1 + want.detach().abs())
        near(following, passed_on(output.detach(), normalize, CLASSES))
        near(eager.next_input(output.detach()), following)
        assert following.shape == output.shape
        assert not following.requires_grad and not loss.requires_grad
    assert given.grad is None, "a gradient left the block"
    assert same_bits(given.detach(), x), "x was written to"
    scale = max((float(p.grad.abs().max()) for p in eager.parameters() if p.grad is not None), default=0.0)
    for (name, p), q in zip(block.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            near(p.grad, q.grad, scale)
    for (name, a), b in zip(block.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("goodness", [*GOODNESS, "projection"])
@pytest.mark.parametrize("name", BY_NAME)
def test_goodness_by_name(name, goodness, dtype):
    """Every normalisation behind every end of a block, and every loss; 17 channels in 5 groups; channels_last in float32."""
    make, shape = BY_NAME[name]
    by_class = goodness == "projection" or GOODNESS[goodness][0]
    losses = ["cross_entropy"] * by_class + list(LOSSES[1:]) * (goodness != "projection")
    normalizations = ["layer_norm", "l2", "rms", None] + ["group_norm", "layer_norm_channels"] * by_class
    norms = (nn.BatchNorm2d, None) if len(shape) == 4 else (None,)
    cases = [
        *itertools.product(losses[:1], normalizations, norms, (nn.ReLU, nn.GELU, None)),
        *itertools.product(losses[1:], ("l2", None), norms[:1], (nn.ReLU,)),
    ]
    for seed, (loss, normalize, norm, activation) in enumerate(cases):
        torch.manual_seed(seed)
        options = {} if goodness == "projection" else {"loss": loss}
        options |= SUMS if goodness == "sum_of_squares" else {}
        block = make(
            goodness=goodness, num_classes=CLASSES if by_class else None, normalize=normalize, norm=norm, activation=activation, **options
        ).to(dtype)  # fmt: skip
        perturbed(block.module)
        x = torch.randn(shape, dtype=dtype)
        if dtype == torch.float32 and x.dim() == 4:
            block, x = (t.to(memory_format=torch.channels_last) for t in (block, x))
        target = torch.randint(CLASSES, (len(x),)) if loss == "cross_entropy" else None
        assert_steps_as_eager(block, x, target, goodness, normalize)


def nested():
    """Convolutions of every kind that has a way of its own, ReLU behind what may be overwritten and what may not."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), nn.Sequential(nn.Conv2d(16, 17, 1), nn.ReLU(), nn.BatchNorm2d(17))
        ),
        nn.GELU(), nn.ReLU(), nn.Conv2d(17, 17, 3, 2, 1, bias=False), nn.BatchNorm2d(17), nn.ReLU(),
    )  # fmt: skip


BATCH_NORMS = {
    "as it is": lambda norm: None,
    "cumulative": lambda norm: setattr(norm, "momentum", None),
    "without parameters": lambda norm: norm.__init__(norm.num_features, affine=False),
    "without statistics": lambda norm: norm.__init__(norm.num_features, track_running_stats=False),
    "frozen": lambda norm: norm.eval(),
    "half frozen": lambda norm: norm.bias.requires_grad_(False),
}


@pytest.mark.parametrize("change", BATCH_NORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nested_sequential(dtype, change):
    """Two steps whose gradients add up, with batch norm in every state."""
    torch.manual_seed(0)
    for goodness, normalize in itertools.product(("class_group", "projection", "sff"), ("layer_norm", "l2", None)):
        block = FFBlock(nested(), 17, CLASSES, goodness=goodness, normalize=normalize)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                BATCH_NORMS[change](module)
        block = perturbed(block).to(dtype).to(memory_format=torch.channels_last)
        x = torch.randn(6, 16, 8, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
        assert_steps_as_eager(block, x, torch.randint(CLASSES, (6,)), goodness, normalize, steps=2)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(17, 17, 1)),
        lambda: nn.Sequential(nn.BatchNorm2d(17), nn.ReLU()),
        lambda: nn.Sequential(nn.Identity(), nn.ReLU()),
        lambda: nn.Sequential(nn.ReLU()),
        lambda: nn.Sequential(nn.Sequential(), nn.Conv2d(17, 17, 1), nn.Identity()),
        lambda: nn.Sequential(),
        lambda: nn.Identity(),
        lambda: nn.Conv2d(17, 17, 3, padding="same", padding_mode="circular"),
        lambda: nn.Sequential(nn.Conv2d(17, 17, (1, 3), padding=(0, 1)), nn.BatchNorm2d(17), nn.Dropout(0.0)),
    ],
)
@pytest.mark.parametrize("goodness", ["class_group", "projection"])
def test_modules_of_few_layers(layers, goodness):
    """What does not begin with a layer of weights leaves x alone."""
    torch.manual_seed(0)
    for normalize, dtype in itertools.product(("layer_norm", None), TOLERANCE):
        block = FFBlock(layers(), 17, CLASSES, goodness=goodness, normalize=normalize).to(dtype)
        x = torch.randn(4, 17, 3, 5, dtype=dtype)
        assert_steps_as_eager(block, x, torch.randint(CLASSES, (4,)), goodness, normalize)


@pytest.mark.parametrize("normalize", ["layer_norm", "layer_norm_channels", "l2", "rms"])
def test_next_input_of_fewer_channels_than_classes(normalize):
    block = LocalBlock(nn.Conv2d(3, 4, 1), GoodnessHead(4, 10), normalize)
    x = torch.randn(2, 3, 5, 5)
    following, _ = block.local_step(x, torch.tensor([1, 2]))
    torch.testing.assert_close(block.next_input(block.module(x)).detach(), following)


def test_group_norm_behind_a_loss_of_one_s_own():
    block = LocalBlock(nn.Conv2d(3, 4, 1), loss=lambda y, target: y.square().mean(), normalize="group_norm")
    x = torch.randn(2, 3, 5, 5)
    following, _ = block.local_step(x)
    torch.testing.assert_close(following, F.group_norm(block.module(x), 1).detach())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("normalize", ["layer_norm", None])
def test_hooks_run(kind, normalize):
    """One on any layer or nn.Sequential runs once in local_step, on the tensors of eager code, which nothing overwrites later."""
    torch.manual_seed(0)
    block = FFBlock(nested(), 17, CLASSES, goodness="class_group", normalize=normalize).double()
    x, target = torch.randn(4, 16, 6, 5, dtype=torch.float64), torch.randint(CLASSES, (4,))
    for name in dict(block.module.named_modules()):
        seen = []
        for run in (lambda b: b.local_step(x, target), lambda b: b.head.loss(b(x)[1], target).backward()):
            hooked, calls = copy.deepcopy(block), []
            getattr(hooked.module.get_submodule(name), kind)(lambda module, *given, calls=calls: calls.append(given))
            run(hooked)
            seen.append(calls)
        assert [len(calls) for calls in seen] == [1, 1], name
        torch.testing.assert_close(*seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_inside_the_users_autocast(dtype):
    """Of a block that is one convolution and its epilogue: the loss and the gradients are about those without autocast."""
    torch.manual_seed(0)
    block, x, target = FFConv2d(3, 8, 3, num_classes=4), torch.randn(5, 3, 6, 6), torch.tensor([0, 1, 2, 3, 0])
    _, loss = block.local_step(x, target)
    expected = {name: p.grad for name, p in block.named_parameters()}
    block.zero_grad()
    with torch.autocast("cpu", dtype):
        _, found = block.local_step(x, target)
    torch.testing.assert_close(found, loss, rtol=2e-2, atol=2e-2)
    for name, p in block.named_parameters():
        assert (p.grad - expected[name]).norm() < 0.1 * expected[name].norm(), name


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm"])
def test_parametrized_weights_learn(parametrization):
    """Those of the head and of the block's module: their gradients are those of plain PyTorch."""
    torch.manual_seed(0)
    block = FFBlock(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), 8, 4, grid=2).double()
    for module, name in ((block.head, "weight"), (block.head, "grid_weight"), (block.module[0], "weight")):
        getattr(nn.utils.parametrizations, parametrization)(module, name)
    x, target = torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    block.eval()  # spectral norm changes its buffers in training mode
    block.head.loss(block(x)[1], target).backward()
    expected = {name: p.grad for name, p in block.named_parameters()}
    block.zero_grad()
    block.local_step(x, target)
    assert any("head.parametrizations.weight" in name for name in expected)
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"goodness": "hinton"}, "goodness: expected one of sff, projection, class_group, .* got 'hinton'"),
        ({"goodness": "mean_of_squares", "loss": "cross_entropy"}, "loss: expected a loss of positive and negative samples"),
        ({"goodness": "class_group", "loss": "hinge"}, "loss: expected one of"),
        ({"goodness": "class_group", "num_classes": None}, "num_classes: expected 1 to 4, .* got None"),
        ({"goodness": "class_group", "num_classes": 5}, "num_classes: expected 1 to 4, .* got 5"),
        ({"num_classes": None}, "num_classes: expected a whole number of at least 1, got None"),
        ({"goodness": "projection", "num_classes": None}, "num_classes: expected a whole number of at least 1, got None"),
        ({"goodness": "class_group", "normalize": "batch"}, "normalize: expected one of"),
        ({"num_classes": 5, "normalize": "group_norm"}, "normalize: expected another one than group_norm where 5 groups, .* 4 channels, got"),
        ({"goodness": "mean_of_squares", "num_classes": None, "normalize": "group_norm"}, "normalize: group_norm takes a group"),
        ({"goodness": "mean_of_squares", "num_classes": 3, "normalize": "group_norm"}, "normalize: group_norm takes a group"),
    ],
)  # fmt: skip
def test_blocks_refuse(options, said):
    with pytest.raises(ValueError, match=said):
        FFBlock(nn.ReLU(), 4, **{"num_classes": 3} | options)


def test_targets_that_do_not_fit_the_loss():
    x, target = torch.randn(3, 7), torch.tensor([0, 1, 2])
    for options, given, said in (
        ({"goodness": "class_group"}, None, "target: expected .* for cross_entropy"),
        ({"goodness": "class_group"}, torch.tensor([0, 1, 5]), r"target: expected labels in 0\.\.4, got 5"),
        ({"goodness": "mean_of_squares"}, target, "target: expected None for softplus"),
        ({"goodness": "mean_of_squares"}, None, "expected positive samples and as many negative ones"),
    ):
        with pytest.raises(ValueError, match=said):
            FFLinear(7, 9, num_classes=CLASSES, **options).local_step(x, given)
