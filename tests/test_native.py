"""The compiled operators against float64 arithmetic in plain PyTorch, and what the loader says when there are none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastff.functional as ff
from fastff.kernels import native

EPS = 1e-5
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

needs_native = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "available")


def op(x, eps=EPS):
    return ff.layer_norm(x, eps, impl="native")


def exact(x, eps=EPS):
    """In float64, and for float64 inputs with the mean taken out twice."""
    flat = x.double().reshape(x.shape[0], -1)
    d = flat - flat.mean(1, keepdim=True)
    d = d - d.mean(1, keepdim=True)
    return (d / (d.square().mean(1, keepdim=True) + eps).sqrt()).reshape(x.shape)


def check(x, y, eps=EPS):
    """y is exact up to rounding: of the output's dtype, and a few units of the arithmetic's for the sums."""
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    want = exact(x, eps)
    compute = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    unit = torch.finfo(x.dtype).eps / 2 if x.dtype in (torch.bfloat16, torch.float16) else 0.0
    # three roundings of each element (subtract twice, multiply), and those of rstd and shift, which all elements share
    error = (y.double() - want).abs()
    bound = (
        unit * want.abs() * (1 + 2**-7) + 8 * compute * want.abs().clamp(min=1) + torch.finfo(x.dtype).smallest_normal
    )
    assert bool((error <= bound).all()), f"error {error.max():.3g}, {float((error / bound).max()):.3g} times the bound"


def test_is_built_where_it_must_be():
    if os.environ.get("FASTFF_REQUIRE_NATIVE") == "1":
        assert not native.reason(), native.reason()


def test_can_be_disabled_and_says_so():
    code = "from fastff.kernels import native; print(not native.reason(), native.reason())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTFF_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "False disabled by FASTFF_NATIVE=0"


def test_says_that_it_was_not_built(monkeypatch):
    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    assert native.reason() == native.NOT_BUILT


def test_says_why_it_failed_to_load(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: aoti_something\nmore")

    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(native.importlib, "import_module", fail)
    assert native.reason().endswith("undefined symbol: aoti_something")


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (3, 1), (2, 2), (5, 7), (4, 1, 1, 1), (3, 5, 7, 3), (2, 16, 8, 8), (2, 2049), (1, 4096), (3, 67, 1, 61)],
)
def test_matches_float64(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).mul(3).add(1).to(dtype)
    before = x.clone()
    y = op(x)
    check(x, y)
    assert y.stride() == x.stride()
    assert torch.equal(x, before)
    assert y.data_ptr() != x.data_ptr()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_keeps_channels_last(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 6, 5, 7).to(dtype).to(memory_format=torch.channels_last)
    y = op(x)
    check(x, y)
    assert y.stride() == x.stride()


# Views of tensors whose every other element is NaN or huge: reading one element too many shows.
VIEWS = {
    "channel slice": lambda big: big[:, 2:5],
    "batch slice": lambda big: big[1:3],
    "every other sample": lambda big: big[::2],
    "spatial slice": lambda big: big[:, :, 1:4, 1:5],
    "every other column": lambda big: big[..., ::2],
    "transposed space": lambda big: big.transpose(2, 3),
    "channels moved last": lambda big: big.permute(0, 2, 3, 1),
    "batch from a channel": lambda big: big.transpose(0, 1),
    "one sample": lambda big: big[2:3, 1:3],
    "one channel": lambda big: big[:, 3:4],
    "offset by one element": lambda big: big.flatten()[1 : 1 + 4 * 60].view(4, 60),
}


@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_larger_tensors(view, layout):
    torch.manual_seed(0)
    big = torch.full((4, 6, 5, 7), float("nan")).to(memory_format=layout)
    part = VIEWS[view](big)
    part.copy_(torch.randn(part.shape) + 10)
    sentinel = big.clone()
    y = op(part)
    check(part, y)
    assert torch.equal(big.isnan(), sentinel.isnan())
    assert torch.equal(big.nan_to_num(), sentinel.nan_to_num())
    assert y.numel() == 0 or y.untyped_storage().nbytes() == y.numel() * y.element_size()


@needs_native
def test_expanded_inputs():
    torch.manual_seed(0)
    row = torch.randn(1, 3, 4)
    y = op(row.expand(5, 3, 4))
    check(row.expand(5, 3, 4), y)
    assert torch.equal(y, op(row).expand(5, 3, 4))
    column = torch.randn(4, 3, 1).expand(4, 3, 5)
    check(column, op(column))
    assert bool((op(torch.ones(()).expand(2, 3, 4)) == 0).all())


@needs_native
@pytest.mark.parametrize(
    ("dtype", "offset", "std"), [(torch.float32, 1e4, 1e-1), (torch.float32, -1e6, 1.0), (torch.float64, 1e9, 1e-3)]
)
def test_mean_far_above_the_deviation(dtype, offset, std):
    torch.manual_seed(0)
    x = (torch.randn(3, 5000, dtype=torch.float64) * std + offset).to(dtype)
    check(x, op(x, 0.0), 0.0)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1000.1])
def test_constant_samples_become_zero(dtype, value):
    assert float(op(torch.full((2, 777), value, dtype=dtype)).abs().max()) < 1e-3


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_in_its_sample(dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 50).to(dtype)
    x[1, 7], x[2, 49] = float("nan"), float("inf")
    y = op(x)
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    check(x[[0, 3]], y[[0, 3]])


@needs_native
@pytest.mark.parametrize("scale", [2.0**-24, 2.0**-14, 1.0, 30000.0])
def test_float16_subnormal_and_large(scale):
    torch.manual_seed(0)
    x = (torch.randint(-8, 8, (3, 1000)) / 8 * scale).half()
    check(x, op(x, 1e-12), 1e-12)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_loads_and_stores_are_torch_s(dtype):
    """Pairs (v, -v) with a huge eps: y = v / sqrt(v^2 + eps) runs through small, subnormal and tied outputs."""
    v = torch.arange(1, 2**14).to(torch.int16).view(dtype)
    v = v[v.isfinite()]
    x = torch.stack([v, -v], 1)
    for eps in (1.0, 2.0**20, 2.0**40):
        f = x.float()
        want = ((f.double()) / (f.double().square() + eps).sqrt()).float()
        got, near = op(x, eps), want.to(dtype)
        # the float32 arithmetic may fall on the other side of a tie: at most one neighbour away, and rarely
        assert int((got.view(torch.int16).int() - near.view(torch.int16).int()).abs().max()) <= 1
        assert float((got != near).float().mean()) < 0.01


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_whatever_the_threads(dtype):
    torch.manual_seed(0)
    x = torch.randn(64, 3000).to(dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(op(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert torch.equal(op(x[5:6]), results[0][5:6])


@needs_native
def test_carries_no_build_paths():
    root = Path(__file__).resolve().parents[1]
    for level in native.LEVELS:
        found = importlib.util.find_spec(f"fastff._C_{level}")
        assert found is None or str(root).encode() not in Path(found.origin).read_bytes()


HERE = Path(__file__).parent
LEVELS_HERE = native.LEVELS[: {"AVX512": 3, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 1)]


@needs_native
@pytest.mark.parametrize("level", LEVELS_HERE[:-1])
def test_other_instruction_sets(level):
    """What a processor without this one's widest vectors would load: the same tests."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / name) for name in WITH_KERNELS), "-k", "native"],
        env=os.environ | {"FASTFF_CPU": level, "FASTFF_EXAMPLES": "20"}, capture_output=True, text=True, cwd=HERE.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


WITH_KERNELS = (
    "test_goodness.py",
    "test_goodness_limits.py",
    "test_epilogue_step.py",
    "test_convolution.py",
    "test_depthwise.py",
    "test_layer_norm.py",
    "test_sums.py",
)


@needs_native
@pytest.mark.parametrize(("value", "says"), [("sse", "got 'sse'"), ("avx1024", "expected one of baseline")])
def test_an_instruction_set_that_is_not_there(value, says):
    code = "from fastff.kernels import native; print(native.reason())"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FASTFF_CPU": value}, capture_output=True, text=True, check=True
    )
    assert "FASTFF_CPU: expected one of" in run.stdout
    assert says in run.stdout


@needs_native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    def f(x):
        if not native.reason():
            x = op(x * 2)
        return x + 1

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 3, 4, 5), (3, 3, 4, 5)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), f(x))
        x = x.to(memory_format=torch.channels_last)
        assert torch.equal(compiled(x), f(x))
        assert compiled(x).stride() == f(x).stride()
