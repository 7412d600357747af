"""What the tests compare with: the goodness loss in eager PyTorch, memory layouts users hand in, tolerances, measured memory."""

import contextlib
import os

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fastff import flat
from fastff.ops import plan

TRUNCATES = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # Triton's interpreter narrows float32 to bfloat16 by cutting it off

# activations of tail_step by name, and where their derivatives jump
EAGER = {
    "none": lambda h: h,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
}
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}


def eager_goodness(x, weight, bias=None, grid_weight=None, padding=0, hidden=None, norm=None):
    """x [B, C, H, W] -> g [B, K] as anyone would write it: convolution, square, mean; adaptive pooling [, convolution, batch norm, ReLU], linear.

    hidden: (weight [M, C], gamma, beta, eps, mean, var) or None; norm: an nn.BatchNorm2d in place of all but the first."""
    g = 0
    if weight is not None:
        g = F.conv2d(x, weight, bias, padding=padding).square().mean((2, 3))
    if grid_weight is not None:
        rows, columns = (min(n, cells) for n, cells in zip(x.shape[2:], grid_weight.shape[2:], strict=True))
        cells = F.adaptive_avg_pool2d(x, (rows, columns))
        if hidden is not None:
            u, *affine, eps, mean, var = hidden
            z = F.conv2d(cells, u[:, :, None, None])
            cells = F.relu(norm(z) if norm else F.batch_norm(z, mean, var, *affine, training=mean is None, eps=eps))
        g = g + cells.flatten(1) @ grid_weight[:, :, :rows, :columns].flatten(1).T
    return g


def eager_loss(g, target, tau=1.0, margin=0.0, label_smoothing=0.0, reduction="mean"):
    u = tau * g
    if margin:
        u = u.scatter_add(1, target[:, None], torch.full_like(u[:, :1], -margin))
    return F.cross_entropy(u, target, label_smoothing=label_smoothing, reduction=reduction)


def softplus(z):
    """F.softplus without its threshold: that is z itself above 20, which in float64 is off by 2e-9."""
    return -F.logsigmoid(-z)


def eager_layer_norm(x, eps=1e-5):
    return F.layer_norm(x, x.shape[1:], eps=eps)


def assert_as_exact(name, got, exact, plain, magnitude=None):
    """`got` may be four times as far from the float64 result as plain PyTorch is in the dtype the arithmetic is done in, plus a few roundings.

    `plain` of 16-bit inputs is computed in float32, so that nothing but the rounding of the result itself is allowed for them.
    magnitude: the result with every term of its sums made positive, whose roundings an order of summation may bring in.
    """
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}"
    if exact.numel() == 0:
        return
    exact = exact.double()
    scale = (exact if magnitude is None else magnitude.double()).abs().max()
    compute = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    allowed = 4 * (plain.double() - exact).abs().max() + 4 * compute * scale
    ulps = 1 if TRUNCATES and got.dtype == torch.bfloat16 else 0.5
    rounding = exact.abs() * torch.finfo(got.dtype).eps * ulps * (1 + 2**-7) + torch.finfo(got.dtype).smallest_normal
    excess = (got.double() - exact).abs() - allowed - (rounding if got.dtype in (torch.bfloat16, torch.float16) else 0)
    assert bool((excess <= 0).all()), f"{name} ({got.dtype}): {excess.max():.3g} beyond the {allowed:.3g} allowed"


# --- layouts: (values) -> (the same values laid out so, the memory around them)


def _within(values, shape, index):
    big = torch.full(shape, float("nan"), dtype=values.dtype)
    part = big[index]
    part.copy_(values)
    return part, big


def _sliced(values):
    return _within(values, [n + 3 for n in values.shape], tuple(slice(1, n + 1) for n in values.shape))


def _every_other(values):
    return _within(values, [2 * n for n in values.shape], tuple(slice(None, None, 2) for _ in values.shape))


def _transposed(values):
    big = values.mT.contiguous()
    return big.mT, big


def _batch_inside(values):
    big = values.transpose(0, 1).contiguous()
    return big.transpose(0, 1), big


def _channels_last(values):
    values = values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values.contiguous()
    return values, values


def _channels_of_channels_last(values):
    """Some channels of a channels_last tensor."""
    big = torch.full((*values.shape[:1], values.shape[1] + 2, *values.shape[2:]), float("nan"), dtype=values.dtype)
    big = big.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else big
    part = big[:, 1:-1]
    part.copy_(values)
    return part, big


def _expanded(values):
    """The last dimension repeated in memory of stride 0: changes the values."""
    big = values[..., :1].contiguous()
    return big.expand(values.shape), big


LAYOUTS = {
    "contiguous": lambda values: (values.contiguous(), values),
    "channels_last": _channels_last,
    "slice": _sliced,
    "every other": _every_other,
    "transposed": _transposed,
    "batch inside": _batch_inside,
    "channels of channels_last": _channels_of_channels_last,
    "expanded": _expanded,
}


def _offset(values):
    """Contiguous, from the fourth number of its memory on."""
    big = torch.full((values.numel() + 7,), float("nan"), dtype=values.dtype)
    part = big[3 : 3 + values.numel()].view(values.shape)
    part.copy_(values)
    return part, big


def _one_element(values):
    """One number for all, as the gradient of a sum is: changes the values."""
    big = torch.full((5,), float("nan"), dtype=values.dtype)
    big[2] = values.flatten()[0]
    return big[2].expand(values.shape), big


EVERY_LAYOUT = LAYOUTS | {"offset": _offset, "one element": _one_element}
OVERLAPPING = {
    "expanded",
    "one element",
}  # several elements in one place: the values change, and nothing may be written


def layouts_of(dimensions):
    """Names of the layouts that a tensor of so many dimensions may have."""
    if dimensions == 0:
        return ["contiguous", "offset", "one element"]
    return sorted(
        EVERY_LAYOUT.keys()
        - ({"transposed", "batch inside", "channels of channels_last"} if dimensions == 1 else set())
    )


def _labels_within(target, count, start, step):
    """`target` as every step-th of so many numbers, of which the others are no labels: read as one, they raise or lead out of memory."""
    big = torch.full((count,), 2**40)
    part = big[start : start + step * (len(target) - 1) + 1 : step]
    part.copy_(target)
    return part


LABELS = {
    "contiguous": lambda target: target.contiguous(),
    "slice": lambda target: _labels_within(target, len(target) + 7, 3, 1),
    "column": lambda target: _labels_within(target, 5 * len(target), 1, 5),
    "every other": lambda target: _labels_within(target, 2 * len(target), 1, 2),
    "expanded": lambda target: target[:1].clone().expand(len(target)),  # changes the values
}


def same_bits(a, b):
    """Equal, NaN for NaN."""
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@contextlib.contextmanager
def planned_for(budget):
    """Plans made for so many bytes of temporaries (None: this machine's): small ones force many chunks, tiles and recomputation."""
    if budget is None:
        yield
        return
    before = plan.budget
    plan.budget = lambda device_type: budget
    plan.plan.cache_clear()
    try:
        yield
    finally:
        plan.budget = before
        plan.plan.cache_clear()


# --- images


def op_arguments(step, impl="auto"):
    """The arguments of torch.ops.fastff.step for a spec.Step."""
    return step.x, *flat.flatten(step), step.need_grad_x, step.algorithm, impl


def pixels(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- measurement


def memory_events(function):
    """(bytes given out or, negative, taken back) by torch's allocator while function() runs, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def peak_memory(function):
    """Greatest number of bytes held above those at the start."""
    held = peak = 0
    for size in memory_events(function):
        held += size
        peak = max(peak, held)
    return peak


def operators_run(function):
    """Names of all operators that run in function(), those inside other operators too."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        function()
    return {e.name() for e in run.profiler.kineto_results.events()}
