"""Tensors that are in channels_last in accelerated code and would be contiguous without it: convolutions, views, and what goes through memory.

conv2d             in channels_last, with fastff's gradients (fastff/ops/convolution.py)
view, reshape      of a tensor in channels_last: of a contiguous copy. What is written to one is written to the other
batch_norm         in training by fastff's epilogue (fastff/ops/epilogue.py)
dropout, rand_like and others that go through memory in its order: on contiguous tensors, so that they draw the same numbers
"""

import torch
import torch.nn.functional as F

from fastff import spec
from fastff.kernels.layout import laid
from fastff.ops import epilogue
from fastff.ops.convolution import PYTORCH, convolve, in_numbers, way
from fastff.ops.gradients import GroupNormGuard
from fastff.ops.table import transformed, unseen
from fastff.swap_in import limits
from fastff.swap_in.goodness import follow, is_temporary
from fastff.swap_in.limits import known, methods

# PyTorch does not document it: without it, copies that stand for views are kept to the end of the call.
USES = getattr(torch._C, "_storage_Use_Count", None)


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
    @unseen
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


def restore(made, copies):
    """Make the tensors contiguous that are still there of those that weak references `made` are to. Those that are the same memory stay that, a
    copy that stands for a view becomes one, and slices become tensors of their own."""
    there = {id(t): t for t in (ref() for ref in made) if t is not None and not t.is_contiguous()}
    ours = [t for t in there.values() if t._base is None or id(t._base) in there or in_channels_last(t._base)]
    found = {_place(c.x): c.flat.detach().view(c.x.shape) for c in copies if c.used()}
    for t in ours:
        if _place(t) not in found:
            found[_place(t)] = t.detach().contiguous()
    for t, place in [(t, _place(t)) for t in ours]:
        t.data = found[place]


def _place(t):
    """Return where a tensor lies in memory, and how."""
    return t.data_ptr(), t.shape, t.stride()


def _conv2d(mode, function, args, kwargs):
    return _convolution(mode, function, *args, **kwargs)


def _convolution(mode, function, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Compute conv2d in channels_last where that pays, with the arguments of F.conv2d."""
    mode.chain = mode.split = None
    reason = _why_as_written(input, weight)
    if reason is not None:
        mode.record("convolution", reason, weight)
        return function(input, weight, bias, stride, padding, dilation, groups)
    options = in_numbers(input, weight, stride, padding, dilation, groups)
    channels = input.shape[1]
    positions = input.numel() // (channels * options[0] ** 2 if options and options[0] else channels)
    few = positions < limits.FEWEST_POSITIONS
    if few and mode.converted and in_channels_last(input):
        input = relaid(input, False)
    elif not few and not in_channels_last(input) and not in_channels_last(weight):
        mode.converted = True
        input = relaid(input, True)
    how = way(input, weight, *options, groups) if options else PYTORCH
    if few and how == PYTORCH:
        reason = f"at {positions} positions of the batch: pays from {limits.FEWEST_POSITIONS} on"
    mode.record("convolution", reason or "replaced", weight)
    if how == PYTORCH:
        return function(input, weight, bias, stride, padding, dilation, groups)
    return convolve(input, weight, bias, *options, groups, how)


def _why_as_written(x, weight):
    """Return why a convolution runs as it was written whatever its size, or None."""
    if type(x) not in limits.TENSORS or type(weight) not in limits.TENSORS or transformed():
        return "not of plain tensors"
    if torch.is_inference_mode_enabled() or x.is_inference():
        return "in inference mode"
    if x.device.type != "cpu":
        return f"on {x.device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "under autocast"
    if x.dtype not in limits.DTYPES or weight.dtype != x.dtype:
        return f"of {str(x.dtype).removeprefix('torch.')}"
    if x.dim() != 4 or x.numel() == 0:
        return "not of [B, C, H, W]"
    if len(weight) < limits.FEWEST_CHANNELS:
        return f"to {len(weight)} channels: pays from {limits.FEWEST_CHANNELS} on"
    return None


def _view(mode, function, args, kwargs):
    """Compute x.view(...), which without this mode always is possible where this mode has changed the layout of x."""
    temporary, x, result = is_temporary(args), args[0], None
    if not (mode.converted and in_channels_last(x)):
        try:
            result = function(*args, **kwargs)
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
    follow(mode, x, result, temporary)
    return result


def _reshape(mode, function, args, kwargs):
    """Compute reshape or flatten, whose result may or may not be a view, as PyTorch says of them."""
    temporary = is_temporary(args)
    x, *others = args or (kwargs.pop("input"),)
    result = function(relaid(x, False) if mode.converted and in_channels_last(x) else x, *others, **kwargs)
    follow(mode, x, result, temporary)
    return result


def _group_norm(mode, function, args, kwargs):
    """Compute a group norm so that it always has a gradient of its input where it has learned factors (GroupNormGuard says why)."""
    if len(args) == 2 and not kwargs:
        return function(*args)
    return GroupNormGuard().__torch_function__(function, (), args, kwargs)


class _BatchNorm(torch.autograd.Function):
    """Batch norm of x [B, C, H, W] in channels_last with the batch's statistics, in one pass each way, and these statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, _, mean, var = epilogue.kernel(x).forward(x, spec.Epilogue(weight, bias, eps, None, False, "none"))
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @unseen
    def backward(ctx, grad, *_):
        x, weight, bias, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated, which PyTorch's can be
            wanted, scale = [True, weight is not None, bias is not None], (var + ctx.eps).rsqrt()
            how = weight, None, None, mean, scale, True, ctx.eps, wanted
            return *torch.ops.aten.native_batch_norm_backward(grad, x, *how), None
        e = spec.Epilogue(weight, bias, ctx.eps, None, False, "none")
        found = epilogue.kernel(x).backward(x, e, mean, var, grad)
        return found.y, *found.of_parameters(e), None


def _batch_norm(mode, function, args, kwargs):
    return _batch_norm_of(mode, function, *args, **kwargs)


def _batch_norm_of(
    mode, function, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    """Compute batch norm in training with the arguments of F.batch_norm: PyTorch's takes up to 17 times as long in channels_last."""
    given, x = (running_mean, running_var, weight, bias), input
    pairs = all((one is None) == (other is None) for one, other in (given[:2], given[2:]))
    plain = all(t is None or (type(t) in limits.TENSORS and t.dtype == x.dtype) for t in given)
    large = known(x) and in_channels_last(x) and x.numel() >= 4 * limits.SMALLEST and x.numel() > x.shape[1]
    if not (mode.converted and training is True and large and pairs and plain and type(momentum) is type(eps) is float):
        return function(x, *given, training, momentum, eps)
    if x.is_inference() or torch.is_autocast_enabled("cpu") or transformed() or epilogue.kernel(x) is None:
        return function(x, *given, training, momentum, eps)
    mode.record("batch norm", "replaced", weight)
    y, mean, var = _BatchNorm.apply(x, weight, bias, eps)
    if running_mean is not None:
        count = x.numel() / x.shape[1]
        epilogue.update_running_statistics(running_mean, running_var, None, mean, var, momentum, count)
    return y


def _in_memory_order(mode, function, args, kwargs):
    """Call a function that goes through the memory of its arguments, as random numbers are drawn, on contiguous ones."""
    if mode.converted:
        args = [relaid(a, False) if type(a) in limits.TENSORS and in_channels_last(a) else a for a in args]
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


DRAWN_IN_PLACE = "normal_ uniform_ bernoulli_ random_ exponential_ cauchy_ log_normal_ geometric_"
DRAWN = [F.dropout, F.alpha_dropout, torch.dropout, torch.bernoulli, torch.Tensor.bernoulli, torch.poisson]
HANDLERS = (
    (_conv2d, [F.conv2d]),
    (_view, methods("view", "view_as", "unflatten")),
    (_reshape, [torch.reshape, torch.flatten, *methods("reshape", "flatten")]),
    (_batch_norm, [F.batch_norm]),
    (_group_norm, [F.group_norm, torch.group_norm]),
    (_by_address, methods("as_strided", "data_ptr", "storage", "untyped_storage", "numpy")),
    (_fill, methods(*DRAWN_IN_PLACE.split())),
    (_in_memory_order, [*DRAWN, torch.rand_like, torch.randn_like, torch.randint_like, torch.empty_like]),
    (_in_memory_order, [torch.as_strided]),
)
