"""Calls of fastff.functional by the sizes of their tensors: the tensors, what our implementations return, and the same in plain PyTorch.

The plain code is what a user would write, by autograd, in the dtype of x. In float64 it gives the exact results; in x's dtype it gives the error that
PyTorch itself makes. `loss_of_step` is what torch.compile gets.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import fastff.functional as ff
from benchmarks.gpu_device import DEVICE, DRY
from fastff import reference, spec
from fastff.kernels.layout import is_channels_last, widened
from fastff.kernels.torch import normalization
from fastff.ops import TABLES

GRID, HIDDEN = 4, 64
LEARNED = (
    "x", "weight", "bias", "grid_weight", "hidden_weight", "hidden_bn_weight", "hidden_bn_bias", "tau", "residual", "bn_weight", "bn_bias"
)  # fmt: skip
PLAIN_ACTIVATIONS = {
    "none": lambda h: h, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu, "gelu": F.gelu
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """A call of one function. `given` names the optional tensors that it gets (of LEARNED, "hidden" and "grad_scale"); options are plain values."""

    function: str
    B: int
    C: int
    H: int
    K: int
    dtype: str = "bf16"
    given: tuple = ()
    options: Any = None
    channels_last: bool = True

    @property
    def columns(self):
        """The columns that tell this case from others in a CSV file."""
        options = dict.fromkeys(self.given, True) | (self.options or {})
        return {
            "function": self.function, "B": self.B, "C": self.C, "H": self.H, "K": self.K, "dtype": self.dtype,
            "layout": "channels_last" if self.channels_last else "contiguous",
            "options": ", ".join(name if value is True else f"{name} {value}" for name, value in options.items()),
        }  # fmt: skip

    @property
    def name(self):
        """The columns as text."""
        sizes = f"{self.B}, {self.C}, {self.H}, {self.K}"
        return " ".join(filter(None, (self.function, f"({sizes})", *list(self.columns.values())[5:])))

    def small(self):
        """The same case with sizes that the interpreter computes quickly."""
        return self._replace(B=min(self.B, 4), C=min(self.C, 24), H=min(self.H, 4), K=min(self.K, 6))


def of(case):
    """The case that runs here: a small one in a dry run."""
    return case.small() if DRY else case


def different(cases):
    """Return the cases without those that are the same here: in a dry run many shapes are."""
    found = {}
    for case in cases:
        found.setdefault(of(case).name, case)
    return list(found.values())


def rows_of(case, x):
    """Return the names of the implementations for GPUs that take x; in a dry run also those that are interpreted."""
    steps = TABLES.get("goodness_step", TABLES["goodness"])
    table = TABLES.get(case.function, TABLES["group_goodness"])
    table = {"goodness_step": steps, "tail_step": steps, "goodness_loss": TABLES["goodness"]}.get(case.function, table)
    return [row.name for row in table if row.name in ("cuda", "triton") and row.can_run(x) is None]


def tensors(case, seed=0):
    """Return {name: tensor} that the case needs, on the device. Parameters are float32."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    B, C, H, K, dtype = case.B, case.C, case.H, case.K, DTYPES[case.dtype]

    def normal(*shape, scale=1.0, mean=0.0):
        return torch.randn(shape, generator=generator, device=DEVICE) * scale + mean

    def image():
        x = normal(B, C, H, H, mean=0.5).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if case.channels_last else x

    found = {"x": image()}
    if case.function in ("goodness_step", "tail_step", "goodness_loss"):
        found["weight"] = normal(K, C, scale=2 / C**0.5)
        M = min(HIDDEN, C) if "hidden" in case.given else C
        if "hidden" in case.given:
            found |= {"hidden_weight": normal(M, C, scale=C**-0.5), "hidden_bn_weight": normal(M, scale=0.1, mean=1)}
            found["hidden_bn_bias"] = normal(M, scale=0.1)
        optional = {
            "bias": lambda: normal(K, scale=0.3), "grid_weight": lambda: normal(K, M, GRID, GRID, scale=0.05),
            "tau": lambda: torch.tensor(0.7, device=DEVICE),
        }  # fmt: skip
        found |= {name: make() for name, make in optional.items() if name in case.given}
    if case.function in ("tail_step", "group_tail_step", "epilogue"):
        found |= {"bn_weight": normal(C, scale=0.2, mean=1), "bn_bias": normal(C, scale=0.2)}
    if "residual" in case.given:
        found["residual"] = image()
    if "grad_scale" in case.given:
        found["grad_scale"] = torch.tensor(8.0, device=DEVICE)
    if case.function == "depthwise":
        k = case.options["kernel"]
        found["weight"] = normal(C, 1, k, k, scale=1 / k).to(dtype)
    if case.function in DIFFERENTIABLE:
        found["cotangent"] = image()
    if case.function.endswith("step") or case.function == "goodness_loss":
        found["target"] = torch.randint(K, (B,), generator=generator, device=DEVICE)
    return found


def leaves(case, t):
    """Return (the tensors that get a gradient, those that do not), both as {name: tensor}."""
    held = {"x"} if (case.options or {}).get("need_grad_x") is False else set()
    held |= {"residual"} if (case.options or {}).get("need_grad_residual") is False else set()
    learned = {name: t[name].detach().requires_grad_() for name in LEARNED if name in t and name not in held}
    return learned, {name: v for name, v in t.items() if name not in learned}


def our_step(case, t, impl):
    """Return {field of StepResult: tensor} of an implementation."""
    options = dict(case.options or {})
    bn = {name: t[name] for name in ("bn_weight", "bn_bias", "residual") if name in t}
    if case.function.startswith("group"):
        target = t["target"] if options.get("loss", "cross_entropy") == "cross_entropy" else None
        step = getattr(ff, case.function)(t["x"], target, **bn, **options, impl=impl)
    else:
        hidden = [t[f"hidden_{name}"] for name in ("weight", "bn_weight", "bn_bias")] if "hidden_weight" in t else None
        given = {name: t[name] for name in ("grid_weight", "tau", "grad_scale") if name in t}
        given |= {"hidden": None if hidden is None else spec.Hidden(*hidden)}
        head = (t["weight"], t.get("bias"), t["target"])
        step = getattr(ff, case.function)(t["x"], *head, **bn, **given, **options, impl=impl)
    return {name: value for name, value in step._asdict().items() if value is not None}


def plain_norm(x, options, K):
    """The next block's input. Layer normalization goes over the samples as flat rows: over x itself PyTorch would copy a channels_last tensor."""
    how = options.get("normalize", "layer_norm")
    if how is None:
        return None
    if how in ("layer_norm", "layer_norm_channels"):
        return getattr(normalization, how)(x, 1e-5)
    return reference.normalized(x, how, options.get("groups", K))


def plain_goodness(x, t, options, group):
    if group:
        keys = ("groups", "power", "mean", "positions")
        return widened(reference.group_goodness(x, **{key: options[key] for key in keys if key in options}))
    bias = t["bias"].to(x.dtype) if "bias" in t else None
    g = widened(F.conv2d(x, t["weight"].to(x.dtype)[:, :, None, None], bias).square().mean((2, 3)))
    if "grid_weight" not in t:
        return g
    cells = F.adaptive_avg_pool2d(x, min(GRID, x.shape[2]))
    if "hidden_weight" in t:
        z = F.conv2d(cells, t["hidden_weight"].to(x.dtype)[:, :, None, None])
        cells = F.relu(F.batch_norm(z, None, None, t["hidden_bn_weight"], t["hidden_bn_bias"], training=True))
    grid_weight = t["grid_weight"][..., : cells.shape[2], : cells.shape[3]].flatten(1)
    return g + widened(cells.flatten(1) @ grid_weight.to(cells.dtype).T)


def loss_of_step(case, t):
    """Return (loss that is differentiated, what the step returns: loss, goodness, next input) in plain PyTorch."""
    options, x, group = case.options or {}, t["x"], case.function.startswith("group")
    if "tail" in case.function:
        x = _plain_epilogue(t, options)
    g = plain_goodness(x, t, options, group)
    if options.get("loss", "cross_entropy") == "cross_entropy":
        u = t.get("tau", options.get("tau", 1.0)) * g
        if options.get("margin"):
            u = u - options["margin"] * F.one_hot(t["target"], g.shape[1])
        smoothing = options.get("label_smoothing", 0.0)
        loss = F.cross_entropy(u, t["target"], label_smoothing=smoothing, reduction=options.get("reduction", "mean"))
    else:
        loss = reference.losses(g, spec.Loss(options["loss"])).mean()
    normalized = plain_norm(x.detach(), options, g.shape[1])
    total = loss.sum() * t["grad_scale"] if "grad_scale" in t else loss.sum()
    return total, (loss.detach(), g.detach(), normalized)


def plain_step(case, t, forward=None):
    """Return what `our_step` does, from plain PyTorch; `forward` stands for a compiled loss_of_step with the case bound."""
    learned, fixed = leaves(case, t)
    total, results = forward(learned | fixed) if forward else loss_of_step(case, learned | fixed)
    names = [f"grad_{name}" for name in learned]
    found = dict(zip(("loss", "goodness", "normalized"), results, strict=True))
    found |= dict(zip(names, torch.autograd.grad(total, list(learned.values())), strict=True))
    return {name: value for name, value in found.items() if value is not None}


def statistics(case, t):
    """Return {"mean", "var"} of the batch that a step with an epilogue returns too."""
    if "tail" not in case.function:
        return {}
    return dict(zip(("var", "mean"), torch.var_mean(widened(t["x"]), (0, 2, 3), correction=0), strict=True))


def _epilogue(t, o, impl):
    bn = {name: t.get(name) for name in ("bn_weight", "bn_bias", "residual")}
    return ff.epilogue(t["x"], **bn, **o, impl=impl)[0]


def _plain_epilogue(t, o):
    h = F.batch_norm(t["x"], None, None, t["bn_weight"], t["bn_bias"], training=True)
    return PLAIN_ACTIVATIONS[o.get("activation", "relu")](h + t["residual"] if "residual" in t else h)


def _plain_layer_norm(t, o):
    how = {"sample": "layer_norm", "channels": "layer_norm_channels"}[o.get("over", "sample")]
    return plain_norm(t["x"], {"normalize": how}, 1)


def _depthwise(t, o, impl):
    return torch.ops.fastff.depthwise(t["x"], t["weight"], o["stride"], o["kernel"] // 2, impl)


def _plain_depthwise(t, o):
    return F.conv2d(t["x"], t["weight"], None, o["stride"], o["kernel"] // 2, groups=t["x"].shape[1])


DIFFERENTIABLE = {  # name: (ours(tensors, options, impl), plain(tensors, options))
    "layer_norm": (lambda t, o, impl: ff.layer_norm(t["x"], **o, impl=impl), _plain_layer_norm),
    "normalize": (
        lambda t, o, impl: ff.normalize(t["x"], **o, impl=impl),
        lambda t, o: plain_norm(t["x"], o | {"normalize": o["how"]}, 1),
    ),
    "epilogue": (_epilogue, _plain_epilogue),
    "depthwise": (_depthwise, _plain_depthwise),
    "group_goodness": (
        lambda t, o, impl: ff.group_goodness(t["x"], **o, impl=impl),
        lambda t, o: plain_goodness(t["x"], t, o, True),
    ),
    "goodness_loss": (
        lambda t, o, impl: ff.goodness_loss(
            t["x"], t["weight"], t.get("bias"), t["target"], grid_weight=t.get("grid_weight"), impl=impl, **o
        ),
        lambda t, o: F.cross_entropy(plain_goodness(t["x"], t, o, False), t["target"]),
    ),
}


def differentiated(case, t, compute):
    """Return {"output", "grad_...": tensor} of output = compute(t)."""
    learned, fixed = leaves(case, t)
    output = compute(learned | fixed)
    # an output has at most as many elements as x, and so as the values that its gradient is made of
    cotangent = fixed["cotangent"].flatten()[: output.numel()].view(output.shape).to(output.dtype)
    if output.dim() == 4 and is_channels_last(output):
        cotangent = cotangent.contiguous(memory_format=torch.channels_last)
    grads = torch.autograd.grad(output, list(learned.values()), cotangent)
    return {"output": output.detach()} | {f"grad_{n}": g for n, g in zip(learned, grads, strict=True)}


def ours(case, t, impl):
    """Return {name: tensor} of an implementation."""
    if case.function not in DIFFERENTIABLE:
        return our_step(case, t, impl)
    compute = DIFFERENTIABLE[case.function][0]
    return differentiated(case, t, lambda v: compute(v, case.options or {}, impl))


def plain(case, t):
    """Return {name: tensor} of plain PyTorch, in the dtype of the tensors."""
    if case.function not in DIFFERENTIABLE:
        return plain_step(case, t)
    compute = DIFFERENTIABLE[case.function][1]
    return differentiated(case, t, lambda v: compute(v, case.options or {}))


def exact(case, t):
    """Return {name: tensor} in float64."""
    wide = {name: v.double() if v.is_floating_point() else v for name, v in t.items()}
    return plain(case, wide) | statistics(case, wide)


def mbytes(case):
    """Return the MB that must be moved: x read, its gradient and the next input written; an epilogue reads y twice and the residual once."""
    passes = {"layer_norm": 2, "normalize": 2}.get(case.function, 3)
    passes += ("tail" in case.function) * (1 + ("residual" in case.given))
    return passes * math.prod((case.B, case.C, case.H, case.H)) * DTYPES[case.dtype].itemsize / 1e6
