"""Graphs as modules: a GraphModule that calls a model's own modules, and what must not change while it stands in for them."""

import copy
import itertools
import operator

from torch import fx, nn

from fastff.graph.snapshot import is_plain, same


class Read(nn.Module):
    """A parameter or buffer of a module of the model, looked up each time, since the model may have got another."""

    def __init__(self, root, path):
        super().__init__()
        *owner, self.attribute = path.split(".")
        self.owner = (root.get_submodule(".".join(owner)),)  # in a tuple, so as not to be a submodule

    def forward(self):
        return getattr(self.owner[0], self.attribute)

    def _only(self, kind):
        found = self.owner[0].__dict__[kind].get(self.attribute) if "owner" in self.__dict__ else None
        return {} if found is None else {self.attribute: found}

    # nn.Module.parameters() and buffers() read these
    _parameters = property(lambda self: self._only("_parameters"), lambda self, value: None)
    _buffers = property(lambda self: self._only("_buffers"), lambda self, value: None)


def graph_module(root, graph, modules):
    """A GraphModule that calls root's own modules, or those in `modules` by path, and reads its parameters when they are needed."""
    owners, taken = {}, {node.target for node in graph.nodes if node.op == "call_module"}
    names = (f"fastff_read_{i}" for i in itertools.count())
    for node in list(graph.nodes):
        if node.op == "get_attr":
            name = next(n for n in names if n not in taken)  # the root may be such a graph
            owners[name] = Read(root, node.target)
            with graph.inserting_before(node):
                call = graph.call_module(name, ())
            node.replace_all_uses_with(call)
            graph.erase_node(node)
        elif node.op == "call_module":
            owners[node.target] = modules.get(node.target) or root.get_submodule(node.target)
    return fx.GraphModule(owners, graph)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
READY: tuple = (True, {}, {}, {}, {})  # a module in training mode without hooks
_readiness = operator.itemgetter("training", *HOOKS)


class Watch:
    """Attributes of modules that a graph depends on, {module: names}, to be looked at before it is used; and their classes and children."""

    def __init__(self, names):
        self.entries = []
        for module, read in names.items():
            wanted = [
                n for n in read if n != "training" and (n in vars(module) or is_plain(getattr(type(module), n, ...)))
            ]
            of_class = not vars(module).keys() >= set(wanted)  # a default that an attribute may yet replace
            wanted = ["_modules", "_modules", *wanted]
            get = (operator.attrgetter if of_class else operator.itemgetter)(*wanted)
            found = get(module if of_class else vars(module))
            # modules are compared by identity, values in lists and dicts, which may be nested, as they were
            values = (*(v.copy() for v in found[:2]), *map(copy.deepcopy, found[2:]))
            forward = vars(module).get("forward")  # of this instance alone, where it has one
            self.entries.append((module, type(module), forward, get, of_class, values, wanted))

    def ready(self):
        """Whether nothing has changed, all modules are in training mode, and none has a hook."""
        return all(_readiness(module.__dict__) == READY for module, *_ in self.entries) and self.unchanged()

    def unchanged(self):
        """Whether nothing has changed. Modes and hooks do not count."""
        try:
            for module, cls, forward, get, of_class, values, _ in self.entries:
                own = module.__dict__
                if type(module) is not cls or own.get("forward") is not forward:
                    return False
                if get(module if of_class else own) != values:
                    return False
        except (KeyError, AttributeError, RuntimeError):  # an attribute is gone, or has become a tensor
            return False
        return True

    def change(self):
        """What has changed, as a text."""
        for module, cls, forward, _, _, values, wanted in self.entries:
            if vars(module).get("forward") is not forward:
                return f"forward of a {cls.__name__}"
            for name, old in zip(wanted, values, strict=True):
                now = getattr(module, name, None)
                if name != "_modules" and not same(now, old):
                    return f"{name} of a {cls.__name__} from {old!r} to {now!r}"
            if type(module) is not cls or dict(module._modules) != values[0]:
                return f"the modules of a {cls.__name__}"
        return "an attribute"
