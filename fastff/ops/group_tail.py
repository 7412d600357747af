"""torch.ops.fastff.group_tail_step: batch norm, residual, activation and group_goodness_step at the end of a block, with all their gradients.

As tail_step (fastff/ops/tail.py), for goodness without weights (fastff/ops/group_goodness.py).
"""

import torch

from fastff import reference
from fastff.kernels.composed import tail as composed
from fastff.kernels.composed.group_goodness import Goodness
from fastff.kernels.composed.tail import Tail
from fastff.kernels.native import group_tail as native_group_tail
from fastff.ops import group_goodness as group_op
from fastff.ops.table import Implementation, always, choose, implement
from fastff.ops.tail import Reference, own_fake, own_results

# "triton": batch norm on PyTorch's operators around the kernel of group_goodness
ROWS = [
    Implementation("triton", group_op.ROWS[0].can_run, composed),
    Implementation(
        "native", group_op.ROWS[1].can_run, native_group_tail, "float64 by batch norm around group_goodness"
    ),
    Implementation("composed", always, composed),
    Implementation("reference", always, Reference),
]

_lib = torch.library.Library("fastff", "FRAGMENT")
_lib.define(
    "group_tail_step(Tensor y, Tensor? bn_weight, Tensor? bn_bias, float bn_eps, Tensor? residual, bool need_residual, str activation, "
    "int groups, int power, bool mean, bool positions, str loss, float theta, Tensor? target, float tau, float margin, float label_smoothing, "
    "str reduction, Tensor? grad_scale, str normalize, float eps, str impl) "
    "-> (Tensor loss, Tensor goodness, Tensor grad_y, Tensor normalized, Tensor grad_residual, Tensor grad_bn_weight, Tensor grad_bn_bias, "
    "Tensor mean, Tensor var)"
)


@torch.no_grad()
def _group_tail_step(
    y, bn_weight, bn_bias, bn_eps, residual, need_residual, activation, groups, power, mean, positions, loss, theta, target, tau, margin,
    label_smoothing, reduction, grad_scale, normalize, eps, impl,
):  # fmt: skip
    how = Goodness(groups, power, mean, positions)
    wanted = group_op.loss_of(y, groups, loss, theta, target, tau, margin, label_smoothing, reduction, grad_scale)
    head = (how, wanted, normalize, eps)

    row = choose("group_tail", ROWS, impl, y)

    def step(x):
        run = choose("group_goodness", group_op.ROWS, row.name, x).run
        g, losses, grad_x, normalized = run.goodness_step(x, *head, True)
        return losses, g, grad_x, normalized

    tail = Tail(bn_weight, bn_bias, bn_eps, residual, need_residual and residual is not None, activation)
    (losses, g, _, normalized), grads = row.run.tail_step(y, tail, head, step)
    return (
        reference.reduced(losses, reduction),
        g.contiguous(),
        group_op.laid_as(y, grads.y),
        y.new_empty(0) if normalize == "none" else group_op.laid_as(y, normalized),
        *own_results(grads, y, bn_weight, bn_bias),
    )


def _group_tail_step_fake(
    y, bn_weight, bn_bias, bn_eps, residual, need_residual, activation, groups, power, mean, positions, loss, theta, target, tau, margin,
    label_smoothing, reduction, grad_scale, normalize, eps, impl,
):  # fmt: skip
    *results, grad_y, normalized = group_op._step_fake(
        y, groups, power, mean, positions, loss, theta, target, tau, margin, label_smoothing, reduction, grad_scale, normalize, eps, True, impl
    )  # fmt: skip
    return *results, grad_y, normalized, *own_fake(y, bn_weight, bn_bias, residual, need_residual)


implement(_lib, "group_tail_step", _group_tail_step, _group_tail_step_fake)

# its results are gradients already: nothing of it is recorded for autograd
_lib.impl("group_tail_step", torch.library.fallthrough_kernel, "Autograd")
