"""A whole local step by the compiled library, torch.ops.fastff.step_native (csrc/cpu/step.cpp): its call from a Step of fastff/spec.py.

A Projection and an Epilogue are computed in float32: parameters are widened here, images and residuals a sample at a time by the kernels."""

import torch

from fastff import flat, spec
from fastff.spec import Projection, StepResult

CHOICES = {
    "epilogue_activation": spec.ACTIVATIONS, "loss_name": spec.LOSSES, "loss_reduction": spec.REDUCTIONS,
    "normalization_name": spec.NORMALIZATIONS,
}  # fmt: skip
_ARGUMENTS = [argument.split() for argument in flat.schema().split(", ")]
_CHOICES = {place: CHOICES[name] for place, (_, name) in enumerate(_ARGUMENTS) if name in CHOICES}
_PARAMETERS = [
    place for place, (kind, name) in enumerate(_ARGUMENTS) if kind == "Tensor?" and name != "epilogue_residual"
]


def run(local, second_moment=False):
    """Return the StepResult of a Step."""
    wide = local.epilogue is not None or isinstance(local.goodness, Projection)
    values = flat.flatten(local)
    for place, names in _CHOICES.items():
        values[place] = names.index(values[place])
    for place in _PARAMETERS if wide else ():
        t = values[place]
        if t is not None and t.dtype != torch.float32 and t.is_floating_point():
            values[place] = t.float()
    results = torch.ops.fastff.step_native(local.x, *values, local.need_grad_x, second_moment)
    return StepResult(*[t if t.numel() else None for t in results])
