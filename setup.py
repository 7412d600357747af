"""Builds the extension fastff._C from csrc/cpu where torch can be imported; otherwise installs pure Python and says so.

The extension uses the stable libtorch ABI and Python's limited API, so one wheel serves Python >= 3.10, torch >= 2.10.
torch is not a build requirement: an isolated build would download gigabytes of it. To build the extension:
    pip install --no-build-isolation .
FASTFF_FORCE_BUILD=1 makes a missing extension an error, FASTFF_NO_BUILD=1 leaves it out. A GPU is never looked for:
build machines have none.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def without_extension(why):
    if os.environ.get("FASTFF_FORCE_BUILD") == "1":
        raise SystemExit(f"fastff: cannot build fastff._C: {why} (FASTFF_FORCE_BUILD=1)")
    print(f"fastff: installing without the compiled library fastff._C: {why}", file=sys.stderr)
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
                without_extension(f"the C++ compiler failed ({str(error).splitlines()[0] if str(error) else error!r})")
                self.extensions = []
                self.distribution.ext_modules = []

    extension = CppExtension(
        "fastff._C",
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
        py_limited_api=True,
        extra_compile_args=[
            "-O3",
            "-g0",
            "-Wno-psabi",  # vectors of gemm.h are passed between inlined functions only
            "-fopenmp-simd",  # the pragmas only: threads come from torch's own pool
            "-fno-trapping-math",  # lets GCC turn the selects of the float16 conversion into vector code
            "-fvisibility=hidden",
            "-DPy_LIMITED_API=0x030A0000",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            # error texts carry __FILE__: keep this machine's folders out of them
            f"-ffile-prefix-map={ROOT}/=",
            f"-ffile-prefix-map={Path(torch.__file__).resolve().parent}/include/=",
        ],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildOrDoWithout},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**with_extension())
