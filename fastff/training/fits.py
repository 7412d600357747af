"""Whether the contents of a checkpoint fit a trainer. Everything is looked at, and optimisers tried out on copies, before anything is written."""

import copy
from collections.abc import Sequence

import torch

from fastff.arguments import first_line, plain
from fastff.training.checkpoint import CheckpointError
from fastff.training.randomness import random_state, set_random_state

NOTHING = object()  # stands for a key that is missing
OPTIONAL = (dict, type(None))
CONTENTS = {
    "kind": str, "names": list, "meta": OPTIONAL, "module": dict, "optimizers": list, "scalers": list, "random": dict,
    "epoch_random": OPTIONAL, "steps": int, "position": dict, "history": list, "totals": (torch.Tensor, type(None)),
}  # fmt: skip


def check(saved, kind, engine):
    """Raise CheckpointError unless the contents of a checkpoint (state.save) are those of a trainer of this kind with this engine."""
    for key, types in CONTENTS.items():
        _of_type(key, saved.get(key, NOTHING), types)
    if saved["kind"] != kind or saved["names"] != list(engine.names):
        text = f"it has {saved['kind']} of {saved['names']}, expected {kind} of {list(engine.names)}"
        raise CheckpointError(f"of another network or cut: {text}")
    _same_form("its weights do not fit this network", saved["module"], engine.module.state_dict())
    for name, those in (("optimizers", engine.optimizers), ("scalers", engine.scalers)):
        if len(saved[name]) != len(those):
            raise CheckpointError(f"its {name} do not fit: expected {len(those)} of them, got {len(saved[name])}")
    for index, (optimizer, state) in enumerate(zip(engine.optimizers, saved["optimizers"], strict=True)):
        _check_optimizer(f"optimizers[{index}]", optimizer, state)
    for index, (scaler, state) in enumerate(zip(engine.scalers, saved["scalers"], strict=True)):
        _of_type(f"scalers[{index}]", state, OPTIONAL)
        if scaler is not None and state is not None:
            _same_form(f"scalers[{index}] does not fit", state, scaler.state_dict())
            for name, value in state.items():
                _of_type(f"scalers[{index}][{name!r}]", value, (int, float))
    _check_progress(saved, len(engine.names))


def _check_progress(saved, losses):
    counts = {f"position[{key!r}]": saved["position"].get(key, NOTHING) for key in ("epoch", "batch")}
    for name, count in ({"steps": saved["steps"]} | counts).items():
        _of_type(name, count, int)
        if count < 0:
            raise CheckpointError(f"expected {name} of at least 0, got {count}")
    for index, row in enumerate(saved["history"]):
        _of_type(f"history[{index}]", row, dict)
    if saved["totals"] is not None:
        _same_form("its totals do not fit", {"totals": saved["totals"]}, {"totals": torch.zeros(3, losses)})
    if saved["position"]["batch"] and saved["epoch_random"] is None:
        raise CheckpointError("expected epoch_random, the random state at the start of the epoch, got nothing")
    now = random_state()
    try:
        for key in ("random", "epoch_random"):
            try:
                if saved[key] is not None:
                    set_random_state(saved[key])
                    states = saved[key].get("loader", [])
                    if not isinstance(states, list) or not all(isinstance(t, torch.Tensor) for t in states):
                        raise TypeError("its loader's are no list of tensors")
            except Exception as error:
                text = f"expected the states of random generators as {key}, got others"
                raise CheckpointError(f"{text} ({type(error).__name__}: {first_line(error)})") from error
    finally:
        set_random_state(now)


def _of_type(what, value, types):
    if not isinstance(value, types) or isinstance(value, bool):
        got = "nothing" if value is NOTHING else f"a {type(value).__name__}"
        names = " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
        raise CheckpointError(f"expected {what} as {names}, got {got}")


def _form(value):
    """What has to be the same in a checkpoint and here: the shape of a tensor and its kind of numbers, else the kind of a value."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape) if value.is_floating_point() else (tuple(value.shape), "not floating")
    if isinstance(value, dict):
        return "dict"
    return "text" if isinstance(value, str) else len(value) if isinstance(value, Sequence) else "a number"


def _same_form(what, saved, own):
    """Raise CheckpointError unless two dicts have the same keys and values of the same form."""
    has, expected = ({name: _form(value) for name, value in d.items()} for d in (saved, own))
    if has != expected:
        name = next(n for n in (*expected, *has) if has.get(n) != expected.get(n))
        text = f"{name} is {has.get(name, 'nothing')} there, expected {expected.get(name, 'nothing')}"
        raise CheckpointError(f"{what}: {text}")


def _check_optimizer(what, optimizer, saved):
    _of_type(what, saved, dict)
    for key, types in (("state", dict), ("param_groups", list), ("class", str)):
        value = saved.get(key, type(optimizer).__name__ if key == "class" else NOTHING)  # 0.1 has no "class"
        _of_type(f"{what}[{key!r}]", value, types)
    made = saved.get("class", type(optimizer).__name__)
    if made != type(optimizer).__name__:
        raise CheckpointError(f"{what} does not fit: it is of {made}, expected {type(optimizer).__name__}")
    for group, mine in zip(saved["param_groups"], optimizer.state_dict()["param_groups"], strict=False):
        _of_type(f"a group of {what}", group, dict)
        _of_type(f"base_lr of {what}", group.get("base_lr", NOTHING), (int, float, torch.Tensor))
        if group.get("params") != mine["params"]:
            raise CheckpointError(
                f"{what} does not fit: expected parameters {mine['params']}, got {group.get('params')}"
            )
        both = group.keys() & mine.keys()  # the trial finds what is missing
        _same_form(f"{what} does not fit", *({key: plain(d[key]) for key in both} for d in (group, mine)))
    try:
        groups = groups_here(optimizer, saved["param_groups"])
        expected = _state_after_a_step(optimizer, groups)
        _copy(optimizer, saved["state"], groups)
    except Exception as error:
        if not _can_be_tried(optimizer):
            return
        text = f"a {type(optimizer).__name__} cannot go on from it ({type(error).__name__}: {first_line(error)})"
        raise CheckpointError(f"{what} does not fit: {text}") from error
    for index, state in saved["state"].items():
        _of_type(f"{what}: state[{index!r}]", state, dict)
        if index not in expected:
            raise CheckpointError(f"{what} does not fit: expected states of {len(expected)} parameters, got {index!r}")
        _same_form(f"{what} does not fit: state[{index}]", state, expected[index])


def groups_here(optimizer, groups):
    """Return saved groups in which what a CUDA graph asks for (recording.py) is as it is here: optimizers on a CPU do not take it."""
    found = list(groups)
    for index, (group, mine) in enumerate(zip(groups, optimizer.param_groups, strict=False)):
        here = {"capturable": mine["capturable"]} if "capturable" in group.keys() & mine.keys() else {}
        if isinstance(group.get("lr"), torch.Tensor) and not isinstance(mine["lr"], torch.Tensor):
            here["lr"] = float(group["lr"])
        found[index] = group | here
    return found


def _copy(optimizer, state, groups):
    """Return a copy of the optimizer, and of its parameters, with this state. Hooks are not copied."""
    copied = copy.deepcopy(optimizer)
    copied.load_state_dict({"state": state, "param_groups": groups})
    return copied


def _state_after_a_step(optimizer, groups):
    """Return the state that a first step with these groups gives each parameter, which has the form of every later one."""
    copied = _copy(optimizer, {}, groups)
    for group in copied.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    copied.step()
    return copied.state_dict()["state"]


def _can_be_tried(optimizer):
    """Whether a copy of the optimizer makes a step with its own groups. Some classes keep attributes that copies do not have."""
    try:
        return _state_after_a_step(optimizer, optimizer.state_dict()["param_groups"]) is not None
    except Exception:
        return False
