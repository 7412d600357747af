"""Compares what two modules that have the same parameters return, their gradients, and what they leave behind, on the same minibatch."""

import copy
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fastff import reference, spec

INFINITY = float("inf")


class Row(NamedTuple):
    """One tensor: largest difference of an element, largest element of `before`, largest difference that is allowed, and a remark."""

    name: str
    difference: float
    largest: float
    allowed: float
    note: str = ""


class Verification:
    """Result of `verify`. Printing it shows a table; in a condition it is `ok`. `rows` has a Row for each tensor that was compared."""

    def __init__(self, rows):
        self.rows = rows

    @property
    def ok(self):
        """Whether every difference is allowed."""
        return all(row.difference <= row.allowed for row in self.rows)

    def __bool__(self):
        return self.ok

    def __str__(self):
        if not self.rows:
            return "nothing to compare: no outputs, parameters or buffers"
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'':{width}}  {'difference':>10}  {'largest':>10}"]
        for row in self.rows:
            mark = "" if row.difference <= row.allowed else "  differs"
            note = f", {row.note}" if row.note else ""
            lines.append(f"{row.name:{width}}  {row.difference:10.1e}  {row.largest:10.1e}{mark}{note}")
        return "\n".join([*lines, "the same but for rounding" if self.ok else "not the same"])


def verify(before, after, batch, *, loss=None, tolerance=1e-4, outputs=None, call=None):
    """Compare two modules: what they return, the gradients of parameters and floating-point inputs, and buffers and parameters after the call.

    A module that trains itself in the call is compared by the parameters that it has afterwards. What only one of the two has, such as a
    gradient that is None in the other, is a difference.

    Args:
        before, after: nn.Modules whose parameters correspond in order and in number of elements; names and shapes may differ. Both are
            copied, and the copy of `after` gets the parameters and buffers of `before`. Neither module is changed.
        batch: the argument of their forward, or a tuple of its arguments.
        loss: function of what the modules return (of `outputs`, where it is given); its result is differentiated. None differentiates the
            sum of all floating-point outputs with fixed random weights.
        tolerance: allowed difference, relative to the largest element.
        outputs: function of what a module returns that picks what is compared, such as lambda result: result[0]; or a pair of
            functions, for before and for after, each of which may be None for all of it.
        call: function of a module and the batch's elements that is called instead of the module, such as lambda layer, x, label:
            layer.train_(x, label), for the training method of a module; or a pair, for before and for after.

    Returns: a Verification, which can be printed or used as a condition.

    Raises:
        TypeError: `before` or `after` is not an nn.Module; `outputs` or `call` is no function.
        ValueError: their parameters or buffers do not correspond."""
    for module in (before, after):
        if not isinstance(module, nn.Module):
            raise TypeError(f"before, after: expected nn.Modules, got {type(module).__name__}")
    batch = batch if isinstance(batch, tuple) else (batch,)
    picks, calls = _for_each("outputs", outputs), _for_each("call", call)
    modules = copy.deepcopy(before), _with_state(after, before)
    first, second = (_run(m, batch, loss, *how) for m, how in zip(modules, zip(picks, calls, strict=True), strict=True))
    rows = []
    for kind, found in first.items():
        missing = ("", None)
        for (name, a), (other, b) in zip_longest(found, second[kind], fillvalue=missing):
            row = _compare(f"{kind} {name or other}", a, b, tolerance)
            if row is not None:
                rows.append(row)
    return Verification(rows)


def _for_each(called, value):
    """Return a pair of functions, each of which may be None, from one or from a pair."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(each is None or callable(each) for each in pair):
        raise TypeError(f"{called}: expected a function or a pair of functions, got {value!r}")
    return pair


def _compare(name, a, b, tolerance):
    """Return the Row of two tensors, of which one or both may be None; None for both."""
    if a is None and b is None:
        return None
    if a is None or b is None:
        there = b if a is None else a
        largest = there.abs().max().item() if there.numel() else 0.0
        return Row(name, INFINITY, largest, 0.0, "none before" if a is None else "none after")
    if a.numel() != b.numel():
        return Row(name, INFINITY, 0.0, 0.0, f"{list(a.shape)} before, {list(b.shape)} after")
    original, (a, b) = (a, b), (a.double().flatten(), b.double().flatten())
    largest = a.abs().nan_to_num(0.0, INFINITY).max().item() if a.numel() else 0.0
    difference = (a - b).abs().nan_to_num(INFINITY).max().item() if a.numel() else 0.0
    if torch.equal(a.isnan(), b.isnan()) and a.isnan().any():
        difference = (a - b).nan_to_num(0.0).abs().max().item()
    allowed = tolerance * max(largest, 1e-6)
    note = _same_if_normalized(*original, tolerance) if difference > allowed and name.startswith("output") else ""
    return Row(name, difference, largest, allowed, note)


def _same_if_normalized(a, b, tolerance):
    """Return a remark if one of two outputs is the other one normalized, as blocks pass it on."""
    if a.dim() not in (2, 4) or a.shape != b.shape or not a.is_floating_point():
        return ""
    a, b = (t.double().view(*t.shape, *[1] * (4 - t.dim())) for t in (a.contiguous(), b.contiguous()))
    for how in spec.NORMALIZATIONS:
        if how in ("none", "group_norm"):
            continue
        for one, other, plain in ((a, b, "after"), (b, a, "before")):
            if (one - reference.normalized(other, how)).abs().max() <= 10 * tolerance * one.abs().max():
                return f"the same if that of {plain} is normalized by {how}"
    return ""


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


def _run(module, batch, loss, pick, call):
    """Return {kind: [(name, tensor)]} of outputs, gradients, buffers and parameters after one forward and backward pass."""
    batch = tuple(
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in batch
    )
    for parameter in module.parameters():
        parameter.grad = None
    with torch.random.fork_rng():  # both modules get the same dropout, and the caller's random state is kept
        torch.manual_seed(0)
        returned = module(*batch) if call is None else call(module, *batch)
    returned = returned if pick is None else pick(returned)
    outputs = [t for t in tree_leaves(returned) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if loss is not None:
        total = loss(returned)
    else:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.numel(), generator=generator).to(t).view(t.shape) for t in outputs]
        connected = [(w * t).sum() for w, t in zip(weights, outputs, strict=True) if t.requires_grad]
        total = sum(connected, torch.zeros(()))
    if isinstance(total, torch.Tensor) and total.requires_grad:
        total.backward()
    inputs = [x for x in batch if isinstance(x, torch.Tensor)]
    found = {
        "output": [(str(i), t) for i, t in enumerate(outputs)],
        "gradient of": [(name, p.grad) for name, p in module.named_parameters()],
        "gradient of input": [(str(i), x.grad) for i, x in enumerate(inputs)],
        "buffer": list(module.named_buffers()),
        "parameter": list(module.named_parameters()),
    }
    return {kind: [(name, None if t is None else t.detach()) for name, t in pairs] for kind, pairs in found.items()}
