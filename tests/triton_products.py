"""The products kernels, drawn shapes, against float64: test_triton.py runs this interpreted, with TRITON_INTERPRET=1."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastff import spec
from fastff.kernels.torch import goodness as plain
from fastff.kernels.triton import goodness

EXAMPLES = int(os.environ.get("FASTFF_EXAMPLES", 10))


@pytest.fixture(autouse=True, scope="module")
def in_the_dtype_of_x():
    """PyTorch's products of 16-bit x are in its dtype, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "product_dtype", lambda x, dtype, algorithm: dtype if dtype == torch.float64 else x.dtype)
        yield


def assert_as_exact(got, base, exact, dtype):
    """Errors of at most four times those of PyTorch's products in the same dtype and two roundings, which the interpreter cuts off; of grad_tau
    those of the goodness, whose differences it is made of."""
    for field, a, b, true in zip(spec.StepResult._fields, got, base, exact, strict=True):
        assert (a is None) == (true is None), field
        if a is not None:
            a, b, true = (t.double().mean() if field == "loss" else t.double() for t in (a, b, true))
            assert a.shape == true.shape, field
            size = exact.goodness.abs().max() if field == "grad_tau" else true.norm()
            off, allowed = (a - true).norm(), 4 * (b - true).norm() + 2 * torch.finfo(dtype).eps * size
            assert off <= allowed, f"{field}: {off:.2g}, allowed {allowed:.2g}"


@st.composite
def problems(draw):
    """Shapes, parameters and a loss, by number."""
    shape = {name: draw(st.integers(1, most)) for name, most in (("B", 9), ("C", 140), ("H", 9), ("W", 9), ("K", 140))}
    loss = draw(st.sampled_from(spec.LOSSES))
    shape["B"] *= 1 if loss == "cross_entropy" else 2
    grid = draw(st.sampled_from([None, None, (1, 1), (2, 3)]))
    return shape | {
        "loss": loss, "bias": draw(st.booleans()), "grid": grid, "channels_last": draw(st.booleans()), "need_grad_x": draw(st.booleans()),
        "normalize": draw(st.sampled_from(["none", "layer_norm", "rms"])), "seed": draw(st.integers(0, 2**32)),
    }  # fmt: skip


def step(problem, dtype, implementation, algorithm):
    """The StepResult of a drawn problem."""
    generator = torch.Generator().manual_seed(problem["seed"])
    B, C, H, W, K = (problem[name] for name in "BCHWK")
    wide = torch.promote_types(dtype, torch.float32)

    def values(scale, *shape, of=wide):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(torch.bfloat16).to(of)

    x = values(1, B, C, H, W, of=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if problem["channels_last"] else x
    weight, bias = values(C**-0.5, K, C, 1, 1), values(0.3, K) if problem["bias"] else None
    head = spec.Projection(weight, bias, values(C**-0.5, K, C, *problem["grid"]) if problem["grid"] else None)
    loss = spec.Loss(problem["loss"], theta=0.7)
    if loss.name == "cross_entropy":
        loss = loss._replace(
            target=torch.randint(K, (B,), generator=generator), learned_tau=values(1).abs(), label_smoothing=0.1
        )
    local = spec.Step(x, None, head, loss, spec.Normalization(problem["normalize"]), problem["need_grad_x"])
    return implementation.step(local, spec.Plan(algorithm, B, K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=EXAMPLES, deadline=None)
@given(problem=problems())
def test_step(dtype, problem):
    got, base, exact = (
        step(problem, *how)
        for how in ((dtype, goodness, "products"), (dtype, plain, "cublas"), (torch.float64, plain, "cublas"))
    )
    assert_as_exact(got, base, exact, dtype)
    again = step(problem, dtype, goodness, "products")
    assert all(a is None or torch.equal(a, b) for a, b in zip(got, again, strict=True))
