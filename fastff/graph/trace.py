"""Tracing a model for the cut: its graph with torch.fx, modules of its own opened only as far as blocks are made of them.

A model that cannot be traced may still be a chain of named modules (`chain`), checked by running it once.
"""

import operator
import re
import traceback
import warnings

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastff.arguments import first_line
from fastff.graph import plain, snapshot, values

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
WEIGHT_FUNCTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.linear, F.conv_transpose2d, torch.conv2d, torch.matmul, torch.einsum, operator.matmul,
}  # fmt: skip


class CutError(ValueError):
    """The model cannot be cut as asked; the text says where it stopped and what to do instead."""


def example_input(model, input_shape, size):
    like = next(iter(model.parameters()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(size, *input_shape, generator=generator).to(like.device, like.dtype)
    filters = (p for p in model.parameters() if p.dim() == 4)
    if len(input_shape) == 3 and any(p.is_contiguous(memory_format=torch.channels_last) for p in filters):
        example = example.contiguous(memory_format=torch.channels_last)
    return example


def is_weight(module):
    """Whether a module has a weight matrix or filter of its own."""
    if isinstance(module, NORMS):
        return False
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return True
    return any(p.dim() >= 2 and sum(n > 1 for n in p.shape) >= 2 for p in module.parameters(recurse=False))


def count_weights(module):
    return sum(is_weight(m) for m in module.modules())


def _is_row_of_blocks(module):
    """Whether a module is a list of two or more members with two or more weight layers each, or one of the model's own with two or more
    children of one such class whose names differ in numbers alone."""
    large = [child for child in module.children() if count_weights(child) >= 2]
    if isinstance(module, CONTAINERS):
        return len(large) >= 2
    own = [
        (type(child), re.sub(r"\d+", "", name))
        for name, child in module.named_children()
        if child in large and not isinstance(child, CONTAINERS) and not is_torchs(child)
    ]
    return not is_torchs(module) and len(set(own)) < len(own)


def is_torchs(module):
    """Whether a module's class is PyTorch's."""
    return type(module).__module__.startswith("torch.nn.")


def _normalises_first(module):
    first = next((m for m in module.modules() if next(m.parameters(recurse=False), None) is not None), None)
    return isinstance(first, NORMS) or "norm" in type(first).__name__.lower()


def _opener(model, granularity, paths):
    """(whether the cut opens a module, whether it must): functions of the module, or of its name. A module that cannot be opened is one block."""

    def opens(module, name):
        if paths is not None:
            return any(path.startswith(name + ".") for path in paths)
        if type(module) in CONTAINERS:
            return True
        if is_torchs(module):
            return False
        if any(map(_is_row_of_blocks, module.modules())):
            return True
        return granularity == "layer" and count_weights(module) >= 2 and not _normalises_first(module)

    return opens, lambda name: paths is not None


def trace(model, granularity, paths, examples):
    """(plain.Trace of the model in its present mode, whether it is a mere chain of the named modules, the same in every mode)."""
    try:
        traced = plain.trace(model, *_opener(model, granularity, paths), in_order=False, examples=examples)
    except plain.NotPlain as fault:
        where = _where(model, fault)
        if paths is not None:
            return _chain(model, paths, examples[0], where), True
        raise CutError(
            f"the model cannot be traced: {where}. Name the modules that end blocks instead, "
            f"granularity=[path, ...] (paths as in model.named_modules()): then only what lies between them is traced"
        ) from fault
    graph = traced.graph
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if sum(not node.args for node in inputs) != 1:
        raise CutError(
            f"the model must take one tensor, got the inputs {', '.join(str(node.target) for node in inputs)}"
        )
    for node in inputs:
        if node.args:  # an argument with a default value
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return traced, False


def _where(model, fault):
    """What is wrong, with the last line of a module of the model that was being traced."""
    at = f"{fault.name} ({type(model.get_submodule(fault.name)).__name__})" if fault.name else "the model itself"
    error, says = fault.__cause__ or fault, f"{at} {fault.reason}"
    names = {id(module): name or "the model itself" for name, module in model.named_modules()}
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        path = frame.f_code.co_filename
        if isinstance(owner, nn.Module) and id(owner) in names and path != nn.modules.module.__file__:
            stack = traceback.extract_stack(frame, 1)
            text = traceback.FrameSummary(path, line, frame.f_code.co_name).line or (stack[0].line if stack else "")
            found = f"{names[id(owner)]} ({type(owner).__name__}), {path}:{line}: {text}"
    return f"tracing stopped in {found}: {says}" if found else f"tracing stopped: {says}"


def _chain(model, paths, example, where):
    """The graph of a model that cannot be traced but is a chain of the named modules: checked by running it once."""
    calls, handles = [], []
    for path in paths:
        hook = lambda module, args, output, path=path: calls.append((path, args, output))  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        with snapshot.preserved(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    graph, value = fx.Graph(), example
    node = graph.placeholder("x")
    if [path for path, _, _ in calls] != paths:
        raise CutError(
            f"granularity: the model calls these modules as {[path for path, _, _ in calls]}, not as {paths} ({where})"
        )
    for path, args, output in calls:
        if len(args) != 1 or args[0] is not value:
            raise CutError(
                f"granularity: something happens to the data before {path!r}, and it cannot be traced: {where}"
            )
        node, value = graph.call_module(path, (node,)), output
    graph.output(node)
    return plain.Trace(graph, {}, {})


def code(graph):
    return graph.python_code("self").src


def record_values(model, graph, examples, is_chain):
    """Note what the values in a graph are, for two examples (fastff/graph/values.py). Returns the tensors that the model makes of the
    second. Raises CutError unless a graph of the whole model computes what the model does."""
    run = values.Recorder(fx.GraphModule(model, graph)).run
    found = []
    for function, example in ((run, examples[0]), (run, examples[1]), (model, examples[1]))[: 2 if is_chain else 3]:
        with snapshot.preserved(model):
            try:
                result = function(example)
            except Exception as error:
                shape, says = list(example.shape), first_line(error)
                raise CutError(f"input_shape: the model does not run on images of shape {shape}: {says}") from error
            outputs = values.tensors(result)
            found.append([t.clone() for t in (*outputs, *model.buffers())])
    if len(found[1]) != len(found[-1]) or not all(map(close, found[1], found[-1])):
        raise CutError(
            "the model computes something else when it is traced. Name the modules that end blocks instead, granularity=[path, ...]"
        )
    return found[-1]


def close(a, b):
    return a.shape == b.shape and torch.allclose(
        a, b, 1e-3, 1e-4 * float(a.abs().max()) if a.numel() else 0, equal_nan=True
    )


def warn_of_hooks(model, graph):
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    inside = {name for name, _ in model.named_modules() if any(name == c or name.startswith(c + ".") for c in called)}
    silent = [
        name or "the model itself"
        for name, m in model.named_modules()
        if name not in inside and (m._forward_hooks or m._forward_pre_hooks)
    ]
    if silent:
        warnings.warn(f"cuts pass through {', '.join(silent)}, so the forward hooks there will not run", stacklevel=4)
