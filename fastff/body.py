"""What a block trains with: its graph opened down to PyTorch's own modules, its convolutions with quicker gradients, and the tail at its end.

    tail    y = anything;  h = BatchNorm2d(y) [+ residual];  main = [activation](h)

Modules of the block that the cut calls whole (a BasicBlock) are opened, as the cut opens those it goes through; what cannot be traced trains
as it is. Training only: evaluation runs the block as it is.
"""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastff.nn.convolution import quickened
from fastff.nn.tail import ACTIVATIONS, Tail, activation_name, hooked

FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", "relu_": "relu", F.relu6: "relu6", F.hardswish: "hardswish", F.silu: "silu",
    F.gelu: "gelu",
}  # fmt: skip
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)


class Body:
    """A block's training graph: body.forward(*alive) as block(*alive), and the Tail that can end it, or None."""

    def __init__(self, block):
        whole = block.train_graph_module if block.train_graph_module is not None else block.graph_module
        modes = {module: module.training for module in whole.modules()}
        try:
            whole.train()
            graph = _Tracer().trace(whole)
        finally:
            for module, mode in modes.items():
                module.training = mode
        modules = dict(whole.named_modules())
        called = {n.target for n in whole.graph.nodes if n.op == "call_module"}
        kept = {n.target for n in graph.nodes if n.op == "call_module"}
        stand_ins = {name: found for name in kept if (found := quickened(modules[name])) is not None}
        self.forward = _graph_module(whole, graph, stand_ins)
        inside = _below(modules, called)
        self.inside = [modules[name] for name in inside]
        self.bypassed = [modules[name] for name in inside - _below(modules, kept - stand_ins.keys())]
        self.tail = _match(whole, graph, stand_ins)

    def ready(self):
        """Whether this may stand in for the block now: all of it in training, and no hook would be passed over."""
        return all(m.training for m in self.inside) and not hooked(self.bypassed)

    def graph_modules(self):
        return [self.forward] if self.tail is None else [self.forward, self.tail.body]


def find(block):
    """The Body of a cut.Block, or None where it cannot be traced."""
    try:
        return Body(block)
    except Exception:  # whatever a model's own code raises when it is traced
        return None


def _below(modules, paths):
    """Names of these modules and all inside them."""
    return {name for name in modules for path in paths if name == path or name.startswith(path + ".")}


def _graph_module(root, graph, stand_ins):
    """A GraphModule that calls `stand_ins` instead of the modules of their names; the root's own stay."""
    module = fx.GraphModule(root, graph)
    for name, found in stand_ins.items():
        if any(n.target == name for n in graph.nodes if n.op == "call_module"):
            *path, last = name.split(".")
            setattr(module.get_submodule(".".join(path)), last, found)
    return module


def _match(whole, graph, stand_ins):
    """The Tail at the end of the graph, or None."""
    modules = dict(whole.named_modules())
    output = next(node for node in graph.nodes if node.op == "output")
    results = output.args[0]
    main = results[0]
    if len(main.users) > 1 or results.count(main) > 1:
        return None
    chain = []  # the nodes that the tail stands for

    def module_of(node):
        return modules[node.target] if node.op == "call_module" else None

    def through_identities(node):
        while (
            type(module_of(node)) in (nn.Identity, nn.Dropout)
            and not getattr(module_of(node), "p", 0)
            and len(node.users) == 1
        ):
            chain.append(node)
            node = node.args[0]
        return node

    node = through_identities(main)
    activation, apply = "none", nn.Identity()
    if type(module_of(node)) in ACTIVATIONS and activation_name(module_of(node)):
        activation, apply = activation_name(module_of(node)), module_of(node)
    elif node.op in ("call_function", "call_method") and node.target in FUNCTIONS and len(node.all_input_nodes) == 1:
        if node.kwargs.get("approximate", "none") != "none":
            return None
        activation = FUNCTIONS[node.target]
        apply = getattr(F, activation)
    if activation != "none":
        chain.append(node)
        node = through_identities(node.args[0])
        if len(node.users) > 1:
            return None
    residual = None
    if node.target in ADDITIONS and len(node.args) == 2 and not node.kwargs and len(node.all_input_nodes) == 2:
        chain.append(node)
        mark, pair = len(chain), node.args
        for side in (0, 1):
            node, residual = through_identities(pair[side]), pair[1 - side]
            if type(module_of(node)) is nn.BatchNorm2d and len(node.users) == 1:
                break
            del chain[mark:]
    if type(module_of(node)) is not nn.BatchNorm2d or len(node.users) > 1:
        return None
    y = node.args[0]
    chain.append(node)
    if y in results or residual in chain:
        return None

    body, copies = fx.Graph(), {}
    for old in graph.nodes:
        if old.op != "output" and old not in chain:
            copies[old] = body.node_copy(old, copies.__getitem__)
    body.output((copies[y], None if residual is None else copies[residual], *(copies.get(r, r) for r in results[1:])))
    bypassed = [module_of(n) for n in chain if n.op == "call_module"]
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    alone = (
        all(n.op in ("placeholder", "call_module", "output") for n in body.nodes)
        and y.op == "call_module"
        and y.args == (inputs[0],)
    )
    single = stand_ins.get(y.target) if alone and sum(n.op == "call_module" for n in body.nodes) == 1 else None
    body = _graph_module(whole, body, stand_ins)
    return Tail(body, module_of(node), activation, apply, residual is not None, bypassed, single)
