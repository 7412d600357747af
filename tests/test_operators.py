"""Steps that are recorded as lists of operators (fastff/graph/operators.py): the bits of ordinary ones, and what a recording must not miss."""

import copy

import pytest
import torch
from torch import nn

import fastff
from fastff import SFF, Trainer
from fastff.graph.recording import FRUITLESS, WARM_UP, CannotRecord
from fastff.memory import by_block, peak_memory
from fastff.nn.block import FFBlock, FFConv2d, FFDepthwiseConv2d, FFLinear, LocalBlock
from fastff.training import Backprop, optim

STEPS = WARM_UP + 3


class Small(nn.Module):
    """Two convolutions with batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        return self.last(self.second(self.first(x)).mean((2, 3)))


def resnet():
    return fastff.models.resnet18(5, stem="cifar", width=4)


def pair(net=Small, kind=Trainer, size=8, sff=None, **options):
    """(a trainer that records its steps, one that does not) of the same weights."""
    torch.manual_seed(0)
    made = SFF(net(), 5, input_shape=(3, size, size), **{"readout": True} | (sff or {}))
    return tuple(kind(copy.deepcopy(made), record_steps=record, **options) for record in (True, False))


def minibatch(seed, rows=8, size=8):
    torch.manual_seed(seed)
    return torch.randn(rows, 3, size, size), torch.randint(5, (rows,))


def same_step(trainers, batch, seed=0):
    """Whether both trainers find the same bits in a step, random numbers included."""
    found = []
    for trainer in trainers:
        torch.manual_seed(seed)
        found.append((trainer.step(*batch), trainer.correct))
    return all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(*found, strict=True))


def one_step(trainer, step):
    batch = minibatch(step)
    torch.manual_seed(step)
    trainer.step(*batch)


def same_weights(a, b):
    pairs = zip(a.sff.state_dict().values(), b.sff.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def recordings(trainer):
    return len(trainer.recorded.recordings)


PAIRS = {
    "defaults": {},
    "dropout, layer by layer": {"sff": {"granularity": "layer", "window": 1}},
    "a window over micro-batches": {"net": resnet, "sff": {"window": 2, "readout": False}, "micro_batches": 2},
    "budget of memory": {"net": resnet, "sff": {"granularity": "auto"}},
    "bf16": {"net": resnet, "amp": "bf16"},
    "clipped AdamW": {"net": resnet, "optimizer": optim.adamw(), "clip_grad_norm": 0.1},
    "SGD": {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)},
    "groups of channels": {"net": resnet, "sff": {"goodness": "class_group", "readout": False, "granularity": "stage"}},
    "frozen": {"net": resnet, "frozen": 2, "train_frozen_heads": True},
    "backpropagation": {"net": resnet, "kind": Backprop},
    "deep supervision": {"kind": Backprop, "deep_supervision": True, "micro_batches": 2},
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_recorded_step_has_the_bits_of_an_ordinary_one(name):
    options = dict(PAIRS[name])
    if options.get("sff", {}).get("goodness") == "class_group":
        options["net"] = lambda: fastff.models.resnet18(5, stem="cifar", width=5)
    trainers = pair(**options)
    for trainer in trainers:
        trainer.train_mode()
    for step in range(STEPS):
        for rows in (8, 5):
            assert same_step(trainers, minibatch(step, rows), step)
        if step == STEPS - 2:
            for trainer in trainers:  # optimizers are called as ever
                optim.set_progress(trainer.optimizers, lambda t: 1 - t, 0.5)
    assert recordings(trainers[0]) == 2
    assert same_weights(*trainers)


def test_positive_and_negative_images():
    trainers = pair(sff={"goodness": "sum_of_squares", "readout": False})
    for step in range(STEPS):
        images = minibatch(step)[0]
        assert same_step(trainers, (images,), step)
    assert recordings(trainers[0]) == 1
    assert same_weights(*trainers)


def test_a_schedule_that_moves_has_a_recording_for_each_plan():
    trainers = pair(resnet, sff={"plan": "pairs", "readout": False})
    for step in range(STEPS * 3):
        assert same_step(trainers, minibatch(step), step)
    assert recordings(trainers[0]) == 2
    assert same_weights(*trainers)


def change_dropout(trainer):
    trainer.sff.model.first[3].p = 0.8


def change_momentum(trainer):
    trainer.sff.model.second[1].momentum = 0.5


def freeze(trainer):
    trainer.sff.model.second[0].weight.requires_grad_(False)


def evaluate_one(trainer):
    trainer.sff.model.second[1].eval()


def new_buffer(trainer):
    trainer.sff.model.second[1].running_mean = torch.full((8,), 3.0)


def lay_out_otherwise(trainer):
    trainer.sff.to(memory_format=torch.channels_last)


def load_weights(trainer):
    state = {name: t * 0.5 for name, t in trainer.sff.state_dict().items()}
    trainer.sff.load_state_dict(state)


def hook_the_optimizer(trainer):
    def double(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad *= 2

    for optimizer in trainer.optimizers:
        optimizer.register_step_pre_hook(double)


def hook_a_module(trainer):
    trainer.sff.model.second[0].register_forward_hook(lambda module, inputs, output: output * 2)


def hook_a_parameter(trainer):
    trainer.sff.model.second[0].weight.register_hook(lambda grad: grad * 2)


def patch_a_method(trainer):
    layer = trainer.sff.model.second[0]
    layer.forward = lambda x: nn.Conv2d.forward(layer, x * 2)


def give_a_gradient(trainer):
    p = trainer.sff.model.second[0].weight
    p.grad = torch.ones_like(p)


CHANGES = (
    change_dropout, change_momentum, freeze, evaluate_one, new_buffer, lay_out_otherwise, load_weights, hook_the_optimizer, hook_a_module,
    hook_a_parameter, patch_a_method, give_a_gradient,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_counts(change):
    trainers, untouched = pair(sff={"granularity": "layer"}), pair(sff={"granularity": "layer"})[0]
    for step in range(STEPS):
        assert same_step(trainers, minibatch(step), step)
        one_step(untouched, step)
    assert same_weights(trainers[0], untouched)
    for trainer in trainers:
        change(trainer)
    for step in range(STEPS):
        assert same_step(trainers, minibatch(step), step)
        one_step(untouched, step)
    assert same_weights(*trainers)
    assert not same_weights(trainers[0], untouched), "the change made no difference: this test says nothing"


class Scaled(nn.Module):
    """Multiplies by an attribute of its class."""

    scale = 1.0

    def forward(self, x):
        return x * self.scale


def test_attributes_of_classes_count(monkeypatch):
    trainers = pair(lambda: net_with(Scaled))
    for step in range(STEPS):
        assert same_step(trainers, minibatch(step), step)
    assert recordings(trainers[0]) == 1
    monkeypatch.setattr(Scaled, "scale", 3.0)
    for step in range(STEPS):
        assert same_step(trainers, minibatch(step), step)
    assert recordings(trainers[0]) == 1
    assert same_weights(*trainers)


def test_images_made_in_inference_mode():
    trainers = pair()
    for step in range(STEPS):
        with torch.inference_mode():
            batch = minibatch(step)
        assert same_step(trainers, batch if step % 2 else tuple(t.clone() for t in batch), step)
    assert same_weights(*trainers)


def test_checkpoints_and_copies_go_on(tmp_path):
    trainers = pair()
    for step in range(STEPS):
        assert same_step(trainers, minibatch(step), step)
    trainers[0].save(tmp_path / "checkpoint.pt")
    copied = copy.deepcopy(trainers[0])
    for step in range(STEPS):
        assert same_step(trainers, minibatch(step), step)
    for again in (copied, trainers[0]):
        if again is trainers[0]:
            again.load(tmp_path / "checkpoint.pt")
        for step in range(STEPS):
            one_step(again, step)
        assert recordings(again) == 1
        assert same_weights(again, trainers[1])


def test_labels_are_checked_in_every_step():
    trainer = pair()[0]
    images, target = minibatch(0)
    for _ in range(STEPS):
        trainer.step(images, target)
        with pytest.raises(ValueError, match=r"target: expected labels in 0\.\.4, got 7"):
            trainer.step(images, torch.full_like(target, 7))


def test_labels_of_any_stride():
    trainers = pair()
    for step in range(STEPS):
        assert same_step(trainers, minibatch(step), step)
    images, target = minibatch(STEPS)
    for _ in range(STEPS):
        assert same_step(trainers, (images, torch.stack([target.flip(0), target], 1)[:, 1]))
    assert same_weights(*trainers)


class Counts(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_steps_in_a_context_of_the_user_are_ordinary():
    contexts = [
        lambda: torch.autocast("cpu", torch.bfloat16),
        Counts,
        torch.autograd.detect_anomaly,
        lambda: torch.device("cpu"),
    ]
    trainers = pair(resnet)
    for trainer in trainers:
        trainer.step(*minibatch(0))
    for make in contexts:
        for step in range(STEPS):
            found = []
            for trainer in trainers:
                with make():
                    found.append(trainer.step(*minibatch(step)))
            assert torch.equal(*found)
    assert recordings(trainers[0]) == 0
    assert same_weights(*trainers)


class Whim(nn.Module):
    """Decides by what it computes."""

    def forward(self, x):
        return x if x.mean() > 0 else -x


class Outside(nn.Module):
    """Reads a tensor that is no part of it, another one in every step."""

    def forward(self, x):
        return x + torch.from_numpy(torch.randn(1).numpy())


def net_with(part):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), part(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


@pytest.mark.parametrize(("part", "why"), [(Whim, "depends on values"), (Outside, "comes from outside")])
def test_what_cannot_be_recorded_is_said_and_trained(part, why):
    torch.manual_seed(0)
    sff = SFF(net_with(part), 5, "layer", (3, 8, 8))
    plain, auto, told = (Trainer(copy.deepcopy(sff), record_steps=record) for record in (False, "auto", True))
    assert "may do something else in each step" in repr(auto)
    for step in range(WARM_UP):
        assert same_step((plain, auto), minibatch(step), step)
        one_step(told, step)
    with pytest.raises(CannotRecord, match=f"record_steps: a step of this network cannot be recorded, .*{why}"):
        told.step(*minibatch(9))
    for step in range(STEPS):
        assert same_step((plain, auto), minibatch(step), step)
    unproven = Trainer(copy.deepcopy(sff), record_steps=True)
    unproven.recorded.gives_up = True
    ordinary = Trainer(sff, record_steps=False)
    for step in range(STEPS):
        assert same_step((unproven, ordinary), minibatch(step), step)
    assert same_weights(unproven, ordinary)
    assert why in repr(unproven)


def test_a_network_that_changes_in_every_step_is_left_alone():
    torch.manual_seed(0)
    trainer = Trainer(SFF(Small(), 5, input_shape=(3, 8, 8)))
    for step in range(FRUITLESS + 3):
        trainer.sff.model.first[3].p = step / 100
        trainer.step(*minibatch(step))
    assert "not recorded as lists of operators: the network changes too often" in repr(trainer)


def test_options_that_do_not_go_together():
    with pytest.raises(ValueError, match="record_steps: expected False with compile=True"):
        pair(compile=True)
    with pytest.raises(ValueError, match="record_steps: expected False with checkpointing"):
        pair(kind=Backprop, checkpointing=True)
    with pytest.raises(ValueError, match="record_steps: expected amp None or 'bf16'"):
        pair(amp="fp16")
    with pytest.raises(ValueError, match="record_steps: expected True, False or 'auto', got 'yes'"):
        Trainer(SFF(Small(), 5, input_shape=(3, 8, 8)), record_steps="yes")


def test_memory_is_no_more_than_that_of_an_ordinary_step():
    recorded, ordinary = pair(resnet, size=16)
    batch = minibatch(0, 16, 16)
    for _ in range(WARM_UP):
        recorded.step(*batch)
        ordinary.step(*batch)
    most = peak_memory(lambda: ordinary.step(*batch))
    assert peak_memory(lambda: recorded.step(*batch)) < 1.02 * most, "while it is recorded"
    assert recordings(recorded) == 1
    assert peak_memory(lambda: recorded.step(*batch)) < 1.02 * most


def test_memory_by_block_sees_the_blocks():
    trainers = pair(resnet, size=16)
    for step in range(STEPS):
        assert same_step(trainers, minibatch(0, 16, 16), step)
    recorded, ordinary = ([i for _, i in by_block(trainer, *minibatch(0, 16, 16))[1]] for trainer in trainers)
    assert recorded == ordinary
    assert set(recorded) == set(range(9))


def blocks():
    """(name, block, x, target)"""
    torch.manual_seed(0)
    x, target = torch.randn(6, 4, 8, 8), torch.randint(4, (6,))
    yield FFConv2d(4, 8, 3, num_classes=4, grid=2, hidden=8), x, target
    yield FFDepthwiseConv2d(4, 3, num_classes=4), x, target
    yield FFConv2d(4, 8, 3, goodness="sum_of_squares"), x, None
    yield FFLinear(16, 8, num_classes=4, goodness="class_group"), x[:, 0, :2].flatten(1), target
    yield FFBlock(nn.Sequential(nn.Conv2d(4, 8, 3), nn.GELU(), nn.Dropout(0.2)), 8, 4, normalize=None), x, target


@pytest.mark.parametrize(("block", "x", "target"), list(blocks()))
def test_local_steps_of_a_block(block, x, target):
    pair = block, copy.deepcopy(block)
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9) for block in pair]
    for step in range(STEPS):
        images = torch.randn_like(x)
        torch.manual_seed(step)
        found = pair[0].local_step(images, target, details=True)
        torch.manual_seed(step)
        expected = pair[1]._local_step(images, target)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not any(t.requires_grad for t in found)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len(block._recorded.recordings) == 1
    assert all(
        torch.equal(a, b) for a, b in zip(block.state_dict().values(), pair[1].state_dict().values(), strict=True)
    )
    for _ in range(2):  # to gradients that are there already it adds
        for step in (block.local_step, pair[1]._local_step):
            torch.manual_seed(0)
            step(x, target)
    for a, b in zip(block.parameters(), pair[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_modules_that_a_block_gets_later_count():
    x, target = torch.randn(6, 4, 8, 8), torch.randint(4, (6,))
    block = FFBlock(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()), 8, 4)

    def record():
        for _ in range(STEPS):
            block.zero_grad()
            block.local_step(x, target)
        assert len(block._recorded.recordings) == 1
        block.zero_grad()

    record()
    block.module[0] = nn.Conv2d(4, 8, 3)
    block.module.append(nn.Dropout(0.5))
    record()
    block.module[0].weight.requires_grad_(False)
    block.module[2].eval()
    first, second = (block.local_step(x, target)[0] for _ in range(2))
    assert block.module[0].weight.grad is None
    assert torch.equal(first, second), "without dropout"


def test_a_block_whose_python_is_not_known_is_not_recorded():
    x, target = torch.randn(6, 4, 8, 8), torch.randint(4, (6,))
    unknown, inside = FFBlock(Whim(), 4, 4), FFBlock(nn.Sequential(nn.Conv2d(4, 4, 3), Whim()), 4, 4)
    own_loss = LocalBlock(
        nn.Sequential(nn.Conv2d(4, 8, 3)), loss=lambda output, target: output.square().mean() * torch.rand(())
    )
    for block in (unknown, inside, own_loss):
        for _ in range(STEPS):
            block.zero_grad()
            block.local_step(x, target)
        assert block._recorded is None


def test_blocks_that_recorded_are_saved_and_copied(tmp_path):
    x, target = torch.randn(6, 4, 8, 8), torch.randint(4, (6,))
    block = FFConv2d(4, 8, 3, num_classes=4)
    for _ in range(STEPS):
        block.zero_grad()
        block.local_step(x, target)
    assert len(block._recorded.recordings) == 1
    torch.save(block, tmp_path / "block.pt")
    block.zero_grad()
    expected = block.local_step(x, target)
    for other in (torch.load(tmp_path / "block.pt", weights_only=False), copy.deepcopy(block)):
        other.zero_grad()
        found = other.local_step(x, target)
        assert torch.equal(found[1], expected[1])
        assert all(p.grad is not None for p in other.module.parameters()), "its own parameters learn"


def test_bad_input_of_a_recorded_block_is_told():
    x, target = torch.randn(6, 4, 8, 8), torch.randint(4, (6,))
    block = FFConv2d(4, 8, 3, num_classes=4)
    for _ in range(STEPS):
        block.zero_grad()
        block.local_step(x, target)
    with pytest.raises(ValueError, match=r"target: expected labels in 0\.\.3, got 9"):
        block.local_step(x, torch.full_like(target, 9))
    with pytest.raises(TypeError, match="target: expected int64 class labels"):
        block.local_step(x, target.int())
    with pytest.raises(ValueError, match="one label per sample"):
        block.local_step(x, target[:5])
