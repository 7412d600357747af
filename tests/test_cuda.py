"""The CUDA kernel without a GPU: its source runs on the CPU, thread by thread, against float64; its machine code keeps to budgets; and what the table
says where it cannot run. tests/cuda_host/ has the threads."""

import ctypes
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_exact, same_bits

import fastff.functional as ff
from fastff import reference
from fastff.kernels import cuda, native
from fastff.kernels.cuda import goodness as kernel
from fastff.ops import goodness as op
from fastff.spec import Epilogue, Loss, Normalization, Projection, Step

ROOT = Path(__file__).resolve().parents[1]
H100, A100, RTX3090 = (132, 227 << 10, True), (108, 163 << 10, False), (82, 99 << 10, False)
WHOLE_STEP = Normalization("layer_norm")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """tests/cuda_host/ as a library whose operator, fastff_cuda_host::step, takes the place of fastff::step_native."""
    if native.reason() or shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("needs the compiled library, Linux and g++")
    torch_folder, built = Path(torch.__file__).parent, tmp_path_factory.mktemp("cuda") / "host.so"
    options = [
        "-O1",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    sources = ["-include", ROOT / "tests/cuda_host/warp.h", ROOT / "tests/cuda_host/library.cpp"]
    with_torch = [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", *options, *sources, *with_torch, "-o", built], check=True)
    torch.ops.load_library(built)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.fastff, "step_native", torch.ops.fastff_cuda_host.step)
        yield ctypes.CDLL(built)


def channels_last(*shape, dtype=torch.bfloat16, generator=None, offset=0.0):
    """Random numbers between samples of NaN."""
    big = torch.full((shape[0] + 2, *shape[1:]), float("nan"), dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    part = big[1:-1]
    part.copy_(torch.randn(shape, generator=generator) + offset)
    return part


@st.composite
def problems(draw):
    """A Step, and a device of which samples need one block or several."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16]))
    K = draw(st.sampled_from([1, 2, 10, 16, 17, 40, 100, 128]))
    B, C = draw(st.integers(1, 5)), 8 * draw(st.integers(1, 12 if K <= 64 else 15))
    H, W = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    bias = draw(st.booleans())
    loss = Loss(
        target=torch.randint(K, (B,), generator=generator),
        tau=draw(st.sampled_from([1.0, 0.3])),
        learned_tau=torch.tensor(1.5) if draw(st.booleans()) else None,
        margin=draw(st.sampled_from([0.0, 1.5])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        grad_scale=torch.tensor(0.5) if draw(st.booleans()) else None,
    )
    step = Step(
        channels_last(B, C, H, W, dtype=dtype, generator=generator, offset=draw(st.sampled_from([0.0, 3.0]))),
        None,
        Projection(
            torch.randn(K, C, 1, 1, generator=generator) * (1 / C) ** 0.5,
            torch.randn(K, generator=generator) if bias else None,
        ),
        loss,
        Normalization(draw(st.sampled_from(["layer_norm", "layer_norm", "none"]))),
        draw(st.booleans()) or draw(st.booleans()),
    )
    return step, draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2, 4, 8]))


def expected(step, dtype):
    """Results in `dtype`; weight and d a are rounded to x's type, as the kernel does, unless dtype is float64, which rounds the weight alone."""
    narrow, head, loss = step.x.dtype, step.goodness, step.loss
    x, P = step.x.to(dtype).flatten(2), step.x[0, 0].numel()
    weight = head.weight[:, :, 0, 0].to(narrow).to(dtype)
    beta = 0 if head.bias is None else head.bias.to(narrow).to(dtype)[:, None]
    options = {"margin": loss.margin, "label_smoothing": loss.label_smoothing}
    tau = loss.tau * (1 if loss.learned_tau is None else loss.learned_tau.to(dtype))
    scale = loss.scale(len(x)) * (1 if loss.grad_scale is None else loss.grad_scale.to(dtype))
    a = weight @ x + beta
    g = a.square().mean(2)
    d, grad_tau = reference.goodness_gradient(g, loss.target, tau, scale=scale, **options)
    factor = scale * tau * 2 / P
    e = a * (d / (scale * tau))[:, :, None]
    rounded = e if dtype == torch.float64 else e.to(narrow).to(dtype)
    top = (tau * g).logsumexp(1).abs() + abs(tau) * g.amax(1) + loss.margin
    return {
        "loss": reference.margin_cross_entropy(g, loss.target, tau, **options),
        "goodness": g,
        "grad_x": (factor * (weight.T @ rounded)).view(step.x.shape),
        "grad_weight": (factor * (rounded @ x.mT).sum(0)).view_as(head.weight),
        "grad_bias": factor * rounded.sum((0, 2)),
        "grad_tau": grad_tau * loss.tau,
        "normalized": reference.normalized(step.x.to(dtype), "layer_norm", 1, step.normalization.eps),
    }, {
        "loss": top,
        "grad_tau": 2 * scale * loss.tau * g.amax(1).sum(),
        "grad_x": (factor * (weight.abs().T @ e.abs())).view(step.x.shape),
        "grad_weight": (factor * (e.abs() @ x.abs().mT).sum(0)).view_as(head.weight),
        "grad_bias": factor * e.abs().sum((0, 2)),
    }  # fmt: skip


def pretended(host, step, multiprocessors, blocks):
    """Pretend a device on which this step's samples take so many blocks, or as many as they can; return its bytes of shared memory."""
    (B, C, H, W), K, bias = step.x.shape, len(step.goodness.weight), step.goodness.bias is not None
    found, kept = (ctypes.c_int * 5)(), 227 << 10
    for shared in range(227 << 10, 8 << 10, -1024):
        host.pretend(multiprocessors, shared, blocks > 1, 0)
        host.division(B, H * W, C, K, bias, found)
        kept = shared if found[0] else kept
        if found[0] >= blocks:
            break
    host.pretend(multiprocessors, kept, blocks > 1, 0)
    return kept


@settings(deadline=None, max_examples=int(os.environ.get("FASTFF_EXAMPLES", 40)), derandomize=True)
@given(problems())
def test_against_float64(host, problem):
    step, multiprocessors, blocks = problem
    shared = pretended(host, step, multiprocessors, blocks)
    before = step.x.clone()
    got = kernel.step(step, None)._asdict()
    exact, magnitudes = expected(step, torch.float64)
    plain, _ = expected(step, torch.float32)
    wanted = {"loss", "goodness", "grad_weight"}
    wanted |= {"grad_x"} if step.need_grad_x else set()
    wanted |= {"grad_bias"} if step.goodness.bias is not None else set()
    wanted |= {"grad_tau"} if step.loss.learned_tau is not None else set()
    wanted |= {"normalized"} if step.normalization.name != "none" else set()
    assert {name for name, t in got.items() if t is not None} == wanted
    for name in wanted:
        assert_as_exact(name, got[name], exact[name], plain[name], magnitudes.get(name))
    assert torch.equal(step.x, before)
    host.pretend(multiprocessors, shared, blocks > 1, 1)  # threads in another order
    for name, t in kernel.step(step, None)._asdict().items():
        assert t is None or same_bits(t, got[name]), f"{name} depends on the order of threads"


def test_labels_out_of_range_make_the_loss_nan(host):
    host.pretend(*H100, 0)
    x, weight, target = channels_last(4, 8, 2, 2), torch.randn(4, 8, 1, 1), torch.tensor([1, 4, -1, 2**32 + 1])
    found = kernel.step(Step(x, None, Projection(weight), Loss(target=target), Normalization()), None)
    assert found.loss.isnan().tolist() == [False, True, True, True]


def test_not_a_number_stays_with_its_sample(host):
    host.pretend(1, 227 << 10, False, 0)
    x, weight = channels_last(4, 8, 2, 2), torch.randn(4, 8, 1, 1)
    x[1, 3, 0, 1] = float("nan")
    found = kernel.step(Step(x, None, Projection(weight), Loss(target=torch.tensor([1, 0, 2, 3])), WHOLE_STEP), None)
    for t in (found.loss, found.goodness, found.grad_x, found.normalized):
        assert t.flatten(1 if t.dim() > 1 else 0).isnan().view(4, -1).any(1).tolist() == [False, True, False, False]


# How samples are divided: (C, H, K): blocks of a sample, samples at a time, and blocks a multiprocessor holds, 1 or at least 2
DIVISIONS = {
    H100: {(64, 32, 10): (2, 1, 2), (64, 32, 100): (4, 1, 2), (128, 16, 10): (1, 1, 2), (128, 16, 100): (2, 1, 2), (256, 8, 10): (1, 2, 2),
           (512, 4, 10): (1, 2, 2), (64, 56, 10): (8, 1, 2), (128, 28, 10): (4, 1, 2), (256, 14, 10): (2, 1, 2), (256, 56, 10): (8, 1, 1),
           (512, 7, 10): (1, 1, 2), (1024, 14, 10): (8, 1, 2), (24, 56, 100): (4, 1, 2)},
    A100: {(64, 32, 10): (1, 1, 1), (128, 16, 10): (1, 1, 2), (256, 8, 10): (1, 2, 2), (512, 4, 10): (1, 3, 2), (64, 56, 10): (0, 0, 0)},
    RTX3090: {(64, 32, 10): (0, 0, 0), (128, 16, 10): (1, 1, 1), (256, 8, 10): (1, 1, 2), (512, 7, 10): (1, 1, 1)},
}  # fmt: skip


@pytest.mark.parametrize("device, shape", [(device, shape) for device, shapes in DIVISIONS.items() for shape in shapes])
def test_samples_are_divided(host, device, shape):
    (C, H, K), B = shape, 512
    host.pretend(*device, 0)
    found = (ctypes.c_int * 5)()
    host.division(B, H * H, C, K, False, found)
    blocks, samples, tiles, grid, size = found
    resident = (device[1] + 1024) // (size + 1024) if blocks else 0
    assert (blocks, samples, min(resident, 2)) == DIVISIONS[device][shape]
    if blocks:
        assert blocks * tiles * 16 >= H * H and size <= device[1]
        assert 0 < grid <= 2 * device[0] and grid % blocks == 0
        assert samples == 1 or samples * tiles <= 8
    assert host.fastff_goodness_blocks(0, B, H * H, C, K, 0) == blocks


def test_the_table_of_the_page(host):
    """docs/kernels.md: blocks of a sample on three devices, and the shared memory of a block on the first."""
    text = (ROOT / "docs" / "kernels.md").read_text("utf-8").split("blocks a sample on an H100")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (\d+), (\d+), (\d+) \| (.+) \|$", text, re.M)
    assert len(rows) == 7
    for *sizes, cells in rows:
        C, H, K = map(int, sizes)
        first, memory, *others = cells.split(" | ")
        for device, cell in zip((H100, A100, RTX3090), (first, *others), strict=True):
            host.pretend(*device, 0)
            found = (ctypes.c_int * 5)()
            host.division(512, H * H, C, K, False, found)
            blocks, samples, _, _, size = found
            assert cell.startswith(str(blocks) if blocks else "does not fit"), (sizes, cell)
            assert samples < 2 or f"({samples}" in cell, (sizes, cell)
            assert device is not H100 or memory == f"{size / 1024:.0f} KB", (sizes, memory, size)


@pytest.mark.parametrize(
    "C, K", [(1024, 16), (1040, 16), (512, 32), (256, 64), (128, 128), (128, 129), (136, 100), (4, 2)]
)
def test_what_registers_and_classes_allow(host, C, K):
    host.pretend(*H100, 0)
    fits = C % 8 == 0 and K <= 128 and C * max(16, 1 << (K - 1).bit_length()) <= 16384
    assert (host.fastff_goodness_blocks(0, 8, 16, C, K, 0) > 0) == fits


# What the table says


def test_on_a_cpu_it_says_why():
    x, weight = channels_last(2, 8, 3, 3), torch.randn(4, 8)
    with pytest.raises(
        RuntimeError,
        match="impl='cuda': .*goodness_step can run here .cuda: the CUDA kernel runs on CUDA devices, x is on cpu",
    ):
        ff.goodness_step(x, weight, None, torch.tensor([0, 1]), impl="cuda")
    with pytest.raises(RuntimeError, match="there is no such implementation of goodness yet"):
        ff.goodness(x, weight, impl="cuda")


@pytest.fixture
def anywhere(host, monkeypatch):
    """The row as on a device of its own, which is `host`."""
    row, *others = op.STEP_ROWS
    assert row.name == "cuda" and row.skip_reason(None), "an explicit choice, until it was measured"
    monkeypatch.setattr(op, "STEP_ROWS", [row._replace(can_run=lambda x: None), *others])
    monkeypatch.setattr(kernel, "blocks", lambda device, *sizes: host.fastff_goodness_blocks(0, *sizes))
    host.pretend(*H100, 0)


def test_the_public_function_runs_it_by_name_alone(anywhere, monkeypatch):
    x, weight, target = channels_last(2, 16, 3, 3), torch.randn(4, 16), torch.tensor([0, 3])
    ran = []
    monkeypatch.setattr(kernel, "step", lambda local, plan, run=kernel.step: ran.append(1) or run(local, plan))
    found = ff.goodness_step(x, weight, None, target, impl="cuda")
    assert ran == [1]
    plain = ff.goodness_step(x, weight.bfloat16().float(), None, target, impl="torch")
    assert found.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
    torch.testing.assert_close(found.grad_x, plain.grad_x, rtol=2**-7, atol=2**-9 * float(plain.grad_x.abs().max()))
    assert found.grad_x.stride() == plain.grad_x.stride() and found.normalized.stride() == plain.normalized.stride()
    ff.goodness_step(x, weight, None, target)
    assert ran == [1], "auto passes it over"


REFUSED = {
    "float32": ({"x": torch.randn(2, 8, 3, 3)}, "for bfloat16 and float16, x is torch.float32"),
    "contiguous": ({"x": torch.randn(2, 8, 3, 3).bfloat16()}, "reads x in channels_last memory"),
    "channels": ({"x": channels_last(2, 12, 3, 3)}, "channels in eights and at most 128 classes, here are 12 and 4"),
    "classes": ({"K": 129}, "channels in eights and at most 128 classes, here are 8 and 129"),
    "kernel size": ({"k": 3}, "weight of kernel size 1 and without a grid"),
    "grid": ({"grid_weight": torch.randn(4, 8, 2, 2)}, "weight of kernel size 1 and without a grid"),
    "float64": ({"dtype": torch.float64}, "computes in float32, an argument is float64"),
    "normalization": ({"normalize": "rms"}, "for the normalizations none and layer_norm, the step has rms"),
    "algorithm": ({"algorithm": "second_moment"}, "has the direct algorithm only"),
    "size": ({"x": channels_last(2, 1024, 40, 40)}, r"a sample \[1024, 40, 40\] and 4 classes do not fit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(anywhere, name):
    given, message = REFUSED[name]
    given = dict(given)
    x = given.pop("x", channels_last(2, 8, 3, 3))
    k, K = given.pop("k", 1), given.pop("K", 4)
    weight = torch.randn(K, x.shape[1], k, k, dtype=given.pop("dtype", torch.float32))
    with pytest.raises(RuntimeError, match=f"cuda: .*{message}"):
        ff.goodness_step(x, weight, None, torch.tensor([0, 1]), impl="cuda", **given)
    ff.goodness_step(x, weight, None, torch.tensor([0, 1]), impl="cuda,torch", **given)  # the next in order runs


def test_it_refuses_an_epilogue_and_other_losses():
    step = Step(
        channels_last(2, 8, 3, 3),
        Epilogue(),
        Projection(torch.randn(4, 8, 1, 1)),
        Loss(target=torch.tensor([0, 1])),
        WHOLE_STEP,
    )
    assert "the step has an epilogue" in kernel.takes(step)
    assert "the step has symba" in kernel.takes(step._replace(epilogue=None, loss=Loss("symba")))


# The library as nvcc built it

LIBRARY = importlib.util.find_spec("fastff._C_cuda")
TOOLS = glob.glob(
    str(Path(getattr(importlib.util.find_spec("triton"), "origin", "/")).parent / "backends/nvidia/bin/cuobjdump")
)
built = pytest.mark.skipif(
    not (LIBRARY and TOOLS),
    reason="needs fastff._C_cuda, which setup.py builds where nvcc is (requirements-cuda.txt), and cuobjdump of Triton's wheel",
)


def cuobjdump(*options):
    return subprocess.run([TOOLS[0], *options, LIBRARY.origin], capture_output=True, text=True, check=True).stdout


@built
def test_registers_without_spills():
    """Two blocks of 256 threads a multiprocessor need at most 128 registers a thread; local memory would be where registers are spilled to."""
    usage = cuobjdump("-res-usage")
    architectures = re.findall(r"^arch = (sm_\w+)", usage, re.M)
    steps = re.findall(r"Function (\S*goodness_step\S*):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert architectures and len(steps) == 8 * len(architectures), "two types and four numbers of classes"
    for name, registers, stack, shared, local in steps:
        assert int(registers) <= 128 and stack == local == "0" and shared in ("0", "1024"), name  # the system has 1024


@built
def test_it_loads_without_a_gpu():
    """Nothing in it is looked up in PyTorch's CUDA libraries before a launch."""
    assert cuda.library().fastff_goodness_blocks


@built
@pytest.mark.parametrize("clusters", [True, False])
def test_instructions(clusters):
    """Tensor cores, ldmatrix, asynchronous copies and 16-byte stores; barriers of clusters where there are clusters."""
    there = re.findall(r"^arch = (sm_\w+)", cuobjdump("-res-usage"), re.M)
    chosen = [name for name in there if (name >= "sm_90" or len(name) > 6) == clusters][:1]
    if not chosen:
        pytest.skip(f"built for {', '.join(there)} alone")
    for code in re.split(r"Function : ", cuobjdump("-sass", "-arch", *chosen))[1:]:
        if "goodness_step" not in code.split("\n", 1)[0]:
            continue
        count = {
            name: len(re.findall(rf"\b{name}\b", code))
            for name in ("HMMA.16816.F32.BF16", "HMMA.16816.F32", "LDSM", "LDGSTS", "STG", "STL")
        }
        assert count["HMMA.16816.F32"] >= 24 and count["LDSM"] >= 12 and count["LDGSTS"] >= 1 and count["STL"] == 0
        assert len(re.findall(r"LDGSTS\.E\.BYPASS\S*\.128", code)) == count["LDGSTS"], "copies of 16 bytes"
        assert len(re.findall(r"STG\.E\.128", code)) >= 2, "both results by 16 bytes a thread"
        assert bool(re.search(r"UCGABAR_ARV", code)) == clusters
