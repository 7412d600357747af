"""Muon: momentum whose updates of convolution weights are orthogonalised. The other parameters are updated by AdamW.

A convolution's weight [D, C, k, k] is a matrix [D, C k k]. Its update is the momentum with all singular values pushed towards one, so that
directions with small gradients are learned as fast as those with large ones. Matrices of many rows are taken in parts of up to ROWS rows, each for
itself: the work grows with the square of the rows, and for the last convolutions of a ResNet18 of width 64 it would be as much as theirs. (With parts
of 32 rows, in a run of benchmarks/plans.py, backpropagation learned two points less and local training half a point.) Sources:
Jordan et al. 2024 (kellerjordan.github.io/posts/muon), and Liu et al. 2025 (arXiv 2502.16982) for the scale, by which an update is about as large
as AdamW's.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
ROWS = 64


def orthogonalizers(grams):
    """Return matrices T [n, m, m] for Gram matrices A = X X^T [n, m, m] of matrices X: all singular values of T X are near one (0.7 to 1.2).

    The iteration X <- (a + b A + c A^2) X, from X / |X| on, only ever multiplies X by polynomials in A from the left. So it is run on A, which is
    small, and on all matrices with as many rows at once. X itself is multiplied once, which for a 3 x 3 convolution takes less than half the time."""
    a, b, c = COEFFICIENTS
    squares = grams.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-14
    gram, product = grams / squares, None
    for step in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # without a on its diagonal
        if product is None:
            product = factor.clone()
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = torch.baddbmm(product, factor, product, beta=a)
        if step + 1 < STEPS:
            gram = torch.baddbmm(gram, factor, gram, beta=a)
            gram = torch.baddbmm(gram, gram, factor, beta=a)
    return product.div_(squares.sqrt())


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
            alike = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.device, p.dtype), []).append(p)
            for params in alike.values():
                (self._orthogonal if group["orthogonal"] else self._adamw)(group, params)

    def _orthogonal(self, group, params):
        lr, momentum = group["lr"], group["momentum"]
        decay = 1 - lr * group["weight_decay"]
        if isinstance(decay, torch.Tensor):  # no factor that addmm_ takes
            torch._foreach_mul_(params, decay)
            decay = 1.0
        by_rows = {}  # {rows or columns, whichever are fewer: [(part of a weight, its momentum as a matrix of so many rows)]}
        for p, average in zip(params, self._state("momentum", params), strict=True):
            average.lerp_(p.grad, 1 - momentum)
            count = -(-len(p) // ROWS)
            parts = (t.tensor_split(count) for t in _matrices(p, p.grad.lerp(average, momentum)))
            for weight, update in zip(*parts, strict=True):
                if len(update) > update.shape[1]:
                    weight, update = weight.mT, update.mT
                by_rows.setdefault(len(update), []).append((weight, update))
        for parts in by_rows.values():
            products = orthogonalizers(torch.stack([update @ update.mT for _, update in parts])).mul_(-0.2 * lr)
            for (weight, update), product in zip(parts, products, strict=True):
                weight.addmm_(product, update, beta=decay, alpha=update.shape[1] ** 0.5)

    def _adamw(self, group, params):
        # torch's kernel itself, for the reason that optim.Stepper gives
        averages, squares = self._state("exp_avg", params), self._state("exp_avg_sq", params)
        steps = self._state("step", params)
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            params, [p.grad for p in params], averages, squares, [], steps, lr=group["lr"], beta1=beta1, beta2=beta2,
            weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip

    def _state(self, name, params):
        """What is kept of each parameter under this name: zeros of its shape, or of one number for "step"."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros((), device=p.device) if name == "step" else torch.zeros_like(p)
        return [self.state[p][name] for p in params]
