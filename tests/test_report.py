"""The report fills Markdown from CSV files alone; whole-step benchmarks run, and refuse a wrong result."""

import argparse
import csv
import functools
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import learning_report, networks, report, runner, scaling, step, tables  # noqa: E402
from fastff import ops  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MACHINE = {"device": "a processor", "threads": 2, "torch": "2", "python": "3", "fastff": "0", "commit": "abc"}
LEARNED = {"dataset": "cifar10", "model": "resnet18", "width": 16, "images": 5000, "last": 0.5, "blocks": "0.4 0.5"}


@pytest.fixture
def results(monkeypatch, tmp_path):
    """An empty folder in place of benchmarks/results."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(tables, "RESULTS", folder)
    return folder


@pytest.fixture
def pages(tmp_path):
    """README.md and docs/*.md, copied."""
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(page, tmp_path / page.relative_to(ROOT))
    return tmp_path


def write(folder, name, rows):
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *MACHINE])
        writer.writeheader()
        writer.writerows(row | MACHINE for row in rows)


def case(columns, base, others, **more):
    """Rows in long form: others is {contender: (ratio, peak MiB)}."""
    for name, (ratio, mib) in ({base: (1, 10)} | others).items():
        found = {"contender": name, "base": base, "ratio": ratio, "ratio_20": 0.9 * ratio, "ratio_80": 1.1 * ratio}
        yield columns | found | {"ms": 10 * ratio, "ms_20": 9 * ratio, "ms_80": 11 * ratio, "peak_mib": mib} | more


def a_few(folder):
    shape = {"B": 32, "C": 64, "H": 32, "K": 100, "layout": "channels_last", "algorithm": "direct"}
    contenders = {"compiled": (0.5, 9), "fastff": (0.25, 8)}
    write(
        folder,
        "goodness",
        [*case(shape, "eager", contenders), *case(shape | {"K": 7}, "eager", contenders | {"fastff": (1.5, 30)})],
    )
    network = {"model": "resnet18", "width": 64, "batch": 32, "size": 32, "classes": 100}
    steps = {"backprop, compiled": (1.1, 9), "block": (0.8, 3), "defaults": (1.004, 9), "layer": (2.5, 2)}
    write(folder, "step-resnet18-64", list(case(network, "backprop", steps, layout="channels_last")))
    write(folder, "step-resnet18-16", list(case(network | {"width": 16}, "backprop", steps, layout="contiguous")))
    growth = {"growth": 2.0, "growth_20": 1.9, "growth_80": 2.1, "grown_from": 4}
    for axis, (fixed, points, _) in scaling.AXES.items():
        rows = [
            case({"axis": axis} | fixed | {axis: p}, "backprop", {"block": (0.8, 3), "layer": (0.7, 2)}, **growth)
            for p in points
        ]
        write(folder, f"scaling-{axis}", [row for point in rows for row in point])
    runs = [
        ("backprop", 0.6, 40),
        ("grid-w2-lr4", 0.7, 50),
        ("paper", 0.5, 30),
        ("backprop-all", 0.8, 400),
        ("stage-w2-lr4-all", 0.9, 300),
    ]
    rows = []
    for name, vote, seconds in runs:
        task = LEARNED | {"experiment": name, "images": 50000 if name.endswith("-all") else 5000}
        rows += [task | {"epoch": e, "seconds": e * seconds / 2, "vote": vote - 0.1 * (2 - e)} for e in (1, 2)]
    write(folder, "learning", rows)


def test_every_marker_is_known():
    names = {name for page in PAGES for name in re.findall(r"<!-- table ([\w-]+) -->", page.read_text("utf-8"))}
    assert names <= set(report.TABLES)
    ours = re.findall(r"<!-- table ([\w-]+) -->", (ROOT / "docs" / "benchmarks.md").read_text("utf-8"))
    assert len(ours) == len(set(ours))
    for page in PAGES:
        text = page.read_text("utf-8")
        assert len(report.MARKED.findall(text)) == len(re.findall(r"^<!-- (?:table|end)", text, re.M)) / 2, page.name


@pytest.mark.parametrize("name", report.TABLES)
def test_nothing_was_measured(name, results):
    assert report.TABLES[name]().startswith("Not measured yet: `")


def test_twice_is_once(results, pages):
    pytest.importorskip("matplotlib")
    a_few(results)
    for name in ("scale", "roofline", "budget", "swap-in"):  # of no benchmark's common form: as they are
        if (source := ROOT / "benchmarks" / "results" / f"{name}.csv").exists():
            shutil.copy(source, results)
    found = []
    for _ in range(2):
        report.main(pages)
        found.append({path.name: path.read_bytes() for path in [pages / "README.md", *(pages / "docs").glob("*.md")]})
    assert found[0] == found[1]
    page = found[0]["benchmarks.md"].decode()
    for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page):
        assert (pages / "docs" / image).exists()
    assert page.count("](scaling-") == len(scaling.AXES)
    assert "learning-cifar10-resnet18-16-50000.png" in page


def test_an_unknown_marker_is_named(results, pages):
    (pages / "README.md").write_text("<!-- table stepp -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="README.md: expected a table out of goodness, .*, got 'stepp'"):
        report.main(pages)


def test_losses_are_sorted_and_complete(results):
    a_few(results)
    rows = report.TABLES["losses"]().splitlines()[2:]
    lost = [tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in rows]
    time = "channels_last, algorithm direct"
    assert [row[:4] for row in lost] == [
        ("`goodness`", f"fastff: B 32, C 64, H 32, K 7, layout {time}", "compiled", "3.00 x"),
        ("`goodness`", f"fastff: B 32, C 64, H 32, K 7, layout {time}", "eager", "1.50 x"),
        ("`step-resnet18-16`", "layer: model resnet18, width 16, batch 32, size 32, classes 100", "backprop", "2.50 x"),
        ("`step-resnet18-64`", "layer: model resnet18, width 64, batch 32, size 32, classes 100", "backprop", "2.50 x"),
    ], "by the greater of time and memory: 30 MiB after 9 and 10, then 2.5 x; 1.004 x is no loss"
    assert lost[1][4:] == ("1.35 to 1.65", "3.00 x (30.0 MiB against 10.0)")
    learned = report.TABLES["losses-learning"]().splitlines()[2:]
    assert len(learned) == 1 and "paper's setting" in learned[0] and "not reached" in learned[0]


def test_all_images_are_a_task_of_their_own(results):
    a_few(results)
    text = report.TABLES["learning-all"]()
    assert "### cifar10, 50,000 images, resnet18 of width 16, 2 epochs" in text
    below = text.split("50,000 images")[1]
    assert learning_report.LABELS["backprop"] in below and learning_report.LABELS["stage-w2-lr4"] in below
    assert set(learning_report.drawn()) == {f"learning-cifar10-resnet18-16-{n}.png" for n in (5000, 50000)}


def tiny(depth):
    return argparse.Namespace(model="plain", width=8, batch=4, size=8, classes=3, depth=depth)


def test_memory_is_flat_along_depth(monkeypatch):
    monkeypatch.setitem(scaling.AXES, "depth", (scaling.PLAIN, (2, 6), (2, 6)))
    rows = scaling.measure("depth", {depth: tiny(depth) for depth in (2, 6)}, rounds=1)
    peaks = {(row["contender"], row["depth"]): row["peak_mib"] for row in rows}
    assert peaks["backprop", 6] > 1.5 * peaks["backprop", 2]
    for name in ("block", "layer"):
        assert peaks[name, 6] == pytest.approx(peaks[name, 2], rel=0.02)
    assert all(row["growth"] == 1 for row in rows if row["depth"] == 2)


def test_a_wrong_step_prints_no_number(monkeypatch):
    make = functools.partial(scaling.build, tiny(2), "sff", **step.PAPER)
    images, target = step.minibatch(tiny(2))
    step.check(make, images, target)
    right = ops.step.run

    def wrong(described, impl="auto"):
        found = right(described, impl)
        return found if impl == "reference" else found._replace(grad_x=found.grad_x * 1.01)

    monkeypatch.setattr(ops.step, "run", wrong)
    with pytest.raises(runner.WrongResult, match="wrong result: block: what three steps change is off by .*e-0[23]"):
        step.check(make, images, target)


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [("resnet19", None, "name: expected one of resnet18, "), ("mobilenet_v3_small", 32, "width: expected None")],
)
def test_networks_say_what_they_are_not(name, width, message):
    with pytest.raises(ValueError, match=message):
        networks.build(name, 10, width)
