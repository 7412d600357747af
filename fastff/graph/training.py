"""The graph that a block trains with: opened down to PyTorch's own layers, with faster stand-ins for them, and the epilogue at its end apart.

    y -> BatchNorm2d [+ residual] [-> activation]      an epilogue: at the block's end part of the step op (fastff/nn/block.py), inside
                                                       the block one kernel, together with the convolution behind it (fastff/graph/fused.py)
    Linear or Conv2d -> ReLU                           at the block's end: the ReLU is applied in place
    Conv2d                                             a convolution with faster gradients

Training only: evaluation runs the block's own modules. What cannot be traced trains as it is.
"""

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastff.graph import fused, plain
from fastff.graph.module import Read, Watch, graph_module

ACTIVATIONS = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu", nn.GELU: "gelu", nn.Identity: "none",
}  # fmt: skip
FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", "relu_": "relu", F.relu6: "relu6", F.hardswish: "hardswish", F.silu: "silu",
    F.gelu: "gelu",
}  # fmt: skip
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
OVERWRITABLE = (nn.Conv2d, nn.Linear)  # no gradient of theirs needs their output


class TrainingGraph:
    """How a block computes in training.

    Attributes:
        forward: GraphModule from the block's inputs to its outputs (a tuple).
        ending: fused.Epilogue that the step op computes; "relu", a ReLU behind a layer that does not need its own output, which is applied in
            place, and its gradient over that of the output; or None.
        body: with an ending: GraphModule from the inputs to what the ending is applied to, (y, residual or None, *further outputs) for an
            Epilogue, (y, *further outputs) for "relu".
        whole: {name: reason} of modules that could have been opened but are called as they are.
    """

    def __init__(self, module, custom):
        modules = dict(module.named_modules())
        inside = set(modules)
        if isinstance(module, fx.GraphModule):  # a part of a model: only what it calls belongs to the block
            inside = _below(modules, {n.target for n in module.graph.nodes if n.op == "call_module"})
        modes = {m: m.training for m in module.modules()}
        try:
            module.train()
            traced = plain.trace(module, lambda m, name: _opens(m, custom))
        finally:
            for m, mode in modes.items():
                m.training = mode
        graph, self.whole = traced.graph, traced.whole
        self.ending, self.body = None, None
        output = graph.output_node()
        if isinstance(output.args[0], fx.Node):
            output.args = ((output.args[0],),)
        self.forward = _optimized(module, modules, graph)
        found = _ending(modules, graph)
        if found is not None:
            self.ending, body = found
            self.body = _optimized(module, modules, body)
        graphs = self.graph_modules()
        called = [{n.target for n in g.graph.nodes if n.op == "call_module"} & modules.keys() for g in graphs]
        own = [n for n in set.intersection(*called) if all(g.get_submodule(n) is modules[n] for g in graphs)]
        watched = [modules[name] for name in inside - _below(modules, own)]
        self.watch = Watch({m: [*traced.reads.get(m, ()), *fused.READS.get(type(m), ())] for m in watched})

    def ready(self):
        """Whether the graph may stand in for the block now: all that it does not call is as it was, in training mode, and has no hooks."""
        return self.watch.ready()

    def graph_modules(self):
        return [self.forward] if self.body is None else [self.forward, self.body]

    def without_writes(self):
        """The graph modules that call nothing but stand-ins, which write to no input."""
        called = {g: [n for n in g.graph.nodes if n.op not in ("placeholder", "output")] for g in self.graph_modules()}
        return [g for g, nodes in called.items() if all(_is_stand_in(g, node) for node in nodes)]


def _is_stand_in(graph_module, node):
    return node.op == "call_module" and isinstance(graph_module.get_submodule(node.target), fused.StandIn)


def _opens(module, custom):
    """Whether tracing opens a module: nn.Sequential, and where `custom` says so a model's own modules; torch.nn's layers are called whole."""
    if type(module) is nn.Sequential:
        return True
    return custom and not isinstance(module, Read) and not type(module).__module__.startswith("torch.nn.")


def training_graph(module, custom=True):
    """The TrainingGraph of a module, or the reason why it has none. custom: whether modules of the model's own are opened."""
    try:
        return TrainingGraph(module, custom)
    except plain.NotPlain as fault:
        return str(fault)


def _below(modules, paths):
    """Names of these modules and of all inside them."""
    return {name for name in modules for path in paths if name == path or name.startswith(path + ".")}


class _Match(NamedTuple):
    """An epilogue in a graph: its input, residual (or None), stand-in, and the nodes it stands for."""

    y: fx.Node
    residual: fx.Node | None
    epilogue: fused.Epilogue
    nodes: list


def _module(modules, node):
    """The module that a node calls, if the forward of its class runs; None for others."""
    module = modules.get(node.target) if node.op == "call_module" else None
    return None if module is None or "forward" in vars(module) else module


def _only_user(node):
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(modules, node):
    """(name, callable) of an activation's node, or None."""
    module = _module(modules, node)
    if type(module) in ACTIVATIONS and getattr(module, "approximate", "none") == "none":
        return ACTIVATIONS[type(module)], module
    called = node.op in ("call_function", "call_method") and node.target in FUNCTIONS
    if called and len(node.all_input_nodes) == 1 and node.kwargs.get("approximate", "none") == "none":
        return FUNCTIONS[node.target], getattr(F, FUNCTIONS[node.target])
    return None


def _is_identity(modules, node):
    module = _module(modules, node)
    return type(module) in (nn.Identity, nn.Dropout) and not getattr(module, "p", 0)


def _behind(modules, nodes):
    """The only user of the last of these nodes but for identities, which are added to the nodes; None where there is none."""
    user = _only_user(nodes[-1])
    while user is not None and _is_identity(modules, user):
        nodes.append(user)
        user = _only_user(user)
    return user


def _match(modules, norm_node):
    """The epilogue that begins with a batch norm's node."""
    nodes, residual, activation = [norm_node], None, None
    user = _behind(modules, nodes)
    if user is not None and user.target in ADDITIONS and _is_addition(user):
        first, second = user.args
        other = second if first is nodes[-1] else first
        # of two batch norms that are added the first takes in the addition, or the second where something is written between
        late = not plain.is_norm(first, modules) or _written_meanwhile(norm_node.graph, modules, [first], user)
        if first is nodes[-1] or late:
            residual = other
            nodes.append(user)
            user = _behind(modules, nodes)
    if user is not None and (activation := _activation(modules, user)) is not None:
        nodes.append(user)
    if _written_meanwhile(norm_node.graph, modules, nodes):
        nodes, residual, activation = [norm_node], None, None
    name, apply = activation or ("none", nn.Identity())
    epilogue = fused.Epilogue(_module(modules, norm_node), name, apply, residual is not None)
    return _Match(norm_node.args[0], residual, epilogue, nodes)


def _written_meanwhile(graph, modules, nodes, last=None):
    """Whether something else is written to in place between the first of these nodes and the last, where all of them would be computed."""
    order = list(graph.nodes)
    between = order[order.index(nodes[0]) : order.index(last or nodes[-1])]
    return any(node not in nodes and plain.writes(node, modules) for node in between)


def _is_addition(node):
    return len(node.args) == 2 and not node.kwargs and len(node.all_input_nodes) == 2


def _norm_nodes(modules, graph):
    return [n for n in graph.nodes if plain.is_norm(n, modules) and len(n.args) == 1]


def _ending(modules, graph):
    """(ending, graph of the body) or None."""
    output = graph.output_node()
    results = output.args[0]
    main = results[0]
    if not isinstance(main, fx.Node) or len(main.users) > 1 or results.count(main) > 1:
        return None
    last = main
    while _is_identity(modules, last) and len(last.all_input_nodes[0].users) == 1:
        last = last.all_input_nodes[0]
    for node in _norm_nodes(modules, graph):
        m = _match(modules, node)
        late = _written_meanwhile(graph, modules, m.nodes, output)
        if m.nodes[-1] in (last, main) and m.y not in results and m.residual not in m.nodes and not late:
            nodes = {*m.nodes, *_between(m.nodes[-1], main)}
            return m.epilogue, _body(graph, nodes, [m.y, m.residual, *results[1:]])
    if type(_module(modules, last)) is nn.ReLU or (last.target in FUNCTIONS and FUNCTIONS[last.target] == "relu"):
        (before,) = last.all_input_nodes[:1]
        if type(_module(modules, before)) in OVERWRITABLE and len(before.users) == 1:
            return "relu", _body(graph, {last, *_between(last, main)}, [before, *results[1:]])
    return None


def _between(first, last):
    """The identities behind `first` up to `last`."""
    nodes = []
    while last is not first:
        nodes.append(last)
        last = last.all_input_nodes[0]
    return nodes


def _body(graph, left_out, results):
    """A copy of the graph without some nodes and with other results."""
    body, copies = fx.Graph(), {}
    for node in graph.nodes:
        if node.op != "output" and node not in left_out:
            copies[node] = body.node_copy(node, copies.__getitem__)
    body.output(tuple(None if node is None else copies.get(node, node) for node in results))
    return body


def _optimized(root, modules, graph):
    """A GraphModule of a copy of the graph that calls the stand-ins of fastff/graph/fused.py."""
    graph = _body(graph, (), graph.output_node().args[0])
    stand_ins = {}
    for node in _norm_nodes(modules, graph):
        _fuse(modules, graph, _match(modules, node), stand_ins)
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in stand_ins:
            stand_in = fused.Convolution.of(modules[node.target])
            if stand_in is not None:
                stand_ins[node.target] = stand_in
    return graph_module(root, graph, stand_ins)


def _fuse(modules, graph, match, stand_ins):
    """Replace an epilogue's nodes, and the convolution behind them where it is the only reader, by one call of a stand-in."""
    stand_in = match.epilogue
    arguments = (match.y,) if match.residual is None else (match.y, match.residual)
    nodes, last = list(match.nodes), match.nodes[-1]
    user = _only_user(last)
    convolution = None if user is None or match.residual is not None else fused.Convolution.of(_module(modules, user))
    if convolution is not None:
        stand_in = fused.EpilogueConvolution(stand_in, convolution)
        nodes.append(user)
        last = user
    name = f"fastff_fused_{len(stand_ins)}"
    stand_ins[name] = stand_in
    with graph.inserting_before(last):
        call = graph.call_module(name, arguments)
    last.replace_all_uses_with(call)
    for node in reversed(nodes):
        graph.erase_node(node)
