"""The Triton kernels without a GPU: interpreted against float64, and compiled ahead of time within a GPU's budget.

Interpreted runs are processes of their own, since Triton decides at its import. With a GPU the same files run on it through `make gpu`."""

import glob
import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastff import spec
from fastff.spec import Plan

triton = pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
INTERPRETED = {
    "goodness and gradients": ("test_goodness.py", "test_goodness_and_its_gradients"),
    "goodness_step": ("test_goodness.py", "test_goodness_step_and_loss or empty_batch or not_a_number or labels"),
    "layer_norm": ("test_layer_norm.py", "triton"),
    "epilogue": ("test_epilogue_step.py", "test_tail_step"),
    "epilogue of two losses": ("test_epilogue.py", "another_loss and triton"),
    "depthwise": ("test_depthwise.py", "values or empty"),
    "group_goodness": ("test_group_goodness.py", "step or alone"),
    "group_epilogue": ("test_group_epilogue_step.py", "test_step and triton and (none or l2 or rms)"),
    "step": ("triton_step.py", "test"),
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

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
INTEGERS = {"target": "*i64", "starts": "*i32", "group_of": "*i32"}
NUMBERS = {"tau", "margin", "label_smoothing", "scale", "eps", "theta", "theta_gap", "alpha"}
ACTIVATIONS = {"x", "residual", "grad_x", "normalized", "y", "grad_h", "grad_y"}
POINTERS = ACTIVATIONS | set(INTEGERS) | {
    "affine", "weight", "bias", "g", "d", "second", "mu", "sums", "means", "cells", "losses", "grad_tau", "learned_tau", "grad_scale", "largest",
    "grad_weight", "grad_bias", "partial", "channel_sums", "factors",
}  # fmt: skip
DIVISIBLE = {"C", "P", "sample_stride", "channel_stride", "position_stride", "n", "share", "positions", "xb"}


def compiled(kernel, dtype, arch, warps, **fixed):
    """The kernel for x of `dtype`. Arguments, and fields of its bundles of them, that are fixed to None are absent, to a number constant."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants, attributes, unknown = {}, {}, set(fixed)

    def declared(name, path, bundle):
        """The type of an argument, or of all fields of a bundle."""
        unknown.discard(name)
        if hasattr(bundle, "_fields") and name not in fixed:
            return bundle(*(declared(field, (*path, i), None) for i, field in enumerate(bundle._fields)))
        if name in fixed:
            constants[path] = fixed[name]
            return "constexpr"
        if name in POINTERS or name in DIVISIBLE:
            attributes[path] = [["tt.divisibility", 16]]
        if name in POINTERS:
            return INTEGERS.get(name, f"*{dtype if name in ACTIVATIONS else 'fp32'}")
        return "fp32" if name in NUMBERS else "i32"

    parameters = inspect.signature(kernel.fn).parameters.values()
    signature = {p.name: declared(p.name, (i,), p.annotation) for i, p in enumerate(parameters)}
    assert not unknown, unknown
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def spilled(binary, arch):
    """Bytes that ptxas spilled to memory."""
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
            return int(found[1])
    raise AssertionError(said.stderr)


def sweeps(dtype, algorithm, C, P, K, cells, activation=None):
    """[(kernel, warps, fixed)]: every launch that a step (with an epilogue, where there is an activation) makes for this shape, in the largest
    of its variants."""
    from fastff.kernels.triton import blocks
    from fastff.kernels.triton.goodness import direct, head_direct, head_second_moment, second_moment

    b = blocks.table(algorithm, 512, C, P, K, cells, 4 if dtype == "fp32" else 2, activation is not None)
    precision = "ieee" if dtype == "fp32" else "tf32"
    none = dict.fromkeys(["learned_tau", "grad_scale", "grad_tau"])
    config = {
        "ACTIVATION": activation, "PRECISION": precision, "HEAD_PRECISION": precision, "CELL_PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        "NS": b.NS, "BP": b.BP, "BC": b.BC, "BK": b.BK, "BG": b.BG, "NORM": 1,
    }  # fmt: skip
    config |= {"channel_stride": 1} | ({} if activation is not None else {"residual": None, "affine": None})
    sums = {} if activation is not None else {"channel_sums": None}
    loss = spec.LOSSES.index("cross_entropy")
    pieces = [{"FIRST": True, "LOSS": loss, "SECOND": True, "means": None, "cells": None, "bias": None}]
    if cells:
        pieces = [
            {"FIRST": True, "LOSS": None, "SECOND": False, "cells": None, "grad_x": None, "normalized": None},
            {"FIRST": False, "LOSS": None, "SECOND": True, "means": None},
        ]
    second = algorithm == "second_moment"
    found = []
    for piece in pieces:
        unused = {} if second and "bias" not in piece else {"mu": None} if second else {"mu": None, "second": None}
        fixed = {**config, **none, **sums, **piece, **unused, "HEAD": second and piece["FIRST"]}
        found.append((second_moment if second else direct, b.warps, fixed))
    stages = {"FIRST": False, "HEAD": False, "LOSS": None, "SECOND": False}
    if second:
        config = {key: value for key, value in config.items() if key not in ("channel_stride", "residual", "affine")}
        return [*found, (head_second_moment, b.head_warps, config | stages)]
    unused = {"second": None, "mu": None} | ({"largest": None} if dtype != "fp16" else {})
    unused |= {} if cells else {"bias": None, "grad_bias": None}
    return [*found, (head_direct, b.head_warps, config | stages | unused)]


SHAPES = [(16, 1024, 10), (64, 1024, 100), (128, 256, 100), (256, 64, 1000)]
CASES = [(90, dtype, "direct", *shape, 0) for dtype in ("bf16", "fp32") for shape in SHAPES]
CASES += [(90, "bf16", "direct", C, P, K, 0) for C, P, K in [(512, 16, 1000), (960, 49, 1000), (512, 1, 10)]]
CASES += [
    (90, "fp16", "direct", 256, 64, 100, 0),
    (90, "bf16", "direct", 64, 1024, 10, 16),
    (90, "bf16", "direct", 512, 16, 100, 16),
]
CASES += [
    (90, dtype, "second_moment", C, P, 1000, 0)
    for dtype in ("bf16", "fp32")
    for C, P in [(24, 3136), (64, 1024), (128, 784)]
]
CASES += [(90, "bf16", "second_moment", 64, 1024, 100, 16), (90, "fp16", "second_moment", 128, 784, 100, 0)]
CASES += [(arch, "bf16", "direct", C, P, 100, 0) for arch in (80, 100) for C, P in [(64, 1024), (512, 16)]]
CASES += [(arch, "bf16", "second_moment", 64, 1024, 100, 0) for arch in (80, 100)]


@pytest.mark.parametrize(("arch", "dtype", "algorithm", "C", "P", "K", "cells"), CASES)
def test_fits_the_chip(arch, dtype, algorithm, C, P, K, cells):
    """No spills, shared memory within the chip's, tensor cores and asynchronous copies where meant."""
    for kernel, warps, fixed in sweeps(dtype, algorithm, C, P, K, cells):
        name = kernel.fn.__name__
        binary = compiled(kernel, dtype, arch, warps, **fixed)
        assert binary.metadata.shared <= SHARED[arch], f"{name}: {binary.metadata.shared} bytes of shared memory"
        assert spilled(binary, arch) == 0, f"{name}: spills"
        assert "cp.async" in binary.asm["ptx"], f"{name}: loads are not asynchronous"
        if dtype != "fp32":
            products = {80: "mma.sync", 90: "mma", 100: "mma"}[arch]
            assert products in binary.asm["ptx"], f"{name}: no tensor cores"


TAILS = [
    (90, "bf16", "direct", 64, 1024, 10), (90, "bf16", "direct", 256, 64, 100), (90, "fp16", "direct", 128, 256, 100),
    (90, "fp32", "direct", 64, 1024, 10), (90, "bf16", "second_moment", 64, 1024, 100), (90, "bf16", "second_moment", 128, 784, 1000),
    (90, "fp32", "second_moment", 64, 1024, 100), (80, "bf16", "direct", 64, 1024, 10), (100, "bf16", "second_moment", 64, 1024, 100),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "dtype", "algorithm", "C", "P", "K"), TAILS)
def test_the_epilogue_fits_the_chip(arch, dtype, algorithm, C, P, K):
    """With batch norm, residual and SiLU, the costliest but GELU, around every tile: still no spills."""
    from fastff.kernels.triton.goodness import fits_with_epilogue

    y = torch.empty(1, C, 1, 1, dtype=torch.float32 if dtype == "fp32" else torch.float16)
    assert fits_with_epilogue(y, Plan(algorithm, 1, 1))
    for kernel, warps, fixed in sweeps(dtype, algorithm, C, P, K, 0, activation=4):
        binary = compiled(kernel, dtype, arch, warps, **fixed)
        assert binary.metadata.shared <= SHARED[arch], (
            f"{kernel.fn.__name__}: {binary.metadata.shared} bytes of shared memory"
        )
        assert spilled(binary, arch) == 0, f"{kernel.fn.__name__}: spills"
