"""Compares the outputs and gradients of two modules that have the same parameters, on the same minibatch."""

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


class Row(NamedTuple):
    """One output or gradient: largest difference of an element, largest element of `before`, and largest difference that is allowed."""

    name: str
    difference: float
    largest: float
    allowed: float


class Verification:
    """Result of `verify`. Printing it shows a table; in a condition it is `ok`. `rows` has a Row for each output, gradient and buffer."""

    def __init__(self, rows):
        self.rows = rows

    @property
    def ok(self):
        """Whether every difference is allowed."""
        return all(row.difference <= row.allowed for row in self.rows)

    def __bool__(self):
        return self.ok

    def __str__(self):
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'':{width}}  {'difference':>10}  {'largest':>10}"]
        for row in self.rows:
            mark = "" if row.difference <= row.allowed else "  differs"
            lines.append(f"{row.name:{width}}  {row.difference:10.1e}  {row.largest:10.1e}{mark}")
        return "\n".join([*lines, "the same but for rounding" if self.ok else "not the same"])


def verify(before, after, batch, *, loss=None, tolerance=1e-4):
    """Compare two modules: what they return (losses, goodness, outputs) and the gradients of their parameters and floating-point inputs.

    Args:
        before, after: nn.Modules whose parameters correspond in order and in number of elements; names and shapes may differ. Both are
            copied, and the copy of `after` gets the parameters and buffers of `before`. Neither module is changed.
        batch: the argument of their forward, or a tuple of its arguments.
        loss: function of what the modules return; its result is differentiated. None differentiates the sum of all floating-point outputs
            with fixed random weights.
        tolerance: allowed difference, relative to the largest element.

    Returns: a Verification, which can be printed or used as a condition.

    Raises:
        TypeError: `before` or `after` is not an nn.Module.
        ValueError: their parameters, buffers or outputs do not correspond."""
    for module in (before, after):
        if not isinstance(module, nn.Module):
            raise TypeError(f"before, after: expected nn.Modules, got {type(module).__name__}")
    batch = batch if isinstance(batch, tuple) else (batch,)
    (names, first), (_, second) = (_run(m, batch, loss) for m in (copy.deepcopy(before), _with_state(after, before)))
    if len(first) != len(second):
        raise ValueError(f"after: expected {len(first)} outputs and gradients as before has, got {len(second)}")
    rows = []
    for name, a, b in zip(names, first, second, strict=True):
        if (a is None) != (b is None) or (a is not None and a.numel() != b.numel()):
            shapes = [None if t is None else list(t.shape) for t in (a, b)]
            raise ValueError(f"{name}: expected the same size from both, got {shapes[0]} before and {shapes[1]} after")
        if a is None:
            continue
        a, b = a.double().flatten(), b.double().flatten()
        largest = a.abs().max().item() if a.numel() else 0.0
        difference = (a - b).abs().nan_to_num(float("inf")).max().item() if a.numel() else 0.0
        if torch.equal(a.isnan(), b.isnan()) and a.isnan().any():
            difference = (a - b).nan_to_num(0.0).abs().max().item()
        rows.append(Row(name, difference, largest, tolerance * max(largest, 1e-6)))
    return Verification(rows)


def _with_state(after, before):
    """Return a copy of `after` with the parameters and buffers of `before`, assigned in order."""
    result = copy.deepcopy(after)
    for what in ("parameters", "buffers"):
        targets, sources = (list(getattr(module, what)()) for module in (result, before))
        if [t.numel() for t in targets] != [t.numel() for t in sources]:
            expected = f"the {what} of before in their order, {[list(t.shape) for t in sources]}"
            raise ValueError(f"after: expected {expected}, got {[list(t.shape) for t in targets]}")
        with torch.no_grad():
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source.reshape(target.shape))
    return result


def _run(module, batch, loss):
    """Return (names, tensors) of the outputs, gradients and buffers after one forward and backward pass."""
    batch = tuple(
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in batch
    )
    for parameter in module.parameters():
        parameter.grad = None
    with torch.random.fork_rng():  # both modules get the same dropout, and the caller's random state is kept
        torch.manual_seed(0)
        returned = module(*batch)
    outputs = [t for t in tree_leaves(returned) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if loss is not None:
        total = loss(returned)
    else:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.numel(), generator=generator).to(t).view(t.shape) for t in outputs]
        total = sum(((w * t).sum() for w, t in zip(weights, outputs, strict=True)), torch.zeros(()))
    if isinstance(total, torch.Tensor) and total.requires_grad:
        total.backward()
    inputs = [x for x in batch if isinstance(x, torch.Tensor)]
    found = [(f"output {i}", t) for i, t in enumerate(outputs)]
    found += [(f"gradient of {name}", p.grad) for name, p in module.named_parameters()]
    found += [(f"gradient of input {i}", x.grad) for i, x in enumerate(inputs)]
    found += [(f"buffer {name}", b) for name, b in module.named_buffers()]
    return [name for name, _ in found], [None if t is None else t.detach() for _, t in found]
