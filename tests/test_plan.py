"""Plans of a step: segments, cuts that move, blocks that finish early."""

import copy
import functools
import itertools

import pytest
import torch
from training_oracle import CLASSES, adamw, assert_same_training, batches, made, naive_training, sgd, train, vector

from fastff import SFF, Backprop, Trainer, models
from fastff import plan as plans
from fastff.memory import peak_memory
from fastff.plan import Segment
from fastff.training.step import Part, in_parts

OVERLAPPING = plans.Turns(((Segment(0, 1), Segment(0, 2), Segment(2, 3)),), "overlapping")
PLANS = {
    "two segments": [1, 3], "a long one": [0, 3], "end to end": [3], "turns": [[1, 3], [0, 2, 3], [3]], "pairs": "pairs", "drawn": "drawn",
    "overlapping": OVERLAPPING, "in parts": [Segment(0, 1, 2), Segment(2, 2), Segment(3, 3)],
}  # fmt: skip


def test_segments_and_turns():
    assert plans.of([1, 3, 8], 9).at(5) == (Segment(0, 1), Segment(2, 3), Segment(4, 8))
    assert plans.window(2, 3).at(0) == (Segment(0, 0), Segment(0, 1), Segment(1, 2))
    pairs = plans.pairs(5)
    assert pairs.at(0) == (Segment(0, 1), Segment(2, 3), Segment(4, 4))
    assert pairs.at(1) == (Segment(0, 0), Segment(1, 2), Segment(3, 4))
    assert pairs.at(2) == pairs.at(0) and pairs.voters == (0, 1, 2, 3, 4)
    assert plans.of([1, 3, 8], 9).at(0, start=3) == (Segment(3, 3), Segment(4, 8))
    drawn = plans.Drawn(9, seed=1)
    steps = [drawn.at(t) for t in range(200)]
    assert steps == [drawn.at(t) for t in range(200)] and len(set(steps)) > 100
    for segments in steps:
        assert [i for s in segments for i in range(s.first, s.last + 1)] == list(range(9))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_ten_steps_equal_naive_training(plan, parts):
    sff = made(window=1)
    naive, data = copy.deepcopy(sff), batches(sff, size=16)
    losses = train(Trainer(sff, adamw, plan=plan, micro_batches=parts), data)
    expected = naive_training(naive, data, adamw, plan=plans.of(plan, 4))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert_same_training(sff, naive, 1e-7)


@pytest.mark.parametrize("plan", [[2, 4, 8], "pairs", [8]], ids=str)
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small"])
def test_batch_norm_and_shortcuts_inside_a_segment(model, plan):
    sff = made(model)
    plan = [2, 5, len(sff.blocks) - 1] if plan == [2, 4, 8] else [len(sff.blocks) - 1] if plan == [8] else plan
    naive, data = copy.deepcopy(sff), batches(sff, steps=3)
    losses = train(Trainer(sff, sgd, plan=plan), data)
    expected = naive_training(naive, data, sgd, plan=plans.of(plan, len(sff.blocks)))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert_same_training(sff, naive, 1e-6)


@pytest.mark.parametrize("plan", [[2, 4, 8], "pairs"], ids=str)
def test_fused_and_unfused_segments_agree_in_float32(plan):
    sffs = [made("resnet18", torch.float32, fuse=fuse, plan=plan) for fuse in (True, False)]
    data = batches(sffs[0], steps=2, dtype=torch.float32)
    a, b = (train(Trainer(sff, sgd), data) for sff in sffs)
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-4)
    difference = vector(sffs[0]) - vector(sffs[1])
    assert difference.abs().max() < 1e-3


def test_a_segment_in_parts_is_one_in_micro_batches():
    """With batch norm, whose statistics are those of a part: one segment in two parts, and both in two."""
    sffs = [made("resnet18", plan=[Segment(0, 3, 2), Segment(4, 8, parts)]) for parts in (2, 1)]
    sffs.append(made("resnet18", plan=[3, 8]))
    data = batches(sffs[0], steps=2, size=12)
    losses = [train(Trainer(sff, sgd, micro_batches=n), data) for sff, n in zip(sffs, (1, 1, 2), strict=True)]
    assert losses[0] == losses[2]
    assert_same_training(sffs[0], sffs[2], 1e-12)
    first, other = (
        Trainer(made("resnet18", plan=[Segment(0, 3, 2), *rest]), sgd) for rest in ([Segment(4, 8)], [Segment(4, 8, 3)])
    )
    assert train(first, data)[0][3] == train(other, data)[0][3] == losses[1][0][3]
    assert torch.equal(first.engine.sff.model.bn1.running_var, other.engine.sff.model.bn1.running_var)


def test_few_samples_are_not_taken_in_parts():
    """A part of one sample would be one value for a batch norm whose channels have one position."""
    trainer = Trainer(made("resnet18", plan=[Segment(0, 8, 2)]), sgd)
    for size, parts in ((12, 2), (5, 1)):
        train(trainer, batches(trainer.engine.sff, steps=1, size=size))
        assert trainer.engine.step.parts == parts


def test_parts_of_a_minibatch_are_cut_anew():
    x, y = torch.arange(10.0), torch.arange(10)
    parts = in_parts([Part((x, None), y, 1.0, 10)], 4)
    assert (
        [p.alive[0].tolist() for p in parts]
        == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
        == [p.target.tolist() for p in parts]
    )
    assert [p.share for p in parts] == [0.3, 0.3, 0.3, 0.1] and all(
        p.alive[1] is None and p.samples == 10 for p in parts
    )
    given = parts
    parts = in_parts(parts, 2)
    assert parts is given and [p.alive[0].tolist() for p in parts] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    pairs = in_parts(in_parts([Part((x,), None, 1.0, 10)], 3), 2)  # positive images, then negative ones
    assert [p.alive[0].tolist() for p in pairs] == [[0, 1, 2, 5, 6, 7], [3, 4, 8, 9]]
    constant = [Part((x[:5], torch.ones(3)), y[:5], 0.5, 10), Part((x[5:], torch.ones(3)), y[5:], 0.5, 10)]
    assert in_parts(list(constant), 1) == constant  # 3 is no number of samples


def test_frozen_blocks_are_in_no_segment():
    sff = made()
    naive, data = copy.deepcopy(sff), batches(sff)
    before = copy.deepcopy(sff.blocks[0].state_dict())
    losses = train(Trainer(sff, sgd, plan=[1, 3], frozen=1), data)
    expected = naive_training(naive, data, sgd, frozen=1, plan=plans.of([0, 2], 3))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert_same_training(sff, naive, 1e-7)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), sff.blocks[0].state_dict().values(), strict=True))


def test_heads_without_a_loss_stay_and_do_not_vote():
    sff = made(plan=[1, 3])
    before = [head.weight.detach().clone() for head in sff.heads]
    images, target = batches(sff, steps=1)[0]
    trainer = Trainer(sff, sgd)
    losses = trainer.step(images, target)
    assert [bool(loss) for loss in losses] == [False, True, False, True]
    assert [torch.equal(a, head.weight) for a, head in zip(before, sff.heads, strict=True)] == [
        True,
        False,
        True,
        False,
    ]
    goodness = sff.goodness(images)
    assert len(goodness) == 2
    first, second = (sff.heads[i].logits(g).log_softmax(1) for i, g in zip((1, 3), goodness, strict=True))
    torch.testing.assert_close(sff(images), ((first + 2 * second) / 3).softmax(1))
    assert list(trainer.evaluate([(images, target)])) == ["vote", "block 1", "block 3"]
    assert set(sff.predict(images, exit_threshold=1e-9).block.tolist()) == {1}
    assert set(sff.predict(images).block.tolist()) == {3}


def small(**options):
    torch.manual_seed(0)
    return SFF(models.resnet18(CLASSES, stem="cifar", width=4), CLASSES, input_shape=(3, 16, 16), **options)


def loader(sff, batches_in_epoch=5):
    return batches(sff, batches_in_epoch, size=4, dtype=torch.float32)


def test_blocks_that_finish_early():
    sff, rates, still = small(plan=[4, 8]), [], []
    trainer = Trainer(sff, sgd, finish=0.5)

    class Watch:
        def start(self, *_): ...
        def epoch(self, *_): ...
        def close(self): ...
        def update(self, state, *_):
            rates.append(
                [group["lr"] for optimizer in trainer.engine.block_optimizers for group in optimizer.param_groups[:1]]
            )
            still.append(
                (trainer.engine.start, [block.training for block in map(functools.partial(module_of, sff), range(9))])
            )

    trainer.fit(loader(sff), 4, progress=Watch())
    ends = [1 - 0.5 * (1 - i / 8) for i in range(9)]
    for step, (row, (start, training)) in enumerate(zip(rates, still, strict=True), 1):
        finished = sum(step / 20 > end for end in ends[:-1])
        assert start == finished and training == [i >= finished for i in range(9)]
        assert all(row[i] == 0 for i in range(finished))
    assert still[-1][0] == 8 and rates[9][0] == 0  # the first block after half of the steps
    state = trainer.sff.state_dict()
    assert all(t.isfinite().all() for t in state.values())


def test_blocks_that_are_trained_again_in_a_longer_fit_are_in_training_mode():
    trainer = Trainer(small(plan=[4, 8]), sgd, finish=0.9)
    data, seen = loader(trainer.sff), []

    class Watch:
        def start(self, *_): ...
        def epoch(self, *_): ...
        def close(self): ...
        def update(self, *_):
            modes = [module_of(trainer.sff, i).training for i in range(9)]
            seen.append((trainer.engine.start, modes))

    for epochs in (1, 8):
        trainer.fit(data, epochs, progress=Watch())
    assert seen[4][0] == 8 and seen[5][0] < 4
    assert all(modes == [i >= start for i in range(9)] for start, modes in seen)


def module_of(sff, index):
    return next(m for m in sff.blocks[index].modules() if isinstance(m, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("options", [{"plan": "pairs"}, {"plan": "drawn"}, {"plan": [3, 8], "finish": 0.7}], ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, options):
    def trainer():
        return Trainer(small(), adamw, **options)

    class Stop(Exception):
        pass

    class StopAfter:
        def __init__(self, steps):
            self.steps = steps

        def start(self, *_): ...
        def epoch(self, *_): ...
        def close(self): ...
        def update(self, state, *_):
            if state.steps == self.steps:
                raise Stop

    data = loader(small(), 7)
    whole, stopped = trainer(), trainer()
    whole.fit(data, 3, progress=False)
    with pytest.raises(Stop):
        stopped.fit(data, 3, out=tmp_path, save_every=1, progress=StopAfter(12))
    resumed = trainer()
    resumed.load(tmp_path / "checkpoint.pt")
    assert 0 < resumed.steps <= 12
    resumed.fit(data, 3, progress=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.sff.state_dict().values(), resumed.sff.state_dict().values(), strict=True)
    )
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert all(a[key] == b[key] or a[key] != a[key] for key in a if key != "seconds")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"plan": "spirals"}, ValueError, "plan: expected 'pairs', 'drawn', .* got 'spirals'"),
        ({"plan": [1, 2]}, ValueError, r"plan: expected blocks in ascending order, the last of them block 3, .* got \[1, 2\]"),
        ({"plan": [2, 1, 3]}, ValueError, "plan: expected blocks in ascending order"),
        ({"plan": [1.5, 3]}, ValueError, "plan: expected a whole number"),
        ({"plan": 3}, TypeError, "plan: expected .* got 3"),
        ({"plan": [[1, 3], [2]]}, ValueError, r"plan: expected .* got \[2\]"),
        ({"plan": plans.window(1, 3)}, ValueError, "plan: expected one whose last loss is that of block 3, .* got window 1"),
        ({"plan": [1, 3], "window": 2}, ValueError, "window: expected None beside a plan, got 2"),
        ({"plan": [1, 3], "schedule": "greedy"}, ValueError, "plan: expected none with schedule='greedy'"),
        ({"finish": 1.0}, ValueError, "finish: expected a number of at least 0 and below 1, got 1.0"),
        ({"finish": "soon"}, ValueError, "finish: expected a number"),
    ],
)  # fmt: skip
def test_unusable_plans(options, error, message):
    with pytest.raises(error, match=message):
        Trainer(made(), sgd, **options)


# --- memory


@pytest.fixture(scope="module")
def counted():
    torch.manual_seed(0)
    net = models.resnet18(CLASSES, stem="cifar", width=16).to(memory_format=torch.channels_last)
    return SFF(net, CLASSES, input_shape=(3, 16, 16), memory=0.5, batch_size=32)


def test_a_step_keeps_to_the_memory_that_was_counted(counted):
    images = torch.randn(32, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    target = torch.arange(32) % CLASSES
    memory = counted.segment_memory
    most = max(memory(*segment) for segment in counted.plan.at(0))
    trainer = Trainer(copy.deepcopy(counted), adamw)
    whole = Backprop(SFF(copy.deepcopy(counted.model), CLASSES, input_shape=(3, 16, 16), readout=True), adamw)
    for loop, expected in ((trainer, most), (whole, memory.backprop)):
        for _ in range(2):
            loop.step(images, target)
        assert peak_memory(lambda loop=loop: loop.step(images, target)) * 2**20 == pytest.approx(expected, rel=0.1)
    assert most <= 0.5 * memory.backprop


def test_the_fewest_segments(counted):
    memory, found = counted.segment_memory, counted.plan.at(0)
    assert [i for s in found for i in range(s.first, s.last + 1)] == list(range(9))
    for first, second in itertools.pairwise(found):
        assert memory(first.first, second.last, 2) > 0.5 * memory.backprop, "the two could be one"
    text = repr(counted)
    assert all(f"{first} to {last}" in text for first, last, _ in found)
    assert f"of the {memory.backprop / 2**20:,.1f} MiB of backpropagation" in text
    late = counted.plan.at(0, start=found[1].first)
    assert late[0].first == found[1].first and {s.last for s in late} <= {s.last for s in found}


def test_parts_need_less_memory(counted):
    memory, most = counted.segment_memory, 0.5 * counted.segment_memory.backprop
    whole, parts = plans.Budget(memory, most, parts=1).at(0), counted.plan.at(0)
    assert len(parts) < len(whole) and parts[0].parts == 2 and {s.parts for s in whole} == {1}
    assert plans.least(memory, parts=2) <= plans.least(memory, parts=1)
    assert memory(0, 3, 2) < 0.6 * memory(0, 3)


def test_one_segment_is_called_backpropagation(counted):
    """As the plan of MobileNetV3-large with memory=0.4 is, in halves."""
    said = "this plan is backpropagation through the whole model"
    sff = copy.deepcopy(counted)
    sff.set_plan(memory=1, batch_size=32)  # counted already, so that the line stands before the table
    assert sff.plan.at(0) == (Segment(0, 8),) and f"{said}\nsegment" in repr(sff)
    for parts, text in ((1, "\n"), (2, ", half a minibatch at a time\n"), (3, ", a minibatch in 3 parts\n")):
        sff.set_plan([Segment(0, 8, parts)])
        assert said + text in repr(sff) + "\n"
    for plan in ([3, 8], [Segment(3, 8)], "drawn", "pairs", [[8], [3, 8]]):
        sff.set_plan(plan)
        assert said not in repr(sff)
    assert said not in repr(counted)


def test_counting_leaves_the_network_as_it_is():
    sff = small(window=1)
    before, state = copy.deepcopy(sff.state_dict()), torch.get_rng_state()
    sff.set_plan(memory=0.9)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), sff.state_dict().values(), strict=True))
    assert all(p.grad is None for p in sff.parameters())


def test_memory_is_counted_without_labels():
    sff = small(goodness="sum_of_squares", memory=0.9)
    trainer = Trainer(sff, sgd)
    trainer.step(torch.randn(8, 3, 16, 16))
    assert 0 < sff.segment_memory(0, 8) < sff.segment_memory.backprop * 1.5


def test_too_little_memory_is_refused_with_the_least():
    with pytest.raises(
        ValueError, match=r"memory: expected at least 0\.\d\d \(of backpropagation's\) or \d+ bytes, .* got 0.01"
    ):
        small(memory=0.01)
    for wrong in (0, -1, "much"):
        with pytest.raises(ValueError, match="memory: expected a finite number above 0"):
            small(memory=wrong)
    with pytest.raises(ValueError, match="memory: expected None beside a plan"):
        small(memory=0.5, plan=[8])


def test_the_default_plan_is_a_few_segments():
    sff = small()
    assert sff.window is None and sff.plan.at(0) == (Segment(0, 3, 2), Segment(4, 8))
    assert sff.plan.voters == (3, 8)


def test_chains_are_not_divided_by_a_segment_of_any_step():
    assert plans.window(1, 3).chains() == [range(1), range(1, 2), range(2, 3)]
    assert plans.window(2, 3).chains() == plans.pairs(3).chains() == plans.Drawn(3).chains() == [range(3)]
    assert plans.of([[0, 2, 4], [1, 2, 4]], 5).chains() == [range(3), range(3, 5)]
    assert plans.of([1, 3], 4).chains(1) == [range(1), range(1, 2), range(2, 4)]  # a frozen block is one of its own
    assert plans.Drawn(3).chains(1) == [range(1), range(1, 3)]


def test_a_plan_of_the_user_needs_no_chains_in_one_process():
    class Last:
        name, phases, voters = "last", 1, (8,)

        def at(self, t, start=0, phase=0):
            return (Segment(max(start, 7), 8),)

    assert Trainer(small(plan=Last()), adamw).engine.segments(3) == (Segment(7, 8),)
