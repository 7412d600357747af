"""The command line in this process, on tiny settings, for the tests of the commands."""

from pathlib import Path

import torch
from typer.testing import CliRunner

from fastff.app.commands import app
from fastff.training import checkpoint

TINY = ["--data", "digits", "--subset", "96", "--width", "2", "--batch-size", "16", "--epochs", "2", "--device", "cpu"]


def call(*arguments, code=0):
    """Run a command in this process; returns (stdout, stderr)."""
    found = CliRunner(env={"COLUMNS": "200", "LINES": "50", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])
    trouble = found.exception if not isinstance(found.exception, SystemExit) else None
    assert found.exit_code == code, f"exit code {found.exit_code}: {found.output} {trouble!r}"
    assert trouble is None and "Traceback" not in found.output
    return found.stdout, found.stderr


def refused(*arguments):
    """The one line that bad input gets."""
    out, err = call(*arguments, code=2)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastff: "), err
    return lines[0].removeprefix("fastff: ")


def state(folder):
    return checkpoint.load(Path(folder) / "checkpoint.pt")


def assert_same_bits(a, b, where="checkpoint"):
    """Everything in two checkpoints but the seconds that things took."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds"}:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where  # NaN is of a block that was not trained
