"""What one local training step computes, described once: its goodness, loss, epilogue and normalization.

    h = batch_norm(x) + residual;  x = activation(h)      Epilogue, or None: the step starts from x itself
    g = goodness(x)                                       Projection (learned weights) or Groups (channels summed)
    loss = loss(g)                                        Loss
    y = normalize(x)                                      Normalization, the next block's input

Each description is a tuple with names and defaults. Ops pass them on as one flat list of arguments, whose schema is derived from the fields
here (`schema`, `flatten`, `unflatten`), and kernels read the fields by name. A new parameter of a loss is a field here, a formula in
fastff/reference.py, and a line in the loss code of each language (fastff/kernels/triton/loss.py, csrc/cpu/loss.h).
"""

import typing
from typing import NamedTuple

import torch

LOSSES = ("cross_entropy", "softplus", "swish", "symba", "swish_symba")
PAIRED_LOSSES = ("symba", "swish_symba")  # of differences between a positive and a negative sample
REDUCTIONS = ("mean", "sum", "none")
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu", "gelu")
NORMALIZATIONS = (
    "none", "layer_norm", "group_norm", "l2", "rms", "layer_norm_channels", "l2_channels", "rms_channels"
)  # fmt: skip
ALGORITHMS = ("auto", "direct", "second_moment")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Pair = tuple[int, int]
MaybeTensor = torch.Tensor | None


class Projection(NamedTuple):
    """g[b,k] = mean over positions of (sum_c weight[k,c] x[b,c,p] + bias[k])^2, plus a linear term over a grid of cells.

    weight [K, C, k, k] or None (no squares), bias [K] or None, grid_weight [K, C, G, G] or None, padding of the k x k head.
    Source: Krutsylo 2025, arXiv 2501.03176; the spatial term is this project's."""

    weight: MaybeTensor
    bias: MaybeTensor = None
    grid_weight: MaybeTensor = None
    padding: Pair = (0, 0)


class Groups(NamedTuple):
    """g[b,k] = sum (or mean) of x^power over the k-th of `count` groups of neighbouring channels and all positions.

    With `positions`, g [B, P] is over all channels at each position instead (count = 1).
    Sources: Hinton 2022 (arXiv 2212.13345), CwComp (arXiv 2312.12668), DeeperForward (ICLR 2025)."""

    count: int = 1
    power: int = 2
    mean: bool = True
    positions: bool = False


class Loss(NamedTuple):
    """The loss of goodness g [B, K].

    "cross_entropy": over tau * learned_tau * g with the target's entry lowered by `margin`, the one-hot target smoothed by `label_smoothing`.
    The others expect positive samples first and as many negative ones after them: softplus or swish of theta - g and g - theta, or of
    -alpha (g_positive - g_negative). All gradients are multiplied by grad_scale.

    target [B] int64 (cross_entropy only); learned_tau and grad_scale: tensors of one element, or None for 1."""

    name: str = "cross_entropy"
    target: MaybeTensor = None
    tau: float = 1.0
    learned_tau: MaybeTensor = None
    margin: float = 0.0
    label_smoothing: float = 0.0
    theta: float = 2.0
    alpha: float = 4.0
    reduction: str = "mean"
    grad_scale: MaybeTensor = None

    def count(self, batch):
        """Number of losses of `batch` samples: one a sample, or one a pair."""
        return batch // 2 if self.name in PAIRED_LOSSES else batch

    def scale(self, batch):
        """d(reduced loss) / d(one of the losses)."""
        return 1 / self.count(batch) if self.reduction == "mean" else 1.0


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


class Normalization(NamedTuple):
    """Of the next block's input: a name of NORMALIZATIONS, the groups of "group_norm", and what is added to the variance or length."""

    name: str = "none"
    groups: int = 1
    eps: float = 1e-5


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
    `grad_y`)."""

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

    @property
    def grad_y(self):
        """grad_x, by the name that tail_step has for its input."""
        return self.grad_x


# --- from tuples to flat arguments of an op and back

TYPES = {
    torch.Tensor: "Tensor", MaybeTensor: "Tensor?", float: "float", int: "int", bool: "bool", str: "str", Pair: "SymInt[2]"
}  # fmt: skip

PARTS = {"epilogue": Epilogue, "projection": Projection, "groups": Groups, "loss": Loss, "normalization": Normalization}
OPTIONAL = ("epilogue", "projection", "groups")  # preceded by a flag that says whether the part is there
ABSENT = {"epilogue": Epilogue(), "projection": Projection(None), "groups": Groups()}


def schema(names=tuple(PARTS)):
    """The arguments that these parts add to the schema of an op, such as "float loss_tau", in the order of `flatten`."""
    arguments = []
    for name in names:
        arguments += [f"bool has_{name}"] if name in OPTIONAL else []
        hints = typing.get_type_hints(PARTS[name])
        arguments += [f"{TYPES[hints[field]]} {name}_{field}" for field in PARTS[name]._fields]
    return ", ".join(arguments)


def flatten(step):
    """The parts of a Step as one list of arguments, in the order of `schema()`."""
    is_projection = isinstance(step.goodness, Projection)
    given = {
        "epilogue": step.epilogue, "projection": step.goodness if is_projection else None, "groups": None if is_projection else step.goodness,
        "loss": step.loss, "normalization": step.normalization,
    }  # fmt: skip
    values = []
    for name, part in given.items():
        values += [part is not None] if name in OPTIONAL else []
        values += part if part is not None else ABSENT[name]
    return values


def unflatten(x, values, need_grad_x=True, algorithm="auto"):
    """The Step of x and what `flatten` gave."""
    values, found = iter(values), {}
    for name, part in PARTS.items():
        here = next(values) if name in OPTIONAL else True
        fields = part(*(next(values) for _ in part._fields))
        found[name] = fields if here else None
    goodness = found["projection"] or found["groups"]
    return Step(x, found["epilogue"], goodness, found["loss"], found["normalization"], need_grad_x, algorithm)
