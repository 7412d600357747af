"""GoodnessHead and the blocks: values and local gradients against eager PyTorch, no gradient across blocks, training."""

import copy

import pytest
import torch
from oracle import eager_goodness, eager_layer_norm, eager_loss
from torch import nn

from fastff.nn import FFBlock, FFConv2d, FFDepthwiseConv2d, FFLinear, GoodnessHead

CLASSES = 5
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


def perturbed(module):
    """Away from zeros, so that every parameter matters."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


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
