"""What one local training step computes, described once: its goodness, loss, epilogue and normalization.

    h = batch_norm(x) + residual;  x = activation(h)      Epilogue, or None: the step starts from x itself
    g = goodness(x)                                       Projection (learned weights) or Groups (channels summed)
    loss = loss(g)                                        Loss
    y = normalize(x)                                      Normalization, the next block's input

Each description is a tuple with names and defaults. Ops pass them on as one flat list of arguments, whose schema is derived from the fields
here (fastff/flat.py), and kernels read the fields by name. A new parameter of a loss is a field here, a formula in
fastff/reference.py, and a line in the loss code of each language (fastff/kernels/triton/loss.py, csrc/cpu/loss.h).

`checked` makes a description from the arguments of the public functions. It raises TypeError or ValueError that names the argument,
what was expected and what it got; `called` is the name of x there.
"""

import math
from typing import NamedTuple, TypeAlias

import torch

from fastff import arguments
from fastff.arguments import DTYPES, check_flags, check_member, check_not_empty, check_target, number_between

LOSSES = ("cross_entropy", "softplus", "swish", "symba", "swish_symba")
PAIRED_LOSSES = ("symba", "swish_symba")  # of differences between a positive and a negative sample
REDUCTIONS = ("mean", "sum", "none")
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu", "gelu")
NORMALIZATIONS = (
    "none", "layer_norm", "group_norm", "l2", "rms", "layer_norm_channels", "l2_channels", "rms_channels"
)  # fmt: skip
ALGORITHMS = ("auto", "direct", "second_moment")

Pair = tuple[int, int]
MaybeTensor: TypeAlias = torch.Tensor | None


class Plan(NamedTuple):
    """How the goodness of a Projection is computed (fastff/ops/plan.py): algorithm "direct", "second_moment",
    "convolution", "products" or "cublas" (direct as three products, by Triton or PyTorch); samples of a chunk, classes of a tile."""

    algorithm: str
    samples: int
    classes: int


class Hidden(NamedTuple):
    """The hidden layer of a spatial term that is not linear: a[b,m,cell] = relu(batch_norm(sum_c weight[m,c] mean_cell(x_b)[c])).

    weight [M, C]; bn_weight, bn_bias [M] or None; eps is added to the variance. mean, var [M] are the statistics of batch norm, or None for those
    of this batch, over its samples and cells."""

    weight: torch.Tensor
    bn_weight: MaybeTensor = None
    bn_bias: MaybeTensor = None
    eps: float = 1e-5
    mean: MaybeTensor = None
    var: MaybeTensor = None


class Projection(NamedTuple):
    """g[b,k] = mean over positions of (sum_c weight[k,c] x[b,c,p] + bias[k])^2, plus a linear term over a grid of cells.

    weight [K, C, k, k] or None (no squares), bias [K] or None, grid_weight [K, C, G, G] or None, padding of the k x k head. The others are the
    fields of a Hidden, behind which the linear term is then: grid_weight [K, M, G, G].
    Source: Krutsylo 2025, arXiv 2501.03176; the spatial term is this project's."""

    weight: MaybeTensor
    bias: MaybeTensor = None
    grid_weight: MaybeTensor = None
    padding: Pair = (0, 0)
    hidden_weight: MaybeTensor = None
    hidden_bn_weight: MaybeTensor = None
    hidden_bn_bias: MaybeTensor = None
    hidden_eps: float = 1e-5
    hidden_mean: MaybeTensor = None
    hidden_var: MaybeTensor = None

    @property
    def hidden(self):
        """The Hidden layer of the spatial term, or None."""
        return None if self.hidden_weight is None else Hidden(*self[4:])

    @property
    def classes(self):
        """K."""
        return (self.weight if self.weight is not None else self.grid_weight).shape[0]

    def dtype(self, x):
        """The dtype of the arithmetic on x: float64 if an argument is, else float32, also for 16-bit x, whose squares overflow."""
        tensors = (x, self.weight, self.grid_weight, self.hidden_weight)
        wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
        return torch.float64 if wide else torch.float32

    def hidden_values(self, x):
        """The number of values of each channel of the hidden layer for x [B, C, H, W]: samples times cells, at most one cell a position."""
        (B, _, H, W), (*_, rows, columns) = x.shape, self.grid_weight.shape
        return B * min(H, rows) * min(W, columns)

    def in_dtype(self, x):
        """Return x and this Projection in the dtype of the arithmetic."""
        dtype = self.dtype(x)
        tensors = {name: t.to(dtype) for name, t in zip(self._fields, self, strict=True) if isinstance(t, torch.Tensor)}
        return x.to(dtype), self._replace(**tensors)

    @classmethod
    def checked(cls, x, weight, bias=None, grid_weight=None, padding=0, algorithm="auto", called="x", hidden=None):
        """Make one for x [B, C, H, W] from weight [K, C] or [K, C, k, k], an int or a pair as padding, and a Hidden or None."""
        if hidden is not None and not isinstance(hidden, Hidden):
            raise TypeError(f"hidden: expected a fastff.spec.Hidden or None, got {type(hidden).__name__}")
        if hidden is not None and hidden.weight is None:
            raise TypeError("hidden_weight: expected a floating-point tensor, got NoneType")
        padding = (padding, padding) if isinstance(padding, int) else padding
        made = cls(weight, bias, grid_weight, padding, *(hidden or ()))
        made.check(x, algorithm, called)
        weight = weight if weight is None or weight.dim() == 4 else weight[:, :, None, None]
        return cls(weight, bias, grid_weight, tuple(padding), *made[4:])

    def check(self, x, algorithm="auto", called="x"):
        """Raise TypeError or ValueError unless this is a head for x [B, C, H, W]."""
        check_not_empty(x, called)
        (weight, bias, grid_weight, padding, *_), channels = self, x.shape[1]
        if weight is None and grid_weight is None:
            raise ValueError("weight: expected [K, C] or [K, C, k, k] unless grid_weight is given, got None for both")
        if weight is None and bias is not None:
            raise ValueError("bias: expected None without weight, since it is part of the squares")
        for name, t in zip(self._fields, self, strict=True):
            if t is None or name in ("padding", "hidden_eps"):
                continue
            if not isinstance(t, torch.Tensor) or t.dtype not in DTYPES:
                raise TypeError(f"{name}: expected a floating-point tensor, got {arguments.kind_of(t)}")
            if t.device != x.device:
                raise ValueError(f"{name}: expected on {x.device} as {called} is, got {t.device}")
        if weight is not None and (weight.dim() not in (2, 4) or weight.shape[1] != channels or weight.shape[0] == 0):
            expected = f"[K, {channels}] or [K, {channels}, k, k] with K >= 1 for {called} of {channels} channels"
            raise ValueError(f"weight: expected {expected}, got {list(weight.shape)}")
        if bias is not None and bias.shape != (self.classes,):
            raise ValueError(f"bias: expected [{self.classes}], got {list(bias.shape)}")
        if self.hidden_weight is not None:
            self._check_hidden(x, called)
            channels = self.hidden_weight.shape[0]
        if grid_weight is not None and (grid_weight.dim() != 4 or grid_weight.shape[:2] != (self.classes, channels)):
            raise ValueError(f"grid_weight: expected [{self.classes}, {channels}, G, G], got {list(grid_weight.shape)}")
        if self.hidden_weight is not None and self.hidden_mean is None and self.hidden_values(x) < 2:
            expected = "more than one sample or cell for the batch statistics of the hidden layer"
            raise ValueError(f"{called}: expected {expected}, got {self.hidden_values(x)} of shape {list(x.shape)}")
        pair = isinstance(padding, tuple | list) and len(padding) == 2
        if not pair or not all(isinstance(p, int) and p >= 0 for p in padding):
            raise ValueError(f"padding: expected an int or a pair of at least 0, got {padding!r}")
        kernel = (1, 1) if weight is None else (*weight.shape[2:], 1, 1)[:2]
        if any(n + 2 * p < k for n, p, k in zip(x.shape[2:], padding, kernel, strict=True)):
            raise ValueError(f"{called}: expected at least {list(kernel)} positions for this head, got {list(x.shape)}")
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm: expected 'auto', 'direct' or 'second_moment', got {algorithm!r}")
        if algorithm == "second_moment" and kernel != (1, 1):
            raise ValueError(f"algorithm: second_moment needs kernel size 1, got {list(kernel)}")

    def _check_hidden(self, x, called):
        weight, channels = self.hidden_weight, x.shape[1]
        if weight.dim() != 2 or weight.shape[1] != channels or weight.shape[0] == 0:
            expected = f"[M, {channels}] with M >= 1 for {called} of {channels} channels"
            raise ValueError(f"hidden_weight: expected {expected}, got {list(weight.shape)}")
        if self.grid_weight is None:
            raise ValueError("hidden: expected None without grid_weight, whose cells it reads, got a hidden layer")
        for name in ("hidden_bn_weight", "hidden_bn_bias", "hidden_mean", "hidden_var"):
            t = getattr(self, name)
            if t is not None and t.shape != weight.shape[:1]:
                raise ValueError(f"{name}: expected [{weight.shape[0]}], got {list(t.shape)}")
        number_between("hidden_eps", self.hidden_eps, 0, math.inf, low_allowed=True)
        if (self.hidden_mean is None) != (self.hidden_var is None):
            raise ValueError("hidden_mean, hidden_var: expected both or neither, got one of them")


# Fields of a Projection that a head learns, and those of a StepResult that are their gradients.
HEAD_PARAMETERS = ("weight", "bias", "grid_weight", "hidden_weight", "hidden_bn_weight", "hidden_bn_bias")
HEAD_GRADIENTS = tuple(f"grad_{name}" for name in HEAD_PARAMETERS)


class Groups(NamedTuple):
    """g[b,k] = sum (or mean) of x^power over the k-th of `count` groups of neighbouring channels and all positions.

    With `positions`, g [B, P] is over all channels at each position instead (count = 1).
    Sources: Hinton 2022 (arXiv 2212.13345), CwComp (arXiv 2312.12668), DeeperForward (ICLR 2025)."""

    count: int = 1  # type: ignore[assignment]  # hides tuple.count
    power: int = 2
    mean: bool = True
    positions: bool = False

    def columns(self, x):
        """The number of columns of g for x [B, C, H, W]."""
        return x.shape[2] * x.shape[3] if self.positions else self.count

    @classmethod
    def checked(cls, x, groups=1, power=2, mean=True, positions=False, called="x"):
        """Make one for x [B, C, H, W]."""
        check_flags(mean=mean, positions=positions)
        made = cls(groups, power, mean, positions)
        made.check(x, called=called)
        return made

    def check(self, x, algorithm="auto", called="x"):
        """Raise ValueError unless x [B, C, H, W] has such groups. They have one algorithm, whatever the argument says."""
        groups = self[0]
        if not isinstance(groups, int) or not 1 <= groups <= x.shape[1]:
            raise ValueError(f"groups: expected 1 to {x.shape[1]}, the channels of {called}, got {groups!r}")
        if self.power not in (1, 2):
            raise ValueError(f"power: expected 1 or 2, got {self.power!r}")
        if self.positions and groups != 1:
            expected = "groups=1, since each position is one group of all channels"
            raise ValueError(f"positions: expected {expected}, got {groups}")
        check_not_empty(x, called)


class Loss(NamedTuple):
    """The loss of goodness g [B, K].

    "cross_entropy": over tau * learned_tau * g with the target's entry lowered by `margin`, the one-hot target smoothed by `label_smoothing`.
    The others expect positive samples first and as many negative ones after them: softplus or swish of theta - g and g - theta - theta_gap, or of
    -alpha (g_positive - g_negative). All gradients are multiplied by grad_scale.

    target [B] int64 (cross_entropy only); learned_tau and grad_scale: tensors of one element, or None for 1."""

    name: str = "cross_entropy"
    target: MaybeTensor = None
    tau: float = 1.0
    learned_tau: MaybeTensor = None
    margin: float = 0.0
    label_smoothing: float = 0.0
    theta: float = 2.0
    theta_gap: float = 0.0
    alpha: float = 4.0
    reduction: str = "mean"
    grad_scale: MaybeTensor = None

    def count(self, batch):
        """Number of losses of `batch` samples: one a sample, or one a pair."""
        return batch // 2 if self.name in PAIRED_LOSSES else batch

    def scale(self, batch):
        """d(reduced loss) / d(one of the losses)."""
        return 1 / self.count(batch) if self.reduction == "mean" else 1.0

    @classmethod
    def checked(cls, x, target=None, positions=False, called="x", *, tau=1.0, **options):
        """Make one for the samples of x. Options are the other fields by their names; tau may also be a 0-dimensional tensor.

        positions: whether g has a column for each position instead of for each class."""
        learned_tau = None
        if isinstance(tau, torch.Tensor):
            if tau.dim() != 0 or tau.dtype not in DTYPES:
                expected = "a number or a floating-point tensor without dimensions"
                raise ValueError(f"tau: expected {expected}, got {arguments.described(tau)}")
            tau, learned_tau = 1.0, tau
        made = cls(target=target, tau=tau, learned_tau=learned_tau, **with_thresholds(options))
        made.check(x, positions, called)
        return made

    def check(self, x, positions=False, called="x"):
        """Raise TypeError or ValueError unless this is a loss for the samples of x."""
        check_member("loss", self.name, LOSSES)
        self.check_numbers()
        scale, target = self.grad_scale, self.target
        one = isinstance(scale, torch.Tensor) and scale.numel() == 1 and scale.dtype in DTYPES
        if scale is not None and not one:
            expected = "a floating-point tensor of one element or None"
            raise TypeError(f"grad_scale: expected {expected}, got {arguments.described(scale)}")
        if self.name != "cross_entropy":
            if target is not None:
                raise ValueError(f"target: expected None for {self.name}, whose batch is two halves, got a tensor")
            if x.shape[0] == 0 or x.shape[0] % 2:
                expected = "positive samples and as many negative ones, an even batch"
                raise ValueError(f"{called}: expected {expected}, got {x.shape[0]}")
        elif positions:
            expected = "False for cross_entropy, which needs a column for each class"
            raise ValueError(f"positions: expected {expected}, got True")
        elif target is None:
            expected = "[B] int64 class labels for cross_entropy, as in local_step(x, target)"
            raise ValueError(f"target: expected {expected}, got None")
        else:
            check_target(target, x, called)
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {self.reduction!r}")

    def check_numbers(self):
        """Raise ValueError for a number out of range."""
        number_between("tau", self.tau, 0, math.inf, low_allowed=False)
        number_between("label_smoothing", self.label_smoothing, 0, 1, low_allowed=True)
        for name in ("margin", "theta", "theta_gap", "alpha"):
            number_between(name, getattr(self, name), -math.inf, math.inf, low_allowed=False)


# What a head keeps of its loss: the rest comes with each step.
LOSS_OPTIONS = tuple(
    name for name in Loss._fields if name not in ("name", "target", "learned_tau", "reduction", "grad_scale")
)


def with_thresholds(options):
    """Return options of a loss with theta as a number: of a pair, the first is that of positive samples, and the second theta + theta_gap.

    Raises TypeError or ValueError that names theta."""
    theta = options.get("theta")
    if not isinstance(theta, (tuple, list)):
        return options
    if len(theta) != 2 or "theta_gap" in options:
        raise ValueError(f"theta: expected a number, or a pair for positive and negative samples, got {theta!r}")
    positive, negative = (number_between("theta", t, -math.inf, math.inf, low_allowed=False) for t in theta)
    return options | {"theta": positive, "theta_gap": negative - positive}


def check_loss_options(options):
    """Return these options of a loss with the defaults of the others.

    Raises TypeError for an unknown one and ValueError for a value out of range."""
    for name in options:
        if name not in LOSS_OPTIONS:
            raise TypeError(f"{name}: expected an option of the loss, one of {', '.join(LOSS_OPTIONS)}")
    made = Loss(**with_thresholds(options))
    made.check_numbers()
    return {name: getattr(made, name) for name in LOSS_OPTIONS}


class Epilogue(NamedTuple):
    """The end of a block, x = activation(batch_norm(y) + residual), with the statistics of this batch.

    weight, bias [C] of batch norm or None; eps is added to the variance; residual as y or None; need_grad_residual: whether its gradient
    is wanted. Source: Ioffe and Szegedy 2015, arXiv 1502.03167."""

    weight: MaybeTensor = None
    bias: MaybeTensor = None
    eps: float = 1e-5
    residual: MaybeTensor = None
    need_grad_residual: bool = True
    activation: str = "relu"

    @property
    def wants_residual(self):
        """Whether there is a residual whose gradient is wanted."""
        return self.residual is not None and self.need_grad_residual

    def check(self, y):
        """Raise TypeError or ValueError unless this may follow y."""
        if not isinstance(y, torch.Tensor) or y.dim() != 4:
            got = list(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            raise ValueError(f"y: expected a tensor [B, C, H, W], got {got}")
        if y.dtype not in DTYPES:
            raise TypeError(f"y: expected float32, float64, bfloat16 or float16, got {y.dtype}")
        number_between("bn_eps", self.eps, 0, math.inf, low_allowed=True)
        check_flags(need_grad_residual=self.need_grad_residual)
        for name, t in (("bn_weight", self.weight), ("bn_bias", self.bias)):
            if t is not None and not isinstance(t, torch.Tensor):
                raise TypeError(f"{name}: expected a tensor or None, got {type(t).__name__}")
            if t is not None and (t.shape != y.shape[1:2] or t.device != y.device or t.dtype not in DTYPES):
                expected = f"a floating-point tensor [{y.shape[1]}] on {y.device}"
                raise ValueError(f"{name}: expected {expected}, got {list(t.shape)} of {t.dtype} on {t.device}")
        r = self.residual
        if r is not None and not isinstance(r, torch.Tensor):
            raise TypeError(f"residual: expected a tensor as y or None, got {type(r).__name__}")
        if r is not None and (r.shape != y.shape or r.dtype != y.dtype or r.device != y.device):
            expected = f"{list(y.shape)} of {y.dtype} on {y.device} as y is"
            raise ValueError(f"residual: expected {expected}, got {list(r.shape)} of {r.dtype} on {r.device}")
        check_member("activation", self.activation, ACTIVATIONS)
        if y.numel() == y.shape[1]:
            expected = "more than one value per channel for batch statistics"
            raise ValueError(f"y: expected {expected}, got {list(y.shape)}")


class EpilogueGradients(NamedTuple):
    """Gradients of an Epilogue: of y, of the residual (that of h; None unless wanted), of weight and bias [C], which are there in any case."""

    y: torch.Tensor
    residual: MaybeTensor
    weight: torch.Tensor
    bias: torch.Tensor

    def of_parameters(self, epilogue):
        """The gradients of weight and bias in their dtypes, None where the Epilogue has none."""
        return _like(self.weight, epilogue.weight), _like(self.bias, epilogue.bias)


def _like(grad, parameter):
    return None if parameter is None else grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)


class Normalization(NamedTuple):
    """Of the next block's input: a name of NORMALIZATIONS, the groups of "group_norm", and what is added to the variance or length."""

    name: str = "none"
    groups: int = 1
    eps: float = 1e-5

    @classmethod
    def checked(cls, name, channels, groups=1, eps=1e-5, called="normalize"):
        """Make one for x of so many channels. None is "none"; `called` is the name of `name` where it was given."""
        name = "none" if name is None else name
        if name not in NORMALIZATIONS:
            raise ValueError(f"{called}: expected one of {', '.join(NORMALIZATIONS)} or None, got {name!r}")
        if name == "group_norm" and groups > channels:
            many = f"{groups} groups, for a head one for each of its classes, are more than the {channels} channels"
            expected = f"another one than group_norm where {many}"
            raise ValueError(f"{called}: expected {expected}, got group_norm")
        return cls(name, groups, number_between("eps", eps, 0, math.inf, low_allowed=True))


class Step(NamedTuple):
    """A whole local step on x [B, C, H, W] (with an epilogue: the output of the block's last convolution)."""

    x: torch.Tensor
    epilogue: Epilogue | None
    goodness: Projection | Groups
    loss: Loss
    normalization: Normalization
    need_grad_x: bool = True
    algorithm: str = "auto"


class StepResult(NamedTuple):
    """What a local step returns. A field is None where there is no such input or it was not asked for.

    loss [] or [B] or [B/2] (reduction "none"); goodness [B, K] (or [B, P]); grad_x and normalized as x; grad_weight, grad_bias,
    grad_grid_weight as the head's parameters, grad_tau []; grad_residual as x; grad_bn_weight, grad_bn_bias [C]; mean and var [C], the
    batch's mean and biased variance in float32 (float64 for float64). With an epilogue grad_x is the gradient of its input y (also
    `grad_y`). With a Hidden layer: grad_hidden_weight, grad_hidden_bn_weight and grad_hidden_bn_bias as its parameters, hidden_mean and hidden_var
    [M], with which its batch norm was computed."""

    loss: torch.Tensor
    goodness: torch.Tensor
    grad_x: MaybeTensor = None
    grad_weight: MaybeTensor = None
    grad_bias: MaybeTensor = None
    grad_grid_weight: MaybeTensor = None
    grad_tau: MaybeTensor = None
    normalized: MaybeTensor = None
    grad_residual: MaybeTensor = None
    grad_bn_weight: MaybeTensor = None
    grad_bn_bias: MaybeTensor = None
    mean: MaybeTensor = None
    var: MaybeTensor = None
    grad_hidden_weight: MaybeTensor = None
    grad_hidden_bn_weight: MaybeTensor = None
    grad_hidden_bn_bias: MaybeTensor = None
    hidden_mean: MaybeTensor = None
    hidden_var: MaybeTensor = None

    def before_epilogue(self, gradients, mean, var):
        """The result of a step with an epilogue, from that of the step behind it and the EpilogueGradients."""
        return self._replace(
            grad_x=gradients.y, grad_residual=gradients.residual, grad_bn_weight=gradients.weight, grad_bn_bias=gradients.bias,
            mean=mean, var=var,
        )  # fmt: skip

    def with_hidden(self, gradients, mean, var):
        """The result with those of a Hidden layer: gradients of weight, bn_weight and bn_bias, and statistics."""
        grad_weight, grad_bn_weight, grad_bn_bias = gradients
        return self._replace(
            grad_hidden_weight=grad_weight, grad_hidden_bn_weight=grad_bn_weight, grad_hidden_bn_bias=grad_bn_bias,
            hidden_mean=mean, hidden_var=var,
        )  # fmt: skip

    @property
    def grad_y(self):
        """grad_x, by the name that tail_step has for its input."""
        return self.grad_x
