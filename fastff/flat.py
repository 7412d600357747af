"""A Step as one flat list of arguments, as PyTorch's ops take it: the schema of an op, and the way there and back. It follows from spec's fields."""

import typing

import torch

from fastff.spec import Epilogue, Groups, Loss, MaybeTensor, Normalization, Pair, Projection, Step

TYPES = {
    torch.Tensor: "Tensor", MaybeTensor: "Tensor?", float: "float", int: "int", bool: "bool", str: "str", Pair: "SymInt[2]"
}  # fmt: skip

PARTS = {"epilogue": Epilogue, "projection": Projection, "groups": Groups, "loss": Loss, "normalization": Normalization}
OPTIONAL = ("epilogue", "projection", "groups")  # preceded by a flag that says whether the part is there
ABSENT = {"epilogue": Epilogue(), "projection": Projection(None), "groups": Groups()}


def schema(names=tuple(PARTS)):
    """The arguments that these parts add to the schema of an op, such as "float loss_tau", in the order of `flatten`."""
    arguments = []
    for name in names:
        arguments += [f"bool has_{name}"] if name in OPTIONAL else []
        hints = typing.get_type_hints(PARTS[name])
        arguments += [f"{TYPES[hints[field]]} {name}_{field}" for field in PARTS[name]._fields]
    return ", ".join(arguments)


def flatten(step):
    """The parts of a Step as one list of arguments, in the order of `schema()`."""
    is_projection = isinstance(step.goodness, Projection)
    given = {
        "epilogue": step.epilogue, "projection": step.goodness if is_projection else None, "groups": None if is_projection else step.goodness,
        "loss": step.loss, "normalization": step.normalization,
    }  # fmt: skip
    values = []
    for name, part in given.items():
        values += [part is not None] if name in OPTIONAL else []
        values += part if part is not None else ABSENT[name]
    return values


def unflatten(x, values, need_grad_x=True, algorithm="auto"):
    """The Step of x and what `flatten` gave."""
    values, found = iter(values), {}
    for name, part in PARTS.items():
        here = next(values) if name in OPTIONAL else True
        fields = [next(values) for _ in part._fields]
        found[name] = part(*(tuple(v) if isinstance(v, list) else v for v in fields)) if here else None
    goodness = found["projection"] or found["groups"]
    return Step(x, found["epilogue"], goodness, found["loss"], found["normalization"], need_grad_x, algorithm)
