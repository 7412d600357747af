"""The benchmarks of single kernels: a wrong result prints no number, a right one a line and rows in long form, and these make a table."""

import argparse
import copy
import csv
import sys
import weakref
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastff.functional as ff
import fastff.graph.fused
from benchmarks import (
    convolution,
    depthwise,
    epilogue,
    extra_losses,
    goodness,
    gpu_cases,
    gpu_report,
    group_goodness,
    layer_norm,
    muon,
    normalization,
    runner,
    tables,
    timing,
)  # fmt: skip
from fastff import SFF, Trainer, bench, models
from fastff.plan import Segment
from fastff.training.loader import Loader

FAMILIES = [shape[0] for shape in group_goodness.SHAPES]
CASES = {  # name: (module, what makes it one small case, its contenders)
    "goodness": (goodness, {"SHAPES": [(4, 16, 8, 10)]}, ["eager", "fastff"]),
    "epilogue": (epilogue, {"SHAPES": [(4, 16, 8, 10)], "RESIDUALS": ["gradient"]}, ["eager", "by parts", "fused"]),
    "depthwise": (depthwise, {"SHAPES": [(4, 16, 8, 3, 1)], "GRADIENTS": ["x and weight"]}, ["pytorch", "fastff"]),
    "convolution": (
        convolution, {"SHAPES": [(4, 16, 8, 16, 3, 1)], "PASSES": [convolution.PASSES[2]]}, ["onednn", "fastff"],
    ),
    "muon": (muon, {"SHAPES": [("resnet18", 4)]}, ["torch", "fastff", "adamw"]),
    "layer_norm": (layer_norm, {"SHAPES": [(4, 16, 8)], "OVER": ["sample"]}, ["eager", "fastff"]),
    "layer_norm over channels": (
        layer_norm, {"SHAPES": [(4, 16, 8)], "OVER": ["channels"]}, ["eager", "fastff", "normalize"],
    ),
    "normalization": (
        normalization, {"SHAPES": [(4, 20)], "WRITTEN": {"l2": normalization.WRITTEN["l2"]}, "BACKWARD": (True,)}, ["eager", "fastff"],
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
    (
        "convolution",
        convolution.op,
        "gradients",
        lambda f: lambda *args: [None if g is None else too_large(g) for g in f(*args)],
    ),
    ("depthwise", fastff.graph.fused, "convolve", result),
    ("depthwise", fastff.graph.fused, "convolve", lambda f: lambda x, *args: f(gradient_too_large(x), *args)),
    ("depthwise", fastff.graph.fused, "convolve", lambda f: lambda x, w, *args: f(x, gradient_too_large(w), *args)),
    ("layer_norm", ff, "layer_norm", result),
    ("layer_norm over channels", ff, "layer_norm", result),
    ("layer_norm over channels", ff, "normalize", result),
    ("normalization", ff, "normalize", result),
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
    runner.check(runner.Case({}, {"base": lambda: (one,), "other": lambda: (one,)}, [exact]))
    for wrong in (one + 1, one * float("nan"), torch.ones(1)):
        with pytest.raises(runner.WrongResult, match="output 0 of other is off"):
            runner.check(runner.Case({}, {"base": lambda: (one,), "other": lambda w=wrong: (w,)}, lambda: [exact]))
    nearly = one + 1e-5  # as torch.compile sums
    runner.check(runner.Case({}, {"base": lambda: (one,), "compiled": lambda: (nearly,)}, [exact]))
    for name, off in (("other", nearly), ("compiled", one + 1e-3)):
        with pytest.raises(runner.WrongResult, match=f"output 0 of {name} is off"):
            runner.check(runner.Case({}, {"base": lambda: (one,), name: lambda off=off: (off,)}, [exact]))
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


def test_fastff_bench_compares_with_the_faster_normalization(monkeypatch):
    """Of a channels_last tensor PyTorch's layer norm makes a copy, unless it is called with the dimensions in the order of the memory."""
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(bench.flat_norm(x), bench.written_norm(x))
    assert bench.flat_norm(x).stride() == x.stride() != bench.written_norm(x).stride()
    seconds = {"written": [4.0], "flat": [2.0], "fastff": [1.0]}
    monkeypatch.setattr(bench, "interleave", lambda functions, rounds: {name: seconds[name] for name in functions})
    for row in bench.run("cpu", 1, [(2, 16, 4, 3)]):
        assert (row.speedup, row.milliseconds) == (2.0, 1e3)


def test_rows_are_added_to_the_columns_of_the_file(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    timing.append_csv(path, [{"a": 1}, {"a": 2, "b": 3}])
    timing.append_csv(path, [{"b": 5, "a": 4}])
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [(row["a"], row["b"]) for row in rows] == [("1", ""), ("2", "3"), ("4", "5")]
    with pytest.raises(ValueError, match="fieldnames"):
        timing.append_csv(path, [{"c": 6}])


def test_tables_of_gpus(run, tmp_path):
    """Without results the page says so; `run` has put the folder of the results here."""
    assert gpu_report.table() == "Not measured yet: `make gpu`. Nothing has run on a GPU so far."
    folder = tmp_path / "gpu-a-card"
    times = {"cold_us": 20, "warm_us": 10, "host_us": 300, "launches": 2, "mbytes": 3.0}
    case = gpu_cases.Case("goodness_step", 512, 64, 32, 10).columns
    rows = [
        case | {"contender": name, "state": "ok"} | times | {"cold_us": cold}
        for name, cold in (("eager", 90), ("compiled", 60), ("triton", 20))
    ]
    rows.append(case | {"contender": "cuda", "state": "refused: too wide"} | dict.fromkeys(times))
    timing.append_csv(folder / "kernels.csv", rows)
    timing.append_csv(folder / "rates.csv", [{"rate": "copy", "value": 3000.0, "unit": "GB/s"}])
    text = gpu_report.table()
    assert "**a-card**" in text
    assert "| `goodness_step` | 512, 64, 32, 10; bf16 | 1 | 90 | 60 | 20 | refused | 3.00 x | 10 | 300 | 2 |" in text


def _train_with(sff, loader, kind, weight, epochs, lr):
    """Train the two segments of `sff`, the first in two parts, with plain SGD and a term of extra_losses as its source writes it."""
    labels, loader.labels, before, added = loader.labels, torch.arange(len(loader.labels)), None, []
    logits = {last: torch.zeros(len(labels), 5, dtype=torch.float64) for last in (3, 8)}
    for name, module in sff.model.named_modules():
        if name.endswith("bn2"):
            module.register_forward_hook(lambda module, inputs, output: added.append(output))
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for images, numbers in loader:
            following, samples = images, len(images)
            for first, last, parts in ((0, 3, 2), (4, 8, 1)):
                pairs, done, head = zip(following.chunk(parts), numbers.chunk(parts), strict=True), [], sff.heads[last]
                for x, n in pairs:
                    added.clear()
                    for block in sff.local_blocks[first : last + 1]:
                        z = block.outputs(x)[0]
                        x = block.next_input(z)
                    g, target = head(z), labels[n]
                    logits[last][n], loss = head.logits(g).detach(), head.loss(g, target)
                    if kind == "similarity":
                        one_hot = torch.eye(5, dtype=torch.float64)[target]
                        difference = torch.corrcoef(z.flatten(2).std(2)) - torch.corrcoef(one_hot)
                        loss = loss + weight * difference.square().mean()
                    elif kind == "kinetic":
                        loss = loss + weight * sum(r.square().mean() for r in added)
                    elif before is not None:
                        soft = -(before[n] * head.logits(g).log_softmax(1)).sum(1).mean()
                        loss = (1 - weight) * loss + weight * soft
                    (loss * len(x) / samples).backward()
                    done.append(x.detach())
                following = torch.cat(done)
            with torch.no_grad():
                for p in sff.parameters():
                    if p.grad is not None:
                        p -= lr * p.grad
                        p.grad = None
        before = ((logits[3].log_softmax(1) + 2 * logits[8].log_softmax(1)) / 3).softmax(1)


@pytest.mark.parametrize("kind, weight", [("similarity", 3.0), ("kinetic", 0.5), ("vote_before", 0.5)])
def test_extra_terms_of_losses_train_as_plain_pytorch_does(kind, weight):
    torch.manual_seed(0)
    net = models.resnet18(num_classes=5, stem="cifar", width=4).double()
    plan = [Segment(0, 3, 2), Segment(4, 8)]
    with_term = SFF(net, 5, input_shape=(3, 16, 16), plan=plan)
    expected, without = copy.deepcopy(with_term), copy.deepcopy(with_term)
    pixels, labels = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8), torch.arange(16) % 5
    make = lambda: Loader(pixels, labels, 8, mean=[0.5] * 3, std=[0.25] * 3, shuffle=True, dtype=torch.float64)  # noqa: E731
    for sff, asked in ((with_term, weight), (without, 0.0)):
        trainer, loader = Trainer(sff, lambda p: torch.optim.SGD(p, lr=0.05), lr_schedule="constant"), make()
        values = extra_losses.add(kind, asked, trainer, loader)
        trainer.fit(loader, 2, progress=False)
    assert len(values) == 4 * (11 if kind == "kinetic" else 3)  # steps; losses, or residual blocks, once for each part
    _train_with(expected, make(), kind, weight, epochs=2, lr=0.05)
    pairs = list(zip(with_term.parameters(), expected.parameters(), strict=True))
    assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-11) for p, q in pairs)
    moved = [(p - q).abs().max() for p, q in zip(with_term.parameters(), without.parameters(), strict=True)]
    assert max(moved) > 1e-4  # the term makes a difference that the comparison sees
