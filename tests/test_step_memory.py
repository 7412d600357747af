"""What a training step leaves alone and lets go of: other blocks, images, activations, memory; and that it waits for no device."""

import copy
import functools

import pytest
import torch
from oracle import operators_run, peak_memory
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from training_oracle import CLASSES, Plain, adamw, batches, made, sgd, train

from fastff import SFF, Backprop, Trainer


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("model", ["resnet18", "plain"])
def test_no_gradient_crosses_a_cut(model, window):
    """A loss turned into NaN spoils its own block and the window before it, and changes not one bit of the blocks before those."""
    sff = made(model, granularity="block", readout=True)
    poisoned, data = copy.deepcopy(sff), batches(sff, 1)
    with torch.no_grad():
        poisoned.heads[3].weight[0, 0] = float("nan")
    train(Trainer(sff, sgd, window=window), data)
    losses = train(Trainer(poisoned, sgd, window=window), data)[0]
    assert [loss != loss for loss in losses] == [i == 3 for i in range(len(losses))]
    for i in range(len(sff.blocks)):
        own, other = list(sff.blocks[i].parameters()), list(poisoned.blocks[i].parameters())
        if 3 - window < i <= 3:
            assert any(p.isnan().any() for p in other), f"the loss of block 3 does not reach block {i}"
        else:
            assert all(map(torch.equal, own, other)), f"the loss of block 3 reaches block {i}"


def test_images_get_no_gradient_and_nothing_is_written_to():
    sff = made("resnet18")
    for window in (1, 2):
        trainer = Trainer(sff, sgd, window=window)
        (images, target), *_ = batches(sff, 1)
        images.requires_grad_()
        before = images.detach().clone(), target.clone()
        train(trainer, [(images, target)])
        assert images.grad is None
        assert torch.equal(images, before[0])
        assert torch.equal(target, before[1])
        assert all(p.grad is None for p in sff.parameters()), "gradients are not kept after a step"


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small"])
def test_activations_are_gone(model, window, parts):
    """When block l starts, of the tensors made in earlier blocks just those of the window are left."""
    sff = made(model, dtype=torch.float32, granularity="block")
    trainer = Trainer(sff, adamw, window=window, micro_batches=parts)
    current, made_in, seen = [None], [], []

    def remember(module, args, output):
        made_in.append((current[0], StorageWeakRef(output.untyped_storage())))

    for module in sff.model.modules():
        if not list(module.children()) and not isinstance(module, nn.Identity):
            module.register_forward_hook(remember)

    def watched(index, visit):
        def run(*arguments, **options):
            seen.append((index, {i for i, storage in made_in if not storage.expired()}))
            current[0] = index
            return visit(*arguments, **options)

        return run

    for i, block in enumerate(sff.local_blocks):
        block.visit = watched(i, block.visit)
    train(trainer, batches(sff, 1, size=4, dtype=torch.float32))
    assert len(seen) == parts * len(sff.blocks)
    assert len(made_in) > 2 * len(sff.blocks)
    for index, alive in seen:
        assert alive == set(range(max(0, index - window + 1), index)), (
            f"block {index} starts with the activations of {alive} in memory"
        )
    assert all(storage.expired() for _, storage in made_in), "after the step"


def test_peak_memory_does_not_grow_with_depth():
    """That of block-local training; backpropagation's, measured likewise, does."""
    peaks = {}
    for depth in (4, 16):
        torch.manual_seed(0)
        sff = SFF(Plain(depth, channels=16, in_channels=16), CLASSES, input_shape=(16, 24, 24), readout=True)
        data = batches(sff, 1, size=8, dtype=torch.float32)
        for name, loop in (
            ("window 1", Trainer(sff, adamw, window=1)),
            ("window 2", Trainer(sff, adamw, window=2)),
            ("backprop", Backprop(sff, adamw)),
        ):
            train(loop, data)  # the optimiser's state
            peaks[name, depth] = peak_memory(functools.partial(loop.step, *data[0]))
    activation = 4 * 8 * 16 * 24 * 24
    assert peaks["backprop", 16] - peaks["backprop", 4] > 10 * activation
    for name in ("window 1", "window 2"):
        assert abs(peaks[name, 16] - peaks[name, 4]) < activation / 20, peaks
    assert peaks["window 1", 16] < peaks["window 2", 16] < peaks["backprop", 16]


WAITING = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::equal",
    "aten::unique",
    "aten::masked_select",
}


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 2},
        {"window": 1, "micro_batches": 2, "clip_grad_norm": 1.0},
        {"window": 1, "amp": "bf16"},
    ],
)
def test_nothing_in_a_step_waits_for_the_device(options, monkeypatch):
    """Labels are looked at on a CPU, where that is free; with this taken out no operator that makes a GPU's host wait is left.

    (PyTorch's fused Adam for the CPU reads its own step counter, so this is SGD.)"""
    sff = made("resnet18", dtype=torch.float32, readout=True, learn_tau=True)
    data = batches(sff, 2, dtype=torch.float32)
    trainer = Trainer(
        sff, functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=True), record_steps=False, **options
    )
    train(trainer, data)
    assert operators_run(lambda: trainer.step(*data[0])) & WAITING == {"aten::_local_scalar_dense", "aten::item"}
    monkeypatch.setattr("fastff.arguments.check_labels", lambda target, classes: None)
    ran = operators_run(lambda: trainer.step(*data[0]))
    assert "aten::convolution_backward" in ran
    assert not ran & WAITING
