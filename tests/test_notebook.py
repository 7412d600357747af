"""examples/first_steps.ipynb runs from top to bottom, and prints what its text says."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
for needed in ("ipykernel", "matplotlib", "sklearn"):
    pytest.importorskip(needed)

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "first_steps.ipynb"


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_first_steps_run(stored, tmp_path, monkeypatch):
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    notebook = nbformat.from_dict(stored)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=where
    ).execute()  # raises on any error
    text = printed(notebook)
    accuracy = float(re.search(r"after epoch 5 the test accuracy is ([\d.]+)%", text)[1])
    assert accuracy > 94  # 98.9 where it was made
    memory = {name.strip(): float(mib) for name, mib in re.findall(r"^(\w.*?) +([\d.]+) MiB$", text, re.M)}
    assert memory["block by block, the paper's"] < memory["backpropagation"] / 2
    assert "the same but for rounding" in text
    assert (tmp_path / "first_steps.pt").exists()


def test_it_is_stored_as_it_ran(stored):
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert all(len(str(output)) < 60_000 for cell in code for output in cell.outputs)
    assert "the test accuracy is" in printed(stored)
