"""What the tests of Trainer and Backprop train and compare with: small networks, and block-local training by fastff.reference.train_step."""

import functools

import torch
from oracle import eager_goodness, eager_layer_norm, eager_loss
from torch import nn

import fastff
from fastff import SFF
from fastff import plan as plans
from fastff.reference import train_step

CLASSES = 5


class Plain(nn.Module):
    """Convolutions without batch norm: nothing in it looks at more than one sample."""

    def __init__(self, depth=4, channels=6, in_channels=3):
        super().__init__()
        sizes = [in_channels, *[channels] * depth]
        self.features = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in zip(sizes, sizes[1:], strict=False))
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, CLASSES)

    def forward(self, x):
        return self.fc(self.pool(self.features(x)).flatten(1))


def resnet():
    return fastff.models.resnet18(num_classes=CLASSES, stem="cifar", width=4)


def mobilenet():
    return fastff.models.mobilenet_v3_small(num_classes=CLASSES, stem="cifar", width_mult=0.25)


MODELS = {
    "resnet18": (resnet, (3, 16, 16)),
    "mobilenet_v3_small": (mobilenet, (3, 16, 16)),
    "plain": (Plain, (3, 8, 8)),
}


def made(name="plain", dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    plain = {"granularity": "block"} | ({"hidden": 0} if options.get("goodness", "sff") == "sff" else {})
    return SFF(make().to(dtype), CLASSES, input_shape=shape, **plain | options)


def batches(sff, steps=10, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, size, *sff.input_shape, generator=generator, dtype=torch.float64)
    return [(draw().to(dtype), torch.randint(CLASSES, (size,), generator=generator)) for _ in range(steps)]


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9, weight_decay=0.01)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.05)


def by_hand(sff):
    """[(function from the tensors alive to those after, its modules)] of the blocks, named by hand where they can be."""
    model = sff.model
    if isinstance(model, fastff.models.resnet.ResNet) and sff.granularity in ("auto", "block"):
        stem = nn.Sequential(model.conv1, model.bn1, model.relu)
        modules = [stem, *model.layer1, *model.layer2, *model.layer3, *model.layer4]
    elif (
        isinstance(model, fastff.models.mobilenet_v3.MobileNetV3)
        and sff.granularity in ("auto", "block")
        or isinstance(model, Plain)
    ):
        modules = list(model.features)
    else:
        return [(block, block) for block in sff.blocks]
    assert len(modules) == len(sff.blocks)
    return [(lambda x, module=module: (module(x),), module) for module in modules]


def logits(head, x):
    """tau * goodness [B, K] of a goodness head as anyone would write it."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm, padding = head.hidden_norm, head.kernel_size // 2
    hidden = None if norm is None else (head.hidden_weight, *[None] * 5)
    g = eager_goodness(x.to(wide), head.weight, head.bias, head.grid_weight, padding, hidden, norm)
    return g * (head.tau if head.log_tau is None else head.log_tau.exp())


def local_loss(head, x, target):
    """The loss of a goodness head."""
    return eager_loss(logits(head, x), target, 1.0, head.margin, head.label_smoothing)


def grouped(parameters):
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def clip_before(parameters, clip):
    """A hook that clips gradients before the optimiser's step."""

    def hook(*_):
        nn.utils.clip_grad_norm_(parameters, clip)

    return hook


def naive_training(sff, data, make, window=1, clip=None, frozen=0, amp=None, plan=None):
    """Trains `sff` in place by fastff.reference.train_step, with blocks and heads in plain PyTorch. Returns the losses [steps][blocks]."""
    functions, modules = zip(*by_hand(sff), strict=True)
    optimizers = []
    for module, head in list(zip(modules, sff.heads, strict=True))[frozen:]:
        parameters = [*module.parameters(), *head.parameters()]
        optimizers.append(make(grouped(parameters)))
        if clip is not None:
            optimizers[-1].register_step_pre_hook(clip_before(parameters, clip))
    sff.train()
    for module in modules[:frozen]:
        module.eval()

    def run(index, *alive):
        with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
            return functions[index](*alive)

    def first(images):
        """The frozen blocks, and the first that learns."""
        alive = (images,)
        with torch.no_grad():
            for index in range(frozen):
                z, *others = run(index, *alive)
                alive = (eager_layer_norm(z), *others)
        return run(frozen, *alive)

    plan = plan or plans.window(window, len(functions) - frozen)
    history = []
    for t, (images, target) in enumerate(data):
        losses = train_step(
            [first, *(functools.partial(run, index) for index in range(frozen + 1, len(functions)))],
            [functools.partial(logits, head) for head in sff.heads[frozen:]],
            optimizers, images, target, plan.at(t),
            loss=lambda u, target: eager_loss(u, target, 1.0, sff.heads[0].margin, sff.heads[0].label_smoothing),
            normalize=lambda z: eager_layer_norm(z),
        )  # fmt: skip
        history.append([0.0] * frozen + losses.tolist())
    return history


def train(trainer, data):
    trainer.train_mode()
    return [trainer.step(*batch).tolist() for batch in data]


def vector(sff):
    return torch.cat([t.detach().double().flatten() for name, t in sff.state_dict().items() if t.is_floating_point()])


def assert_same_training(sff, other, rtol=1e-9):
    for (name, a), b in zip(sff.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}")
