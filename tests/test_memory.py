"""peak_memory against allocations whose sizes are known."""

import gc

import torch

import fastff
from fastff.memory import by_block, peak_memory

MIB = 2**18  # float32 numbers


def near(got, expected):
    """Numbers become tensors of a few bytes inside operators."""
    return abs(got - expected) < 1e-3


def allocate(mib):
    return torch.empty(mib * MIB)


def test_peak_is_of_what_lives_at_once():
    def three_at_once():
        a, b = allocate(8), allocate(8)
        c = allocate(8)
        del a, b, c

    def two_at_once():
        a = allocate(8)
        b = allocate(8)
        del a
        c = allocate(8)
        del b, c

    def one_at_a_time():
        for _ in range(5):
            allocate(8)

    assert near(peak_memory(three_at_once), 24)
    assert near(peak_memory(two_at_once), 16)
    assert near(peak_memory(one_at_a_time), 8)
    assert near(peak_memory(lambda: None), 0)


def test_above_the_starting_point():
    kept = [allocate(8)]
    assert near(peak_memory(lambda: kept[0].add_(1)), 0), "what is there already does not count"
    assert near(peak_memory(lambda: kept.append(allocate(4))), 4), "what the step leaves behind does"


def test_garbage_from_before_the_step_is_not_freed_in_it():
    """A network that only refers to itself goes when Python's collector finds it: not while a step is measured."""
    found = []
    peak_memory(lambda: found.append(gc.isenabled()))
    assert found == [False] and gc.isenabled()


def test_temporaries_inside_operators_and_gradients():
    x = allocate(8)
    assert near(peak_memory(lambda: (x + 1).mul_(2)), 8)
    assert near(peak_memory(lambda: (x + 1) * 2), 16)
    weight = torch.ones(2 * MIB, requires_grad=True)

    def step():
        (weight * weight).sum().backward()  # the product, then the gradient: each 2 MiB, with 2 MiB inside the backward
        weight.grad = None

    step()
    assert 4 <= peak_memory(step) <= 6.01


def test_says_nothing_and_leaves_errors_alone(capfd):
    peak_memory(lambda: allocate(1))
    assert capfd.readouterr() == ("", "")

    def broken():
        raise ValueError("mine")

    try:
        peak_memory(broken)
    except ValueError as error:
        assert str(error) == "mine"
    torch.ones(3).sum()
    print("still here", flush=True)
    assert capfd.readouterr().out == "still here\n"
    assert near(peak_memory(lambda: allocate(2)), 2), "after an error it works again"


def test_the_memory_of_a_step_by_block():
    """The curve's top is the peak of the step, blocks follow each other, and the trainer stays as it was."""
    net = fastff.models.resnet18(10, width=2, stem="cifar", in_channels=1)
    trainer = fastff.Trainer(fastff.SFF(net, 10, "stage", (1, 8, 8)))
    images, target = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    trainer.train_mode()
    for _ in range(2):
        trainer.step(images, target)
    curve, visits = by_block(trainer, images, target)
    assert [index for _, index in visits] == list(range(len(trainer.sff.blocks)))
    times = [time for time, _ in curve]
    assert times == sorted(times) and times[-1] > visits[-1][0] > visits[0][0] >= 0
    assert abs(max(value for _, value in curve) - peak_memory(lambda: trainer.step(images, target))) < 0.05
    assert not any("visit" in vars(block) for block in trainer.sff.local_blocks)
