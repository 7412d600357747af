"""The kernels with the arguments that the ops pass on for now."""

from fastff import spec
from fastff.kernels.composed import tail as composed_tail
from fastff.kernels.triton import goodness as projection
from fastff.kernels.triton import group_goodness as groups
from fastff.kernels.triton import layer_norm as layer_norm_kernels


def _loss(loss, B):
    """(spec.Loss, factor that its scale does not have)."""
    scale = {"reduction": "mean" if loss.scale != 1 else "sum"}
    if hasattr(loss, "name"):
        return spec.Loss(
            loss.name, loss.target, loss.tau, None, loss.margin, loss.label_smoothing, loss.theta, loss.theta, grad_scale=loss.grad_scale, **scale
        )
    return spec.Loss(
        "cross_entropy", loss.target, loss.tau, loss.learned_tau, loss.margin, loss.label_smoothing, grad_scale=loss.grad_scale, **scale
    )


class Projection:
    SECOND_MOMENT_CHANNELS = projection.SECOND_MOMENT_CHANNELS

    @staticmethod
    def goodness(x, weight, bias, grid_weight, padding, plan, dtype):
        return projection.goodness(x, spec.Projection(weight, bias, grid_weight, padding), plan)

    @staticmethod
    def goodness_backward(d, x, weight, bias, grid_weight, padding, plan, dtype, need_x):
        return projection.goodness_backward(d, x, spec.Projection(weight, bias, grid_weight, padding), plan, need_x)

    @staticmethod
    def goodness_step(x, weight, bias, grid_weight, padding, plan, dtype, loss, need_x, normalize, eps):
        step = spec.Step(
            x, None, spec.Projection(weight, bias, grid_weight, padding), _loss(loss, len(x)), spec.Normalization(normalize, eps=eps), need_x
        )
        r = projection.step(step, plan)
        normalized = x.new_empty(0) if r.normalized is None else r.normalized
        return r.loss, r.goodness, r.grad_x, r.grad_weight, r.grad_bias, r.grad_grid_weight, r.grad_tau, normalized

    @staticmethod
    def tail_step(y, tail, head, step):
        weight, bias, grid_weight, padding, plan, _, loss, normalize, eps = head
        r = projection.step(
            spec.Step(
                y, spec.Epilogue(*tail), spec.Projection(weight, bias, grid_weight, padding), _loss(loss, len(y)),
                spec.Normalization(normalize, eps=eps),
            ), plan,
        )  # fmt: skip
        normalized = y.new_empty(0) if r.normalized is None else r.normalized
        results = r.loss, r.goodness, r.grad_x, r.grad_weight, r.grad_bias, r.grad_grid_weight, r.grad_tau, normalized
        return results, composed_tail.Gradients(
            r.grad_x, r.grad_residual, r.grad_bn_weight, r.grad_bn_bias, r.mean, r.var
        )


class Groups:
    @staticmethod
    def goodness(x, how):
        return groups.goodness(x, spec.Groups(*how))

    @staticmethod
    def goodness_backward(d, x, how):
        return groups.goodness_backward(d, x, spec.Groups(*how))

    @staticmethod
    def goodness_step(x, how, loss, normalize, eps, need_x):
        step = spec.Step(
            x, None, spec.Groups(*how), _loss(loss, len(x)), spec.Normalization(normalize, how.groups, eps), need_x
        )
        r = groups.step(step)
        return r.goodness, r.loss, r.grad_x, r.normalized

    @staticmethod
    def normalize(x, how, count, eps):
        return groups.normalize(x, spec.Normalization(how, count, eps))


def layer_norm(x, eps):
    return layer_norm_kernels.layer_norm(x, eps)
