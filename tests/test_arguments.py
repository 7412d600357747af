"""Every argument of every public function: a wrong value raises an error that begins with the argument's name, and says what came."""

import inspect

import pytest
import torch

import fastff.functional as ff

B, C, K = 4, 6, 3
NAN, INF = float("nan"), float("inf")
TENSOR = [
    None,
    "a",
    1.5,
    object(),
    [1.0],
    torch.zeros(B, C, 5, 5, dtype=torch.int64),
    torch.zeros(0),
    torch.zeros(2, 2, 2, 2, 2, 2),
]
OPTIONAL = TENSOR[1:]
CHOICE = [0, 1.5, "a", object(), [], True]
FLAG = ["a", 2, 0.5, object(), []]
NUMBER = [None, "a", object(), [1.0], NAN, INF, 1j]
POSITIVE = [*NUMBER, -1.0]
COUNT = [None, "a", 0, -1, 1.5, object(), [1], NAN]
WRONG = {
    "x": TENSOR, "y": TENSOR, "g": TENSOR, "weight": TENSOR, "bias": OPTIONAL, "grid_weight": OPTIONAL, "target": TENSOR, "label": TENSOR,
    "bn_weight": OPTIONAL, "bn_bias": OPTIONAL, "residual": OPTIONAL, "grad_scale": [*OPTIONAL, torch.zeros(2), torch.tensor(1)],
    "padding": [None, "a", 1.5, -1, (1,), (1, 1, 1), (1, "a"), (-1, 0), object()], "tau": [*POSITIVE, 0.0, torch.zeros(2), torch.tensor(1)],
    "margin": NUMBER, "label_smoothing": [*POSITIVE, 1.0], "theta": NUMBER, "alpha": NUMBER, "eps": POSITIVE, "bn_eps": POSITIVE,
    "reduction": [None, *CHOICE], "normalize": CHOICE, "how": CHOICE, "loss": [None, *CHOICE], "activation": [None, *CHOICE],
    "over": [None, *CHOICE], "impl": [None, *CHOICE, "auto,nothing"], "algorithm": [None, *CHOICE], "channel_dim": [None, "a", 0, 7, 1.5, []],
    "groups": [*COUNT, C + 1], "power": [None, "a", 0, 3, 1.5, NAN, object(), []], "num_classes": [*COUNT, 10_000],
    "need_grad_x": [None, *FLAG], "need_grad_residual": [None, *FLAG], "mean": [None, *FLAG], "positions": [None, *FLAG],
    "value": ["a", object(), [1.0], torch.zeros(2)],
    "hidden": ["a", 1.5, object(), (torch.zeros(5, C),), *map(ff.Hidden, TENSOR), ff.Hidden(torch.zeros(5, C), *[object()] * 5)],
}  # fmt: skip


def right():
    """The arguments that are right, by name."""
    return {
        "x": torch.randn(B, C, 5, 5), "y": torch.randn(B, C, 5, 5), "g": torch.randn(B, K), "weight": torch.randn(K, C), "bias": torch.randn(K),
        "target": torch.zeros(B, dtype=torch.int64), "label": torch.zeros(B, dtype=torch.int64), "num_classes": K, "groups": 1,
    }  # fmt: skip


FUNCTIONS = {
    name: function
    for name, function in vars(ff).items()
    if inspect.isfunction(function) and function.__module__ == ff.__name__ and not name.startswith("_")
}


def arguments(name):
    """(argument, wrong value) for each argument of a function."""
    for parameter in inspect.signature(FUNCTIONS[name]).parameters:
        if (name, parameter) != ("loss_of", "loss"):
            right_here = (
                1 if (name, parameter) == ("overlay_label", "x") else 0
            )  # which may have any number of dimensions
            values = WRONG[parameter]
            yield from ((parameter, value) for value in values[: len(values) - right_here])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_values_are_named(name):
    wrong = []
    for argument, value in arguments(name):
        given = {k: v for k, v in right().items() if k in inspect.signature(FUNCTIONS[name]).parameters}
        if name == "loss_of":
            given["loss"] = ff.Loss(target=right()["target"])
        called = f"{name}({argument}={value!r:.60})".replace("\n", " ")
        try:
            FUNCTIONS[name](**given | {argument: value})
        except (TypeError, ValueError, RuntimeError) as error:
            text = str(error).splitlines()[0]
            said = (
                f"{argument}:",
                f"{argument}=",
                *(f"hidden_{field}:" for field in ff.Hidden._fields if argument == "hidden"),
            )
            if not text.startswith(said) or isinstance(error, RuntimeError):
                wrong.append(f"{called}: {type(error).__name__}: {text[:100]}")
        except Exception as error:
            wrong.append(f"{called}: {type(error).__name__}: {error}"[:150])
        else:
            wrong.append(f"{called}: accepted")
    assert not wrong, f"{len(wrong)} of {len(list(arguments(name)))}\n" + "\n".join(wrong)
