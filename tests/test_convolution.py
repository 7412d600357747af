"""The gradient of a convolution's weight, and the convolutions of a block's training graph, against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LAYOUTS, same_bits
from torch import nn

from fastff.graph.fused import Convolution
from fastff.kernels import native
from fastff.ops.convolution import KERNEL, PANELS, PYTORCH, ROWS, WINOGRAD, convolve, way
from fastff.ops.table import kernel_for

LAYOUTS_OF_A_BATCH = (torch.contiguous_format, torch.channels_last)
RUNS = [
    (dtype, row.name)
    for row in ROWS
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    if row.can_run(torch.zeros(1, 1, 1, 1, dtype=dtype)) is None
]


def exact_gradient(grad, x, kernel, stride, padding):
    weight = torch.zeros(grad.shape[1], x.shape[1], kernel, kernel, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(F.conv2d(x.double(), weight, None, stride, padding), weight, grad.double())[0]


def drawn(draw, channels, outputs, largest):
    """Sizes of a convolution, B, C, D, kernel, stride, padding, H and W up to `largest`, and a generator for its tensors."""
    B, C, D = draw(st.integers(1, 5)), draw(st.integers(1, channels)), draw(st.integers(1, outputs))
    kernel, stride = draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 2, 3]))
    padding = draw(st.integers(0, kernel))
    H, W = (draw(st.integers(max(1, kernel - 2 * padding), largest)) for _ in range(2))
    return B, C, D, kernel, stride, padding, H, W, torch.Generator().manual_seed(draw(st.integers(0, 2**32)))


@pytest.mark.parametrize(("dtype", "impl"), RUNS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_weight_gradient(data, dtype, impl):
    """Any sizes and layouts: values, arguments untouched, the same bits twice and for any number of threads."""
    draw = data.draw
    B, C, D, kernel, stride, padding, H, W, generator = drawn(draw, 37, 20, 19)
    P, Q = ((n + 2 * padding - kernel) // stride + 1 for n in (H, W))

    def laid(*shape):
        values = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
        return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](values)

    (x, x_memory), (grad, grad_memory) = laid(B, C, H, W), laid(B, D, P, Q)
    before = [t.clone() for t in (x_memory, grad_memory)]
    run = lambda: torch.ops.fastff.convolution_weight_gradient(grad, x, kernel, stride, padding, impl)  # noqa: E731
    got, again = run(), run()
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    other = run()
    torch.set_num_threads(threads)
    exact = exact_gradient(grad, x, kernel, stride, padding)
    size = exact_gradient(grad.abs(), x.abs(), kernel, stride, padding)
    eps = torch.finfo(dtype).eps
    assert got.shape == (D, C, kernel, kernel)
    assert got.dtype == dtype
    # every sum's roundings: the square root of its length would do on average, a few times that at most
    terms = max(1.0, float(B * P * Q)) ** 0.5
    assert bool(((got.double() - exact).abs() <= 4 * eps * terms * size + eps * exact.abs()).all())
    assert same_bits(got, again)
    assert impl != "native" or same_bits(got, other)
    assert all(same_bits(a, b) for a, b in zip(before, (x_memory, grad_memory), strict=True))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "bias", "need_x"), [(37, True, True), (16, False, False), (3, True, True)])
def test_the_stand_in_is_the_convolution(kernel, stride, channels, bias, need_x, layout, depthwise):
    """Values and all gradients, whichever way is taken: matrix products, the compiled kernels, PyTorch's."""
    torch.manual_seed(0)
    sizes = (channels, channels if depthwise else 20, kernel, stride, kernel // 2)
    conv, wide = (nn.Conv2d(*sizes, groups=channels if depthwise else 1, bias=bias) for _ in range(2))
    conv, wide = conv.to(memory_format=layout), wide.double()
    x = torch.randn(4, channels, 11, 9).contiguous(memory_format=layout).requires_grad_(need_x)
    wide.load_state_dict(conv.state_dict())
    leaves = [*conv.parameters()] + [x] * need_x
    got = Convolution.of(conv)(x)
    wide_x = x.detach().double().requires_grad_(need_x)
    want = wide(wide_x)
    torch.testing.assert_close(got, want.float())
    assert got.is_contiguous(memory_format=layout)
    grad = torch.randn_like(got)
    wanted = torch.autograd.grad(want, [*wide.parameters()] + [wide_x] * need_x, grad.double())
    for a, b in zip(torch.autograd.grad(got, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS_OF_A_BATCH for b in LAYOUTS_OF_A_BATCH])
def test_the_kernel_takes_few_positions_in_each_layout(layouts):
    """At few positions the compiled kernel computes the weight's gradient, in the layout of the weight, so that autograd copies nothing."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 32, 4, 4), torch.randn(48, 32, 3, 3)
    x, weight = (t.contiguous(memory_format=layout) for t, layout in zip((x, weight), layouts, strict=True))
    weight.requires_grad_()
    expected = KERNEL if kernel_for("convolution", ROWS, x) else PYTORCH
    assert way(x, weight, 1, 1, 1) == expected
    contiguous = layouts[0] == torch.contiguous_format
    many = PYTORCH if contiguous or expected == PYTORCH else WINOGRAD
    assert way(x.repeat(64, 1, 1, 1).contiguous(memory_format=layouts[0]), weight, 1, 1, 1) == many
    grad = torch.randn(8, 48, 4, 4)
    convolve(x, weight, None, 1, 1, 1).backward(grad)
    assert weight.grad.stride() == weight.stride()
    exact = exact_gradient(grad, x, 3, 1, 1)
    assert (weight.grad - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_which_convolutions_have_a_stand_in():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    assert Convolution.of(conv).convolution is conv
    assert isinstance(Convolution.of(conv), Convolution)
    others = [
        nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 6, 3, dilation=2), nn.Conv2d(4, 6, (3, 1)),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 6, 3, stride=(1, 2)), nn.ConvTranspose2d(4, 6, 3), nn.Linear(4, 6),
        torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
    ]  # fmt: skip
    assert [Convolution.of(m) for m in others] == [None] * len(others)


def test_other_dtypes_layouts_and_autocast_are_pytorchs():
    conv = nn.Conv2d(32, 8, 3)
    for x in (torch.randn(2, 32, 6, 6), torch.randn(32, 6, 6)):
        torch.testing.assert_close(convolve(x, conv.weight, conv.bias, 1, 0, 1), conv(x), rtol=0, atol=0)
    x = torch.randn(2, 32, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(x, conv.weight, conv.bias, 1, 0, 1).dtype == torch.bfloat16


def test_bad_arguments_are_named():
    run = torch.ops.fastff.convolution_weight_gradient
    x = torch.randn(2, 3, 8, 8)
    for error, grad, how in (
        ("grad: expected \\[8, 8\\] positions", torch.randn(2, 4, 7, 8), (3, 1, 1)),
        ("grad: expected \\[B, D, P, Q\\]", torch.randn(3, 4, 8, 8), (3, 1, 1)),
        ("grad: expected torch.float32", torch.randn(2, 4, 8, 8).double(), (3, 1, 1)),
        ("kernel, stride, padding", torch.randn(2, 4, 8, 8), (3, 0, 1)),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            run(grad, x, *how, "auto")
    torch.library.opcheck(run.default, (torch.randn(2, 4, 8, 8), x, 3, 1, 1, "auto"))


@pytest.mark.skipif(bool(native.reason()), reason=native.reason())
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_convolutions_of_few_positions(data):
    """Both products with panels of columns, of any sizes and layouts, against PyTorch's in float64."""
    draw = data.draw
    B, C, D, kernel, stride, padding, H, W, generator = drawn(draw, 60, 60, 9)
    layout = lambda: LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]  # noqa: E731
    x, x_memory = layout()(torch.randn(B, C, H, W, generator=generator))
    weight, weight_memory = layout()(torch.randn(D, C, kernel, kernel, generator=generator))
    exact = F.conv2d(x.double(), weight.double(), None, stride, padding)
    grad, grad_memory = layout()(torch.randn(exact.shape, generator=generator))
    memories = (x_memory, weight_memory, grad_memory)
    before = [t.clone() for t in memories]

    def run():
        y = torch.ops.fastff.convolution_few_native(x, weight, stride, padding)
        return y, torch.ops.fastff.convolution_few_gradient_native(grad, x, kernel, stride, padding)

    got = run()
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    other = run()
    torch.set_num_threads(threads)
    size = F.conv2d(x.double().abs(), weight.double().abs(), None, stride, padding)
    of_weight = [exact_gradient(*map(f, (grad, x)), kernel, stride, padding) for f in (torch.clone, torch.abs)]
    lengths = C * kernel**2, grad[:, 0].numel()
    for y, (right, largest), length in zip(got, ((exact, size), of_weight), lengths, strict=True):
        assert y.is_contiguous()
        error = (y.double() - right).abs()
        assert bool((error <= 4 * torch.finfo(torch.float32).eps * length**0.5 * largest).all())
    assert all(same_bits(a, b) for a, b in zip(got, other, strict=True))
    assert all(same_bits(a, b) for a, b in zip(before, memories, strict=True))


@pytest.mark.skipif(bool(native.reason()), reason=native.reason())
@pytest.mark.parametrize("bias", [False, True])
def test_many_weights_at_few_positions_are_taken_in_panels(bias):
    """Values and gradients of the whole convolution; a weight or a bias that does not fit raises PyTorch's error."""
    torch.manual_seed(0)
    x, conv = torch.randn(4, 160, 4, 4, requires_grad=True), nn.Conv2d(160, 192, 3, padding=1, bias=bias)
    assert way(x, conv.weight, 1, 1, 1) == (PANELS if kernel_for("convolution", ROWS, x) else PYTORCH)
    got, want = convolve(x, conv.weight, conv.bias, 1, 1, 1), conv(x)
    torch.testing.assert_close(got, want)
    grad, leaves = torch.randn_like(want), [x, *conv.parameters()]
    found, expected = (torch.autograd.grad(y, leaves, grad) for y in (got, want))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.stride() == b.stride()
    for wrong in ((conv.weight[:, :150], None), (conv.weight, torch.zeros(1))):
        with pytest.raises(RuntimeError):
            convolve(x, *wrong, 1, 1, 1)


@pytest.mark.skipif(bool(native.reason()), reason=native.reason())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_winograd(data):
    """Values and both gradients of any sizes and layouts, against PyTorch's in float64: the same bits twice and for any number of threads.

    A rounding error at one position is also one at its neighbours in the tile, so that the largest element bounds all."""
    draw = data.draw
    B, C, D, _, _, _, H, W, generator = drawn(draw, 60, 70, 13)
    padding, laid = draw(st.integers(0, 2)), lambda t: LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](t)
    H, W = (max(n, 3 - 2 * padding) for n in (H, W))
    tensors = [torch.randn(shape, generator=generator) for shape in ((B, C, H, W), (D, C, 3, 3), (D,))]
    (x, x_memory), (weight, weight_memory), bias = laid(tensors[0]), laid(tensors[1]), tensors[2]
    bias = draw(st.sampled_from([None, bias]))
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), 1, padding)
    grad, grad_memory = laid(torch.randn(exact.shape, generator=generator))
    memories = (x_memory, weight_memory, grad_memory)
    before, last, ops = [t.clone() for t in memories], draw(st.booleans()), torch.ops.fastff

    def run():
        y = ops.convolution_winograd_native(x, weight, bias, padding, False)
        grad_x = ops.convolution_winograd_native(grad, weight, None, 2 - padding, True)
        return y, grad_x, ops.convolution_winograd_gradient_native(grad, x, padding, last)

    got = run()
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    other = run()
    torch.set_num_threads(threads)

    def everything(f):
        g, inputs, weights = (f(t.double()) for t in (grad, x, weight))
        y = F.conv2d(inputs, weights, None if bias is None else f(bias.double()), 1, padding)
        return y, F.conv_transpose2d(g, weights, None, 1, padding), exact_gradient(g, inputs, 3, 1, padding)

    lengths = 9 * C, 9 * D, grad[:, 0].numel()
    for y, right, size, length in zip(got, everything(torch.clone), everything(torch.abs), lengths, strict=True):
        error = (y.double() - right).abs().max()
        assert error <= 4 * torch.finfo(torch.float32).eps * length**0.5 * size.max()
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in got[:2])
    assert got[2].is_contiguous(memory_format=LAYOUTS_OF_A_BATCH[last])
    assert all(same_bits(a, b) for a, b in zip(got, other, strict=True))
    assert all(same_bits(a, b) for a, b in zip(before, memories, strict=True))


@pytest.mark.skipif(bool(native.reason()), reason=native.reason())
@pytest.mark.parametrize("layout", LAYOUTS_OF_A_BATCH)
@pytest.mark.parametrize("bias", [False, True])
def test_large_convolutions_by_3_x_3_filters_are_winograd(bias, layout):
    """The whole convolution: values, gradients in the layout of the weight, and gradients of these; wrong sizes raise PyTorch's error."""
    torch.manual_seed(0)
    x = torch.randn(4, 24, 12, 12).contiguous(memory_format=torch.channels_last).requires_grad_()
    conv = nn.Conv2d(24, 40, 3, padding=1, bias=bias).to(memory_format=layout)
    expected = WINOGRAD if kernel_for("convolution", ROWS, x) else PYTORCH
    assert way(x, conv.weight, 1, 1, 1) == expected
    for stride, padding in ((2, 1), (1, 3)):
        assert way(x, conv.weight, stride, padding, 1) != WINOGRAD
    got, want = convolve(x, conv.weight, conv.bias, 1, 1, 1), conv(x)
    torch.testing.assert_close(got, want)
    leaves = [x, *conv.parameters()]
    first = [torch.autograd.grad(y.pow(2).sum(), leaves, retain_graph=True) for y in (got, want)]
    for a, b, leaf in zip(*first, leaves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())
        assert a.stride() == leaf.stride()
    found, wanted = (torch.autograd.grad(y.pow(2).sum(), leaves, create_graph=True) for y in (got, want))
    second = [torch.autograd.grad(sum(g.pow(2).sum() for g in each), leaves) for each in (found, wanted)]
    for a, b in (*zip(found, wanted, strict=True), *zip(*second, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    for wrong in ((conv.weight[:, :20], None), (conv.weight, torch.zeros(1))):
        with pytest.raises(RuntimeError):
            convolve(x, *wrong, 1, 1, 1)
