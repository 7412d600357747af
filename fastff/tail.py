"""Finding the tail of a block: its graph opened down to PyTorch's own modules, and the pattern at its end.

    y = anything;  h = BatchNorm2d(y) [+ residual];  main = [activation](h)

Modules of the block that the cut calls whole (a BasicBlock) are opened, as the cut opens those it goes through; what cannot be traced, or
ends otherwise, has no tail and trains as before. Training only: evaluation runs the block as it is.
"""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastff.nn.tail import ACTIVATIONS, Tail, activation_name

FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", "relu_": "relu", F.relu6: "relu6", F.hardswish: "hardswish", F.silu: "silu",
    F.gelu: "gelu",
}  # fmt: skip
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)


def find(block):
    """The Tail of a cut.Block, or None."""
    whole = block.train_graph_module if block.train_graph_module is not None else block.graph_module
    modes = {module: module.training for module in whole.modules()}
    try:
        whole.train()
        graph = _Tracer().trace(whole)
    except Exception:  # whatever a model's own code raises when it is traced: the block has no tail then
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    return _match(whole, graph)


def _match(whole, graph):
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
    called = {n.target for n in graph.nodes if n.op == "call_module" and n not in chain}
    inside = {name for n in whole.graph.nodes if n.op == "call_module" for name, _ in _named(modules, n.target)}
    kept = {name for target in called for name, _ in _named(modules, target)}
    return Tail(
        fx.GraphModule(whole, body), module_of(node), activation, apply, residual is not None,
        bypassed=[modules[name] for name in sorted(inside - kept)], inside=[modules[name] for name in sorted(inside)],
    )  # fmt: skip


def _named(modules, path):
    return [(name, m) for name, m in modules.items() if name == path or name.startswith(path + ".")]
