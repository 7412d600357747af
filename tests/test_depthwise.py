"""Depthwise convolution against PyTorch's in float64: values and gradients of every row, layouts, dtypes, strides and paddings.

With TRITON_INTERPRET=1 this file tests the Triton kernels, interpreted, and nothing else (test_triton.py runs it so)."""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LAYOUTS, assert_as_exact, same_bits

from fastff.kernels.torch.depthwise import out_like

TRITON = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ["triton"] if TRITON else ["torch", "reference"]
DTYPES = (
    (torch.float32, torch.bfloat16, torch.float16)
    if TRITON
    else (torch.float32, torch.float64, torch.bfloat16, torch.float16)
)


def plain(x, weight, grad, stride, padding, dtype):
    """(y, dL/dx, dL/dweight) by PyTorch in `dtype`."""
    x, weight, grad = (t.detach().to(dtype) for t in (x, weight, grad))
    x.requires_grad_()
    weight.requires_grad_()
    y = F.conv2d(x, weight, stride=stride, padding=padding, groups=len(weight))
    return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8 if TRITON else 40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_values_and_gradients(data, dtype, impl):
    kernel, stride = data.draw(st.sampled_from([3, 5, 1])), data.draw(st.sampled_from([1, 2]))
    padding = data.draw(st.integers(0, kernel - 1))
    B, C = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 5, 17, 70]))
    least = max(1, kernel - 2 * padding)
    H, W = (data.draw(st.integers(least, least + 8)) for _ in range(2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    x, memory = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](draw(B, C, H, W))
    weight = draw(C, 1, kernel, kernel)
    grad = draw(B, C, *((n + 2 * padding - kernel) // stride + 1 for n in (H, W)))
    need_x, before = data.draw(st.booleans()), memory.clone()
    runs = []
    for _ in range(2):
        y = torch.ops.fastff.depthwise(x, weight, stride, padding, impl)
        runs.append((y, *torch.ops.fastff.depthwise_backward(grad, x, weight, stride, padding, need_x, impl)))
    assert all(map(torch.equal, *runs))
    assert same_bits(memory, before), "an input was written"
    y, dx, dw = runs[0]
    assert y.stride() == out_like(x, weight, stride, padding).stride()
    exact = plain(x, weight, grad, stride, padding, torch.float64)
    rough = plain(x, weight, grad, stride, padding, torch.promote_types(dtype, torch.float32))
    if (
        impl == "torch"
    ):  # is PyTorch in that dtype, but for the weight's gradient, which PyTorch leaves undefined in parts in 16 bits
        rough = (*plain(x, weight, grad, stride, padding, dtype)[:2], rough[2])
    size = plain(x.abs(), weight.abs(), grad.abs(), stride, padding, torch.float64)
    assert_as_exact("y", y, exact[0], rough[0], size[0])
    if need_x:
        assert_as_exact("dL/dx", dx, exact[1], rough[1], size[1])
    else:
        assert dx.numel() == 0
    assert_as_exact("dL/dweight", dw, exact[2], rough[2], size[2])


@pytest.mark.skipif(TRITON, reason="float64, and no kernels in it")
def test_autograd_and_opcheck():
    torch.manual_seed(0)
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6, 5), (3, 1, 3, 3)))
    for impl in IMPLEMENTATIONS:
        for stride, padding in ((1, 1), (2, 0)):
            run = lambda x, w, how=(stride, padding, impl): torch.ops.fastff.depthwise(x, w, *how)  # noqa: E731
            assert torch.autograd.gradcheck(run, (x, weight))
            torch.library.opcheck(torch.ops.fastff.depthwise.default, (x, weight, stride, padding, impl))
    last = x.detach().contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.fastff.depthwise_backward.default, (grad, last, weight.detach(), 1, 1, True, "auto")
    )


@pytest.mark.skipif(TRITON, reason="nothing of the kernels")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(3, 4, 4)}, r"x: expected \[B, C, H, W\], got \[3, 4, 4\]"),
        ({"weight": torch.zeros(4, 1, 3, 3)}, r"weight: expected \[3, 1, k, k\] .* got \[4, 1, 3, 3\]"),
        ({"weight": torch.zeros(3, 1, 3, 5)}, r"weight: expected"),
        ({"weight": torch.zeros(3, 1, 3, 3).double()}, "weight: expected torch.float32 as x is, got torch.float64"),
        ({"stride": 0}, "stride: expected at least 1, got 0"),
        ({"padding": 3}, "padding: expected 0 to 2 for this kernel, got 3"),
        (
            {"x": torch.zeros(2, 3, 2, 9), "padding": 0},
            r"x: expected at least 3 rows and columns .* got \[2, 3, 2, 9\]",
        ),
        ({"impl": "cuda"}, "no implementation of depthwise can run here"),
    ],
)
def test_bad_input(change, text):
    arguments = {
        "x": torch.zeros(2, 3, 4, 4),
        "weight": torch.zeros(3, 1, 3, 3),
        "stride": 1,
        "padding": 1,
        "impl": "auto",
    }
    with pytest.raises((ValueError, TypeError, RuntimeError), match=text):
        torch.ops.fastff.depthwise(*(arguments | change).values())


@pytest.mark.parametrize("grad", [torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 5).bfloat16()])
def test_gradient_of_another_shape_or_type(grad):
    """The compiled kernel would read past the end of it."""
    with pytest.raises(ValueError, match=r"grad: expected \[2, 3, 5, 5\] of torch.float32 as y is, got"):
        torch.ops.fastff.depthwise_backward(grad, torch.zeros(2, 3, 5, 5), torch.zeros(3, 1, 3, 3), 1, 1, True, "auto")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_empty_batch(impl):
    y = torch.ops.fastff.depthwise(torch.zeros(0, 3, 6, 6), torch.ones(3, 1, 3, 3), 1, 1, impl)
    assert y.shape == (0, 3, 6, 6)
