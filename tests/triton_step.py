"""Steps of every loss, normalization and epilogue under a head with weights, and the epilogue by itself, against float64: test_triton.py runs this
interpreted, with TRITON_INTERPRET=1."""

import pytest
import torch
import torch.nn.functional as F

from fastff import spec
from fastff.kernels.torch import goodness as plain
from fastff.kernels.triton import blocks, epilogue, goodness
from fastff.kernels.triton.goodness import spatial


def problem(channels_last=False):
    torch.manual_seed(0)
    x, residual = torch.randn(6, 16, 4, 4), torch.randn(6, 16, 4, 4)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    return x, residual, torch.randn(5, 16, 1, 1), torch.rand(16) + 0.5, torch.randn(16)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("name", spec.LOSSES)
def test_step(name, activation, hidden):
    x, residual, weight, bn_weight, bn_bias = problem(channels_last=activation is None)
    loss = spec.Loss(name, torch.arange(6) % 5 if name == "cross_entropy" else None)
    for normalize, algorithm in (("layer_norm", "direct"), ("layer_norm_channels", "second_moment"), ("rms", "direct")):

        def step(dtype, implementation, normalize=normalize, algorithm=algorithm):
            tensors = (t.to(dtype) for t in (x, residual, weight, bn_weight, bn_bias))
            y, r, w, scale, shift = tensors
            grid_weight, layer = (
                torch.linspace(-1, 1, 5 * 16 * 6, dtype=dtype).sin().div(8).view(5, 16, 2, 3),
                w.new_ones(16, 16).tril() / 4,
            )
            head = spec.Projection(w, None, grid_weight, (0, 0), layer, scale, shift) if hidden else spec.Projection(w)
            around = activation and spec.Epilogue(scale, shift, residual=r, activation=activation)
            local = spec.Step(y, around, head, loss, spec.Normalization(normalize))
            return implementation.step(local, spec.Plan(algorithm, 6, 5))

        got, exact = step(torch.float32, goodness), step(torch.float64, plain)
        for field, a, b in zip(spec.StepResult._fields, got, exact, strict=True):
            assert (a is None) == (b is None), field
            if field == "loss" and a.dim() == 0:  # one sweep computed the losses and a small launch added them up
                b = b.mean()
            assert a is None or (a - b).abs().max() < 1e-5 * b.abs().max(), field


@pytest.mark.parametrize("name", ["softplus", "swish"])
def test_a_pair_of_thresholds(name):
    """Other thresholds for positive and for negative samples."""
    x, _, weight, *_ = problem()
    weight = weight / 4  # goodness near the thresholds
    losses = [spec.Loss(name, **spec.with_thresholds({"theta": theta})) for theta in ((3.0, 0.5), 3.0)]

    def step(dtype, implementation, loss):
        head = spec.Projection(weight.to(dtype))
        local = spec.Step(x.to(dtype), None, head, loss, spec.Normalization("layer_norm"))
        return implementation.step(local, spec.Plan("direct", 6, 5))

    got, exact, single = (
        step(*how) for how in ((torch.float32, goodness, losses[0]), *((torch.float64, plain, each) for each in losses))
    )
    for field in ("loss", "grad_x", "grad_weight"):
        a, b, other = (getattr(each, field) for each in (got, exact, single))
        assert (a.mean() - b.mean() if field == "loss" else a - b).abs().max() < 1e-5 * b.abs().max(), field
        assert (b - other).abs().max() > 1e-2 * b.abs().max(), field


@pytest.mark.parametrize("channels_last", [False, True])
def test_epilogue_forward_and_backward(channels_last):
    y, residual, _, weight, bias = problem(channels_last)
    description = spec.Epilogue(weight, bias, residual=residual, activation="gelu")
    x, _, mean, var = epilogue.forward(y, description)
    grad_x = torch.randn_like(x)
    kept = grad_x.clone()
    got = epilogue.backward(y, description, mean, var, grad_x)
    assert torch.equal(grad_x, kept)
    inputs = [t.double().requires_grad_() for t in (y, residual, weight, bias)]
    exact = F.gelu(F.batch_norm(inputs[0], None, None, *inputs[2:], training=True) + inputs[1])
    assert (x - exact).abs().max() < 1e-5 * exact.abs().max()
    for a, b in zip(got, torch.autograd.grad(exact, inputs, grad_x.double()), strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize(("side", "activation"), [(3, None), (6, "relu")])
def test_channels_in_pieces(side, activation):
    """More channels than a piece has, with several samples a tile and several tiles a sample, more samples than programs, and every term of g."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 72, side, side), torch.randn(9, 72, 1, 1) / 8, torch.randn(9) / 4
    grid_weight, loss = (
        torch.randn(9, 72, 2, 1) / 8,
        spec.Loss("cross_entropy", torch.arange(5), learned_tau=torch.tensor(0.7)),
    )
    assert blocks.sizes(x.device, "direct", 5, 72, side**2, 9, 2, 4).BC == 64

    def step(dtype, implementation):
        y, w, b, v = (t.to(dtype) for t in (x, weight, bias, grid_weight))
        around = activation and spec.Epilogue(activation=activation)
        head, of_tau = spec.Projection(w, b, v), loss._replace(learned_tau=loss.learned_tau.to(dtype))
        return implementation.step(
            spec.Step(y, around, head, of_tau, spec.Normalization("layer_norm")), spec.Plan("direct", 5, 9)
        )

    got, exact = step(torch.float32, goodness), step(torch.float64, plain)
    for field, a, b in zip(spec.StepResult._fields, got, exact, strict=True):
        assert (a is None) == (b is None), field
        b = b.mean() if field == "loss" and a.dim() == 0 else b
        assert a is None or (a - b).abs().max() < 1e-5 * b.abs().max(), field


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("C", "side", "algorithm"), [(72, 3, "direct"), (40, 7, "direct"), (40, 7, "second_moment")])
def test_grid_behind_an_epilogue_in_one_sweep(C, side, algorithm, dtype, monkeypatch):
    """In 16 bits, with several samples a tile and channels in pieces, and with several tiles a sample.

    Allowed is four times the error of PyTorch's operators and a rounding, which the interpreter cuts off."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, C, side, side).to(dtype), torch.randn(9, C, 1, 1) / 8
    grid_weight, loss = torch.randn(9, C, 3, 2) / 8, spec.Loss(target=torch.arange(9), learned_tau=torch.tensor(0.7))
    sweeps = []
    monkeypatch.setattr(goodness, algorithm, recording(getattr(goodness, algorithm), sweeps))

    def step(dtype, implementation):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        w, v, bn, tau = (t.to(wide) for t in (weight, grid_weight, torch.linspace(0.5, 2, C), loss.learned_tau))
        around = spec.Epilogue(bn, bn - 1, residual=x.flip(0).to(dtype), activation="silu")
        local = spec.Step(
            x.to(dtype), around, spec.Projection(w, None, v), loss._replace(learned_tau=tau), spec.Normalization("layer_norm")
        )  # fmt: skip
        return implementation.step(local, spec.Plan(algorithm, 9, 9))

    got, base, exact = step(dtype, goodness), step(dtype, plain), step(torch.float64, plain)
    assert len(sweeps) == 1
    for field, a, b, true in zip(spec.StepResult._fields, got, base, exact, strict=True):
        assert (a is None) == (true is None), field
        if a is not None:
            a, b, true = (t.double().mean() if field == "loss" else t.double() for t in (a, b, true))
            assert (a - true).norm() <= 4 * (b - true).norm() + 2 * torch.finfo(dtype).eps * true.norm(), field


@pytest.mark.parametrize(
    ("B", "C", "side", "M", "cells", "algorithm", "activation", "known", "cublas"),
    [
        (20, 72, 4, 40, 3, "direct", None, False, False),  # channels in pieces, and several programs
        (20, 20, 3, 0, 4, "direct", "relu", False, False),  # cells that are more than the positions
        (18, 16, 4, 5, 2, "second_moment", "silu", True, False),  # statistics of batch norm that are known
        (5, 8, 3, 7, 1, "direct", None, False, True),
        (5, 8, 3, 0, 2, "second_moment", None, False, True),
        (1, 8, 24, 6, 2, "direct", None, False, False),  # several programs a sample
        (7, 40, 4, 6, 2, "products", "relu", False, False),
        (1, 8, 24, 0, 2, "products", None, False, True),
        (40, 20, 2, 6, 2, "products", None, False, False),  # tiles of more samples than z takes at a time
        (40, 20, 1, 6, 1, "direct", None, False, False),
    ],
)
def test_spatial_term(B, C, side, M, cells, algorithm, activation, known, cublas, monkeypatch):
    """Between the sweeps, with a hidden layer of M channels or without one, by kernels of its own and by products of cuBLAS."""
    if cublas:
        monkeypatch.setattr(spatial, "MOST_BYTES", 0)
        monkeypatch.setattr(blocks, "GRID_BYTES", 0)
    torch.manual_seed(0)
    given = (
        torch.randn(B, C, side, side),
        torch.randn(6, C, 1, 1) / 4,
        torch.randn(6),
        torch.randn(6, M or C, cells, cells),
    )
    layer = (torch.randn(M, C) / 2, torch.rand(M) + 0.5, torch.randn(M)) if M else ()
    norm = (torch.randn(M), torch.rand(M) + 0.2) if known else ()
    loss = spec.Loss(target=torch.arange(B) % 6, learned_tau=torch.tensor(0.7))

    def step(dtype, implementation):
        (x, weight, bias, grid_weight), hidden, statistics = ([t.to(dtype) for t in ts] for ts in (given, layer, norm))
        around = activation and spec.Epilogue(activation=activation)
        head = spec.Projection(weight, bias, grid_weight, (0, 0), *hidden, *((1e-3, *statistics) if known else ()))
        of_tau = loss._replace(learned_tau=loss.learned_tau.to(dtype))
        local = spec.Step(x, around, head, of_tau, spec.Normalization("layer_norm"))
        how = "cublas" if algorithm == "products" and implementation is plain else algorithm
        return implementation.step(local, spec.Plan(how, B, 6))

    ran = []
    monkeypatch.setattr(spatial, "spatial", recording(spatial.spatial, ran))
    monkeypatch.setattr(spatial, "hidden_gradient", recording(spatial.hidden_gradient, ran))
    got, exact = step(torch.float32, goodness), step(torch.float64, plain)
    assert len(ran) == {(False, False): 1, (False, True): 0, (True, False): 2, (True, True): 3}[bool(M), cublas]
    for field, a, b in zip(spec.StepResult._fields, got, exact, strict=True):
        assert (a is None) == (b is None), field
        b = b.mean() if field == "loss" else b
        assert a is None or (a - b).abs().max() < 1e-5 * b.abs().max(), field


@pytest.mark.parametrize("K", [37, 150])
def test_grid_under_second_moment_in_one_sweep(K, monkeypatch):
    """With more classes than a tile has, of the sweep or of the reduction, and more columns of the grid's weights."""
    torch.manual_seed(0)
    given = torch.randn(5, 20, 6, 5), torch.randn(K, 20, 1, 1) / 4, torch.randn(K), torch.randn(K, 20, 3, 2) / 4
    sweeps, loss = [], spec.Loss(target=torch.arange(5) * 9, learned_tau=torch.tensor(0.7))
    monkeypatch.setattr(goodness, "second_moment", recording(goodness.second_moment, sweeps))

    def step(dtype, implementation):
        x, weight, bias, grid_weight = (t.to(dtype) for t in given)
        of_tau = loss._replace(learned_tau=loss.learned_tau.to(dtype))
        head = spec.Projection(weight, bias, grid_weight)
        local = spec.Step(x, None, head, of_tau, spec.Normalization("layer_norm"))
        return implementation.step(local, spec.Plan("second_moment", 5, K))

    got, exact = step(torch.float32, goodness), step(torch.float64, plain)
    assert len(sweeps) == 1
    for field, a, b in zip(spec.StepResult._fields, got, exact, strict=True):
        assert (a is None) == (b is None), field
        b = b.mean() if field == "loss" else b
        assert a is None or (a - b).abs().max() < 1e-5 * b.abs().max(), field


class recording:  # in the place of a kernel
    def __init__(self, kernel, ran):
        self.kernel, self.ran = kernel, ran

    def __getitem__(self, grid):
        self.ran.append(grid)
        return self.kernel[grid]


def test_many_classes_are_left_to_products():
    x, weight = torch.randn(3, 8, 4, 4), torch.randn(140, 8, 1, 1)
    for algorithm, why in (
        ("direct", "direct holds the classes of a sample in registers, with 8 channels at most 16, the head has 140"),
        ("second_moment", None),
    ):
        assert goodness.reason(x, spec.Projection(weight), spec.Plan(algorithm, 3, 140)) == why
    d, head, direct = torch.randn(3, 140), spec.Projection(weight), spec.Plan("direct", 3, 140)
    for plan in (direct, spec.Plan("products", 3, 140)):
        torch.testing.assert_close(goodness.goodness(x, head, plan), plain.goodness(x, head, direct))
        for need_grad_x in (False, True):
            got = goodness.goodness_backward(d, x, head, plan, need_grad_x)
            torch.testing.assert_close(got, plain.goodness_backward(d, x, head, direct, need_grad_x))


@pytest.mark.parametrize("C", [5, 300])
def test_running_statistics_are_those_of_batch_norm(C):
    torch.manual_seed(0)
    x, (mean, var) = torch.randn(4, C, 3, 3), (torch.randn(C), torch.rand(C))
    tracked, own_mean, own_var = torch.tensor(6), mean.clone(), var.clone()
    F.batch_norm(x, mean, var, training=True, momentum=0.3)
    of_batch = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    epilogue.update_running_statistics(own_mean, own_var, tracked, *of_batch, 0.3, 36)
    assert int(tracked) == 7
    torch.testing.assert_close(own_mean, mean)
    torch.testing.assert_close(own_var, var)


@pytest.mark.parametrize(
    ("algorithm", "grid", "activation"),
    [("direct", False, "relu"), ("direct", True, None), ("second_moment", False, None)],
)
def test_gpus_of_other_sizes(algorithm, grid, activation, monkeypatch):
    """Programs, and so the order of sums, follow the number of multiprocessors: one GPU gives the
    same bits each time, another one others, as exact."""
    torch.manual_seed(0)
    x, weight, cells, bn = (
        torch.randn(12, 24, 9, 9),
        torch.randn(7, 24, 1, 1) / 5,
        torch.randn(7, 24, 2, 2) / 5,
        torch.rand(24) + 0.5,
    )
    loss = spec.Loss(target=torch.arange(12) % 7)

    def step(dtype, implementation):
        y, w, v, scale = (t.to(dtype) for t in (x, weight, cells, bn))
        around = activation and spec.Epilogue(scale, scale - 1, activation=activation)
        head = spec.Projection(w, None, v if grid else None)
        return implementation.step(
            spec.Step(y, around, head, loss, spec.Normalization("layer_norm")), spec.Plan(algorithm, 12, 7)
        )

    exact, bits = step(torch.float64, plain), set()
    for multiprocessors in (1, 5, 24, 200):  # from all samples in a program to several programs a sample
        for module in (goodness, epilogue):
            monkeypatch.setattr(module, "multiprocessors", lambda device, n=multiprocessors: n)
        got, again = step(torch.float32, goodness), step(torch.float32, goodness)
        for field, a, b, true in zip(spec.StepResult._fields, got, again, exact, strict=True):
            assert (a is None) == (true is None), field
            if a is not None:
                assert torch.equal(a, b), field
                true = true.mean() if field == "loss" and a.dim() == 0 else true
                assert (a - true).abs().max() < 1e-5 * true.abs().max(), field
        bits.add(tuple(got.grad_weight.flatten().tolist()))
    assert len(bits) > 2
