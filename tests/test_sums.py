"""Sums over many positions or samples: their error does not grow with the number of terms, at any instruction set.

Values are alike, so that a sum is far greater than its terms and all roundings of adding one go the same way: the worst case."""

import pytest
import torch

import fastff.functional as ff
from fastff import spec
from fastff.kernels import native
from fastff.ops import TABLES

pytestmark = pytest.mark.skipif(native.reason() != "", reason=native.reason() or "is there")
# Floats add up at most 256 terms in a register, 16 such sums and 32 of those; doubles do the rest. Each addition rounds by half a unit, and
# what is summed has been rounded a few times itself.
BOUND = (256 + 16 + 32 + 16) * 2.0**-24
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SIDE = 1024  # of images


def check(**results):
    """name=(result, the exact one)."""
    for name, (got, exact) in results.items():
        error = float(((got.double() - exact) / exact).abs().max())
        assert error < BOUND, f"{name}: relative error {error:.1e}, bound {BOUND:.1e}"


def images(layout, samples=1, channels=3, side=SIDE):
    return torch.full((samples, channels, side, side), 1.1).contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("algorithm", ["direct", "second_moment"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 3, SIDE, 4), (1, 16, 512, 40), (30_000, 3, 1, 4), (4000, 20, 2, 30)], ids=str)
def test_native_projection(size, layout, algorithm):
    samples, channels, side, classes = size
    torch.manual_seed(0)
    x = images(layout, samples, channels, side)
    weight, bias, grid = (
        torch.rand(classes, channels, 1, 1) + 0.1,
        torch.rand(classes),
        torch.rand(classes, channels, 1, 1),
    )
    d = torch.full((samples, classes), 0.3)
    wide = [t.double() for t in (d, x, weight, bias, grid)]
    options = [0, 0], "native", algorithm
    exact = torch.ops.fastff.goodness_backward(*wide, [0, 0], "torch", "direct", False)[1:]
    found = torch.ops.fastff.goodness_backward(d, x, weight, bias, grid, *options, False)[1:]
    check(**{name: pair for name, *pair in zip(("weight", "bias", "grid_weight"), found, exact, strict=True)})
    check(
        goodness=(
            torch.ops.fastff.goodness(x, weight, bias, grid, *options),
            torch.ops.fastff.goodness(*wide[1:], [0, 0], "torch", "direct"),
        )
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_native_groups(layout):
    x = images(layout)
    for options in ({"groups": 3}, {"power": 1}):
        check(
            goodness=(
                ff.group_goodness(x, **options, impl="native"),
                ff.group_goodness(x.double(), **options, impl="torch"),
            )
        )
    for how in ("l2", "rms", "layer_norm", "group_norm"):
        y = x * torch.linspace(1, 2, SIDE)
        check(
            normalized=[
                ff.normalize(t, how, impl=impl)[..., ::97].flatten()
                for t, impl in ((y, "native"), (y.double(), "torch"))
            ]
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 3, SIDE), (30_000, 3, 1)], ids=str)
def test_native_epilogue(size, layout):
    """The gradients of batch norm's parameters, where those of its output are alike."""
    x = images(layout, *size)
    x = x * (1 + torch.arange(x.numel()).view(x.shape) % 2)
    results = []
    for dtype, impl in ((torch.float32, "native"), (torch.float64, "torch")):
        weight, bias = (torch.full((3,), value, dtype=dtype, requires_grad=True) for value in (1.0, 2.0))
        y, *statistics = ff.epilogue(x.to(dtype), bn_weight=weight, bn_bias=bias, impl=impl)
        results.append([*statistics, *torch.autograd.grad(y, bias, torch.full_like(y, 0.3))])
    check(**{name: pair for name, *pair in zip(("mean", "var", "bias"), *results, strict=True)})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_native_variances_where_the_first_values_are_unlike_the_others(layout):
    """Of images the first of which begins black: sums of squares about a value of that one would lose four of seven digits."""
    torch.manual_seed(0)
    x = (100 + torch.randn(40, 3, 32, 32)).contiguous(memory_format=LAYOUTS[layout])
    x[0] = 0
    x[:, 0, 0, 0] = 0
    grad, results = torch.randn(x.shape).contiguous(memory_format=LAYOUTS[layout]), []
    for dtype, impl in ((torch.float32, "native"), (torch.float64, "torch")):
        row = next(row.run for row in TABLES["epilogue"] if row.name == impl)
        y = x.to(dtype)
        plain = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
        _, _, mean, var = row.forward(y, spec.Epilogue())
        found = row.backward(
            y[1:],
            spec.Epilogue(),
            *plain,
            grad_normalized=grad[1:].to(dtype),
            normalization=spec.Normalization("layer_norm"),
        )
        results.append((mean, var, *found.y.abs().sum((0, 2, 3), keepdim=True)))
    check(**{name: pair for name, *pair in zip(("mean", "var", "gradient"), *results, strict=True)})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-40, 1e-38, 1e-20])
def test_native_variances_of_tiny_values(scale, layout):
    """Squares of these are no floats, and between the smallest ones and their mean lies no float either."""
    y = (torch.rand(4, 3, 6, 6) * scale).contiguous(memory_format=LAYOUTS[layout])
    normalization, results = spec.Normalization("layer_norm"), []
    for dtype, impl in ((torch.float32, "native"), (torch.float64, "torch")):
        row, given = next(row.run for row in TABLES["epilogue"] if row.name == impl), y.to(dtype)
        x, normalized, mean, var = row.forward(given, spec.Epilogue(), normalization)
        plain = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)  # so that layer norm sees the tiny values
        found = row.backward(
            given, spec.Epilogue(), *plain, grad_normalized=torch.ones_like(given), normalization=normalization
        )
        results.append((x, normalized, mean, var, found.y))
    rounding = 2.0**-149 / 1e-5  # of a mean, divided by both square roots of eps
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=rounding)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "size", [(1, 3, 1 << 16, 16), (1, 16, 512, 512), (1, 16, 1, 1 << 18), (30_000, 3, 1, 1)], ids=str
)
def test_native_convolutions(size, layout):
    x = torch.full(size, 1.1).contiguous(memory_format=LAYOUTS[layout])
    grad, channels, results = x[:, :3] * 0.7, size[1], []
    for dtype, impl in ((torch.float32, "native"), (torch.float64, "torch")):
        weight, given = torch.full((channels, 1, 3, 3), 0.2, dtype=dtype), x.to(dtype)
        _, depthwise = torch.ops.fastff.depthwise_backward(given * 0.7, given, weight, 1, 1, False, impl)
        full = torch.ops.fastff.convolution_weight_gradient(grad.to(dtype), given, 3, 1, 1, impl)
        here = (..., *(slice(1, 2) if n == 1 else slice(None) for n in size[2:]))
        results.append((depthwise[here], full[here]))  # of one row, those of the rows beside it are zero
    check(**{name: pair for name, *pair in zip(("depthwise", "convolution"), *results, strict=True)})
