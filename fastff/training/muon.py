"""Muon: momentum whose updates of convolution weights are orthogonalised. The other parameters are updated by AdamW.

An update is the momentum with all singular values pushed towards one, so that directions with small gradients are learned as fast as those with large
ones; for which matrices, and by which iteration: fastff/kernels/torch/muon.py. Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), and
Liu et al. 2025 (arXiv 2502.16982) for the scale, by which an update is about as large as AdamW's.
"""

import torch

from fastff.ops import muon as ops


def parameter_groups(parameters, heads=None):
    """Return parameter groups: weights (two or more dimensions), and norms, biases and temperatures without weight decay.

    heads: for Muon, ids of parameters of goodness heads. The first group is then that of the network's convolution weights, to which neither the
    heads' belong nor depthwise filters [C, 1, k, k]."""
    groups = {"convolutions": [], "weights": [], "rest": []}
    for p in dict.fromkeys(p for p in parameters if p.requires_grad):
        convolution = heads is not None and p.dim() >= 4 and id(p) not in heads and min(p.shape[:2]) > 1
        groups["convolutions" if convolution else "weights" if p.dim() >= 2 else "rest"].append(p)
    made = [
        {"params": groups["convolutions"], "orthogonal": True},
        {"params": groups["weights"]},
        {"params": groups["rest"], "weight_decay": 0.0},
    ]
    return [group for group in made if group["params"]]


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
    """Take a step of each of these Muon optimisers, with parameters of like settings together, whichever optimiser they belong to."""
    alike = {}  # {settings of a group, device and dtype: ([parameter], [its state])}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            settings = tuple(group[name] for name in ("orthogonal", "lr", "momentum", "weight_decay", "betas", "eps"))
            for p in group["params"]:
                if p.grad is not None:
                    params, states = alike.setdefault((*settings, p.device, p.dtype), ([], []))
                    params.append(p)
                    states.append(optimizer.state[p])
    for (orthogonal, lr, momentum, weight_decay, betas, eps, *_), (params, states) in alike.items():
        grads = [p.grad for p in params]
        if orthogonal:
            ops.update(params, grads, _kept("momentum", params, states), lr, momentum, weight_decay)
        else:
            averages, squares, steps = (_kept(name, params, states) for name in ("exp_avg", "exp_avg_sq", "step"))
            torch._foreach_add_(steps, 1)
            fused_adam(torch._fused_adamw_, params, grads, averages, squares, steps, lr, betas, weight_decay, eps)


@torch.no_grad()
def fused_adam(kernel, params, grads, averages, squares, steps, lr, betas, weight_decay, eps):
    """Update parameters of one dtype on one device by torch's fused kernel of Adam or AdamW. steps: counted with this one."""
    kernel(
        params, grads, averages, squares, [], steps, lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def _kept(name, params, states):
    """What is kept of each parameter under this name: zeros of its shape, or of one number for "step"."""
    for p, state in zip(params, states, strict=True):
        if name not in state:
            state[name] = torch.zeros((), device=p.device) if name == "step" else torch.zeros_like(p)
    return [state[name] for state in states]
