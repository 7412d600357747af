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

triton = pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
INTERPRETED = {
    "goodness and gradients": ("test_goodness.py", "test_goodness_and_its_gradients"),
    "goodness_step": ("test_goodness.py", "test_goodness_step_and_loss or empty_batch or not_a_number or labels"),
    "layer_norm": ("test_layer_norm.py", "triton"),
    "epilogue": ("test_epilogue_step.py", "test_tail_step"),
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

SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes a program may have
INTEGERS = {"target": "*i64", "starts": "*i32", "group_of": "*i32"}
NUMBERS = {"tau", "margin", "label_smoothing", "scale", "eps", "theta", "theta_gap", "alpha"}
ACTIVATIONS = {"x", "residual", "grad_x", "normalized", "y", "grad_h", "grad_y"}
POINTERS = ACTIVATIONS | set(INTEGERS) | {
    "affine", "weight", "bias", "g", "d", "second", "mu", "sums", "means", "cells", "losses", "grad_tau", "learned_tau", "grad_scale", "largest",
    "grad_weight", "grad_bias", "partial", "channel_sums", "factors", "grid_weight", "term", "weights", "grad_grid", "out",
}  # fmt: skip
DIVISIBLE = {"C", "P", "sample_stride", "channel_stride", "position_stride", "n", "share", "positions", "xb"}


def compiled(kernel, dtype, arch, warps, options=None, **fixed):
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
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options or {"num_warps": warps})


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


def sweeps(dtype, arch, algorithm, C, P, K, cells=0, activation=None, channels_last=True, bias=False):
    """[(kernel, options, programs of a multiprocessor, fixed)]: launches that a step (with an epilogue, where there is an activation) makes for
    this shape; with cells and an epilogue, which is not one sweep, the second part of it."""
    from fastff.kernels.triton import blocks
    from fastff.kernels.triton.goodness import direct, head_second_moment, second_moment

    size = 4 if dtype == "fp32" else 2
    b = blocks.table(algorithm, 512, C, P, K, cells, size, activation is not None, arch)
    second, precision = algorithm == "second_moment", "ieee" if dtype == "fp32" else "tf32"
    inside = cells and not second and activation is None
    H = int(P**0.5)
    config = {
        "C": C, "P": P, "H": H, "W": P // H, "K": K, "GH": int(cells**0.5) or 1, "GW": int(cells**0.5) or 1, "CHANNELS_LAST": channels_last,
        "NS": b.NS, "BP": b.BP, "BC": b.BC, "BK": b.BK, "BG": b.BG, "LK": triton.next_power_of_2(K), "ACTIVATION": activation,
        "PRECISION": precision, "HEAD_PRECISION": precision, "CELL_PRECISION": "tf32x3" if dtype == "fp32" else "tf32", "NORM": 1,
        "WHOLE": True, "FIRST": inside or not cells, "HEAD": second and not cells, "LOSS": None if cells and not inside else 0, "SECOND": True,
    }  # fmt: skip
    absent = {"learned_tau", "grad_scale", "grad_tau"} | ({"bias"} if not bias else set())
    absent |= {"residual", "affine"} if activation is None else set()
    absent |= set() if inside else {"term", "grid_weight", "means"}
    absent |= {"cells"} if not cells else set()
    absent |= {"second", "mu"} if not second else {"mu"} if not bias else set()
    fixed = config | dict.fromkeys(absent) | {"parts": 1}
    found = [(second_moment if second else direct, blocks.options(b), blocks.resident(b), fixed)]
    if second and activation is None:
        kept = {name: fixed[name] for name in ("bias", "mu") if name in fixed} | {"BK": b.HK}
        unused = dict.fromkeys({"grid_weight", "means", "cells", "term", "g", "sums"})
        found.append((head_second_moment, {"num_warps": b.head_warps}, 1, config | kept | unused))
    return found


# (compute capability, dtype, algorithm, C, P, K, cells, activation, channels_last, bias); activation 4 is SiLU, the costliest but GELU
CASES = [(90, "bf16", "direct", *shape) for shape in [(64, 1024, 10), (128, 256, 100), (512, 16, 10), (24, 3136, 10)]]
CASES += [(90, "bf16", "direct", 64, 1024, 10, 16), (90, "bf16", "direct", 64, 1024, 10, 0, 4)]
CASES += [(90, "bf16", "direct", 64, 1024, 10, 0, None, False, True), (90, "fp32", "direct", 64, 1024, 10)]
CASES += [
    (80, "bf16", "direct", 128, 256, 10),
    (86, "bf16", "direct", 64, 1024, 10),
    (100, "bf16", "direct", 128, 256, 10),
]
CASES += [
    (90, "bf16", "second_moment", *shape) for shape in [(64, 1024, 1000), (128, 784, 1000), (64, 1024, 100, 0, 4)]
]
CASES += [(80, "bf16", "second_moment", 64, 1024, 100)]
MORE = [(90, "bf16", "direct", *shape) for shape in [(64, 1024, 100), (128, 256, 10), (256, 64, 10), (256, 64, 100)]]
MORE += [(90, "bf16", "direct", *shape) for shape in [(256, 196, 100), (960, 49, 10), (512, 16, 10, 16), (40, 784, 10)]]
MORE += [(90, "bf16", "direct", *shape) for shape in [(256, 64, 10, 0, 4), (64, 1024, 10, 16, 4), (128, 256, 10, 0, 4)]]
MORE += [
    (90, "fp16", "direct", 128, 256, 100),
    (90, "fp32", "direct", 256, 64, 10),
    (90, "fp32", "direct", 64, 1024, 10, 0, 4),
]
MORE += [
    (arch, "bf16", "direct", C, P, K) for arch in (80, 86, 100, 120) for C, P, K in [(64, 1024, 32), (256, 64, 10)]
]
MORE += [(100, "bf16", "direct", 128, 256, 100), (90, "fp32", "second_moment", 64, 1024, 1000)]
MORE += [(90, "bf16", "second_moment", *shape) for shape in [(24, 3136, 1000), (112, 196, 1000), (64, 1024, 100, 16)]]
MORE += [(arch, "bf16", "second_moment", 64, 1024, 1000) for arch in (86, 100, 120)]
if os.environ.get("FASTFF_SHAPES") == "all":  # each takes about 3 s of a CPU
    CASES += MORE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_the_chip(case):
    """No spills; registers and shared memory for the programs that a multiprocessor is given; tensor cores, on sm_90 warpgroups of them with
    positions as their rows; asynchronous copies, and accesses of 16 bytes, where C % 8 == 0."""
    arch, dtype, _, C, *_ = case
    for kernel, options, programs, fixed in sweeps(dtype, *(case[0], *case[2:])):
        name = kernel.fn.__name__
        binary = compiled(kernel, dtype, arch, None, options, **fixed)
        assembly, shared = binary.asm["ptx"], binary.metadata.shared
        spills, registers = assembled(binary, arch)
        assert spills == 0, f"{name}: {spills} bytes spilled"
        assert registers * 32 * options["num_warps"] * programs <= 2**16, f"{name}: {registers} registers"
        assert shared * programs <= SHARED[arch], f"{name}: {shared} bytes of shared memory, {programs} programs"
        assert "cp.async" in assembly, f"{name}: loads are not asynchronous"
        if name == "head_second_moment":
            continue
        assert not re.search(r"(ld|st)\.global\.b16", assembly), f"{name}: accesses of 2 bytes"
        if dtype != "fp32" and C >= 64:
            products = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(arch, "mma.sync")
            assert assembly.count(products) >= 3, f"{name}: {products} {assembly.count(products)} times"
            assert arch != 90 or fixed["GH"] > 1 or case[2] != "direct" or "mma.sync" not in assembly, name


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_batch_norm_sums_fit_the_chip(arch, dtype):
    from fastff.kernels.triton import epilogue as module

    config = {"ACTIVATION": spec.ACTIVATIONS.index("silu"), "R": module.POSITIONS, "BC": 64, "channel_stride": 1}
    kernels = (
        (module.channel_sums, 8, {"residual": None, "affine": None}),
        (module.derive, 8, {}),
        (module.apply, 4, {}),
        (module.finish, 4, {}),
    )
    for kernel, warps, fixed in kernels:
        binary = compiled(kernel, dtype, arch, warps, **config, **fixed)
        assert spilled(binary, arch) == 0, kernel.fn.__name__


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_layer_norm_fits_the_chip(arch, dtype):
    from fastff.kernels.triton.layer_norm import BLOCK, kernel

    for stages in ({"SUMS": True, "WRITE": True}, {"SUMS": False, "WRITE": True}):
        binary = compiled(kernel, dtype, arch, 8, BLOCK=BLOCK, **stages)
        assert binary.metadata.shared <= SHARED[arch]
        assert spilled(binary, arch) == 0


@pytest.mark.parametrize(("arch", "dtype"), [(80, "bf16"), (90, "bf16"), (90, "fp32"), (100, "bf16")])
@pytest.mark.parametrize("channels_last", [True, False])
def test_depthwise_fits_the_chip(channels_last, arch, dtype):
    from fastff.kernels.triton import depthwise as module

    R, BC, warps = module.tiles(channels_last, 240)
    inner = {"channel_stride": 1} if channels_last else {"column_stride": 1}
    for kernel, stride in ((3, 2), (5, 1)):
        sizes = {"STRIDE": stride, "PADDING": kernel // 2, "KERNEL": kernel, "R": R, "BC": BC} | inner
        sizes["TAPS"] = triton.next_power_of_2(kernel**2)
        for launch, fixed in (
            (module.convolve, {"ADJOINT": False}),
            (module.convolve, {"ADJOINT": True}),
            (module.weight_gradient, {"ADJOINT": False}),
        ):
            binary = compiled(launch, dtype, arch, warps, **sizes, **fixed)
            assert binary.metadata.shared <= SHARED[arch]
            assert spilled(binary, arch) == 0, f"{launch.fn.__name__} {kernel} x {kernel}"


@pytest.mark.parametrize(("arch", "dtype"), [(80, "bf16"), (90, "bf16"), (90, "fp32"), (100, "fp16")])
@pytest.mark.parametrize("channels_last", [True, False])
def test_group_goodness_fits_the_chip(channels_last, arch, dtype):
    from fastff.kernels.triton import group_goodness as module

    norms, lengths = ("group_norm", "layer_norm_channels"), ("l2", "l2_channels")
    for C, P, K, loss, names in [
        (64, 1024, 10, 0, norms), (960, 49, 100, 0, norms), (128, 256, 1, 1, norms), (500, 1, 1, 4, lengths)
    ]:  # fmt: skip
        BC, R = module.tiles(channels_last, C, P)
        fixed = dict.fromkeys(["learned_tau", "grad_tau"]) | {
            "POWER": 2, "MEAN": True, "GOODNESS": True, "LOSS": loss, "MEMBERS": 1 + (loss == 4), "BC": BC, "R": R,
            "KP": triton.next_power_of_2(K), "GP": triton.next_power_of_2(-(-C // K)), "channel_stride" if channels_last else "position_stride": 1,
        }  # fmt: skip
        of_samples, of_positions = (spec.NORMALIZATIONS.index(name) for name in names)
        absent = {"d": None, "sums": None, "factors": None, "target": None}
        absent |= {} if loss else {"LOSS": None, "losses": None, "grad_x": None, "grad_scale": None}
        for kernel, more in (
            (module.samples, {"NORM": of_samples} | ({"target": None} if loss else {})),
            (module.positions, {"NORM": of_positions} | absent),
        ):
            binary = compiled(kernel, dtype, arch, module.WARPS, **fixed | more)
            assert binary.metadata.shared <= SHARED[arch]
            assert spilled(binary, arch) == 0, kernel.fn.__name__
