"""The end of a block, behind its last convolution or linear layer, as local training computes it.

BatchNormEpilogue    batch norm [+ residual] [+ activation], in one op with the goodness step
ReLUEpilogue         a ReLU behind a layer that does not need its own output: applied in place
"""

from torch import nn

from fastff.graph import fused
from fastff.ops.gradients import add_gradient

ACTIVATIONS = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu", nn.GELU: "gelu", nn.Identity: "none",
}  # fmt: skip


def activation_name(module):
    """The name in spec.ACTIVATIONS of an activation module ("none" for None), or None for other modules."""
    if module is None:
        return "none"
    if type(module) is nn.GELU and module.approximate != "none":
        return None
    return ACTIVATIONS.get(type(module))


class BatchNormEpilogue:
    """The modules at the end of a block that the step op computes.

    Args:
        batch_norm: the nn.BatchNorm2d behind the block's last convolution.
        activation: the activation's name; `apply`: the callable that computes it.
        has_residual: whether something is added between the two.
    """

    def __init__(self, batch_norm, activation, apply, has_residual):
        self.batch_norm, self.activation, self.apply, self.has_residual = batch_norm, activation, apply, has_residual

    def __str__(self):
        activation = [self.activation] if self.activation != "none" else []
        return " + ".join(["batch norm"] + ["residual"] * self.has_residual + activation)

    def ready(self):
        """Whether the step op computes what these modules do in their present mode."""
        return fused.uses_batch_statistics(self.batch_norm)

    def fits(self, y, residual):
        """Whether the step op takes these tensors: images, no broadcasting, one dtype, more than one value a channel."""
        shapes = y.shape, None if residual is None else residual.shape
        return self.takes(*shapes) and (residual is None or residual.dtype == y.dtype)

    def takes(self, y, residual):
        """Whether the step op takes tensors of one dtype and these shapes; None for no residual."""
        return residual in (None, y) and len(y) == 4 and y.numel() > y[1]

    def finish(self, y, residual):
        """The block's output, by its own modules."""
        h = nn.BatchNorm2d.forward(self.batch_norm, y)  # of a subclass, what follows it is in the graph
        return self.apply(h if residual is None else h + residual)

    def description(self, residual, need_grad_residual):
        """The spec.Epilogue with this residual (or None)."""
        return fused.description(self.batch_norm, self.activation, residual, need_grad_residual)

    def update(self, y, step):
        """Update the running statistics from a step's result."""
        fused.update_statistics(self.batch_norm, step.mean, step.var, y.numel() / y.shape[1])

    def add_gradients(self, grad_weight, grad_bias):
        """Add the gradients of batch norm's parameters to their .grad."""
        add_gradient(self.batch_norm.weight, grad_weight)
        add_gradient(self.batch_norm.bias, grad_bias)


class ReLUEpilogue:
    """A ReLU at the end of a block. It overwrites the layer's output, which no gradient needs, and then the gradient."""

    def __str__(self):
        return "relu in place"
