"""layer_norm against F.layer_norm in float64: every row of its table, layouts, dtypes, first and second derivatives."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LAYOUTS, assert_as_exact, same_bits

import fastff.functional as ff
from fastff.ops.group_goodness import ROWS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = [row.name for row in ROWS]


def runnable(impl, x):
    why = next(row for row in ROWS if row.name == impl).can_run(x)
    if why:
        pytest.skip(why)


def eager(x, over, channel_dim):
    """x in the shape users give, in any dtype."""
    if over == "sample" or x.dim() == 2:
        return F.layer_norm(x, x.shape[1:])
    if channel_dim == -1:
        return F.layer_norm(x, x.shape[-1:])
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def conditioning(x, over, channel_dim):
    """Size of the elements in units of the deviation they are divided by: what a rounding of x or of its mean is multiplied with."""
    x = x.detach().double()
    rows = x.flatten(1) if over == "sample" or x.dim() == 2 else x if channel_dim == -1 else x.movedim(1, -1)
    return (rows.abs().amax(-1) / (rows.var(-1, correction=0) + 1e-5).sqrt()).max()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_values_and_gradients(data, dtype, impl):
    shape = data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    over, channel_dim = data.draw(st.sampled_from(["sample", "channels"])), data.draw(st.sampled_from([1, -1]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    values = (
        torch.randn(shape, dtype=torch.float64, generator=generator) * 3 + data.draw(st.sampled_from([0.0, 10.0]))
    ).to(dtype)
    runnable(impl, values)
    x, memory = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](values)
    # the cotangent as autograd may hand it over: dense, or the stride-0 one of a sum
    cotangent = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    if data.draw(st.booleans()):
        cotangent = cotangent.flatten()[0].expand(shape)
    before, before_cotangent = memory.clone(), cotangent.clone()

    def run(function, dtype):
        leaf = x.detach().to(dtype).requires_grad_()
        y = function(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, cotangent.to(dtype))[0]

    y, grad = run(lambda x: ff.layer_norm(x, over=over, channel_dim=channel_dim, impl=impl), dtype)
    again, _ = run(lambda x: ff.layer_norm(x, over=over, channel_dim=channel_dim, impl=impl), dtype)
    exact, exact_grad = run(lambda x: eager(x, over, channel_dim), torch.float64)
    plain, _ = run(lambda x: eager(x, over, channel_dim), compute_dtype(dtype))
    _, plain_grad = run(lambda x: eager(x, over, channel_dim), dtype)  # PyTorch's own backward keeps 16-bit statistics
    assert y.dtype == grad.dtype == dtype
    assert torch.equal(y, again)
    assert same_bits(memory, before)
    assert same_bits(cotangent, before_cotangent)
    worst = conditioning(x, over, channel_dim)
    assert_as_exact("layer_norm", y, exact, plain, worst)
    deviation = (
        x.double().flatten(1).var(1, correction=0) if over == "sample" else eager_variance(x, channel_dim)
    ).min()
    assert_as_exact(
        "gradient", grad, exact_grad, plain_grad, worst**2 * cotangent.double().abs().max() / (deviation + 1e-5).sqrt()
    )


def eager_variance(x, channel_dim):
    x = x.double()
    return (x if channel_dim == -1 or x.dim() == 2 else x.movedim(1, -1)).var(-1, correction=0)


@pytest.mark.parametrize("over", ["sample", "channels"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_and_second_derivatives(impl, over, layout):
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(3, 4, 2, 3, dtype=torch.float64))[0].requires_grad_()
    runnable(impl, x)
    assert torch.autograd.gradcheck(lambda x: ff.layer_norm(x, over=over, impl=impl), x)
    assert torch.autograd.gradgradcheck(lambda x: ff.layer_norm(x, over=over, impl=impl), x)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "every other", "transposed"])
def test_result_is_dense_and_keeps_channels_last(impl, layout):
    x, _ = LAYOUTS[layout](torch.randn(3, 4, 5, 2))
    runnable(impl, x)
    y = ff.layer_norm(x, impl=impl)
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=wanted)
    assert y.untyped_storage().nbytes() == 4 * y.numel()


@pytest.mark.parametrize("impl", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 5)])
def test_empty(impl, shape):
    x = torch.empty(shape, requires_grad=True)
    y = ff.layer_norm(x, impl=impl)
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_eps_and_constant_samples(impl):
    """A constant sample becomes zero, and eps is inside the root."""
    x = torch.cat([torch.full((1, 8), 3.0), torch.tensor([[1.0, -1.0] * 4])])
    runnable(impl, x)
    y = ff.layer_norm(x, eps=3.0, impl=impl)
    assert not y[0].any()
    torch.testing.assert_close(y[1], x[1] / 2)


def test_no_preference_changes_the_result_beyond_rounding():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 5)
    results = [ff.layer_norm(x, impl=row.name) for row in ROWS if row.can_run(x) is None]
    assert len(results) >= 2
    for y in results[1:]:
        torch.testing.assert_close(y, results[0], rtol=1e-6, atol=1e-6)


def test_over_channels_runs_the_implementation_that_is_asked_for():
    x = torch.randn(2, 5, 3, 3).to(memory_format=torch.channels_last)
    assert same_bits(ff.layer_norm(x, over="channels"), ff.normalize(x, "layer_norm_channels"))
    if torch.cuda.is_available():
        return
    with pytest.raises(RuntimeError, match="triton"):
        ff.layer_norm(x, over="channels", impl="triton")
