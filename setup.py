"""Builds the compiled library from csrc/cpu where torch can be imported; otherwise installs pure Python and says so.

One extension for each instruction set, fastff._C_baseline, _C_avx2 and _C_avx512, of which one is loaded (fastff/kernels/native): a wheel built
anywhere runs anywhere.

They use the stable libtorch ABI and Python's limited API, so one wheel serves Python >= 3.10, torch >= 2.10.
torch is not a build requirement: an isolated build would download gigabytes of it. To build them:
    pip install --no-build-isolation .
FASTFF_FORCE_BUILD=1 makes missing extensions an error, FASTFF_NO_BUILD=1 leaves them out. A GPU is never looked for:
build machines have none.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
LEVELS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64") and sys.platform != "win32":
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS |= {"avx2": avx2, "avx512": [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd"]}
if os.environ.get("FASTFF_LEVELS"):  # some of them only, for a quick build
    LEVELS = {level: LEVELS[level] for level in os.environ["FASTFF_LEVELS"].split(",")}


def without_extension(why):
    if os.environ.get("FASTFF_FORCE_BUILD") == "1":
        raise SystemExit(f"fastff: cannot build the compiled library: {why} (FASTFF_FORCE_BUILD=1)")
    print(f"fastff: installing without the compiled library: {why}", file=sys.stderr)
    return {}


def with_extension():
    if os.environ.get("FASTFF_NO_BUILD") == "1":
        return without_extension("FASTFF_NO_BUILD=1")
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:
        return without_extension(f"torch cannot be imported here ({error}); try pip install --no-build-isolation")

    class BuildOrDoWithout(BuildExtension):
        def run(self):
            try:
                super().run()
            except (Exception, SystemExit) as error:
                first = str(error).splitlines()[0] if str(error) else repr(error)
                without_extension(f"the C++ compiler failed ({first}); needed is GCC 12, Clang 16 or newer (C++20)")
                self.extensions = []
                self.distribution.ext_modules = []

        def build_extension(self, extension):
            # object files of one level must not be taken for those of another
            kept, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
            os.makedirs(self.build_temp, exist_ok=True)
            try:
                super().build_extension(extension)
            finally:
                self.build_temp = kept

    # error texts carry __FILE__: keep this machine's folders out of them
    folders = [ROOT, Path(torch.__file__).resolve().parent / "include"]
    flags = ["-O3", "-g0", "-fvisibility=hidden", *(f"-ffile-prefix-map={folder}/=" for folder in folders)]
    vectors = [
        "-Wno-psabi",  # vectors of vec.h are passed between inlined functions only
        "-Wno-aggressive-loop-optimizations",  # of a loop after transposing whole blocks, for sizes it cannot have
        "-fopenmp-simd",  # the pragmas only: threads come from torch's own pool
        "-fno-trapping-math",  # lets GCC turn the selects of the float16 conversion into vector code
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
