"""Cutting an unmodified model into blocks.

The model is traced with torch.fx. A block ends at a node of the graph, its *main* tensor; the block is everything that tensor needs and
no earlier block has computed. So a shortcut's convolution belongs to the block that adds it, and whatever else is alive across the cut
is handed on beside the main tensor. Granularities:

    block   a custom module that holds no list of further blocks (BasicBlock, InvertedResidual, EncoderBlock, ...) or a layer outside of
            such modules; cut only where one tensor is alive
    layer   a weight layer with what follows it up to the next (normalisation, activation, squeeze-excite, addition, pooling). A module
            that normalises before its first weight layer (dense layers, transformer blocks) is one layer
    stage   blocks of one resolution together
    model   one block
    [path]  blocks end where the named modules end

What follows the last block (pooling and layers on [B, C] features, the classifier) is the tail. Modules without a cut inside are called as
they are: their hooks fire and they read self.training as ever. The opened ones are traced in train and in eval mode.
"""

import difflib
import operator
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastff.graph.plain import Read, Watch, graph_module
from fastff.graph.trace import (
    WEIGHT_FUNCTIONS,
    CutError,
    code,
    count_weights,
    example_input,
    record_shapes,
    trace,
    warn_of_hooks,
)

GRANULARITIES = ("layer", "block", "stage", "model")
POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
POOL_FUNCTIONS = {F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.mean, torch.flatten}
IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


class Block(nn.Module):
    """One block: block(*alive) -> (main, *others), the tensors alive after it; its inputs are those alive before it.

    Attributes: name (of its last weight layer or module), modules_called (paths), output_shape (of main, for one sample), channel_dim.
    """

    def __init__(self, name, root, train, evaluate, output_shape, channel_dim):
        super().__init__()
        self.name, self.output_shape, self.channel_dim = name, tuple(output_shape), channel_dim
        self._root = (root,)  # in a tuple, so as not to be a submodule
        self.graph_module = evaluate
        self.train_graph_module = train  # only where it differs
        self.watch, self.whole = None, {}  # of the modules that the cut opens; {name: reason} of those that it does not

    @property
    def modules_called(self):
        return _called(self.graph_module)

    @property
    def training_module(self):
        """The GraphModule that computes the block in training mode."""
        return self.graph_module if self.train_graph_module is None else self.train_graph_module

    def forward(self, *alive):
        self.check()
        if self.train_graph_module is not None and self.training and self._root[0].training:
            return self.train_graph_module(*alive)
        return self.graph_module(*alive)

    def compiled(self, **options):
        """This block through torch.compile(**options), each graph by itself: all blocks share this forward, and one function is compiled
        for eight sets of shapes at most."""
        evaluate = torch.compile(self.graph_module, **options)
        train = evaluate if self.train_graph_module is None else torch.compile(self.train_graph_module, **options)
        return lambda *alive: (train if self.training and self._root[0].training else evaluate)(*alive)

    def check(self):
        """Raises RuntimeError where an attribute of the model has changed that the blocks were cut by."""
        if self.watch is not None and not self.watch.unchanged():
            raise RuntimeError(
                f"the model was cut into blocks before a change of {self.watch.change()}; make the SFF after it"
            )


def cut(model, granularity, input_shape):
    """Cut `model` -> (blocks, tail): the tail is a GraphModule from the tensors alive after the last block to the model's output, or None.

    Args:
        model: nn.Module with one tensor argument, images [B, *input_shape].
        granularity: one of GRANULARITIES, or a list of module paths that end blocks.
        input_shape: of one sample, (C, H, W) for images.

    Raises CutError, or ValueError for wrong arguments.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    paths = None
    if not isinstance(granularity, str):
        paths = _checked_paths(model, granularity)
    elif granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity: expected one of {', '.join(GRANULARITIES)} or a list of module paths, got {granularity!r}"
        )
    if not isinstance(input_shape, Sequence) or not all(isinstance(n, int) and n > 0 for n in input_shape):
        raise ValueError(
            f"input_shape: expected the positive sizes of one sample such as (3, 32, 32), got {input_shape!r}"
        )
    example = example_input(model, input_shape)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        traces = {}
        traces[False], is_chain = trace(model, granularity, paths, example)
        if not is_chain:
            model.train()
            traces[True], _ = trace(model, granularity, paths, example)
            model.eval()
        graphs = {mode: traced.graph for mode, traced in traces.items()}
        if not is_chain and code(graphs[True]) == code(graphs[False]):
            del graphs[True]
        for mode, graph in graphs.items():
            model.train(mode)
            record_shapes(model, graph, example, is_chain)
        mains = {mode: _mains(model, graph, granularity, paths) for mode, graph in graphs.items()}
    finally:
        for module, mode in modes.items():
            module.training = mode
    warn_of_hooks(model, graphs[False])
    blocks, tail = _build(model, graphs, mains, input_shape)
    reads = [traced.reads for traced in traces.values()]
    watch = Watch({m: set().union(*(r.get(m, ()) for r in reads)) for m in {m: None for r in reads for m in r}})
    for block in (*blocks, *([tail] if tail is not None else [])):
        block.watch, block.whole = watch, traces[False].whole | traces[max(traces)].whole
    return blocks, tail


def _checked_paths(model, paths):
    paths = list(paths)
    names = dict(model.named_modules())
    if not paths:
        raise ValueError("granularity: expected at least one module path, got an empty list")
    for path in paths:
        if path not in names or path == "":
            close = difflib.get_close_matches(str(path), names, 3)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise ValueError(f"granularity: expected paths of modules of the model, got {path!r}{hint}")
    if len(set(paths)) < len(paths):
        raise ValueError(f"granularity: expected each module path once, got {paths}")
    return paths


# --- where blocks end


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


def _is_pool(model, node):
    if node.op == "call_module":
        return isinstance(_attribute(model, node.target), POOLS)
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


def _mains(model, graph, granularity, paths):
    if paths is not None:
        return _named_mains(graph, paths)
    gated = _gated(model, graph)

    def is_item(node):
        if node in gated:
            return False
        if node.op == "call_module":
            return count_weights(_attribute(model, node.target)) > 0
        return node.target in WEIGHT_FUNCTIONS and any(n.op == "get_attr" for n in node.all_input_nodes)

    items = [node for node in graph.nodes if is_item(node)]
    on_vectors = [
        len(next((n.meta["shape"] for n in node.all_input_nodes if _is_tensor(n) and n.op != "get_attr"), ())) == 2
        for node in items
    ]
    kept = len(items)
    while kept and on_vectors[kept - 1]:
        kept -= 1
    kept = kept or len(items) - 1  # vectors all along: a perceptron, whose last layer classifies
    if kept < 1:
        raise CutError(
            "the model has no layer with weights before its classifier: there is nothing to train block by block"
        )

    segment_of, segments = {}, [[] for _ in items]
    position = {node: i for i, node in enumerate(items)}
    for node in graph.nodes:
        inherited = max((segment_of[n] for n in node.all_input_nodes), default=-1)
        segment_of[node] = max(position.get(node, -1), inherited)
        if segment_of[node] >= 0 and _is_tensor(node) and node.op != "output":
            segments[segment_of[node]].append(node)

    last = _end(model, segments[kept - 1])
    if granularity == "model":
        return [last]
    needed, mains, done = _ancestors(last), [], set()
    for segment in segments[: kept - 1]:
        main = next(
            (n for n in reversed(segment) if n in needed and any(u in position and u in needed for u in n.users)), None
        )
        if main is None:
            continue
        if granularity != "layer":
            before = done | _ancestors(main)
            alive = [n for n in before if n.op != "get_attr" and (_is_tensor(n) or n.op == "placeholder")]
            if any(user in needed - before for n in alive if n is not main for user in n.users):
                continue
        done |= _ancestors(main)
        mains.append(main)
    mains.append(last)
    if granularity == "stage":
        size = [_resolution(node) for node in mains]
        mains = [node for i, node in enumerate(mains) if i + 1 == len(mains) or size[i] != size[i + 1]]
    return mains


def _end(model, segment):
    """The last tensor of the last block: before pooling, flattening, or the choice of a class token."""
    vectors = len(segment[0].meta["shape"]) == 2
    end = segment[0]
    for node in segment[1:]:
        if _is_pool(model, node) or (len(node.meta["shape"]) == 2 and not vectors):
            break
        end = node
    return end


def _resolution(node):
    """Positions on each side; of [B, H, W, C] too, where H = W tells it from [B, C, H, W]."""
    shape = node.meta["shape"][1:]
    last = len(shape) == 2 or (len(shape) == 3 and shape[0] == shape[1] != shape[2])
    return tuple(shape[:-1] if last else shape[1:])


def _named_mains(graph, paths):
    mains = []
    for path in paths:
        inside = [
            node for node in graph.nodes
            if node.target == path or any(path == entry for entry in node.meta.get("nn_module_stack", {}))
        ]  # fmt: skip
        inside = [node for node in inside if _is_tensor(node)]
        if not inside:
            raise CutError(f"granularity: {path!r} is never called, or gives no single tensor")
        mains.append(inside[-1])
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(mains, key=order.get)


# --- building the blocks


def _build(model, graphs, mains, input_shape):
    parts = {mode: _parts(model, graph, mains[mode]) for mode, graph in graphs.items()}
    evaluate = parts[False]
    if True in parts:
        shapes = [[(node.meta["shape"], alive) for node, _, alive in part] for part in parts.values()]
        if shapes[0] != shapes[1]:
            raise CutError(
                "the model computes different things in train and eval mode, and cannot be cut at the same places in both; "
                "name the modules that end blocks instead, granularity=[path, ...]"
            )
    blocks = []
    for i, (main, module, _) in enumerate(evaluate[: len(mains[False])]):
        train = parts[True][i][1] if True in parts else None
        called = _called(module)
        blocks.append(
            Block(
                _name(model, called) or main.name,
                model,
                train,
                module,
                main.meta["shape"][1:],
                _channel_dim(model, main, called, input_shape),
            )
        )
    tail = None
    if len(evaluate) > len(blocks):
        train = parts[True][-1][1] if True in parts else None
        tail = Block("classifier", model, train, evaluate[-1][1], (), 1)
    return blocks, tail


def _name(model, called):
    """The module that holds just the block's weight layers, or where there is none the last of these."""
    targets = [target for target in called if count_weights(_attribute(model, target))]
    if not targets:
        return None
    common = ".".join(os.path.commonprefix([target.split(".") for target in targets]))
    if common and count_weights(_attribute(model, common)) == sum(
        count_weights(_attribute(model, target)) for target in targets
    ):
        return common
    return targets[-1]


def _parts(model, graph, mains):
    """[(main, GraphModule, number of tensors alive after)] for each block, then for the tail where there is one."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    output = next(node for node in graph.nodes if node.op == "output")
    source = next(node for node in graph.nodes if node.op == "placeholder")
    ends = mains if output.args[0] is mains[-1] else [*mains, output]
    needed = _ancestors(mains[-1]) if not isinstance(output.args[0], fx.Node) else _ancestors(output)
    ends = ends if isinstance(output.args[0], fx.Node) else mains
    parts, done, alive = [], {source}, [source]
    for end in ends:
        new = {node for node in _ancestors(end, stop=done) if node.op != "get_attr"}
        _with_earlier_readers(model, new, done, needed, order)
        done = done | new
        crossing = [n for n in done if n is not end and n is not output and any(u in needed - done for u in n.users)]
        crossing = [] if end is output else [end, *sorted(crossing, key=order.get)]
        parts.append(
            (
                end,
                _graph_module(model, alive, sorted(new - {output}, key=order.get), crossing or [output.args[0]]),
                len(crossing),
            )
        )
        alive = crossing
    return parts


def _with_earlier_readers(model, new, done, needed, order):
    """What reads a tensor before an in-place operation in this block writes it must run in this block too."""

    def in_place(node):
        if node.op == "call_module":
            return getattr(_attribute(model, node.target), "inplace", False)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return (
            node.target in IN_PLACE
            or node.kwargs.get("inplace") is True
            or (name.endswith("_") and not name.endswith("__"))
        )

    for node in sorted(new, key=order.get):
        if node.op not in ("placeholder", "output") and node.all_input_nodes and in_place(node):
            for reader in node.all_input_nodes[0].users:
                if order[reader] < order[node] and reader in needed:
                    new |= {n for n in _ancestors(reader, stop=done) if n.op != "get_attr"}


def _graph_module(model, inputs, nodes, outputs):
    graph, copies = fx.Graph(), {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)

    def copy_of(node):
        if node not in copies:  # a parameter or buffer: each block reads it for itself
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in nodes:
        copies[node] = graph.node_copy(node, copy_of)
    results = tuple(copy_of(node) for node in outputs)
    graph.output(results)
    return graph_module(model, graph, {})


def _called(module):
    """Paths of the model's modules that a GraphModule calls."""
    targets = dict.fromkeys(n.target for n in module.graph.nodes if n.op == "call_module")
    return [target for target in targets if not isinstance(module.get_submodule(target), Read)]


def _attribute(model, path):
    value = model
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _channel_dim(model, main, called, input_shape):
    """1 or -1. Three dimensions: tokens. Four: the reading whose aspect is that of the input; if both fit, what the block's layers take."""
    shape = main.meta["shape"][1:]
    if len(shape) == 1:
        return 1
    if len(shape) == 2:
        return -1
    wanted = input_shape[1] / input_shape[2] if len(input_shape) == 3 else 1.0
    first, last = abs(shape[1] / shape[2] - wanted), abs(shape[0] / shape[1] - wanted)
    if abs(first - last) > 1e-6:
        return 1 if first < last else -1
    layers = [m for target in called for m in _attribute(model, target).modules()]
    return 1 if any(isinstance(m, nn.modules.conv._ConvNd) for m in layers) else -1
