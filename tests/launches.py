"""Counts what a step launches on a GPU, on a machine without one: PyTorch's operators that start a kernel, and the launches of Triton kernels.

Rows of the tables are chosen as on a GPU. Triton's kernels are recorded and not run, so results are numbers without meaning."""

import collections
import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# (B, C, H = W, K) of the table of times by which the GPU kernels were designed: ResNet18 at 32 x 32 pixels, ResNets and MobileNetV3 at 224 x 224.
SHAPES = [
    *((B, C, H, K) for B in (128, 512) for C, H in ((64, 32), (128, 16), (256, 8), (512, 4)) for K in (10, 100, 1000) if B > 128 or K < 1000),
    *((256, C, H, 1000) for C, H in ((64, 56), (256, 14), (512, 7), (1024, 14), (24, 56), (40, 28), (112, 14), (960, 7), (2048, 7))),
]  # fmt: skip

# Operators that start no kernel beside views, which their schema tells: they make or describe memory.
SILENT = {
    "aminmax", "_local_scalar_dense",  # labels are checked on a CPU alone
    "_record_function_enter_new", "_record_function_exit",  # names for the profiler
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias", "is_same_size", "set_",
}  # fmt: skip


def _is_view(func):
    return any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)


class Launches(TorchDispatchMode):
    """Within it, `count` collects the names of what is launched, `called` those of all operators, which cost the host time (views and memory too),
    and `recorded` the launches of Triton kernels: (kernel, arguments, keywords)."""

    def __init__(self):
        super().__init__()
        self.count, self.called, self.recorded = collections.Counter(), collections.Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")
        self.called[name[1]] += 1
        if name[1] not in SILENT and not _is_view(func):
            self.count[name[1]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return sum(self.count.values())

    @property
    def kernels(self):
        """The Triton launches alone."""
        return sum(n for name, n in self.count.items() if name.startswith("triton "))


@contextlib.contextmanager
def as_on_a_gpu(multiprocessors=132):
    """Choose implementations for CPU tensors as for those of a GPU. Yields the Launches to enter around what is to be counted."""
    from triton.runtime.jit import JITFunction

    from fastff.kernels import native, triton
    from fastff.kernels.triton import depthwise, epilogue, goodness, launch, layer_norm
    from fastff.ops import convolution, step
    from fastff.ops import depthwise as ops_depthwise

    launches = Launches()

    def run(self, *args, **kwargs):
        if torch._C._len_torch_dispatch_stack():
            launches.count[f"triton {self.fn.__name__}"] += 1
            kwargs = {key: value for key, value in kwargs.items() if key not in ("grid", "warmup")}
            launches.recorded.append((self, args, kwargs))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(triton, "INTERPRETED", True))
        stack.enter_context(mock.patch.object(native, "reason", lambda *_: "as on a GPU"))
        for module in (step, convolution, ops_depthwise):  # ops are called past the dispatcher, as without a mode
            stack.enter_context(mock.patch.object(module, "dispatched", lambda *_: False))
        for module in (launch, depthwise, epilogue, goodness, layer_norm):
            if hasattr(module, "multiprocessors"):
                stack.enter_context(mock.patch.object(module, "multiprocessors", lambda device: multiprocessors))
        yield launches


def specialised(kernel, args, kwargs, arch):
    """What Triton would compile for a launch on this architecture: (ASTSource, options), specialised for the arguments as they are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), options


def compiled(kernel, args, kwargs, arch):
    """The binary of a launch on this architecture."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = specialised(kernel, args, kwargs, arch)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options.__dict__)
