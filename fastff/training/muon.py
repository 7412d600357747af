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


def _matrices(p, other):
    """A parameter [D, ...] and a tensor of its shape as [D, N], in the order in which the parameter lies in memory: of it itself a view."""
    order = sorted(range(1, p.dim()), key=p.stride, reverse=True)
    return p.permute(0, *order).view(len(p), -1), other.permute(0, *order).flatten(1)


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

    def step(self, closure=None):
        """Update the parameters that have gradients. closure: None."""
        if closure is not None:
            raise ValueError("closure: expected None, since a step computes no loss of its own")
        step_together([self])


@torch.no_grad()
def step_together(optimizers):
    """Take a step of each of these Muon optimisers. Matrices with as many rows are orthogonalised at once, whichever optimiser they belong to."""
    alike = {}  # {settings of a group, device and dtype: ([parameter], [its state])}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            settings = tuple(group[name] for name in ("orthogonal", "lr", "momentum", "weight_decay", "betas", "eps"))
            for p in group["params"]:
                if p.grad is not None:
                    params, states = alike.setdefault((*settings, p.device, p.dtype), ([], []))
                    params.append(p)
                    states.append(optimizer.state[p])
    by_rows = {}  # {(rows or columns, whichever are fewer, device, dtype): [(matrix, its momentum, factors of the two, learning rate)]}
    for (orthogonal, lr, momentum, weight_decay, betas, eps, *kind), (params, states) in alike.items():
        if orthogonal:
            for weight, update, decay in _parts(params, states, lr, momentum, weight_decay):
                if len(update) > update.shape[1]:
                    weight, update = weight.mT, update.mT
                by_rows.setdefault((len(update), *kind), []).append((weight, update, decay, lr))
        else:
            _adamw(params, states, lr, weight_decay, betas, eps)
    for parts in by_rows.values():
        products = orthogonalizers(torch.stack([update @ update.mT for _, update, *_ in parts]))
        for (weight, update, decay, lr), product in zip(parts, products, strict=True):
            if isinstance(lr, torch.Tensor):  # no factor that addmm_ takes
                product, lr = product.mul_(lr), 1.0
            weight.addmm_(product, update, beta=decay, alpha=-0.2 * lr * update.shape[1] ** 0.5)


def _parts(params, states, lr, momentum, weight_decay):
    """(part of a weight of up to ROWS rows, its momentum with Nesterov's look ahead, what the weight is multiplied by) of convolutions' weights."""
    decay = 1 - lr * weight_decay
    if isinstance(decay, torch.Tensor):
        torch._foreach_mul_(params, decay)
        decay = 1.0
    averages, grads = _kept("momentum", params, states), [p.grad for p in params]
    torch._foreach_lerp_(averages, grads, 1 - momentum)
    for p, update in zip(params, torch._foreach_lerp(grads, averages, momentum), strict=True):
        count = -(-len(p) // ROWS)
        for part in zip(*(t.tensor_split(count) for t in _matrices(p, update)), strict=True):
            yield *part, decay


def _adamw(params, states, lr, weight_decay, betas, eps):
    # torch's kernel itself, for the reason that optim.Stepper gives
    averages, squares = _kept("exp_avg", params, states), _kept("exp_avg_sq", params, states)
    steps = _kept("step", params, states)
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        params, [p.grad for p in params], averages, squares, [], steps, lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def _kept(name, params, states):
    """What is kept of each parameter under this name: zeros of its shape, or of one number for "step"."""
    for p, state in zip(params, states, strict=True):
        if name not in state:
            state[name] = torch.zeros((), device=p.device) if name == "step" else torch.zeros_like(p)
    return [state[name] for state in states]
