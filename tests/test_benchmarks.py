"""The benchmarks of single kernels: a wrong result prints no number, a right one a line and rows in long form, and these make a table."""

import argparse
import csv
import sys
import weakref
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastff.functional as ff
import fastff.graph.fused
from benchmarks import convolution, depthwise, epilogue, goodness, group_goodness, layer_norm, runner, tables

FAMILIES = [shape[0] for shape in group_goodness.SHAPES]
CASES = {  # name: (module, what makes it one small case, its contenders)
    "goodness": (goodness, {"SHAPES": [(4, 16, 8, 10)]}, ["eager", "fastff"]),
    "epilogue": (epilogue, {"SHAPES": [(4, 16, 8, 10)], "RESIDUALS": ["gradient"]}, ["eager", "by parts", "fused"]),
    "depthwise": (depthwise, {"SHAPES": [(4, 16, 8, 3, 1)], "GRADIENTS": ["x and weight"]}, ["pytorch", "fastff"]),
    "convolution": (convolution, {"SHAPES": [(4, 16, 8, 16, 3, 1)]}, ["onednn", "fastff", "forward"]),
    "layer_norm": (layer_norm, {"SHAPES": [(4, 16, 8)], "OVER": ["sample"]}, ["eager", "fastff"]),
    "layer_norm over channels": (
        layer_norm, {"SHAPES": [(4, 16, 8)], "OVER": ["channels"]}, ["eager", "fastff", "normalize"],
    ),
} | {
    family: (group_goodness, {"SHAPES": [(family, 4, 20, 8, 10 if "cwcomp" in family or "deeper" in family else 1)]}, ["eager", "fastff"])
    for family in dict.fromkeys(FAMILIES)
}  # fmt: skip


def too_large(tensor):
    return tensor * 1.01


def gradient_too_large(tensor):
    return tensor + 0.01 * (tensor - tensor.detach())


def of_a_step(field):
    """A step function whose `field` is 1 % too large."""
    return lambda f: lambda *args, **kw: (step := f(*args, **kw))._replace(**{field: too_large(getattr(step, field))})


def result(f):
    return lambda *args, **kw: too_large(f(*args, **kw))


WRONG = [  # (case, owner and name of the function that goes wrong, how)
    *(("goodness", ff, "goodness_step", of_a_step(field)) for field in ("loss", "grad_x", "grad_weight")),
    *(
        ("epilogue", ff, "tail_step", of_a_step(field))
        for field in ("loss", "normalized", "grad_x", "grad_residual", "grad_bn_weight", "grad_bn_bias", "grad_weight")
    ),
    ("epilogue", ff, "goodness_step", of_a_step("grad_x")),
    ("convolution", torch.ops.fastff, "convolution_weight_gradient", result),
    ("depthwise", fastff.graph.fused, "convolve", result),
    ("depthwise", fastff.graph.fused, "convolve", lambda f: lambda x, *args: f(gradient_too_large(x), *args)),
    ("depthwise", fastff.graph.fused, "convolve", lambda f: lambda x, w, *args: f(x, gradient_too_large(w), *args)),
    ("layer_norm", ff, "layer_norm", result),
    ("layer_norm over channels", ff, "layer_norm", result),
    ("layer_norm over channels", ff, "normalize", result),
    *(
        (family, ff, "group_goodness_step", of_a_step(field))
        for family in dict.fromkeys(FAMILIES)
        for field in ("loss", "grad_x", "normalized")
    ),
]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(name of a case, arguments) -> (lines printed, path of the CSV), the tables' folder being this one."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "LAYOUTS", {"channels_last": torch.channels_last})

    def run(name, *arguments):
        module, small, _ = CASES[name]
        for key, value in small.items():
            monkeypatch.setattr(module, key, value)
        path = tmp_path / f"{module.__name__.split('.')[-1]}.csv"
        monkeypatch.setattr(sys, "argv", ["", "--quick", "--rounds", "1", "--csv", str(path), *arguments])
        try:
            module.main()
        finally:
            lines = capsys.readouterr().out.splitlines()
            assert lines.pop(0).startswith("device ")
            run.printed = lines
        return lines, path

    return run


@pytest.mark.parametrize(("name", "owner", "function", "wrong"), WRONG)
def test_a_wrong_result_prints_no_number(run, name, owner, function, wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(owner, function, wrong(getattr(owner, function)))
    with pytest.raises(runner.WrongResult, match="^wrong result: .* is off by 1.0e-02, allowed are"):
        run(name)
    assert run.printed == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CASES)
def test_line_rows_and_table(run, name):
    module, _, contenders = CASES[name]
    assert module.table().startswith("Not measured yet: `python -m benchmarks.")
    lines, path = run(name)
    assert [line.split()[0] for line in lines] == [lines[0].split()[0], "wrote"]
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows] == contenders
    for row in rows:
        assert row["base"] == contenders[0]
        assert all(float(row[key]) > 0 for key in ("ratio", "ratio_20", "ratio_80", "ms", "mbytes", "floor_ms"))
        assert all(row[key] for key in ("device", "threads", "torch", "commit"))
        assert row["contender"] in lines[0]
    assert float(rows[0]["ratio"]) == 1
    text = module.table()
    assert text == module.table()
    assert len(text.split("\n\n")[0].splitlines()) == 3
    assert "| faster than " in text
    assert f"commit {rows[0]['commit']}." in text


def test_torch_compile_is_a_contender(run, monkeypatch):
    monkeypatch.setattr(runner, "compiled", lambda function: function)
    for name in ("goodness", "epilogue", "layer_norm", "hinton"):
        lines, _ = run(name, "--compile")
        assert "| compiled " in lines[0]
        assert "| than compiled |" in CASES[name][0].table()


def test_quick():
    """About a third, of every family one."""
    a = argparse.Namespace(quick=True)
    for module, _, _ in CASES.values():
        assert 3 * len(runner.chosen(module.SHAPES, a)) <= len(module.SHAPES) + 2
    assert {shape[0] for shape in runner.chosen(group_goodness.SHAPES, a)} == set(FAMILIES)


def test_check():
    one, exact = torch.ones(3), torch.ones(3, dtype=torch.float64)
    contenders = {"base": lambda: (one,), "other": lambda: (one + 1,)}
    runner.check(runner.Case({}, contenders, [exact], unchecked=("other",)))
    for wrong in (one + 1, one * float("nan"), torch.ones(1)):
        with pytest.raises(runner.WrongResult, match="output 0 of other is off"):
            runner.check(runner.Case({}, {"base": lambda: (one,), "other": lambda w=wrong: (w,)}, lambda: [exact]))
    with pytest.raises(runner.WrongResult, match="output 0 of base is off"):
        runner.check(runner.Case({}, {"base": lambda: (one * float("nan"),)}, [exact]))


def test_one_case_is_held_at_a_time():
    held = []

    def case():
        x = torch.ones(3)
        held.append(weakref.ref(x))
        return runner.Case({"case": len(held)}, {"base": lambda: (x,), "other": lambda: (x,)}, lambda: [x.double()])

    def cases():
        for _ in range(3):
            assert all(x() is None for x in held)
            yield case()

    assert len(runner.run(cases(), argparse.Namespace(rounds=1, csv=None))) == 6
