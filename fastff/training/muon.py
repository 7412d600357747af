"""Muon: momentum whose updates of convolution weights are orthogonalised. The other parameters are updated by AdamW.

A convolution's weight [D, C, k, k] is a matrix [D, C k k]. Its update is the momentum with all singular values pushed towards one, so that
directions with small gradients are learned as fast as those with large ones. Matrices of many rows are taken in parts of up to ROWS rows, each for
itself: the work grows with the square of the rows, and for the last convolutions of a ResNet18 of width 64 it would be as much as theirs. Sources:
Jordan et al. 2024 (kellerjordan.github.io/posts/muon), and Liu et al. 2025 (arXiv 2502.16982) for the scale, by which an update is about as large
as AdamW's.
"""

import torch
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
ROWS = 64


def orthogonalized(matrix):
    """Push the singular values of a matrix [M, N] towards one (they end up between about 0.7 and 1.2). Returns [M, N].

    The iteration X <- a X + (b A + c A^2) X with A = X X^T only ever multiplies X by polynomials in A from the left. So it is run on A, which is
    small, and X is multiplied once, which for a 3 x 3 convolution takes less than half the time."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.mT).mT
    x = matrix / (matrix.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    gram, product = x @ x.mT, None
    for step in range(STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if step + 1 < STEPS:
            gram = factor @ gram @ factor
    return product @ x


def splits(parameters, heads):
    """Return parameter groups: convolution weights, other weights, and norms, biases and temperatures without weight decay.

    heads: ids of parameters of goodness heads, which are no convolutions of the network. Depthwise filters [C, 1, k, k] are none either."""
    groups = {"convolutions": [], "weights": [], "rest": []}
    for p in dict.fromkeys(p for p in parameters if p.requires_grad):
        convolution = p.dim() >= 4 and id(p) not in heads and min(p.shape[:2]) > 1
        groups["convolutions" if convolution else "weights" if p.dim() >= 2 else "rest"].append(p)
    made = [
        {"params": groups["convolutions"], "orthogonal": True},
        {"params": groups["weights"]},
        {"params": groups["rest"], "weight_decay": 0.0},
    ]
    return [group for group in made if group["params"]]


def _matrices(p, *others):
    """A parameter [D, ...] and tensors of its shape as [D, N], in the order in which the parameter lies in memory: of it itself a view."""
    order = sorted(range(1, p.dim()), key=p.stride, reverse=True)
    return [p.permute(0, *order).view(len(p), -1), *(t.permute(0, *order).flatten(1) for t in others)]


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for groups with orthogonal=True, AdamW for the others.

    Args:
        params: parameter groups.
        lr: the learning rate of both.
        momentum: of the orthogonalised updates, with Nesterov's look ahead.
        weight_decay: decoupled, of both.
        betas, eps: AdamW's.
    """

    def __init__(self, params, lr=4e-3, momentum=0.95, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"orthogonal": False, "capturable": False})

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters that have gradients. closure: None."""
        if closure is not None:
            raise ValueError("closure: expected None, since a step computes no loss of its own")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._orthogonal if group["orthogonal"] else self._adamw)(group, params)

    def _orthogonal(self, group, params):
        lr, momentum = group["lr"], group["momentum"]
        for p in params:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - momentum)
            count = -(-len(p) // ROWS)
            parts = zip(*(t.tensor_split(count) for t in _matrices(p, p.grad, state["momentum"])), strict=True)
            for weight, grad, average in parts:
                update = orthogonalized(grad.lerp(average, momentum))
                scale = 0.2 * max(update.shape) ** 0.5
                weight.mul_(1 - lr * group["weight_decay"]).add_(update.mul_(-scale * lr))

    def _adamw(self, group, params):
        for p in params:
            if not self.state[p]:
                self.state[p] |= {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        lists = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        beta1, beta2 = group["betas"]
        adamw(
            params, [p.grad for p in params], *lists, [], [state["step"] for state in states], fused=True, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False, capturable=group["capturable"],
        )  # fmt: skip
