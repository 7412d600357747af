"""Launches of the Triton kernels, recorded on a CPU (launches.py) and compiled ahead of time as for a GPU: not again for another batch size, and,
beside those of the goodness (test_triton.py), within its budget, with wide accesses."""

import os
import re

import pytest
import torch
from launches import as_on_a_gpu, compiled, specialised

pytest.importorskip("triton", reason="Triton is not installed")
from test_triton import SHARED, spilled

from fastff import spec


def epilogue(x):
    from fastff.kernels.triton import epilogue as module

    C = x.shape[1]
    e = spec.Epilogue(torch.rand(C), torch.rand(C), residual=torch.randn_like(x), activation="silu")
    _, _, mean, var = module.forward(x, e)
    module.backward(x, e, mean, var, torch.randn_like(x))
    module.update_running_statistics(
        torch.zeros(C), torch.ones(C), torch.zeros((), dtype=torch.int64), mean, var, 0.1, 9
    )


def layer_norm(x):
    from fastff.kernels.triton.layer_norm import layer_norm as run

    run(x, 1e-5)
    run(x[:1].repeat(1, 1, 16, 16), 1e-5)  # in parts


def groups(x):
    from fastff.kernels.triton import group_goodness as module

    for of, loss, normalization in (
        (spec.Groups(8), spec.Loss(target=torch.arange(len(x)) % 8), spec.Normalization("layer_norm")),
        (spec.Groups(8), spec.Loss(target=torch.arange(len(x)) % 8), spec.Normalization("group_norm", 8)),
        (spec.Groups(), spec.Loss("symba"), spec.Normalization("l2")),
        (spec.Groups(positions=True), spec.Loss("softplus"), spec.Normalization("layer_norm_channels")),
    ):
        module.step(spec.Step(x, None, of, loss, normalization))


def depthwise(x):
    from fastff.kernels.triton import depthwise as module

    weight = torch.randn(x.shape[1], 1, 5, 5).to(x.dtype)
    y = module.forward(x, weight, 2, 2)
    module.backward(y, x, weight, 2, 2, True)


def goodness(x):
    from fastff.kernels.triton import goodness as module

    B, C = x.shape[:2]
    loss, normalization = spec.Loss(target=torch.arange(B) % 8), spec.Normalization("layer_norm")
    for algorithm in ("direct", "second_moment"):
        step = spec.Step(x, None, spec.Projection(torch.randn(8, C, 1, 1)), loss, normalization)
        module.step(step, spec.Plan(algorithm, B, 8))


def spatial(x):
    """A hidden layer of the spatial term: what runs between the sweeps, which test_triton.py compiles, and the reduction.

    With few samples, which several programs share, and losses of pairs, the hidden layer and the loss have launches of their own."""
    from fastff.kernels.triton import goodness as module

    B, C, M = *x.shape[:2], 64
    layer = torch.randn(M, C), torch.ones(M), torch.zeros(M)
    head = spec.Projection(torch.randn(10, C, 1, 1), None, torch.randn(10, M, 4, 4), (0, 0), *layer)
    loss = spec.Loss(target=torch.arange(B) % 10, learned_tau=torch.tensor(1.0))
    for samples, of in ((x, loss), (x[:2], spec.Loss("symba"))):
        local = spec.Step(samples, None, head, of, spec.Normalization())
        module.step(local, spec.Plan("direct", len(samples), 10))


def few_samples(x):
    """One large sample, which several programs share: what joins the parts that they wrote."""
    from fastff.kernels.triton import goodness as module

    x = x[:1, :24].repeat(1, 1, 4, 4)
    head = spec.Projection(torch.randn(8, 24, 1, 1), torch.randn(8), torch.randn(8, 24, 2, 2))
    for algorithm in ("direct", "second_moment"):
        local = spec.Step(x, None, head, spec.Loss(target=torch.tensor([3])), spec.Normalization("layer_norm"))
        module.step(local, spec.Plan(algorithm, 1, 8))


def tail(x):
    """The end of a block: sums for the statistics of y, and the reduction, which goes on to dL/dy."""
    from fastff.kernels.triton import goodness as module

    C, loss = x.shape[1], spec.Loss(target=torch.arange(len(x)) % 8)
    around = spec.Epilogue(torch.ones(C), torch.ones(C), residual=x, activation="relu")
    local = spec.Step(x, around, spec.Projection(torch.randn(8, C, 1, 1)), loss, spec.Normalization("layer_norm"))
    module.step(local, spec.Plan("direct", len(x), 8))


KERNELS = {
    f.__name__: f for f in (epilogue, layer_norm, groups, depthwise, spatial, few_samples, tail)
}  # fmt: skip
MADE = {
    "spatial": {"spatial", "hidden_gradient", "loss_kernel"},
    "few_samples": {"join"},
    "tail": {"channel_sums", "reduce"},
}


def launches_of(name, B, C, H, dtype, channels_last):
    x = torch.randn(B, C, H, H).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    with as_on_a_gpu(4) as launches, launches:
        (KERNELS | {"goodness": goodness})[name](x)
    assert launches.recorded, "PyTorch's operators run"
    return launches.recorded


CASES = [(90, torch.bfloat16, 24, 7, True), (86, torch.float16, 240, 14, True), (80, torch.float32, 64, 32, False)]
if os.environ.get("FASTFF_SHAPES") == "all":
    CASES += [(arch, torch.bfloat16, 64, 32, True) for arch in SHARED]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("arch", "dtype", "C", "H", "channels_last"), CASES)
def test_fits_the_chip(name, arch, dtype, C, H, channels_last):
    launches = launches_of(name, 8, C, H, dtype, channels_last)
    assert MADE.get(name, set()) <= {kernel.fn.__name__ for kernel, *_ in launches}
    for kernel, args, kwargs in launches:
        if kernel.fn.__name__ in ("direct", "second_moment", "head_second_moment"):
            continue  # tests/test_triton.py
        binary, of = compiled(kernel, args, kwargs, arch), f"{kernel.fn.__name__} of {name}"
        assert binary.metadata.shared <= SHARED[arch], of
        assert spilled(binary, arch) == 0, of
        narrow = len(re.findall(r"ld\.global\.[\w:.]*b16", binary.asm["ptx"]))
        # one number is a pivot; depthwise filters, and a wide position of few channels, are not contiguous in a tile
        assert narrow <= 1 or name == "depthwise", f"{of}: {narrow} loads of 2 bytes"
        wide = kernel.fn.__name__ in ("channel_sums", "apply", "derive", "finish", "kernel", "samples", "positions")
        if channels_last and (wide or (name, kernel.fn.__name__) == ("tail", "reduce")):
            assert re.search(r"ld\.global\.[\w:.]*v4\.b32", binary.asm["ptx"]), f"{of}: no loads of 16 bytes"
        if channels_last and kernel.fn.__name__ in ("convolve", "weight_gradient"):
            assert re.search(r"ld\.global\.[\w:.]*v[24]\.b32", binary.asm["ptx"]), f"{of}: no loads of 8 bytes"


@pytest.mark.parametrize("name", [*KERNELS, "goodness"])
def test_another_batch_size_compiles_nothing(name):
    """Sizes that are a multiple of 16 or not, and fill the GPU or not."""
    keys = []
    for B in (2, 6, 16):
        found = set()
        for kernel, args, kwargs in launches_of(name, B, 24, 7, torch.bfloat16, True):
            source, options = specialised(kernel, args, kwargs, 90)
            found.add(
                (kernel.fn.__name__, str(source.signature), str(source.constants), str(source.attrs), str(options))
            )
        keys.append(found)
    assert keys[0] == keys[1] == keys[2]
