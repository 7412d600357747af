"""Builds the compiled libraries from csrc/ if torch can be imported. Otherwise it installs fastff without them and prints the reason.

There is one extension for each instruction set, fastff._C_baseline, _C_avx2 and _C_avx512. fastff/kernels/native loads the one that fits the
processor, so a wheel does not depend on the processor of the machine that built it.

The extensions use the stable libtorch ABI and Python's limited API, so one wheel serves Python >= 3.10 and torch >= 2.10. torch is not a build
requirement, because an isolated build would download gigabytes of it. `pip install .` builds with the torch that is installed already, and without
the library where there is none; so do --no-build-isolation and editable installs.
With FASTFF_FORCE_BUILD=1 it is an error if they cannot be built; FASTFF_NO_BUILD=1 leaves them out. The build needs no GPU.

Where there is nvcc (in CUDA_HOME, on the PATH, or from the packages of requirements-cuda.txt) one more extension, fastff._C_cuda, is built from
csrc/cuda for the architectures in CUDA. FASTFF_CUDA names some of them, for a quick build, or none: FASTFF_CUDA=90a, FASTFF_CUDA=.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
LEVELS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64") and sys.platform != "win32":
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS |= {"avx2": avx2, "avx512": [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd"]}
if os.environ.get("FASTFF_LEVELS"):  # some of them only, for a quick build
    LEVELS = {level: LEVELS[level] for level in os.environ["FASTFF_LEVELS"].split(",")}
CUDA = os.environ.get("FASTFF_CUDA", "80,86,89,90a,100,120").split(",")


def nvcc():
    """The path of CUDA's compiler, or None."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    bins = [os.path.join(folder, "bin") for folder in folders if folder] + os.environ.get("PATH", "").split(os.pathsep)
    bins.append(os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin"))
    return shutil.which("nvcc", path=os.pathsep.join(bins)) if CUDA != [""] and sys.platform == "linux" else None


def compile_cuda(source, folder):
    """Compile a .cu file, which knows nothing of torch, for all architectures; return its object file and the folder of CUDA's libraries."""
    made = Path(folder) / f"{source.stem}-{'-'.join(CUDA)}.o"
    architectures = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in CUDA]
    options = [
        "-O3",
        "-std=c++17",
        "-prec-div=false",
        "-prec-sqrt=false",
        "--threads=0",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
    ]
    try:
        if not made.exists() or made.stat().st_mtime < max(path.stat().st_mtime for path in source.parent.iterdir()):
            subprocess.run([nvcc(), "-c", *options, *architectures, source, "-o", made], check=True)
        said = subprocess.run([nvcc(), "--dryrun", source], capture_output=True, text=True, check=True).stderr
        top = Path(next(line.split("TOP=")[1] for line in said.splitlines() if "TOP=" in line))
        patterns = ("lib64", "lib", "targets/*/lib")
        libraries = [found for each in patterns for found in top.glob(f"{each}/libcudart_static.a")]
        return str(made), str(libraries[0].parent)
    except Exception as error:
        raise CompileError(f"{nvcc()} failed ({error}); it has to know the architectures {', '.join(CUDA)}") from error


def without_extension(why):
    if os.environ.get("FASTFF_FORCE_BUILD") == "1":
        raise SystemExit(f"fastff: cannot build the compiled library: {why} (FASTFF_FORCE_BUILD=1)")
    print(f"fastff: installing without the compiled library: {why}", file=sys.stderr)
    return {}


def with_extension():
    if os.environ.get("FASTFF_NO_BUILD") == "1":
        return without_extension("FASTFF_NO_BUILD=1")
    if sysconfig.get_path("purelib") not in sys.path:  # pip's isolated build hides the torch of this Python
        sys.path.append(sysconfig.get_path("purelib"))
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:
        return without_extension(f"torch cannot be imported here ({error}); install torch first")

    class BuildOrDoWithout(BuildExtension):
        def run(self):
            try:
                super().run()
            except (Exception, SystemExit) as error:
                first = str(error).splitlines()[0] if str(error) else repr(error)
                without_extension(f"the C++ compiler failed ({first}); needed is GCC 12, Clang 16 or newer (C++20)")
                self.extensions = []
                self.distribution.ext_modules = []
                wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
                if wheel is not None:  # it was made for extensions; without any it runs everywhere
                    wheel.root_is_pure, wheel.py_limited_api = True, False

        def build_extension(self, extension):
            # Each level has its own folder, since the object files of all levels have the same names.
            build_temp, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
            os.makedirs(self.build_temp, exist_ok=True)
            try:
                if extension.name == "fastff._C_cuda":
                    made, libraries = compile_cuda(ROOT / "csrc" / "cuda" / "goodness.cu", self.build_temp)
                    extension.extra_objects, extension.library_dirs = [made], [*extension.library_dirs, libraries]
                    extension.libraries = [*extension.libraries, "cudart_static", "dl", "rt", "pthread"]
                super().build_extension(extension)
            finally:
                self.build_temp = build_temp

    # Error messages contain __FILE__; these options keep the folders of the build machine out of them.
    folders = [ROOT, Path(torch.__file__).resolve().parent / "include"]
    flags = [
        "-include",
        str(ROOT / "csrc" / "cpu" / "glibc.h"),
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        *(f"-ffile-prefix-map={folder}/=" for folder in folders),
    ]
    vectors = [
        "-Wno-psabi",  # the warning is about passing vectors between functions; those of vec.h are inlined
        "-Wno-aggressive-loop-optimizations",  # a false warning: GCC assumes sizes that a loop in a transposition cannot have
        "-fopenmp-simd",  # enables the simd pragmas; threads come from torch's pool
        "-fno-trapping-math",  # GCC can vectorize the selects of the float16 conversion
        "-ffp-contract=fast",
    ]

    def extension(name, folder, sources, *more, **how):
        """The extension fastff.NAME of these sources, compiled with some flags more, again when a file in csrc/FOLDER changes."""
        define = [f"-DFASTFF_MODULE={name}", "-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        return CppExtension(
            f"fastff.{name}",
            sorted(str(path.relative_to(ROOT)) for path in sources),
            depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{folder}/*")),
            py_limited_api=True,
            extra_compile_args={"cxx": [*flags, *more, *define]},
            **how,
        )

    cpu = list(ROOT.glob("csrc/cpu/*.cpp"))
    extensions = [
        extension(f"_C_{level}", "cpu", cpu, *vectors, *instructions) for level, instructions in LEVELS.items()
    ]
    if nvcc():
        sources = [*ROOT.glob("csrc/cuda/*.cpp"), ROOT / "csrc" / "cpu" / "module.cpp"]
        extensions.append(extension("_C_cuda", "*", sources, optional=os.environ.get("FASTFF_FORCE_BUILD") != "1"))
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildOrDoWithout},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**with_extension())
