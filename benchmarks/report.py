"""Fills the tables of README.md and docs/*.md from the CSV files in benchmarks/results, and draws the plots of docs/ from them and nothing else.

    python -m benchmarks.report

A table is the text between the lines `<!-- table NAME -->` and `<!-- end -->`. It is replaced as a whole, so that no number is typed by hand. The
function that makes a table is in the module of the benchmark that writes its CSV file.
"""

import importlib
import re

from benchmarks import scaling, tables


def of(module, function="table", *args):
    """Return a function that imports benchmarks/MODULE.py when it is called, and calls one of its functions with these arguments."""
    return lambda *more: getattr(importlib.import_module(f"benchmarks.{module}"), function)(*args, *more)


TABLES = {
    "goodness": of("goodness"),
    "epilogue": of("epilogue"),
    "depthwise": of("depthwise"),
    "convolution": of("convolution"),
    "muon": of("muon"),
    "layer-norm": of("layer_norm"),
    "group-goodness": of("group_goodness"),
    "roofline": of("roofline"),
    "kernels": of("summary", "kernels"),
    "gpu": of("gpu_report"),
    "networks": of("summary", "steps"),
    "step": of("step", "table", "resnet18-64"),
    "step-in-words": of("step", "sentence"),
    "steps": of("step"),
    "budget": of("budget"),
    "memory": of("memory"),
    **{f"scaling-{axis}": of("scaling", "table", axis) for axis in scaling.AXES},
    "swap-in": of("swap_in"),
    "strangers": of("strangers"),
    "scale": of("scale_report"),
    "scale-measured": of("scale_report", "measured"),
    "plans": of("plans"),
    "tasks": of("plans", "tasks"),
    "tasks-by-plan": of("plans", "tasks_by_plan"),
    "learning-all": of("learning_report", "every_table"),
    "learning-curves": of("learning_report", "pictures"),
    "time-to-accuracy": of("learning_report", "time_to_accuracy"),
    "any-model": of("any_model", "sentence"),
    "torch-distributed": of("torch_distributed"),
    "losses": of("losses"),
    "losses-learning": of("learning_report", "losses"),
}
PLOTS = (of("learning_report", "curves"), of("scaling", "plot"), of("scale_report", "plot"))
MARKED = re.compile(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def fill(path):
    """Replace the tables in the file `path`. Raises SystemExit if it names an unknown table."""

    def replaced(match):
        if match[1] not in TABLES:
            raise SystemExit(f"{path.name}: expected a table out of {', '.join(TABLES)}, got {match[1]!r}")
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    path.write_text(MARKED.sub(replaced, path.read_text(encoding="utf-8")), encoding="utf-8")


def main(root=tables.ROOT):
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        fill(path)
    for draw in PLOTS:
        draw(root / "docs")


if __name__ == "__main__":
    main()
