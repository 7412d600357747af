"""Which implementation of an op runs: an ordered table of rows, each with a predicate that gives the reason it refuses."""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

NAMES = ("cuda", "triton", "native", "torch", "reference")
ALIASES = {"composed": "torch"}  # former names, still accepted
# PyTorch does not document it. Where it is missing, transforms of torch.func raise PyTorch's error about functions without a rule for them.
TRANSFORMED = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
# PyTorch does not document it: without it, modes of torch.overrides look at each call in optimizers' steps and in our backward passes.
UNSEEN = getattr(torch._C, "DisableTorchFunction", contextlib.nullcontext)
PLAIN = {torch.Tensor, torch.nn.Parameter, float, int, bool, str, tuple, type(None)}  # types of arguments in eager mode


def always(x):
    """Accept any x: the condition of an implementation that always runs."""


class Implementation(NamedTuple):
    """An implementation of an op.

    can_run(x) returns None or the reason why it cannot; run is a function, or a module of functions; note says what it leaves to others;
    skip_reason(x) returns why "auto" should not choose it although it can run, or None. takes(call) returns None or the reason why it cannot
    compute this call of the op, for an implementation that leaves nothing to others."""

    name: str
    can_run: Callable
    run: object
    note: str = ""
    skip_reason: Callable = always
    takes: Callable = always

    def refuses(self, x, call=None):
        """Return why it cannot compute a call of the op on x, or None. Without a call: why it can compute none."""
        why = self.can_run(x)
        return self.takes(call) if why is None and call is not None else why


class Lazy:
    """A module of kernels, imported when an attribute is first read."""

    def __init__(self, name, within=None):
        self.name, self.within = name, within

    def __getattr__(self, attribute):
        module = importlib.import_module(self.name)
        return getattr(getattr(module, self.within) if self.within else module, attribute)


def check_impl(impl):
    """Raise TypeError unless impl is a string, whose words `choose` checks."""
    if not isinstance(impl, str):
        raise TypeError(f"impl: expected 'auto' or names out of {', '.join(NAMES)}, got {impl!r}")


def choose(op, rows, impl, x, call=None):
    """Return the first row that can run for `impl`: "auto", a name, or names in order of preference, separated by commas.

    "auto" follows the environment variable FASTFF_IMPL, which is written likewise. `call` is a description of the op's other arguments, for rows that
    look at them. Raises RuntimeError with every row's reason if none can run, and ValueError for an unknown name."""
    if impl == "auto" and "FASTFF_IMPL" not in os.environ:  # at every call of an op
        for row in rows:
            if row.skip_reason(x) is None and row.refuses(x, call) is None:
                return row
    source = "impl"
    if impl == "auto" and os.environ.get("FASTFF_IMPL", "auto") != "auto":
        impl, source = os.environ["FASTFF_IMPL"], "FASTFF_IMPL"
    wanted = [row.name for row in rows if row.skip_reason(x) is None] if impl == "auto" else _names(impl)
    for name in wanted:
        if name not in NAMES:
            raise ValueError(f"{source}: expected 'auto' or names out of {', '.join(NAMES)}, got {impl!r}")
    by_name = {row.name: row for row in rows}
    refused = []
    for name in wanted:
        why = by_name[name].refuses(x, call) if name in by_name else f"there is no such implementation of {op} yet"
        if why is None:
            return by_name[name]
        refused.append(f"{name}: {why}")
    raise RuntimeError(f"{source}={impl!r}: no implementation of {op} can run here ({'; '.join(refused)})")


def _names(impl):
    return [ALIASES.get(name.strip(), name.strip()) for name in impl.split(",")]


def concerns(rows):
    """Return True if FASTFF_IMPL is unset or names an implementation of this op."""
    if "FASTFF_IMPL" not in os.environ:  # at every call of an op
        return True
    wanted = _names(os.environ["FASTFF_IMPL"])
    return wanted == ["auto"] or any(row.name in wanted for row in rows)


def kernel_for(op, rows, x):
    """The implementation that "auto" chooses for x, or None where that is PyTorch's own or FASTFF_IMPL names none of this op's."""
    if "FASTFF_IMPL" in os.environ and not concerns(rows):
        return None
    row = choose(op, rows, "auto", x)
    return None if row.name in ("torch", "reference") else row


def dispatched(x, *others):
    """Return whether an op on these values must go through PyTorch's dispatcher, which costs about 0.1 ms.

    It must under torch.compile, torch.export and dispatch modes (but for those that record kernels, fastff/graph/operators.py), on the meta
    device, and for subclasses of Tensor such as FakeTensor."""
    if torch.compiler.is_compiling() or x.is_meta or (torch._C._len_torch_dispatch_stack() and not _calls_kernels()):
        return True
    return not PLAIN.issuperset(map(type, (x, *others)))


def _calls_kernels():
    """Whether the one dispatch mode at work wants to see the kernels that an op calls, and not the op."""
    modes = torch._C._len_torch_dispatch_stack()
    return modes == 1 and getattr(torch._C._get_dispatch_stack_at(0), "calls_kernels", False)


def transformed():
    """Return whether a transform of torch.func, such as grad or vmap, is at work: functions without a rule for it cannot run then."""
    return TRANSFORMED()


def unseen(backward):
    """Decorate the backward pass of a function: modes of torch.overrides, such as that of accelerated code, do not look at the calls in it."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        with UNSEEN():
            return backward(ctx, *grads)

    return run


def without_autocast(x):
    """Return a context in which PyTorch's operators compute in the dtypes of what they are given, on the device of x."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else contextlib.nullcontext()


LIBRARY = torch.library.Library("fastff", "FRAGMENT")


def register(schema, run, fake, backward=None, save=None):
    """Define an op by its schema: what it computes on every device, the shapes of its results, and how it is differentiated.

    backward(ctx, *grads), save(ctx, inputs, output): as for torch.library.register_autograd."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastff::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"fastff::{name}", backward, setup_context=save, lib=LIBRARY)
