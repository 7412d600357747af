"""optim.step against optimizer.step() and zero_grad(): the same bits, and everything out of the ordinary through the optimizer itself."""

import copy

import pytest
import torch

from fastff.training import optim
from fastff.training.optim import fused_calls, step

MAKERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), fused=True),
    "recorded": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-2), fused=True, capturable=True),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True, amsgrad=True),
    "maximize": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True, maximize=True),
    "plain adam": lambda groups: torch.optim.Adam(groups, lr=1e-2),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
}


def pair(name):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(n)) for n in ((4, 3), (5,), (2, 2, 2), (3,))]
    theirs = copy.deepcopy(ours)
    return ours, theirs, optim.build(MAKERS[name], ours), optim.build(MAKERS[name], theirs)


def give(ours, theirs, missing=()):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if i not in missing:
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()


def same(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(a.grad is None for a in ours)


@pytest.mark.parametrize("name", MAKERS)
def test_same_bits(name):
    """Steps, a step without some gradients, changed learning rates, and a state loaded in between."""
    ours, theirs, optimizer, plain = pair(name)
    for i in range(12):
        give(ours, theirs, missing=(1,) if i in (0, 5) else ())
        if i == 7:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            plain.load_state_dict(copy.deepcopy(plain.state_dict()))
        if i > 8:
            optim.set_progress([optimizer, plain], lambda t: t, 1 / i)
        quick = name in ("adamw", "adam", "recorded") and i not in (0, 1, 5)
        assert (fused_calls(optimizer) is not None) == quick, "the quick way is taken where it is meant"
        step(optimizer)
        plain.step()
        plain.zero_grad()
        same(ours, theirs)
    for a, b in zip(optimizer.state_dict()["state"].values(), plain.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_hooks_and_patched_steps_run():
    ours, theirs, optimizer, plain = pair("adamw")
    seen = []
    for _ in range(2):
        give(ours, theirs)
        step(optimizer)
    handle = optimizer.register_step_pre_hook(lambda *_: seen.append("hook"))
    give(ours, theirs)
    step(optimizer)
    assert seen == ["hook"]
    handle.remove()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps optimizer.step
    give(ours, theirs)
    step(optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert all(p.grad is None for p in ours)


def test_a_learning_rate_that_is_a_tensor_follows_the_schedule():
    """And does not shrink with every step of it: the base is a number of its own."""
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = optim.build(lambda groups: torch.optim.Adam(groups, lr=torch.tensor(0.5), foreach=False), [parameter])
    for progress in (0.5, 0.5, 1.0, 0.0):
        optim.set_progress([optimizer], lambda t: t, progress)
        assert float(optimizer.param_groups[0]["lr"]) == 0.5 * progress
