"""Copies of a tensor [B, C, H, W] from one memory layout into the other are exact, for sizes that are no multiples of the kernel's tiles."""

import pytest
import torch

from fastff.kernels.layout import laid

SHAPES = [
    (2, 40, 32, 32),
    (3, 13, 7, 5),
    (1, 8, 64, 1),
    (2, 17, 9, 9),
    (2, 1, 4, 4),
    (2, 5, 1, 1),
    (0, 3, 4, 4),
    (5, 130, 3, 3),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_copies(shape, dtype, channels_last):
    source, wanted = torch.contiguous_format, torch.channels_last
    if not channels_last:
        source, wanted = wanted, source
    x = torch.randn(shape).to(dtype).contiguous(memory_format=source)
    y, expected = laid(x, channels_last), x.contiguous(memory_format=wanted)
    assert torch.equal(y, x)
    assert y.is_contiguous(memory_format=wanted)
    assert y.stride() == expected.stride()
    part = torch.full((*shape[:3], shape[3] + 2), torch.nan, dtype=dtype)[..., 1:-1].copy_(
        x
    )  # a slice of a larger tensor
    assert torch.equal(laid(part, channels_last), x)


def test_the_kernel_refuses_what_it_cannot_read():
    laid(torch.randn(2, 3, 4, 4), True)
    with pytest.raises(RuntimeError, match="layout_native: x must be .B, C, H, W., contiguous"):
        torch.ops.fastff.layout_native(torch.randn(2, 3, 4, 5).transpose(2, 3), True)
    with pytest.raises(RuntimeError, match="expected a float32 tensor"):
        torch.ops.fastff.layout_native(torch.randn(2, 3, 4, 4).double(), True)
