"""Trainer against block-local training written naively with autograd."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from oracle import LABELS, eager_layer_norm
from training_oracle import (
    adamw,
    assert_same_training,
    batches,
    grouped,
    made,
    naive_training,
    sgd,
    train,
    vector,
)

from fastff import Trainer, reference
from fastff import plan as plans

# --- ten steps


CASES = [
    (model, granularity, window, optimizer)
    for model in ("resnet18", "mobilenet_v3_small")
    for granularity, window, optimizer in [
        ("block", 1, sgd), ("block", 2, sgd), ("block", 3, sgd), ("layer", 1, sgd), ("layer", 2, sgd), ("layer", 3, sgd),
        ("block", 1, adamw), ("block", 2, adamw), ("layer", 1, adamw),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("model", "granularity", "window", "optimizer"), CASES)
def test_ten_steps_equal_naive_training(model, granularity, window, optimizer):
    """Weights, batch-norm statistics and losses, in float64: to 1e-7, for ten steps amplify the last bit of the first."""
    sff = made(model, granularity=granularity, bias=True)
    naive = copy.deepcopy(sff)
    data = batches(sff)
    start = vector(sff)
    losses = train(Trainer(sff, optimizer, window=window), data)
    expected = naive_training(naive, data, optimizer, window)
    assert float((vector(sff) - start).abs().max()) > 1e-2, "nothing was trained"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-7, atol=1e-7)
    assert_same_training(sff, naive, 1e-7)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_reference_step_is_the_trainers(window):
    """With its own goodness, loss and normalisation, in the paper's setting."""
    sff = made(grid=0)
    plain, data = copy.deepcopy(sff), batches(sff)
    losses = train(Trainer(sff, sgd, window=window), data)
    blocks = [lambda x, block=block: (block(x),) for block in plain.model.features]
    heads = [lambda z, head=head: reference.goodness(z, head.weight) for head in plain.heads]
    pairs = zip(plain.model.features, plain.heads, strict=True)
    optimizers = [sgd(grouped([*block.parameters(), *head.parameters()])) for block, head in pairs]
    plain.train()
    segments = plans.window(window, len(blocks)).at(0)
    expected = [reference.train_step(blocks, heads, optimizers, *batch, segments) for batch in data]
    torch.testing.assert_close(torch.tensor(losses), torch.stack(expected), rtol=1e-7, atol=1e-7, check_dtype=False)
    assert_same_training(sff, plain, 1e-7)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small"])
def test_ten_steps_in_float32(model, window):
    """About as far from the float64 weights as naive training in float32: ten steps amplify roundings, whichever they are."""
    exact = made(model)
    data = batches(exact)
    single, naive = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    narrow = [(images.float(), target) for images, target in data]
    naive_training(exact, data, sgd, window)
    naive_training(naive, narrow, sgd, window)
    train(Trainer(single, sgd, window=window), narrow)
    error, allowed = ((vector(s) - vector(exact)).norm() for s in (single, naive))
    assert 0 < error <= 4 * allowed, f"{error:.3g} from the float64 weights, naive training is {allowed:.3g}"


@pytest.mark.parametrize(
    "options",
    [
        {"learn_tau": True, "tau": 0.5},
        {"margin": 1.0, "label_smoothing": 0.1},
        {"kernel_size": 3, "grid": 0},
        {"grid": 0, "bias": True},
        {"squares": False},
        {"hidden": 7},
        {"hidden": 7, "squares": False, "learn_tau": True, "margin": 1.0, "label_smoothing": 0.1},
    ],
)
@pytest.mark.parametrize("window", [1, 2])
def test_options_of_the_heads(options, window):
    sff = made(**options)
    naive, data = copy.deepcopy(sff), batches(sff, 5)
    train(Trainer(sff, adamw, window=window), data)
    naive_training(naive, data, adamw, window)
    assert_same_training(sff, naive)
    if "learn_tau" in options:
        assert all(float(head.log_tau.detach().exp()) != 0.5 for head in sff.heads)


@pytest.mark.parametrize("window", [1, 3])
def test_normalisation_over_channels_and_none(window):
    for normalize, norm in (
        ("layer_norm_channels", lambda x: F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)),
        (None, lambda x: x),
    ):
        sff = made(normalize=normalize)
        naive, data = copy.deepcopy(sff), batches(sff, 4)
        train(Trainer(sff, sgd, window=window), data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("training_oracle.eager_layer_norm", norm)
            naive_training(naive, data, sgd, window)
        assert_same_training(sff, naive)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("parts", [2, 3, 7, 50])
def test_micro_batches_add_up(parts, window):
    """Also where the last part is smaller; in a net without batch norm they change nothing."""
    whole = made()
    cut, data = copy.deepcopy(whole), batches(whole, 4, size=7)
    a = train(Trainer(whole, adamw, window=window), data)
    trainer = Trainer(cut, adamw, window=window, micro_batches=parts)
    b = train(trainer, data)
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-6)
    assert_same_training(cut, whole)


@pytest.mark.parametrize("window", [1, 2])
def test_gradients_are_clipped_block_by_block(window):
    sff = made()
    naive, free, data = copy.deepcopy(sff), copy.deepcopy(sff), batches(sff, 4)
    train(Trainer(sff, sgd, window=window, clip_grad_norm=0.1), data)
    naive_training(naive, data, sgd, window, clip=0.1)
    assert_same_training(sff, naive)
    train(Trainer(free, sgd, window=window), data)
    assert float((vector(free) - vector(sff)).abs().max()) > 1e-3, "0.1 clipped nothing"


@pytest.mark.parametrize("window", [1, 2, 3])
def test_frozen_blocks(window):
    """They keep every bit, batch-norm statistics too, no loss reaches into them, and their heads still say what they see."""
    sff = made("resnet18", granularity="block")
    naive, before, data = copy.deepcopy(sff), copy.deepcopy(sff), batches(sff, 4)
    trainer = Trainer(sff, sgd, window=window, frozen=4)
    losses = train(trainer, data)
    assert all(row[:4] == [0.0] * 4 and min(row[4:]) > 0 for row in losses)
    expected = naive_training(naive, data, sgd, window, frozen=4)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-9, atol=1e-9)
    assert_same_training(sff, naive)
    for (name, a), b in zip(sff.model.state_dict().items(), before.model.state_dict().values(), strict=True):
        frozen = name.startswith(("conv1", "bn1", "layer1", "layer2.0"))
        if not name.startswith("fc") and not name.endswith("num_batches_tracked"):
            assert torch.equal(a, b) == frozen, name
    assert set(trainer.engine.scores(data[0][0])) == {"vote", *(f"block {i}" for i in range(9))}


def test_greedy_trains_one_block_after_the_other():
    sff = made("resnet18", granularity="stage")
    data, trained = batches(sff, 3), []

    class Watched(Trainer):
        def step(self, images, target):
            before = [[p.detach().clone() for p in self.sff.block_parameters(i)] for i in range(4)]
            running = [[b.clone() for b in block.buffers()] for block in self.sff.blocks]
            losses = super().step(images, target)
            changed = [i for i in range(4) if not all(map(torch.equal, before[i], self.sff.block_parameters(i)))]
            statistics = [i for i in range(4) if not all(map(torch.equal, running[i], self.sff.blocks[i].buffers()))]
            assert changed == statistics == losses.nonzero().flatten().tolist()
            trained.extend(changed)
            return losses

    trainer = Watched(
        sff, functools.partial(torch.optim.SGD, lr=0.05), schedule="greedy", window=1, lr_schedule="constant"
    )
    history = trainer.fit(data, epochs=2, progress=False)
    assert trained == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    assert len(history) == 8
    assert trainer.steps == 24


@pytest.mark.parametrize("window", [1, 2])
def test_readout_learns_on_detached_features(window):
    """The blocks train to the same bits with and without it; it is plain cross-entropy on the last block's normalised output."""
    sff, without = made(readout=True), made()
    data, classifier = batches(sff, 5), copy.deepcopy(sff.model.fc)
    trainer, other, optimizer = (
        Trainer(sff, sgd, window=window),
        Trainer(without, sgd, window=window),
        sgd(grouped(classifier.parameters())),
    )
    train(trainer, data)
    for images, target in data:
        with torch.no_grad():
            x = images
            for block in without.model.features:
                x = eager_layer_norm(block(x))
        optimizer.zero_grad()
        F.cross_entropy(classifier(x.mean((2, 3))), target).backward()
        optimizer.step()
        other.step(images, target)
    for name, value in without.state_dict().items():
        assert torch.equal(value, sff.state_dict()[name]) or name.startswith("model.fc"), name
    torch.testing.assert_close(sff.model.fc.weight, classifier.weight, rtol=1e-9, atol=1e-9)
    assert "readout" in trainer.engine.scores(data[0][0])


def test_every_block_is_compiled():
    """All 17, for training and for evaluation, though they share a forward method."""
    sff, compiled = made("resnet18", granularity="layer"), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    alive = (batches(sff, 1)[0][0],)
    want = sff.goodness(alive[0])
    forwards = [block.compiled(backend=backend, dynamic=False) for block in sff.blocks]
    for forward, block, goodness in zip(forwards, sff.local_blocks, want, strict=True):
        main, *others = forward(*alive)
        torch.testing.assert_close(block.head(main), goodness)
        alive = (block.next_input(main), *others)
    assert len(compiled) == 17


# --- 16 bits


def test_bf16_autocast():
    """Not further from the float64 weights than naive training under the same autocast."""
    exact = made("resnet18")
    data = batches(exact, 5)
    narrow = [(images.float(), target) for images, target in data]
    for window in (1, 2):
        wide, amp, naive = (copy.deepcopy(exact).to(t) for t in (torch.float64, torch.float32, torch.float32))
        naive_training(wide, data, sgd, window)
        naive_training(naive, narrow, sgd, window, amp=torch.bfloat16)
        train(Trainer(amp, sgd, window=window, amp="bf16"), narrow)
        error, allowed = ((vector(s) - vector(wide)).norm() for s in (amp, naive))
        assert 1e-4 < error <= 1.5 * allowed, (
            f"window {window}: {error:.3g} from the float64 weights, naive training is {allowed:.3g}"
        )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_fp16_with_a_scale_for_each_block(window, parts):
    """Scales that differ between the blocks of a window cancel: closer to float64 than naive training in bfloat16 is."""
    exact = made()
    wide, half, naive = (copy.deepcopy(exact).to(t) for t in (torch.float64, torch.float32, torch.float32))
    data = batches(exact, 5)
    narrow = [(images.float(), target) for images, target in data]
    naive_training(wide, data, sgd, window)
    naive_training(naive, narrow, sgd, window, amp=torch.bfloat16)
    trainer = Trainer(half, sgd, window=window, amp="fp16", micro_batches=parts)
    for index, _ in enumerate(trainer.engine.scalers):
        trainer.engine.scalers[index] = torch.amp.GradScaler("cpu", init_scale=2.0 ** (5 + 3 * (index % 2)))
    train(trainer, narrow)
    error, allowed = ((vector(s) - vector(wide)).norm() for s in (half, naive))
    assert 0 < error <= allowed, f"{error:.3g} from the float64 weights, bfloat16 is {allowed:.3g}"


def test_fp16_step_that_overflows_is_skipped_for_that_block_alone():
    sff = made(dtype=torch.float32)
    data = batches(sff, 1, dtype=torch.float32)
    trainer = Trainer(sff, sgd, window=1, amp="fp16")
    scales = [2.0**6, 2.0**40, 2.0**6, 2.0**6]
    trainer.engine.scalers[:] = [torch.amp.GradScaler("cpu", init_scale=scale) for scale in scales]
    before = [[p.detach().clone() for p in sff.block_parameters(i)] for i in range(4)]
    train(trainer, data)
    kept = [all(map(torch.equal, before[i], sff.block_parameters(i))) for i in range(4)]
    assert kept == [False, True, False, False]
    assert [s.get_scale() for s in trainer.engine.scalers] == [2.0**6, 2.0**39, 2.0**6, 2.0**6]


# --- counts, labels, seeds


def test_counts_what_each_block_had_right():
    sff = made()
    ((images, target),) = batches(sff, 1, size=9)
    expected = [int((g.argmax(1) == target).sum()) for g in sff.goodness(images)]
    for options in ({"window": 1}, {"window": 2}, {"window": 1, "micro_batches": 4}):
        trainer = Trainer(copy.deepcopy(sff), sgd, **options)
        trainer.step(images, target)
        assert trainer.correct.tolist() == expected


@pytest.mark.parametrize("layout", LABELS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("plain", {"granularity": "layer", "grid": 2}),
        ("resnet18", {"grid": 0}),
        ("mobilenet_v3_small", {"bias": True}),
    ],
)
def test_labels_of_any_stride(name, options, layout):
    """A data set with several labels an image hands in a column of them: with or without a fused tail the step is that of a copy."""
    results = []
    for lay in (lambda target: target.clone(), LABELS[layout]):
        sff = made(name, dtype=torch.float32, **options)
        data = [
            (images, target[:1].repeat(6) if layout == "expanded" else target)
            for images, target in batches(sff, 2, dtype=torch.float32)
        ]
        losses = train(Trainer(sff), [(images, lay(target)) for images, target in data])
        results.append((losses, vector(sff)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_same_seed_same_bits():
    results = []
    for _ in range(2):
        sff = made("mobilenet_v3_small", dtype=torch.float32)
        train(Trainer(sff), batches(sff, 3, dtype=torch.float32))
        results.append(vector(sff))
    assert torch.equal(*results)
