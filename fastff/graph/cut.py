"""Cutting an unmodified model into blocks.

The model is traced with torch.fx. A block ends at a node of the graph, its *main* tensor; the block is everything that tensor needs and
no earlier block has computed. So a shortcut's convolution belongs to the block that adds it, and whatever else is alive across the cut
is handed on beside the main tensor. Granularities:

    block   a custom module that holds no row of further blocks (BasicBlock, InvertedResidual, EncoderBlock, ...) or a layer outside of
            such modules; cut only where one tensor is alive, or the several ones that such a module hands on
    layer   a weight layer with what follows it up to the next (normalisation, activation, squeeze-excite, addition, pooling). A module
            that normalises before its first weight layer (dense layers, transformer blocks) is one layer
    stage   blocks of one resolution together
    model   one block
    [path]  blocks end where the named modules end

What follows the last block (pooling and layers on [B, C] features) is the classifier. Modules without a cut inside are called as they are:
their hooks fire and they read self.training as ever. The opened ones are traced in train and in eval mode.

Each tensor at a cut has a row for each image in its first dimension: another dimension of the images is moved there, and where the rows of a
tensor are parts of images there is no cut (fastff/graph/values.py). A block that writes to an input works on a copy of it.
"""

import difflib
import operator
import os
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from fastff.graph import values
from fastff.graph.ends import Parts
from fastff.graph.module import Read, Watch, graph_module
from fastff.graph.snapshot import preserved
from fastff.graph.trace import (
    CONTAINERS,
    CutError,
    close,
    code,
    count_weights,
    example_input,
    record_values,
    trace,
    warn_of_hooks,
)

GRANULARITIES = ("layer", "block", "stage", "model")


class Block(nn.Module):
    """One block: block(*alive) -> (main, *others), the tensors alive after it; its inputs are those alive before it.

    Attributes: name (of its last weight layer or module), modules_called (paths), output_shape (of main, for one sample), channel_dim,
    rows (for each output, whether it has a row for each image), holds (the model's own blocks in it, where there are several).
    """

    def __init__(self, name, root, train, evaluate, output_shape, channel_dim, rows, holds=()):
        super().__init__()
        self.name, self.output_shape, self.channel_dim = name, tuple(output_shape), channel_dim
        self.rows, self.holds = rows, holds
        self._root = (root,)  # in a tuple, so as not to be a submodule
        self.graph_module = evaluate
        self.train_graph_module = train  # only where it differs
        self.watch, self.whole = None, {}  # of the modules that the cut opens; {name: reason} of those that it does not
        self.one_size = False  # whether it is for images of the size that the model was cut for alone

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


def cut(model, granularity, input_shape, num_classes=None):
    """Cut `model` -> (blocks, classifier): the classifier is a Block from the tensors alive after the last block to the model's output, or None.

    Args:
        model: nn.Module with one tensor argument, images [B, *input_shape].
        granularity: one of GRANULARITIES, or a list of module paths that end blocks.
        input_shape: of one sample, (C, H, W) for images.
        num_classes: of the model's output [B, num_classes], where it is known: then the layer that makes it is the classifier.

    Raises CutError, or TypeError, ValueError and RuntimeError for wrong arguments and under torch.inference_mode().
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "model: expected to be cut outside of torch.inference_mode(), under which nothing can be trained"
        )
    _check_model(model)
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
    examples = [example_input(model, input_shape, size) for size in values.BATCHES]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        traces = {}
        traces[False], is_chain = trace(model, granularity, paths, examples)
        if not is_chain:
            model.train()
            traces[True], _ = trace(model, granularity, paths, examples)
            model.eval()
        graphs = {mode: traced.graph for mode, traced in traces.items()}
        if not is_chain and code(graphs[True]) == code(graphs[False]):
            del graphs[True]
        warn_of_hooks(model, graphs[False])
        parts, results = {}, {}
        for mode, graph in graphs.items():
            model.train(mode)
            results[mode] = record_values(model, graph, examples, is_chain)
            values.describe(graph)
            output = values.choose_output(graph, num_classes)
            if output is None:
                raise CutError("the model's output holds no tensor that could be classes [B, K]")
            parts[mode] = _built(model, Parts(model, graph, granularity, paths, num_classes))
        blocks, classifier = _blocks(model, parts, input_shape)
        everything = [*blocks, *([classifier] if classifier is not None else [])]
        for mode in (True, False):
            model.train(mode)
            _run_once(model, everything, examples[1], None if mode or classifier is None else results[mode])
    finally:
        for module, mode in modes.items():
            module.training = mode
    reads = [traced.reads for traced in traces.values()]
    watch = Watch({m: set().union(*(r.get(m, ()) for r in reads)) for m in {m: None for r in reads for m in r}})
    for block in everything:
        block.watch, block.whole = watch, traces[False].whole | traces[max(traces)].whole
        block.one_size = any(traced.sizes for traced in traces.values())
    return blocks, classifier


WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


def _check_model(model):
    """Raise TypeError or ValueError for what is no model, or one whose tensors cannot be computed with or trained."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {kind}")
    if kind in WRAPPERS:
        raise TypeError(f"model: expected the model itself, got a {kind} around it: give its .{WRAPPERS[kind]}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: expected one of Python code, which can be traced, got a ScriptModule")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"model: expected initialized tensors, got {name} of a lazy module: run the model once")
        if tensor.is_meta:
            raise ValueError(f"model: expected tensors with values, got {name} on the meta device")
        if tensor.is_inference():
            raise ValueError(
                f"model: expected tensors that can be trained, got {name}, made under torch.inference_mode()"
            )


def _run_once(model, blocks, example, want):
    """Run the blocks one after the other: the result must be among what the model has computed, `want` (None for anything). A block that
    writes to an input gets a copy of it from now on."""
    with preserved(model):
        alive = (example.clone(),)
        for block in blocks:
            versions = [t._version if isinstance(t, torch.Tensor) else 0 for t in alive]
            following = block(*alive)
            written = [isinstance(t, torch.Tensor) and t._version != v for t, v in zip(alive, versions, strict=True)]
            _copy_inputs(block.training_module if model.training else block.graph_module, written)
            alive = following
    if want is not None and not any(close(t, alive[0]) for t in want):
        raise CutError(
            "the blocks one after the other do not compute what the model does; where a tensor is overwritten that something "
            "else still reads, name the modules that end blocks, granularity=[path, ...], so that both lie in one block"
        )


def _copy_inputs(module, written):
    """Let a GraphModule work on copies of the inputs that it writes to."""
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node in [node for node, is_written in zip(nodes, written, strict=True) if is_written]:
        readers = list(node.users)
        with module.graph.inserting_before(nodes[-1].next):
            copy = module.graph.call_method("clone", (node,))
        for reader in readers:
            reader.replace_input_with(node, copy)
        module.recompile()


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


# --- building the blocks


def _built(model, parts):
    """[(end node, Crossing, GraphModule)] of the parts."""
    built, before = [], None
    for part in parts:
        built.append((part.end, part.crossing, _graph_module(model, parts, part, before)))
        before = part.crossing
    return built


def _graph_module(model, parts, part, before):
    """A part of the graph, from what crosses the cut before it (None: the images) to what crosses the cut behind it, or to the output."""
    graph, copies = fx.Graph(), {}
    if before is None:
        copies[parts.source] = graph.placeholder(parts.source.name)
    else:
        _take_in(graph, before, copies)

    def copy_of(node):
        if node not in copies:
            copies[node] = graph.node_copy(node, copy_of)
        return copies[node]

    for node in sorted(part.nodes, key=parts.order.get):
        copies[node] = graph.node_copy(node, copy_of)
    crossing = part.crossing
    if crossing is None:
        graph.output((copy_of(parts.output.args[0]),))
    else:
        with_rows_first = [_rows_first(graph, n, copy_of(n)) for n in (*crossing.main, *crossing.others)]
        main, others = with_rows_first[: len(crossing.main)], with_rows_first[len(crossing.main) :]
        joined = main[0] if len(main) == 1 else graph.call_function(torch.cat, (tuple(main), 1))
        graph.output((joined, *others))
    return graph_module(model, graph, {})


def _rows_first(graph, node, copy):
    moved = node.meta["rows"] not in (None, 0)
    return graph.call_function(torch.movedim, (copy, node.meta["rows"], 0)) if moved else copy


def _take_in(graph, before, copies):
    """Placeholders for what crosses a cut, and what was at the cut made from them again."""
    first = graph.placeholder("_".join(n.name for n in before.main))
    others = [graph.placeholder(n.name) for n in before.others]
    main = [first]
    if len(before.main) > 1:
        pieces = graph.call_function(torch.split, (first, [n.meta["shape"][1] for n in before.main], 1))
        main = [graph.call_function(operator.getitem, (pieces, i)) for i in range(len(before.main))]
    for node, copy in zip((*before.main, *before.others), (*main, *others), strict=True):
        moved = node.meta["rows"] not in (None, 0)
        copies[node] = graph.call_function(torch.movedim, (copy, 0, node.meta["rows"])) if moved else copy
    for node in before.sizes:
        images = graph.call_method("size", (first, 0))
        copies[node] = graph.call_function(operator.mul, (images, node.meta["times"]))


def _blocks(model, parts, input_shape):
    """(blocks, classifier or None) from the parts of the graph in evaluation, and in training where that is another."""
    if True in parts:
        shapes = [
            [(n.meta["shape"] if n else None, c and len(c.others)) for n, c, _ in part] for part in parts.values()
        ]
        if shapes[0] != shapes[1]:
            raise CutError(
                "the model computes different things in train and eval mode, and cannot be cut at the same places in both; "
                "name the modules that end blocks instead, granularity=[path, ...]"
            )
    blocks, classifier = [], None
    for i, (end, crossing, module) in enumerate(parts[False]):
        train = parts[True][i][2] if True in parts else None
        if end is None:
            classifier = Block("classifier", model, train, module, (), 1, (True,))
            continue
        called = _called(module)
        shape = _output_shape(crossing)
        rows = tuple(n.meta["rows"] is not None for n in (crossing.main[0], *crossing.others))
        dim = _channel_dim(model, shape, called, input_shape)
        holds = [name for name in called if _is_own_block(model.get_submodule(name))]
        name = _name(model, called) or end.name
        blocks.append(Block(name, model, train, module, shape, dim, rows, holds if len(holds) > 1 else ()))
    return blocks, classifier


def _output_shape(crossing):
    """Of the main tensor behind a block, for one sample."""
    first = crossing.main[0]
    shape = [n for d, n in enumerate(first.meta["shape"]) if d != first.meta["rows"]]
    if len(crossing.main) > 1:
        shape[0] = sum(n.meta["shape"][1] for n in crossing.main)
    return tuple(shape)


def _is_own_block(module):
    own = type(module) not in CONTAINERS and not type(module).__module__.startswith("torch.nn.")
    return own and count_weights(module) >= 2


def _name(model, called):
    """The module that holds just the block's weight layers, or where there is none the last of these."""
    targets = [target for target in called if count_weights(model.get_submodule(target))]
    if not targets:
        return None
    common = ".".join(os.path.commonprefix([target.split(".") for target in targets]))
    if common and count_weights(model.get_submodule(common)) == sum(
        count_weights(model.get_submodule(target)) for target in targets
    ):
        return common
    return targets[-1]


def _called(module):
    """Paths of the model's modules that a GraphModule calls."""
    targets = dict.fromkeys(n.target for n in module.graph.nodes if n.op == "call_module")
    return [target for target in targets if not isinstance(module.get_submodule(target), Read)]


def _channel_dim(model, shape, called, input_shape):
    """1 or -1. Three dimensions: tokens. Four: the reading whose aspect is that of the input; if both fit, what the block's layers take."""
    if len(shape) == 1:
        return 1
    if len(shape) == 2:
        return -1
    wanted = input_shape[-2] / input_shape[-1] if len(input_shape) > 2 else 1.0
    first, last = abs(shape[-2] / shape[-1] - wanted), abs(shape[-3] / shape[-2] - wanted)
    if abs(first - last) > 1e-6:
        return 1 if first < last else -1
    layers = [m for target in called for m in model.get_submodule(target).modules()]
    return 1 if any(isinstance(m, nn.modules.conv._ConvNd) for m in layers) else -1
