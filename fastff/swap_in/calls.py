"""What PyTorch does inside accelerated code: each call of one of its functions is looked at with its arguments, and some are done otherwise.

No source code is read or changed. `Faster` is a mode of torch.overrides: Python runs as it is written, and what is done otherwise is always a single
call, whose result has the same values but for rounding. All that this depends on is known at that moment: nothing has to be proved about the code.

    conv2d             in channels_last, with fastff's gradients (fastff/ops/convolution.py)
    view, reshape      of a tensor that is in channels_last because of that: of a contiguous copy. What is written to one is written to the other
    mean, sum          of x.square(), or of a view of it, for x [B, C, H, W]: ff.group_goodness, if nothing else can have that square
    Adam, AdamW, SGD   with fused=True, and no optimizer of PyTorch is looked at call by call
    std                of what needs no gradient: as the length of x - mean
    dropout, rand_like and others that go through memory in its order: on contiguous tensors, so that they draw the same numbers

Code outside sees no difference: tensors that are still there when accelerated code returns get the layout that they would have had.
"""

import sys
import threading
import weakref
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

import fastff.functional as ff
from fastff.kernels.layout import laid
from fastff.ops.convolution import convolve
from fastff.ops.gradients import GroupNormGuard

DTYPES: tuple[torch.dtype, ...] = (torch.float32,)  # of convolutions by oneDNN: in float64 the layout gains nothing
FEWEST_CHANNELS = 16  # of a convolution's output, from which on channels_last pays
FEWEST_POSITIONS = 1024  # of a minibatch: below, bringing the weights into the layout costs what it gains
SMALLEST = 1 << 15  # elements of x from which on ff.group_goodness pays
TENSORS = (torch.Tensor, torch.nn.Parameter)
SCALAR = torch.zeros(())
# Two functions that PyTorch does not document. Without the first, copies that stand for views are kept to the end of the call; without the second,
# Python code that runs in a backward pass sees tensors in channels_last.
USES = getattr(torch._C, "_storage_Use_Count", None)
ENGINE = getattr(torch.autograd.Variable, "_execution_engine", None)
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)

_thread = threading.local()  # .mode: the Faster that this thread is in


def current():
    """Return the Faster that this thread is in, or None."""
    return getattr(_thread, "mode", None)


def in_channels_last(x):
    """Return whether x is in channels_last and not contiguous as well."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class _Relaid(torch.autograd.Function):
    """A copy of x [B, C, H, W] in channels_last, or a contiguous one. Its gradient has the layout of x."""

    @staticmethod
    def forward(ctx, x, channels_last):
        ctx.back = not channels_last
        return laid(x, channels_last)

    @staticmethod
    def backward(ctx, grad):
        return relaid(grad, ctx.back), None


def relaid(x, channels_last):
    """Return x [B, C, H, W] in channels_last, or contiguous."""
    return (_Relaid.apply if torch.is_grad_enabled() and x.requires_grad else laid)(x, channels_last)


def _version(x):
    """Return how often x has been written to. Tensors of inference mode do not know that."""
    return 0 if x.is_inference() else x._version


class _Copy:
    """A contiguous copy that stands for a view of x: `update` makes up for what has been written to one of them."""

    def __init__(self, x, flat):
        self.x, self.flat = x, flat
        self.versions = _version(x), _version(flat)

    def update(self):
        versions = _version(self.x), _version(self.flat)
        if versions != self.versions:
            source, target = (self.flat, self.x) if versions[0] == self.versions[0] else (self.x, self.flat)
            with torch.set_grad_enabled(torch.is_grad_enabled() and source.requires_grad):
                target.copy_(source)
            self.versions = _version(self.x), _version(self.flat)

    def used(self):
        """Whether anything else can read or write the copy: two references to its storage are those of `flat` and of this function."""
        return USES is None or USES(self.flat.untyped_storage()._cdata) > 2


class _Chain(NamedTuple):
    """How a tensor came about: `power` 1 or 2 of x [B, C, H, W] as it was at `version`, viewed in the tensor's shape."""

    result: weakref.ref
    x: torch.Tensor
    version: int
    power: int
    direct: bool  # nothing else has the tensors between x and the result

    def of(self, tensor):
        """Whether this is how `tensor` came about, and x has not been written to since."""
        return self.result() is tensor and self.x._version == self.version


class _Parts(torch.autograd.Function):
    """Goodness [B, K] of equal parts of x, as torch.split makes them, over all of each: the gradients go back to the parts."""

    @staticmethod
    def forward(ctx, x, mean, *parts):
        ctx.save_for_backward(x, *parts)
        ctx.options = len(parts), 2, mean, False
        with torch.no_grad():
            return ff.group_goodness(x, len(parts), mean=mean)

    @staticmethod
    def backward(ctx, grad):
        x, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            x = torch.cat(parts, 1)
        grad = torch.ops.fastff.group_goodness_backward(grad, x, *ctx.options, "auto")
        return None, None, *grad.chunk(ctx.options[0], 1)


class _Split:
    """What torch.split made of x. Its goodness is computed once, when it is first asked for."""

    def __init__(self, x, parts):
        self.x, self.version, self.parts, self.found = x, x._version, [weakref.ref(p) for p in parts], {}

    def goodness(self, part, mean):
        """Return the goodness [B] of a part, or None if one of them is gone."""
        parts = [ref() for ref in self.parts]
        if self.x._version != self.version or any(p is None for p in parts):
            return None
        how = mean, torch.is_grad_enabled()
        if how not in self.found:
            self.found[how] = _Parts.apply(self.x.detach(), mean, *parts)
        return self.found[how][:, next(i for i, p in enumerate(parts) if p is part)]


class _References(TorchFunctionMode):
    """Counts the references to the first argument of the last function called."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count = sys.getrefcount(args[0])
        return function(*args, **(kwargs or {}))


def _references_of_temporaries():
    """Return the number of references, inside a mode, to an argument that nothing else has: `h.square()` in h.square().mean(1). 0 if it is the same
    for one that has a name."""
    x = torch.ones(1)
    with _References() as counted:
        x.square().mean(0)
        temporary = counted.count
        named = x.square()
        named.mean(0)
    return temporary if temporary < counted.count else 0


TEMPORARY = _references_of_temporaries()


class Faster(TorchFunctionMode):
    """The mode of one call of accelerated code. `record(pattern, result, weight)` is told what was done with each call that it knows.

    calls: whether to look at calls, or at optimizers alone: each costs about 2 microseconds, which only convolutions bring in again."""

    def __init__(self, record, calls=True):
        super().__init__()
        self.record, self.calls = record, calls
        self.converted = False  # whether a tensor is in channels_last that would not be without this mode
        self.made, self.copies, self.chain, self.split = [], [], None, None
        self.fused, self.paused = [], None  # of the optimizer that is making a step

    def __enter__(self):
        _thread.mode = self
        self.hooks = [register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)]
        return super().__enter__() if self.calls else self

    def __exit__(self, *error):
        self.resume()
        if self.calls:
            super().__exit__(*error)
        _thread.mode = self.chain = self.split = None
        for hook in self.hooks:
            hook.remove()
        if self.converted:
            self._restore_layouts()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        handler = HANDLERS.get(function)
        if handler is None:
            result = function(*args, **kwargs) if kwargs else function(*args)
        elif kwargs:
            result = handler(self, function, args, kwargs)
        else:
            result = handler(self, function, args, {})
        if self.converted:
            for tensor in result if type(result) in (tuple, list) else (result,):
                if type(tensor) is torch.Tensor and not tensor.is_contiguous():
                    self.made.append(weakref.ref(tensor))
            for copy in self.copies:
                copy.update()
        return result

    def resume(self):
        """End what `_before_step` began. A step that raises an error does not."""
        while self.fused:
            self.fused.pop()["fused"] = None
        if self.paused is not None:
            self.paused.__exit__(None, None, None)
            self.paused = None

    def forget(self):
        """Let go of what only this object holds."""
        self.chain = self.split = None
        self.copies = [copy for copy in self.copies if copy.used()]

    def _restore_layouts(self):
        """Make the tensors contiguous that are still there and would be without this mode. Those that are the same memory stay that, a copy that
        stands for a view becomes one, and slices become tensors of their own."""
        there = {id(t): t for t in (ref() for ref in self.made) if t is not None and not t.is_contiguous()}
        ours = [t for t in there.values() if t._base is None or id(t._base) in there or in_channels_last(t._base)]
        found = {_place(c.x): c.flat.detach().view(c.x.shape) for c in self.copies if c.used()}
        for t in ours:
            if _place(t) not in found:
                found[_place(t)] = t.detach().contiguous()
        for t, place in [(t, _place(t)) for t in ours]:
            t.data = found[place]


def _place(t):
    """Return where a tensor lies in memory, and how."""
    return t.data_ptr(), t.shape, t.stride()


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _conv2d(mode, function, args, kwargs):
    return _convolution(mode, function, *args, **kwargs)


def _convolution(mode, function, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Compute conv2d in channels_last where that pays, with the arguments of F.conv2d."""
    options = (stride, padding, dilation, groups)
    reason = _why_as_written(input, weight)
    mode.chain = mode.split = None
    mode.record("convolution", reason or "replaced", weight)
    if reason:
        if mode.converted and reason.startswith("at") and in_channels_last(input):
            input = relaid(input, False)
        return function(input, weight, bias, *options)
    if not in_channels_last(input) and not in_channels_last(weight):
        mode.converted = True
        input = relaid(input, True)
    (stride, across), dilation = _pair(stride), _pair(dilation)
    padding = (0, 0) if padding == "valid" else padding if padding == "same" else _pair(padding)
    channels, (filters, _, k, width) = input.shape[1], weight.shape
    plain = stride == across and padding[0] == padding[-1] and padding != "same" and k == width and dilation == (1, 1)
    if plain and (groups == 1 or groups == channels == filters and padding[0] < k):
        return convolve(input, weight, bias, stride, padding[0], groups)
    return function(input, weight, bias, *options)


def _why_as_written(x, weight):
    """Return why a convolution runs as it was written, or None."""
    if type(x) not in TENSORS or type(weight) not in TENSORS or torch._C._are_functorch_transforms_active():
        return "not of plain tensors"
    if torch.is_inference_mode_enabled() or x.is_inference():
        return "in inference mode"
    if x.device.type != "cpu":
        return f"on {x.device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "under autocast"
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"of {str(x.dtype).removeprefix('torch.')}"
    if x.dim() != 4 or x.numel() == 0:
        return "not of [B, C, H, W]"
    if len(weight) < FEWEST_CHANNELS:
        return f"to {len(weight)} channels: pays from {FEWEST_CHANNELS} on"
    if x.numel() < FEWEST_POSITIONS * x.shape[1]:
        return f"at {x.numel() // x.shape[1]} positions of the batch: pays from {FEWEST_POSITIONS} on"
    return None


def _view(mode, function, args, kwargs):
    """Compute x.view(...), which without this mode always is possible where this mode has changed the layout of x."""
    x, temporary, result = args[0], sys.getrefcount(args[0]) == TEMPORARY, None
    try:
        possible = True
        # PyTorch throws an exception, in 80 microseconds, where channels and positions would be put together
        if mode.converted and in_channels_last(x) and not isinstance((*args, *kwargs.values())[-1], torch.dtype):
            shape = function(SCALAR.expand(x.shape), *args[1:], **kwargs).shape
            possible = {1, len(x), len(x) * x.shape[1]} <= {1, *accumulate(shape, mul)}
        result = function(*args, **kwargs) if possible else None
    except RuntimeError:
        if not mode.converted or x.is_contiguous():
            raise
    if result is None:
        mode.forget()
        copy = next((c for c in mode.copies if c.x is x), None)
        if copy is None:
            copy = _Copy(x, relaid(x, False) if in_channels_last(x) else x.contiguous())
            mode.copies.append(copy)
        result = function(copy.flat, *args[1:], **kwargs)
    mode.chain = _follow(mode, x, result, temporary)
    return result


def _reshape(mode, function, args, kwargs):
    """Compute reshape or flatten, whose result may or may not be a view, as PyTorch says of them."""
    temporary = bool(args) and sys.getrefcount(args[0]) == TEMPORARY
    x, *others = args or (kwargs.pop("input"),)
    moved = mode.converted and in_channels_last(x)
    result = function(relaid(x, False) if moved else x, *others, **kwargs)
    mode.chain = _follow(mode, x, result, temporary)
    return result


def _is_activation(x):
    """Whether x is a tensor whose goodness fastff may compute."""
    known = type(x) is torch.Tensor and x.dim() == 4 and x.dtype in DTYPES
    return known and x.device.type == "cpu" and not x.is_inference()


def _follow(mode, x, result, temporary, power=1):
    """Return the chain of a view of x, or of its square."""
    before = mode.chain
    if before is not None and before.of(x) and before.power * power <= 2:
        direct = before.direct and temporary
        return before._replace(result=weakref.ref(result), power=before.power * power, direct=direct)
    return _Chain(weakref.ref(result), x, x._version, power, True) if _is_activation(x) else None


def _split(mode, function, args, kwargs):
    result, mode.split = function(*args, **kwargs), None
    x = args[0] if args else None
    if _is_activation(x) and result[0].shape[1] * len(result) == x.shape[1] and len({p.shape for p in result}) == 1:
        mode.split = _Split(x, result)
    return result


def _square(mode, function, args, kwargs):
    temporary = bool(args) and sys.getrefcount(args[0]) == TEMPORARY
    result = function(*args, **kwargs)
    x, *others = args or (kwargs.get("input"),)
    exponent = others[0] if others else kwargs.get("exponent")
    if exponent is x or function in SQUARES or (type(exponent) in (int, float) and exponent == 2):
        mode.chain = _follow(mode, x, result, temporary, power=2)
    return result


def _reduce(mode, function, args, kwargs):
    """Compute the mean or sum of a square, or of a view, as a goodness, if it is one and is a temporary: no gradient is asked for of those."""
    chain, found = mode.chain, None
    if chain is not None and args and chain.of(args[0]) and _whole(mode, chain.x).numel() >= SMALLEST:
        # nothing else has the square, so nothing can ask for its gradient
        if chain.direct and sys.getrefcount(args[0]) == TEMPORARY:
            found = _goodness(mode, chain, function in MEANS, args[0], *args[1:], **kwargs)
        mode.record("goodness", "replaced" if found is not None else "as written", None)
    mode.chain = None
    return function(*args, **kwargs) if found is None else found


def _whole(mode, x):
    """Return what x is a part of by the last torch.split, or x."""
    return mode.split.x if mode.split is not None and any(part() is x for part in mode.split.parts) else x


def _goodness(mode, chain, mean, z, dim=None, keepdim=False, **other):
    """Return the reduction of z over `dim` as a goodness of the x in its chain, or None if it is none."""
    dims = (dim,) if isinstance(dim, int) else dim
    if other or keepdim or not dims or torch.is_autocast_enabled("cpu"):
        return None
    (batch, channels, height, width), shape = chain.x.shape, tuple(z.shape)
    over = sorted(d % z.dim() for d in dims)
    if shape == tuple(chain.x.shape) and over == [1] and chain.power == 2:
        g = ff.group_goodness(chain.x, positions=True, mean=mean)
        return g.view(batch, height, width)
    rest = list(range(over[0], z.dim()))
    if shape[0] != batch or over != rest or over[0] not in (1, 2):
        return None
    groups = 1 if over[0] == 1 else shape[1]
    if channels % groups:
        return None
    if _whole(mode, chain.x) is not chain.x and chain.power == 2 and shape == tuple(chain.x.shape) and groups == 1:
        g = mode.split.goodness(chain.x, mean)
        if g is not None:
            return g
    g = ff.group_goodness(chain.x, groups, power=chain.power, mean=mean)
    return g[:, 0] if over[0] == 1 else g


def _deviation(mode, function, args, kwargs):
    """Compute a standard deviation that needs no gradient in vectors: PyTorch's own takes one element after the other, ten times as long."""
    found = None
    if len(args) > 1 and type(args[0]) in TENSORS and args[0].numel() >= SMALLEST:
        found = _deviation_of(*args, **kwargs)
    return function(*args, **kwargs) if found is None else found


def _deviation_of(x, dim=None, unbiased=True, keepdim=False, correction=None, **other):
    learns = torch.is_grad_enabled() and x.requires_grad
    if other or learns or x.dtype not in DTYPES or isinstance(dim, bool) or dim is None or x.device.type != "cpu":
        return None
    mean = x.mean(dim, keepdim=True)
    degrees = x.numel() // mean.numel() - (int(unbiased) if correction is None else correction)
    if degrees <= 0:
        return None
    return torch.linalg.vector_norm(x - mean, dim=dim, keepdim=keepdim) / degrees**0.5


def _group_norm(mode, function, args, kwargs):
    """Compute a group norm so that it always has a gradient of its input (GroupNormGuard says why)."""
    return GroupNormGuard().__torch_function__(function, (), args, kwargs)


def _backward(mode, function, args, kwargs):
    """Run the backward pass of one tensor in this mode, which PyTorch would leave for it: it calls Python code, such as hooks and what is
    checkpointed."""
    mode.forget()
    try:
        known = {"gradient", "retain_graph", "create_graph", "inputs"}.issuperset(kwargs) and 1 <= len(args) <= 4
        if mode.converted and known and ENGINE is not None and all(not isinstance(a, (tuple, list)) for a in args):
            return _backward_in(mode, *args, **kwargs)
        return function(*args, **kwargs)
    finally:
        mode.forget()


def _backward_in(mode, tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None):
    if gradient is None and tensor.numel() != 1:
        return tensor.backward()  # raises the error
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    inputs = () if inputs is None else (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    retain_graph = create_graph if retain_graph is None else retain_graph
    TorchFunctionMode.__enter__(mode)
    try:
        ENGINE.run_backward(
            (tensor,), (gradient,), retain_graph, create_graph, inputs, allow_unreachable=True, accumulate_grad=True
        )
    finally:
        TorchFunctionMode.__exit__(mode, None, None, None)


def _in_memory_order(mode, function, args, kwargs):
    """Call a function that goes through the memory of its arguments, as random numbers are drawn, on contiguous ones."""
    if mode.converted:
        args = [relaid(a, False) if type(a) in TENSORS and in_channels_last(a) else a for a in args]
    return function(*args, **kwargs)


def _fill(mode, function, args, kwargs):
    """Fill a tensor with random numbers in the order of its elements."""
    x, *others = args
    if not mode.converted or not in_channels_last(x):
        return function(*args, **kwargs)
    filled = x.detach().contiguous()
    function(filled, *others, **kwargs)
    return x.copy_(filled)


def _by_address(mode, function, args, kwargs):
    """Call a function that looks at the memory of x as it would be without this mode."""
    x = args[0]
    if mode.converted and in_channels_last(x):
        x.data = x.detach().contiguous()
    return function(*args, **kwargs)


def _before_step(optimizer, args, kwargs):
    """Leave PyTorch's own optimizers alone, each of whose hundreds of calls would be looked at, and have some update all parameters at once."""
    mode = current()
    hooks = (getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post"))
    if (
        mode is None
        or not type(optimizer).__module__.startswith("torch.optim.")
        or len(args) > 1
        or kwargs
        or any(hooks)
    ):
        return  # a closure, a hook or a class of the user's, who may do anything in it
    mode.paused = torch._C.DisableTorchFunction()
    mode.paused.__enter__()
    for group in optimizer.param_groups if type(optimizer) in FUSED else ():
        plain = group.get("fused") is None and group.get("foreach") is None and isinstance(group["lr"], float)
        if plain and not group.get("capturable") and not group["differentiable"] and _alike(optimizer, group["params"]):
            group["fused"] = True
            mode.fused.append(group)
            mode.record(f"{type(optimizer).__name__}.step", "replaced", None)


def _after_step(optimizer, args, kwargs):
    mode = current()
    if mode is not None:
        mode.resume()


def _alike(optimizer, parameters):
    """Whether all that belongs to a parameter lies in memory as it does, since the fused kernels go through memory in its order, and all
    parameters or none have a state."""
    states = set()
    for p in parameters:
        grad = p.grad
        if grad is None:
            continue
        state = [t for t in optimizer.state.get(p, {}).values() if isinstance(t, torch.Tensor) and t.dim()]
        states.add(len(state))
        if type(p) not in TENSORS or p.device.type != "cpu" or p.dtype not in (torch.float32, torch.float64):
            return False
        if not (p.is_contiguous() or in_channels_last(p)) or grad.is_sparse:
            return False
        strides, dtype = p.stride(), p.dtype
        if any(t.stride() != strides or t.dtype != dtype for t in (grad, *state)):
            return False
    return len(states) == 1


def _methods(*names):
    return [getattr(torch.Tensor, name) for name in names]


MEANS = (torch.Tensor.mean, torch.mean)
SQUARES = (torch.Tensor.square, torch.square)
POWERS = (torch.pow, torch.mul, *_methods("pow", "__pow__", "mul", "__mul__"))
HANDLERS = {F.conv2d: _conv2d}
for _handler, _functions in (
    (_view, _methods("view", "view_as", "unflatten")),
    (_reshape, [torch.reshape, torch.flatten, *_methods("reshape", "flatten")]),
    (_square, [*SQUARES, *POWERS]),
    (_split, [torch.split, torch.chunk, *_methods("split", "chunk")]),
    (_deviation, [torch.Tensor.std, torch.std]),
    (_backward, [torch.Tensor.backward, torch.autograd.backward]),
    (_reduce, [*MEANS, torch.Tensor.sum, torch.sum]),
    (_group_norm, [F.group_norm, torch.group_norm]),
    (_by_address, _methods("as_strided", "data_ptr", "storage", "untyped_storage", "numpy")),
    (
        _fill,
        _methods(
            "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_"
        ),
    ),
    (
        _in_memory_order,
        [F.dropout, F.alpha_dropout, torch.dropout, torch.bernoulli, torch.Tensor.bernoulli, torch.poisson],
    ),
    (_in_memory_order, [torch.rand_like, torch.randn_like, torch.randint_like, torch.empty_like, torch.as_strided]),
):
    HANDLERS |= dict.fromkeys(_functions, _handler)
