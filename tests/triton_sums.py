"""Sums of the Triton kernels: their error does not grow with the number of positions, and variances keep their digits far from zero.

Run by test_triton.py with TRITON_INTERPRET=1, as if on a GPU so small that a program gets all that it may take. That is 256 tiles, for which
the interpreter would need minutes; the tests allow fewer."""

import pytest
import torch

import fastff.functional as ff
from fastff import spec
from fastff.kernels.triton import depthwise, epilogue, goodness, launch, layer_norm

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    for module in (depthwise, epilogue, goodness, layer_norm):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 0)


def check(bound, **results):
    """name=(result, the exact one)."""
    for name, (got, exact) in results.items():
        error = float(((got.double() - exact) / exact).abs().max())
        assert error < bound, f"{name}: relative error {error:.1e}, bound {bound:.1e}"


def both(run):
    """(result, exact one) of run(dtype, impl): of the kernels, and in float64 of PyTorch."""
    return run(torch.float32, "triton"), run(torch.float64, "torch")


def far(layout):
    """Images of mean 100 and deviation 1, each of which begins black."""
    torch.manual_seed(0)
    x = (100 + torch.randn(4, 5, 12, 12)).contiguous(memory_format=LAYOUTS[layout])
    x[:, :, 0, 0] = 0
    return x


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variances_of_values_far_from_zero(layout):
    x, spread = far(layout), 2.0**-20  # of the normalized values: those of x are roundings of 2^-18
    for how in ("layer_norm", "group_norm", "layer_norm_channels"):
        pair = (ff.normalize(t, how, groups=2, impl=i) for t, i in ((x, "triton"), (x.double(), "torch")))
        got, exact = (t[..., 1:, 1:] for t in pair)
        assert float((got - exact).abs().max()) < 100 * spread, how
    for algorithm in ("direct", "second_moment"):
        given = torch.ones(3, 5) / 1000, None, torch.zeros(4, dtype=torch.int64)
        got = ff.goodness_step(x, *given, algorithm=algorithm, impl="triton").normalized
        assert float((got - ff.layer_norm(x.double(), impl="torch")).abs().max()) < 100 * spread, algorithm
    (_, mean, var), (_, *exact) = both(lambda dtype, impl: ff.epilogue(x.to(dtype), impl=impl))
    check(100 * spread, mean=(mean, exact[0]), var=(var, exact[1]))


def alike(*shape, layout="contiguous", value=4 / 3):
    """The same value everywhere: the roundings of sums go one way for long."""
    return torch.full(shape, value).contiguous(memory_format=LAYOUTS[layout])


def bound(tiles):
    """Roundings of a program's sum, of those of the parts and within a tile."""
    return (tiles + 8) * 2.0**-24


@pytest.mark.parametrize("algorithm", ["direct", "second_moment"])
def test_goodness_of_many_positions(algorithm, monkeypatch):
    monkeypatch.setattr(launch, "MOST", 32)
    x = alike(1, 1, 128, 256)

    def run(dtype, impl):
        weight = torch.ones(1, 1, 1, 1, dtype=dtype)
        return torch.ops.fastff.goodness(x.to(dtype), weight, None, None, [0, 0], impl, algorithm)

    check(bound(32), goodness=both(run))


def test_weight_gradient_of_many_positions(monkeypatch):
    monkeypatch.setattr(launch, "MOST", 4)
    x = alike(1, 1, 128, 256)

    def run(dtype, impl):
        d, weight = torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
        return torch.ops.fastff.goodness_backward(d, x.to(dtype), weight, None, None, [0, 0], impl, "direct", False)[1]

    check(bound(4 * 4), weight=both(run))


def test_groups_of_many_positions():
    x = alike(1, 64, 128, 256, layout="channels_last")
    check(bound(8), goodness=both(lambda dtype, impl: ff.group_goodness(x.to(dtype), power=1, impl=impl)))


def test_statistics_of_many_positions(monkeypatch):
    monkeypatch.setattr(launch, "MOST", 8)
    x = alike(1, 1, 256, 256)
    x[..., 0, 0] = 0
    _, _, mean, var = epilogue.forward(x, spec.Epilogue())
    check(bound(8), mean=(mean, x.double().mean()), var=(var, x.double().var(correction=0)))


def test_layer_norm_of_many_positions(monkeypatch):
    monkeypatch.setattr(launch, "MOST", 8)
    x = alike(1, 1, 1024, 4096)
    x[..., ::2, :] = 0
    check(bound(8), normalized=both(lambda dtype, impl: ff.layer_norm(x.to(dtype), impl=impl)))


def test_depthwise_of_many_positions(monkeypatch):
    monkeypatch.setattr(launch, "MOST", 4)
    x = alike(1, 16, 128, 128, layout="channels_last", value=1.7)

    def run(dtype, impl):
        given, weight = x.to(dtype), torch.ones(16, 1, 3, 3, dtype=dtype)
        return torch.ops.fastff.depthwise_backward(torch.ones_like(given), given, weight, 1, 1, False, impl)[1]

    check(bound(4 + 8), weight=both(run))  # the interpreter adds up the positions of a tile one after another
