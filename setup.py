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


def compile_cuda(source, to):
    """Compile a .cu file, which knows nothing of torch, for all architectures; return the folder of CUDA's libraries."""
    architectures = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in CUDA]
    options = ["-O3", "-std=c++17", "-prec-div=false", "-prec-sqrt=false", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    subprocess.run([nvcc(), "-c", *options, *architectures, source, "-o", to], check=True)
    dry = subprocess.run([nvcc(), "--dryrun", source], capture_output=True, text=True, check=True).stderr
    return next(line.split('"')[1].removeprefix("-L") for line in dry.splitlines() if "LIBRARIES=" in line)


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

    def extension(make, name, folder, compiled, arguments):
        """The extension fastff.NAME of the sources in csrc/FOLDER; arguments: of each compiler, as torch.utils.cpp_extension takes them."""
        define = [f"-DFASTFF_MODULE={name}", "-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        return make(
            f"fastff.{name}",
            sorted(
                str(path.relative_to(ROOT)) for ending in compiled for path in ROOT.glob(f"csrc/{folder}/*.{ending}")
            ),
            depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
            py_limited_api=True,
            extra_compile_args={compiler: [*given, *define] for compiler, given in arguments.items()},
        )

    # An extension of csrc/cuda/*.cu would be one more, made by CUDAExtension where CUDA_HOME is set, with {"cxx": flags, "nvcc": [...]}.
    extensions = [
        extension(CppExtension, f"_C_{level}", "cpu", ["cpp"], {"cxx": [*flags, *vectors, *instructions]})
        for level, instructions in LEVELS.items()
    ]
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildOrDoWithout},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**with_extension())
