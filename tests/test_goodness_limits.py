"""Goodness at its limits: empty batches, NaN, labels out of range, overflow, memory, and bits whatever the batch is cut into."""

import itertools

import pytest
import torch
from oracle import (
    LABELS,
    eager_goodness,
    eager_loss,
    memory_events,
    peak_memory,
    planned_for,
    same_bits,
)
from test_goodness import IMPLEMENTATIONS

import fastff.functional as ff


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_empty_batch(impl, kernel):
    x, weight = torch.empty(0, 3, 4, 5, requires_grad=True), torch.randn(6, 3, kernel, kernel, requires_grad=True)
    grid_weight = torch.randn(6, 3, 2, 2, requires_grad=True)
    g = ff.goodness(x, weight, grid_weight=grid_weight, padding=kernel // 2, impl=impl)
    assert g.shape == (0, 6)
    grads = torch.autograd.grad(g.sum(), (x, weight, grid_weight))
    assert grads[0].shape == x.shape
    assert not grads[1].any()
    assert not grads[2].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("algorithm", ["direct", "second_moment"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_stays_in_its_sample(impl, algorithm, value):
    """As in PyTorch: a sample with NaN or infinity has no finite loss and gradient; the others are as without it."""
    torch.manual_seed(0)
    x, weight, target = torch.randn(4, 3, 5, 5), torch.randn(6, 3), torch.tensor([0, 1, 2, 3])
    x[1, 2, 3, 3] = value
    step = ff.goodness_step(x, weight, None, target, reduction="none", impl=impl, algorithm=algorithm)
    eager = eager_goodness(x, weight[:, :, None, None])
    assert (
        step.loss.isnan().tolist()
        == eager_loss(eager, target, reduction="none").isnan().tolist()
        == [False, True, False, False]
    )
    assert step.goodness.isfinite().all(1).tolist() == eager.isfinite().all(1).tolist() == [True, False, True, True]
    assert not step.grad_weight.isfinite().any()
    others = [0, 2, 3]
    clean = ff.goodness_step(x[others], weight, None, target[others], reduction="none", impl=impl, algorithm=algorithm)
    for name in ("loss", "goodness", "grad_x", "normalized"):
        torch.testing.assert_close(getattr(step, name)[others], getattr(clean, name), rtol=1e-5, atol=1e-6)
    weight[2, 1] = value
    g = ff.goodness(x[others], weight, impl=impl, algorithm=algorithm)
    assert g.isfinite().all(0).tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("label", [-1, 6, 2**40])
def test_labels_out_of_range_raise(impl, label):
    x, weight, target = torch.randn(3, 4, 2, 2), torch.randn(6, 4), torch.tensor([0, label, 5])
    for call in (ff.goodness_step, ff.goodness_loss):
        with pytest.raises(ValueError, match=rf"target: expected labels in 0\.\.5, got {label}"):
            call(x, weight, None, target, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LABELS)
def test_labels_of_any_stride(impl, layout):
    """Labels may be a column of a matrix, or any other view. Around them lie numbers that are no labels."""
    x, weight, grid_weight = torch.randn(6, 4, 3, 3), torch.randn(7, 4), torch.randn(7, 4, 2, 2)
    target = torch.tensor([6] * 6) if layout == "expanded" else torch.tensor([3, 0, 6, 6, 1, 2])
    laid = LABELS[layout](target)
    assert torch.equal(laid, target)
    for call in (ff.goodness_step, ff.tail_step):
        for head in ({"weight": weight}, {"weight": weight, "grid_weight": grid_weight, "algorithm": "second_moment"}):
            got, want = (call(x, bias=None, **head, target=t, reduction="none", impl=impl) for t in (laid, target))
            assert all(a is b is None or same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_16_bit_activations_whose_squares_overflow():
    """Squares of float16 activations above 255 overflow; accumulated in float32 they must not."""
    x, weight = torch.full((2, 4, 3, 3), 300.0, dtype=torch.float16), torch.full((2, 4), 0.25, dtype=torch.float16)
    for algorithm in ("direct", "second_moment"):
        g = ff.goodness(x, weight, algorithm=algorithm)
        assert g.dtype == torch.float32
        assert g.tolist() == [[90000.0] * 2] * 2


@pytest.mark.parametrize("algorithm", ["auto", "direct", "second_moment"])
def test_large_head_is_never_formed_whole(algorithm):
    """No tensor as large as [B, K, P], or as one sample's [K, P], or as all samples' W S [B, K, C], beyond the budget."""
    torch.manual_seed(0)
    B, C, H, K, budget = 6, 8, 40, 500, 2**18
    x, weight, target = torch.randn(B, C, H, H), torch.randn(K, C), torch.randint(K, (B,))
    with planned_for(budget):
        ff.goodness_step(x, weight, None, target, algorithm=algorithm)  # loads what is loaded once
        step = memory_events(lambda: ff.goodness_step(x, weight, None, target, algorithm=algorithm))
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        both = memory_events(lambda: ff.goodness_loss(*leaves, None, target, algorithm=algorithm).backward())
    bound = max(4 * x.numel(), budget)
    assert 2 * bound < 4 * K * H * H, "one sample's outputs must not fit, or this test could not fail"
    assert 0 < max(step) <= bound
    assert 0 < max(both) <= bound
    memory = 4 * (2 * x.numel() + 4 * B * K + 3 * weight.numel()) + 4 * budget
    held = peak = 0
    for size in step:
        held += size
        peak = max(peak, held)
    assert peak <= memory, f"{peak} bytes at the peak, expected at most {memory}"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name in ("native", "torch")])
def test_memory_is_that_of_the_results(impl, dtype, layout):
    """dL/dx and the next input have x's size; some samples at a time are widened to float32. (Not for layer_norm_channels by PyTorch.)"""
    x = torch.randn(128, 32, 32, 32).to(dtype).contiguous(memory_format=layout)
    weight, target, size = torch.randn(10, 32), torch.zeros(128, dtype=torch.int64), x.numel() * x.element_size()
    for algorithm, need_grad_x, normalize in itertools.product(
        ("direct", "second_moment"), (True, False), (None, "layer_norm", "rms")
    ):
        options = {"algorithm": algorithm, "need_grad_x": need_grad_x, "normalize": normalize, "impl": impl}
        with planned_for(2**20):
            ff.goodness_step(x, weight, None, target, **options)
            peak = peak_memory(lambda o=options: ff.goodness_step(x, weight, None, target, **o))
        some = 0 if impl == "native" else 2**20 + 4 * 4 * 2**18
        results = (need_grad_x + (normalize is not None)) * size
        assert peak <= results + some + 2**16, (
            f"{options}: {peak / size:.2f} times x, of which results {results / size:.0f}"
        )


def test_same_loss_whatever_the_batch_is_cut_into():
    """Each sample's goodness does not depend on its neighbours' values."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 5, 6, 6), torch.randn(9, 5)
    whole = ff.goodness(x, weight)
    with planned_for(400):
        torch.testing.assert_close(ff.goodness(x, weight), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.cat([ff.goodness(part, weight) for part in x.split(3)]), whole, rtol=1e-5, atol=1e-6
    )


@pytest.mark.skipif("native" not in IMPLEMENTATIONS, reason="of the C++ kernel")
@pytest.mark.parametrize("algorithm", ["direct", "second_moment"])
@pytest.mark.parametrize(("shape", "classes"), [((33, 12, 6, 5), 20), ((3, 40, 20, 20), 70), ((50, 24, 2, 2), 9)])
def test_the_number_of_threads_changes_no_bit(shape, classes, algorithm):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(classes, shape[1]), torch.randn(classes)
    grid_weight, target = torch.randn(classes, shape[1], 3, 2), torch.randint(classes, shape[:1])
    before, steps = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            step = ff.goodness_step(
                x, weight, bias, target, grid_weight=grid_weight, impl="native", algorithm=algorithm
            )
            steps.append(step)
    finally:
        torch.set_num_threads(before)
    for step in steps[1:]:
        for a, b in zip(step, steps[0], strict=True):
            assert a is None or torch.equal(a, b)
