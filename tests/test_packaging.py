"""What importing fastff brings in, and what setup.py does where the compiled library cannot be built."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastff

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fastff.__file__).parent

MODULES = """
import sys
import torch
before = set(sys.modules)
import fastff
print(*sorted(set(sys.modules) - before))
"""


def test_import_brings_in_little():
    run = subprocess.run([sys.executable, "-c", MODULES], cwd=ROOT, capture_output=True, text=True, check=True)
    new = run.stdout.split()
    assert "fastff" in new
    own = [name for name in new if name.split(".")[0] == "fastff"]
    for heavy in ("fastff.training", "fastff.cli", "fastff._C_baseline", "fastff._C_avx2"):
        assert not [name for name in own if name == heavy or name.startswith(heavy + ".")], (
            f"importing fastff imports {heavy}"
        )
    top = {name.split(".")[0] for name in new} - set(sys.stdlib_module_names) - {"fastff", "torch", "numpy"}
    assert not top, f"importing fastff imports {sorted(top)}"


def test_the_library_does_not_import_the_application():
    imports = re.compile(r"^\s*(from|import) fastff(\.app\b| import .*\bapp\b)", re.M)
    files = [path for path in PACKAGE.rglob("*.py") if imports.search(path.read_text(encoding="utf-8"))]
    assert {path for path in files if path.parent != PACKAGE / "app"} == {PACKAGE / "cli.py"}


EVERY_MODULE = """
import importlib, pkgutil, sys
import torch
OTHERS = "typer rich click matplotlib pooch requests sklearn scipy tensorboard PIL torchvision onnx onnxscript onnxruntime"
sys.modules |= dict.fromkeys(OTHERS.split())  # None: importing them fails
import fastff
for module in pkgutil.walk_packages(fastff.__path__, "fastff."):
    if not module.name.startswith(("fastff.app", "fastff.cli", "fastff.__main__", "fastff._C", "fastff.kernels.triton")):
        importlib.import_module(module.name)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2))
fastff.Trainer(fastff.SFF(net, 2, input_shape=(3, 8, 8))).step(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
"""


def test_the_library_needs_torch_alone():
    """Each module outside of fastff/app imports, and a network trains, where nothing of the extras is installed."""
    run = subprocess.run([sys.executable, "-c", EVERY_MODULE], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy of what setup.py reads, beside a torch that cannot be imported."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("not in a source checkout")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copytree(ROOT / "fastff", tree / "fastff", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "torch.py").write_text("raise ImportError('no torch in this test')\n")
    return tree


def test_the_layout_for_the_kernels_hub(checkout):
    """Every source file is named in build.toml, and no operator is registered under a fixed name."""
    tomllib = pytest.importorskip("tomllib")
    shutil.copy(ROOT / "Makefile", checkout)
    shutil.copytree(ROOT / "hub", checkout / "hub")
    subprocess.run(["make", "hub"], cwd=checkout, check=True, capture_output=True)
    hub = checkout / "build" / "hub"
    asked = tomllib.loads((hub / "build.toml").read_text())
    named = [*asked["torch"]["src"], *asked["kernel"]["cpu"]["src"]]
    assert sorted(named) == sorted(str(path.relative_to(hub)) for path in hub.glob("cpu/*.cpp"))
    assert all((hub / name).read_text().startswith('#include "hub.h"\n') for name in named)
    namespaces = re.findall(r"LIBRARY_\w+\((\w+)", "".join((hub / name).read_text() for name in named))
    assert len(namespaces) > 10 and set(namespaces) == {"TORCH_EXTENSION_NAME"}
    assert (hub / "torch-ext" / asked["general"]["name"].replace("-", "_") / "__init__.py").exists()


def build_wheel(tree, torch=False, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FASTFF_")}
    if not torch:
        clean["PYTHONPATH"] = str(tree.parent / "stub")
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "out"],
        cwd=tree,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )
    said = [line for line in run.stderr.splitlines() if line.startswith("fastff: ")]
    return run, said, sorted((tree / "out").glob("*.whl"))


def test_without_torch_the_wheel_is_pure_python(checkout):
    run, said, wheels = build_wheel(checkout)
    assert run.returncode == 0, run.stderr
    assert said == [
        "fastff: installing without the compiled library: torch cannot be imported here "
        "(no torch in this test); install torch first"
    ]
    assert [wheel.name.endswith("-py3-none-any.whl") for wheel in wheels] == [True]
    names = zipfile.ZipFile(wheels[0]).namelist()
    assert "fastff/kernels/native/__init__.py" in names
    assert not [name for name in names if name.endswith(".so") or name.split("/")[0] in ("tests", "csrc", "benchmarks")]


def test_forced_build_without_torch_is_an_error(checkout):
    run, said, wheels = build_wheel(checkout, FASTFF_FORCE_BUILD="1")
    assert run.returncode != 0
    assert said[0].startswith("fastff: cannot build the compiled library: torch cannot be imported here")
    assert not wheels


def test_no_build(checkout):
    run, said, wheels = build_wheel(checkout, FASTFF_NO_BUILD="1")
    assert run.returncode == 0, run.stderr
    assert said == ["fastff: installing without the compiled library: FASTFF_NO_BUILD=1"]
    assert wheels[0].name.endswith("-py3-none-any.whl")


@pytest.mark.parametrize("force", [False, True])
def test_a_failing_compiler(checkout, force):
    for source in (checkout / "csrc" / "cpu").glob("*.cpp"):
        source.write_text("#error broken on purpose\n")  # all of them: no time lost on compiling the others
    run, said, wheels = build_wheel(checkout, torch=True, **({"FASTFF_FORCE_BUILD": "1"} if force else {}))
    assert (run.returncode != 0) == force, run.stderr
    start = "cannot build the compiled library" if force else "installing without the compiled library"
    assert said[0].startswith(f"fastff: {start}: the C++ compiler failed")
    if not force:
        assert not [name for name in zipfile.ZipFile(wheels[0]).namelist() if name.endswith(".so")]
        assert wheels[0].name.endswith("-py3-none-any.whl"), "a wheel without machine code runs everywhere"


@pytest.mark.skipif(sys.platform != "linux", reason="setup.py looks for nvcc on Linux")
@pytest.mark.parametrize("force", [False, True])
def test_an_nvcc_that_fails(checkout, force):
    """The CUDA library alone is left out, or the build fails where one is asked for."""
    for source in (checkout / "csrc" / "cpu").glob("*.cpp"):
        source.name == "module.cpp" or source.unlink()  # the libraries are empty: no time lost on compiling them
    compiler = checkout / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    wanted = {"CUDA_HOME": str(checkout / "cuda"), "FASTFF_LEVELS": "baseline"} | (
        {"FASTFF_FORCE_BUILD": "1"} if force else {}
    )
    run, said, wheels = build_wheel(checkout, torch=True, **wanted)
    assert (run.returncode != 0) == force, run.stderr
    assert f"{compiler} failed" in run.stderr
    if not force:
        names = [name for name in zipfile.ZipFile(wheels[0]).namelist() if name.endswith(".so")]
        assert names == ["fastff/_C_baseline.abi3.so"]


def test_the_compiled_library_runs_with_glibc_2_28():
    """Whatever compiled it: no symbol is newer than those of the tag manylinux_2_28."""
    if sys.platform != "linux" or shutil.which("objdump") is None:
        pytest.skip("needs Linux and objdump")
    libraries = set(PACKAGE.glob("_C*.so")) - set(PACKAGE.glob("_C_cuda.*"))  # wheels have no CUDA library
    for library in libraries:
        if not is_fresh(library):
            continue
        symbols = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
        for name, newest in (("GLIBC", (2, 28)), ("GLIBCXX", (3, 4, 25))):
            found = {tuple(map(int, v.split("."))) for v in re.findall(rf"\b{name}_([\d.]+)", symbols)}
            assert found and max(found) <= newest, f"{library.name}: {name} {max(found)}"


def is_fresh(library):
    """Whether a library was built from setup.py as it is now."""
    header = ROOT / "csrc" / "cpu" / "glibc.h"
    return not header.exists() or library.stat().st_mtime >= header.stat().st_mtime


def test_an_isolated_build_finds_the_torch_that_is_installed(checkout):
    """pip hides the folder of installed packages from a build; setup.py looks there, so that nothing is downloaded."""
    code = (
        "import sys, sysconfig; sys.path = [p for p in sys.path if 'site-packages' not in p]; sys.path[:0] = ['stub']; "
    )
    code += "import runpy; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py', run_name='__main__')"
    (checkout / "stub").mkdir()
    shutil.copytree(Path(__import__("setuptools").__file__).parent, checkout / "stub" / "setuptools")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=clean, capture_output=True, text=True)
    assert run.returncode == 0 and "installing without" not in run.stderr, run.stderr
