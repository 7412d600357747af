"""Where the blocks of a model end: at which nodes of its graph, what each block computes, and what is alive behind it."""

import math
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastff.graph import values
from fastff.graph.plain import writes
from fastff.graph.trace import WEIGHT_FUNCTIONS, CutError, count_weights

POOLS = (nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)
POOL_FUNCTIONS = {F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.adaptive_avg_pool3d, torch.mean, torch.flatten}


def _ancestors(node, stop=frozenset()):
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node not in seen and node not in stop:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _is_tensor(node):
    return node.meta.get("shape") is not None


def _is_entry(node, of):
    """Whether a node reads an entry of a tuple or the like."""
    return node.target in (operator.getitem, getattr) and node.args[0] is of and of.meta["shape"] is None


def _is_measure(node):
    """Whether a node is a size of a tensor, or is computed from sizes."""
    if _is_tensor(node) or node.op == "call_module":
        return False
    measured = node.target is getattr or node.target in ("size", "dim", "numel")
    return measured or not any(map(_is_tensor, node.all_input_nodes))


def _is_pool(model, node):
    if node.op == "call_module":
        return isinstance(model.get_submodule(node.target), POOLS)
    return node.target in POOL_FUNCTIONS or (node.op == "call_method" and node.target in ("mean", "flatten"))


def _gated(model, graph):
    """Weight nodes between a global pooling and the multiplication with what was pooled: squeeze-excite."""
    inside = set()
    for pool in graph.nodes:
        if not _is_pool(model, pool) or not pool.all_input_nodes:
            continue
        pooled = pool.all_input_nodes[0]
        for user in pooled.users:
            if user.target in (operator.mul, operator.imul, torch.mul, "mul", "mul_"):
                gates = _ancestors(user, stop={pooled})
                if pool in gates:
                    inside |= gates - {user}
    return inside


class Crossing(NamedTuple):
    """What is alive at a cut: main (nodes, joined along their channels if there are several), others (nodes), sizes (nodes of whole numbers
    that are found again from the number of images), refused (why there can be no cut here, or None)."""

    main: list
    others: list
    sizes: list
    refused: str | None


class Part(NamedTuple):
    """What a block computes: the nodes, of which `end` is the last tensor, and what is alive behind it; end and crossing None: the classifier."""

    end: fx.Node | None
    crossing: Crossing | None
    nodes: set


class Parts:
    """The parts of one graph of a model: those of the blocks, and that of the classifier if there is one."""

    def __init__(self, model, graph, granularity, paths, num_classes):
        self.model, self.graph, self.granularity, self.paths = model, graph, granularity, paths
        self.num_classes = num_classes
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.output = graph.output_node()
        self.source = next(node for node in graph.nodes if node.op == "placeholder")
        self.needed = _ancestors(self.output)
        depends = {self.source}
        for node in graph.nodes:
            if depends.intersection(node.all_input_nodes):
                depends.add(node)
        # what does not depend on the images: each block that needs it computes it for itself
        self.free = {node for node in graph.nodes if node not in depends}

    def __iter__(self):
        ends = self._named_ends() if self.paths is not None else self._ends()
        done, crossing = {self.source}, None
        for end in ends:
            new = self._new(end, done)
            crossing = self._crossing(done | new, end)
            yield Part(end, crossing, new)
            done = done | new
        new = {node for node in self.needed if node not in done and node not in self.free} - {self.output}
        if new or self.output.args[0] not in crossing.main or len(crossing.main) > 1:
            yield Part(None, None, new)

    def _new(self, end, done):
        """What a block up to `end` computes beside what is done."""
        new = _ancestors(end, stop=done) - self.free
        while True:
            size = len(new)
            _with_earlier_readers(self.model, new, done, self.needed, self.order)
            new -= self.free
            available = done | new | self.free
            for node in list(new | {self.source} if len(done) == 1 else new):
                # the entries of a tuple, and what is measured of a tensor, so that it need not be alive for that
                new |= {
                    user for user in node.users
                    if user in self.needed and user not in done and user is not self.output
                    and (_is_entry(user, node) or (_is_measure(user) and available.issuperset(user.all_input_nodes)))
                }  # fmt: skip
            if len(new) == size:
                return new

    def _crossing(self, done, end):
        """What is alive behind the nodes that are done, of which `end` is the last tensor of the block."""
        alive = [n for n in done if n is not end and any(u in self.needed and u not in done for u in n.users)]
        alive = sorted(alive, key=self.order.get)
        if any(u in self.needed and u not in done for u in end.users):
            alive = [end, *alive]
        tensors = [n for n in alive if _is_tensor(n)]
        others = [n for n in alive if not _is_tensor(n)]
        siblings = [n for n in tensors if end.args and _is_entry(n, end.args[0]) and _is_entry(end, end.args[0])]
        main = [n for n in siblings if n.meta["rows"] is not None] if end in siblings else [end]
        main.sort(key=self.order.get)
        shapes = {(len(n.meta["shape"]), n.meta["rows"], *n.meta["shape"][2:]) for n in main}
        if len(main) > 1 and (len(shapes) > 1 or len(main[0].meta["shape"]) < 4 or main[0].meta["rows"] != 0):
            main = [max(main, key=lambda n: math.prod(n.meta["shape"]))]
        unfit = next((n for n in (*main, *alive) if n.meta["folded"]), None)
        if unfit is None and (not main or main[0].meta["rows"] is None):
            unfit = end
        refused = None
        if unfit is not None:
            refused = f"{unfit.name}, of shape {list(unfit.meta['shape'] or ())} for {values.BATCHES[0]} images, has no row for each image"
        elif self.granularity in ("block", "stage") and not {*tensors} <= {*main, *siblings}:
            refused = "more than one tensor is alive there"
        sizes = [n for n in others if n.meta["times"]]
        kept = [n for n in tensors if n not in main] + [n for n in others if not n.meta["times"]]
        return Crossing(main, kept, sizes, refused)

    def _named_ends(self):
        ends = []
        for path in self.paths:
            inside = [
                node for node in self.graph.nodes
                if node.target == path or any(path == entry for entry in node.meta.get("nn_module_stack", {}))
            ]  # fmt: skip
            entries = [user for node in inside for user in node.users if _is_entry(user, node)]
            inside = sorted({n for n in (*inside, *entries) if _is_tensor(n)}, key=self.order.get)
            if not inside:
                raise CutError(f"granularity: {path!r} is never called, or gives no tensor that is used")
            ends.append(inside[-1])
        return self._accepted(sorted(ends, key=self.order.get), self.paths)

    def _accepted(self, ends, paths=None):
        """Those of the nodes behind which there can be a cut. Raises CutError if that is not so of the last, or of one that was named."""
        done, accepted = {self.source}, []
        for end in ends:
            new = self._new(end, done)
            crossing = self._crossing(done | new, end)
            refused = crossing.refused
            if end is ends[-1] and refused and not refused.startswith("more"):
                paths = paths or [end.name]
            if refused is None or end is ends[-1]:
                done |= new
                accepted.append(end)
            if refused and paths:
                place = f"behind {paths[ends.index(end)] if len(paths) == len(ends) else end.name!r}"
                raise CutError(
                    f"granularity: the model cannot be cut {place}: {refused}. Name other modules, [path, ...]"
                )
        return accepted

    def _ends(self):
        """The nodes where blocks end, by the granularity."""
        gated = _gated(self.model, self.graph)
        items = [
            node for node in self.graph.nodes if node in self.needed and node not in gated and self._has_weights(node)
        ]
        kept = self._before_classifier(items)
        if kept < 1:
            raise CutError(
                "the model has no layer with weights before its classifier: there is nothing to train block by block"
            )
        segment_of, segments = {}, [[] for _ in items]
        position = {node: i for i, node in enumerate(items)}
        for node in self.graph.nodes:
            inherited = max((segment_of[n] for n in node.all_input_nodes), default=-1)
            segment_of[node] = max(position.get(node, -1), inherited)
            if segment_of[node] >= 0 and _is_tensor(node) and node.op != "output":
                segments[segment_of[node]].append(node)
        last = _end(self.model, segments[kept - 1], gated)
        if self.granularity == "model":
            return self._accepted([last])
        inside, ends = _ancestors(last), []
        for segment in segments[: kept - 1]:
            used = [n for n in segment if n in inside]
            end = next((n for n in reversed(used) if any(u in position for u in n.users)), None)
            if end is not None and end.meta["folded"]:
                end = next((n for n in reversed(used) if n.meta["rows"] is not None), None)
            if end is not None:
                ends.append(end)
        ends = self._accepted([*ends, last])
        if self.granularity == "stage":
            size = [_resolution(node) for node in ends]
            ends = [node for i, node in enumerate(ends) if i + 1 == len(ends) or size[i] != size[i + 1]]
        return ends

    def _has_weights(self, node):
        if node in self.free:
            return False
        if node.op == "call_module":
            return count_weights(self.model.get_submodule(node.target)) > 0
        return node.target in WEIGHT_FUNCTIONS and any(n.op == "get_attr" for n in node.all_input_nodes)

    def _before_classifier(self, items):
        """How many of the nodes with weights come before the classifier: it has those at the end that take or make vectors."""

        def on_vectors(node):
            inputs = [n for n in node.all_input_nodes if _is_tensor(n) and n not in self.free]
            return any(len(n.meta["shape"]) == 2 for n in (*inputs[:1], node) if _is_tensor(n))

        kept = len(items)
        while kept and on_vectors(items[kept - 1]):
            kept -= 1
        if kept == 0:
            return len(items) - 1  # vectors all along: a perceptron, whose last layer classifies
        shape = items[-1].meta["shape"]
        if kept == len(items) and shape is not None and self.num_classes is not None:
            makes_classes = self.num_classes in (shape[1], shape[-1])
            kept -= makes_classes and self.output.args[0].meta["shape"][1:] == (self.num_classes,)
        return kept


def _end(model, segment, gated):
    """The last tensor of the last block: before pooling, flattening, or the choice of a class token."""
    vectors = len(segment[0].meta["shape"]) == 2
    end = segment[0]
    for node in segment[1:]:
        if (_is_pool(model, node) and node not in gated) or (len(node.meta["shape"]) == 2 and not vectors):
            break
        end = node
    return end


def _resolution(node):
    """Positions on each side; of [B, H, W, C] too, where H = W tells it from [B, C, H, W]."""
    shape = node.meta["shape"][1:]
    last = len(shape) == 2 or (len(shape) == 3 and shape[0] == shape[1] != shape[2])
    return tuple(shape[:-1] if last else shape[1:])


def _with_earlier_readers(model, new, done, needed, order):
    """What reads a tensor before an in-place operation in this block writes it must run in this block too."""
    modules = dict(model.named_modules())
    for node in sorted(new, key=order.get):
        if node.op not in ("placeholder", "output") and node.all_input_nodes and writes(node, modules):
            for reader in node.all_input_nodes[0].users:
                if order[reader] < order[node] and reader in needed:
                    new |= {n for n in _ancestors(reader, stop=done) if n.op != "get_attr"}
