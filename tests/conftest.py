"""Which tests are left out where a folder of the source tree is missing, as beside an installed wheel."""

from pathlib import Path

NEED = {
    "benchmarks": ("test_accelerate.py", "test_benchmarks.py", "test_report.py", "test_scale.py", "test_swap_in.py"),
    "csrc": ("test_cuda.py", "test_step_native.py"),
    "docs": ("test_docs.py",),
    "examples": ("test_notebook.py",),
}
ROOT = Path(__file__).resolve().parents[1]
collect_ignore = [name for folder, names in NEED.items() if not (ROOT / folder).exists() for name in names]
