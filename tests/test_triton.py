"""The Triton kernels without a GPU: interpreted against float64, and compiled ahead of time within a GPU's budget.

Interpreted runs are processes of their own, since Triton decides at its import. With a GPU the same files run on it through `make gpu`."""

import glob
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from launches import SHAPES, as_on_a_gpu, compiled

from fastff import spec

triton = pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
INTERPRETED = {
    "goodness and gradients": ("test_goodness.py", "test_goodness_and_its_gradients"),
    "goodness_step": ("test_goodness.py", "test_goodness_step_and_loss"),
    "goodness_step at its limits": ("test_goodness_limits.py", "empty_batch or not_a_number or labels"),
    "layer_norm": ("test_layer_norm.py", "triton"),
    "epilogue": ("test_epilogue_step.py", "test_tail_step"),
    "epilogue of two losses": ("test_epilogue.py", "another_loss and triton"),
    "depthwise": ("test_depthwise.py", "values or empty"),
    "group_goodness": ("test_group_goodness.py", "step or alone"),
    "group_epilogue": ("test_group_epilogue_step.py", "test_step and triton and (none or l2 or rms)"),
    "step": ("triton_step.py", "test"),
    "products": ("triton_products.py", "test"),
    "sums": ("triton_sums.py", "test"),
    "trainer": ("triton_trainer.py", "test"),
    "tuning": ("triton_tuning.py", "test"),
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name):
    file, chosen = INTERPRETED[name]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file), "-k", chosen],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=HERE.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    assert re.search(r"\d+ passed", run.stdout), run.stdout[-1000:]


def test_without_a_gpu_the_table_says_why(monkeypatch):
    import fastff.functional as ff

    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3)
    with pytest.raises(RuntimeError, match="triton: Triton runs on CUDA devices, x is on cpu"):
        ff.goodness(x, weight, impl="triton")
    monkeypatch.setattr("fastff.kernels.triton.INSTALLED", False)
    with pytest.raises(RuntimeError, match="triton: Triton is not installed"):
        ff.layer_norm(x, impl="triton")


# --- ahead of time

SHARED = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}  # bytes a program may have


def spilled(binary, arch):
    """Bytes that ptxas spilled to memory."""
    return assembled(binary, arch)[0]


def assembled(binary, arch):
    """Bytes that ptxas spilled to memory, and registers of a thread."""
    assembler = glob.glob(os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/ptxas*"))
    suffix = "a" if arch >= 90 else ""
    for tool in sorted(assembler):
        with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
            file.write(binary.asm["ptx"])
            file.flush()
            command = [tool, "-v", f"--gpu-name=sm_{arch}{suffix}", "-o", os.devnull, file.name]
            said = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"(\d+) bytes spill stores", said.stdout + said.stderr)
        if said.returncode == 0 and found:
            return int(found[1]), int(re.search(r"Used (\d+) registers", said.stdout + said.stderr)[1])
    raise AssertionError(said.stderr)


def launched(arch, dtype, algorithm, C, P, K, cells=0, activation=None, channels_last=True, bias=False, hidden=0, B=8):
    """[(kernel, arguments, keywords)]: the launches that a step (with an epilogue, where there is an activation) makes."""
    from fastff.kernels.triton import blocks, goodness

    H, G = math.isqrt(P), math.isqrt(cells)
    x = torch.zeros(B, C, H, H, dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype])
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    around = activation and spec.Epilogue(
        torch.ones(C), torch.ones(C), residual=torch.zeros_like(x), activation=activation
    )
    bias, cells = torch.ones(K) if bias else None, torch.ones(K, hidden or C, G, G) if G else None
    layer = (torch.ones(hidden, C), torch.ones(hidden), torch.ones(hidden)) if hidden else ()
    head = spec.Projection(torch.ones(K, C, 1, 1), bias, cells, (0, 0), *layer)
    loss = spec.Loss(target=torch.zeros(B, dtype=torch.int64))
    step = spec.Step(x, around, head, loss, spec.Normalization("layer_norm"))
    with mock.patch.object(blocks, "architecture", lambda device: arch), as_on_a_gpu(1) as launches, launches:
        goodness.step(step, spec.Plan(algorithm, B, K))
    return launches.recorded


def sweeps(*case):
    """The launches of a step that make most of its arithmetic."""
    from fastff.kernels.triton import goodness
    from fastff.kernels.triton.goodness import products

    kernels = [goodness.direct, goodness.second_moment, goodness.head_second_moment]
    kernels += [getattr(products, name) for name in PRODUCTS]
    return [launch for launch in launched(*case) if launch[0] in kernels]


PRODUCTS = ("outputs", "input_gradient", "weight_gradient")

# (compute capability, dtype, algorithm, C, P, K, cells, activation, channels_last, bias, hidden); SiLU is the costliest activation but GELU
CASES = [
    *((90, "bf16", "direct", *shape) for shape in [(64, 1024, 10), (128, 256, 100), (512, 16, 10), (24, 3136, 10)]),
    (90, "bf16", "direct", 64, 1024, 10, 16), (90, "bf16", "direct", 64, 1024, 10, 0, "silu"), (90, "bf16", "direct", 512, 16, 10, 16, "gelu"),
    (90, "bf16", "direct", 64, 1024, 10, 16, "silu", True, False, 64),
    (90, "bf16", "direct", 64, 1024, 10, 0, None, False, True), (90, "fp32", "direct", 64, 1024, 10),
    (80, "bf16", "direct", 128, 256, 10), (86, "bf16", "direct", 64, 1024, 10), (100, "bf16", "direct", 128, 256, 10),
    *((90, "bf16", "second_moment", *shape) for shape in [(64, 1024, 1000), (128, 784, 1000), (64, 1024, 100, 16, "silu")]),
    (80, "bf16", "second_moment", 64, 1024, 100),
    (90, "bf16", "products", 256, 196, 1000), (90, "fp16", "products", 512, 49, 100), (86, "bf16", "products", 960, 49, 1000),
]  # fmt: skip
MORE = [
    *((90, "bf16", "direct", *shape) for shape in [(64, 1024, 100), (128, 256, 10), (256, 64, 10), (256, 64, 100)]),
    *((90, "bf16", "direct", *shape) for shape in [(256, 196, 100), (960, 49, 10), (512, 16, 10, 16), (40, 784, 10)]),
    *((90, "bf16", "direct", *shape, "silu") for shape in [(256, 64, 10, 0), (64, 1024, 10, 16), (128, 256, 10, 0)]),
    (90, "fp16", "direct", 128, 256, 100), (90, "fp32", "direct", 256, 64, 10), (90, "fp32", "direct", 64, 1024, 10, 0, "silu"),
    *((arch, "bf16", "direct", C, P, K) for arch in (80, 86, 100, 120) for C, P, K in [(64, 1024, 32), (256, 64, 10)]),
    *((arch, "bf16", "direct", 64, 1024, 10, 16, "gelu") for arch in (80, 86, 90, 100, 120)),
    (90, "fp16", "direct", 256, 64, 16, 16, "gelu"), (100, "bf16", "direct", 512, 16, 10, 16, "gelu"),
    (90, "bf16", "direct", 64, 1024, 32, 16, "gelu"), (80, "bf16", "direct", 64, 1024, 32, 16, "gelu", True, True, 64),
    *((arch, "bf16", "direct", 64, 1024, 10, 16, "silu", True, False, 64) for arch in (80, 86, 100, 120)),
    (100, "bf16", "direct", 128, 256, 64), (90, "fp32", "second_moment", 64, 1024, 1000),
    *((90, "bf16", "second_moment", *shape) for shape in [(24, 3136, 1000), (112, 196, 1000), (64, 1024, 100, 16)]),
    *((arch, "bf16", "second_moment", 64, 1024, 1000) for arch in (86, 100, 120)),
]  # fmt: skip


def of_all_shapes():
    """A case for each size of tile that a step at any of SHAPES has on any architecture, by the algorithms that take it; behind an epilogue too."""
    from fastff.kernels.triton import blocks

    found = {}
    types = ("bf16", 2, ()), ("fp16", 2, ()), ("fp32", 4, ()), ("bf16", 2, (0, "silu")), ("fp32", 4, (0, "silu"))
    for arch, (dtype, itemsize, around), (B, C, H, K), algorithm in itertools.product(
        SHARED, types, SHAPES, ("direct", "second_moment", "products")
    ):
        if sizes := blocks.table(algorithm, B, C, H * H, K, 0, itemsize, bool(around), arch):
            key = arch, dtype, algorithm, blocks.power_of_2(C) > C, sizes, around
            found.setdefault(key, (arch, dtype, algorithm, C, H * H, K, *around))
    return list(found.values())


if os.environ.get("FASTFF_SHAPES") == "all":  # each takes about 3 s of a CPU
    CASES = list(dict.fromkeys(CASES + MORE + of_all_shapes()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_the_chip(case):
    """No spills; registers and shared memory for the programs that a multiprocessor is given; tensor cores, on sm_90 warpgroups of them with
    positions as their rows; asynchronous copies, and accesses of 16 bytes, where C % 8 == 0."""
    from fastff.kernels.triton import blocks

    arch, dtype, algorithm, C, *_ = case
    launches = sweeps(*case)
    assert launches, "PyTorch's operators run"
    for kernel, args, kwargs in launches:
        name, config = kernel.fn.__name__, args[-1]
        sweep = name in ("direct", "second_moment")
        programs = blocks.resident(blocks.Blocks(*[0] * 5, kwargs["num_warps"])) if sweep else 1
        binary = compiled(kernel, args, kwargs, arch)
        assembly, shared = binary.asm["ptx"], binary.metadata.shared
        spills, registers = assembled(binary, arch)
        assert spills == 0, f"{name}: {spills} bytes spilled"
        assert registers * 32 * kwargs["num_warps"] * programs <= 2**16, f"{name}: {registers} registers"
        assert shared * programs <= SHARED[arch], f"{name}: {shared} bytes of shared memory, {programs} programs"
        once = config.K <= config.BK if name == "input_gradient" else name == "outputs" and config.C <= config.BC
        pipelined = kwargs["num_stages"] > 1 and not once
        assert pipelined == ("cp.async" in assembly), f"{name}: loads are not asynchronous"
        if name == "head_second_moment":
            continue
        assert not re.search(r"(ld|st)\.global\.b16", assembly), f"{name}: accesses of 2 bytes"
        if name in PRODUCTS:
            widest = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(arch, "mma.sync")
            assert dtype == "fp32" or C < 64 or widest in assembly, name
            assert dtype == "fp32" or C < 64 or arch != 90 or "mma.sync" not in assembly, name
        elif dtype != "fp32" and C >= 64 and config.SECOND.value:
            widest = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(arch, "mma.sync")
            products = widest if config.NS.value * config.BP.value >= 64 or arch < 90 else "mma."  # of 64 rows
            assert assembly.count(products) >= 3, f"{name}: {products} {assembly.count(products)} times"
            assert arch != 90 or config.GH.value > 1 or algorithm != "direct" or "mma.sync" not in assembly, name


def loads(binary, function):
    """(asynchronous loads, others) that lines of this function of a kernel make in the assembly."""
    lines, start = inspect.getsourcelines(function.fn)
    file, within, found = Path(inspect.getsourcefile(function.fn)).name, range(start, start + len(lines)), [0, 0]
    names = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', binary.asm["ptx"]))
    here = False
    for line in binary.asm["ptx"].splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            here = Path(names[place[1]]).name == file and int(place[2]) in within
        elif here and (instruction := re.search(r"\b(cp\.async\.c[ag]|ld\.global)", line)):
            found[instruction[1] == "ld.global"] += 1
    return tuple(found)


@pytest.mark.parametrize(
    "case",
    [
        (90, "bf16", "direct", 64, 1024, 10), (80, "bf16", "direct", 128, 256, 10), (90, "bf16", "second_moment", 64, 1024, 10),
        (90, "bf16", "direct", 128, 256, 100), (90, "bf16", "direct", 512, 256, 10),
    ],
    ids=str,
)  # fmt: skip
def test_sweeps_do_not_wait_for_x_and_w(case):
    """Both sweeps of a sample load x ahead of the products. W is loaded once for all samples; where channels are in pieces it is loaded ahead
    likewise, and what a program writes of its own piece is loaded once more where it is needed."""
    from fastff.kernels.triton import epilogue
    from fastff.kernels.triton.goodness import arguments

    arch, _, algorithm, *_ = case
    kernel, args, kwargs = sweeps(*case)[0]
    config, threads = args[-1], 32 * kwargs["num_warps"]
    binary = compiled(kernel, args, kwargs, arch)
    pieces = config.C.value > config.BC.value
    tile = config.BC.value * config.NS.value * config.BP.value
    vectors = tile // (8 * threads)  # loads of a tile by a thread, 16 bytes of x each
    ahead, waiting = loads(binary, epilogue.load_tile)
    assert ahead == 2 * kwargs["num_stages"] * vectors
    assert waiting == pieces * vectors
    if algorithm == "direct":
        ahead, waiting = loads(binary, arguments.class_weights)
        assert waiting == config.BC.value * config.BK.value // (4 * threads)
        assert (ahead > 0) == pieces


@pytest.mark.parametrize(
    "case",
    [
        (90, "bf16", "second_moment", 64, 16, 1000, 16), (86, "bf16", "second_moment", 64, 16, 1000, 16),  # dL/dV of 1000 classes
        (90, "bf16", "products", 512, 4, 100, 4, None, True, False, 64, 256), (86, "fp32", "products", 512, 1, 100, 1, None, True, False, 64, 256),
        (86, "fp16", "direct", 40, 1, 10, 1, None, True, True, 64, 256),
    ],
    ids=str,
)  # fmt: skip
def test_the_smaller_launches_fit_the_chip(case):
    """A grid's weights of many classes, and a hidden layer on few positions of many samples, in the shared memory that there is."""
    shared = {kernel.fn.__name__: compiled(kernel, *how, case[0]).metadata.shared for kernel, *how in launched(*case)}
    assert shared.keys() >= (
        {"reduce"} if case[2] == "second_moment" else {"hidden_layer", "hidden_gradient", "spatial"}
    )
    assert max(shared.values()) <= SHARED[case[0]], shared
