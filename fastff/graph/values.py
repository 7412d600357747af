"""What the values in a model's graph are: found by running the graph on two batches of different sizes.

Each node gets in its meta

    shape    of a tensor for the first batch; None for other values
    rows     the dimension of a tensor that counts the images; None where it has none
    folded   whether it may not cross a cut: several rows belong to one image, as where windows or cells are made part of the minibatch; or it
             is an object that holds tensors
    times    of a whole number: how many times the number of images it is; 0 where it does not depend on it

Tuples and the like are taken apart: behind the node that makes one come nodes for its entries, and all others read these. So whatever crosses a
cut is a tensor or a number.
"""

import dataclasses
import operator

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fastff.graph import snapshot

BATCHES = (2, 3)


class Recorder(fx.Interpreter):
    """Runs a graph and notes at each node a description of its value."""

    def run_node(self, node):
        result = super().run_node(node)
        node.meta.setdefault("runs", []).append(_description(result))
        return result


def _entries(value):
    """{a key: an entry} of a tuple, a list, a dict or a dataclass; None for other values."""
    if isinstance(value, dict):
        return dict(value) if all(isinstance(key, str) for key in value) else None
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _description(value):
    """A tensor as its shape; containers as (how entries are read, the entries described, the class); other values as they are."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, device="meta")
    entries = _entries(value)
    if entries is None:
        return value
    kind = getattr if not isinstance(value, (dict, tuple, list)) else operator.getitem
    return kind, {key: _description(entry) for key, entry in entries.items()}, type(value)


def _is_container(run):
    return isinstance(run, tuple) and len(run) == 3 and run[0] in (getattr, operator.getitem)


def describe(graph):
    """Take containers apart, and fill in meta, from the descriptions of two runs."""
    for node in list(graph.nodes):
        if node._erased:
            continue
        runs = node.meta.pop("runs", (None, None))
        if node.op not in ("placeholder", "output", "get_attr") and all(map(_is_container, runs)):
            _take_apart(graph, node, runs)
        if "shape" not in node.meta:
            _fill_in(node, runs)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _fill_in(node, runs):
    first, second = runs
    tensors = [isinstance(run, torch.Tensor) for run in runs]
    node.meta |= {"shape": None, "rows": None, "folded": all(map(_is_container, runs)), "times": 0}
    if all(tensors):
        node.meta["shape"] = tuple(first.shape)
        changed = [d for d, (a, b) in enumerate(zip(first.shape, second.shape, strict=False)) if a != b]
        if changed or first.dim() != second.dim():
            sizes = [t.shape[changed[0]] for t in (first, second)] if len(changed) == 1 else []
            node.meta["rows"] = changed[0] if tuple(sizes) == BATCHES else None
            node.meta["folded"] = node.meta["rows"] is None
    elif not any(tensors) and type(first) is int and type(second) is int and first != second:
        times = first // BATCHES[0]
        node.meta["folded"] = (first, second) != tuple(times * size for size in BATCHES)
        node.meta["times"] = times
    elif not any(tensors) and first is not second and not snapshot.same(first, second):
        node.meta["folded"] = True


def _take_apart(graph, node, runs):
    """Let the readers of a container read nodes of its entries."""
    kind, entries, made = runs[0]
    others = runs[1][1]
    readers = list(node.users)
    if entries.keys() != others.keys() or any(user.op == "call_method" and user.args[0] is node for user in readers):
        return
    parts, where = {}, node
    made_of = dict(enumerate(node.args)) | node.kwargs if isinstance(node.target, type) else {}
    for key, entry in entries.items():
        if isinstance(made_of.get(key), fx.Node):  # the graph calls a class on values of its own
            parts[key] = made_of[key]
            continue
        with graph.inserting_after(where):
            where = parts[key] = graph.call_function(kind, (node, key))
        _fill_in(where, (entry, others[key]))
    rebuilt = {tuple: tuple, torch.Size: tuple, list: list, fx.immutable_collections.immutable_list: list}
    whole = node  # an object of a class of its own is handed on as it is
    if made is dict:
        whole = dict(parts)
    elif made in rebuilt:
        whole = rebuilt[made](parts.values())
    for user in readers:
        keyed = user.target in (operator.getitem, getattr) and user.args[0] is node and len(user.args) == 2
        key = user.args[1] if keyed else None
        if isinstance(key, int) and key < 0:
            key += len(parts)
        if keyed and isinstance(key, (int, str)) and key in parts:
            user.replace_all_uses_with(parts[key])
            graph.erase_node(user)
        elif whole is not node or user.op == "output":  # of the output one tensor is chosen, whatever holds it
            entire = tuple(parts.values()) if user.op == "output" else whole
            swap = lambda n, entire=entire: entire if n is node else n  # noqa: E731
            user.args, user.kwargs = fx.map_arg(user.args, swap), fx.map_arg(user.kwargs, swap)
    for key, part in parts.items():
        if all(map(_is_container, (entries[key], others[key]))) and part not in made_of.values():
            _take_apart(graph, part, (entries[key], others[key]))


def choose_output(graph, num_classes):
    """Make one tensor the model's output: of several, the first of shape [B, num_classes], or else the first [B, n], or the first. Returns its
    node, or None where there is no tensor."""
    output = graph.output_node()
    nodes = [n for n in tree_leaves(output.args[0]) if isinstance(n, fx.Node) and n.meta.get("shape") is not None]
    if not nodes:
        return None
    output.args = (min(nodes, key=lambda n: (n.meta["shape"][1:] != (num_classes,), len(n.meta["shape"]) != 2)),)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return output.args[0]


def tensors(value):
    """The tensors in a model's output."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for entry in (_entries(value) or {}).values() for t in tensors(entry)]
