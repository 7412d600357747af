"""Sphinx: Markdown pages as they are on GitHub, and the API from docstrings, which are plain text in Google's style."""

import re
from pathlib import Path

import fastff

project = "fastff"
author = "the fastff authors"
release = version = fastff.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
exclude_patterns = ["build"]
html_theme = "furo"
html_static_path, html_css_files = ["page.css"], ["page.css"]
html_title = f"fastff {release}"
html_show_copyright = False
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_param = False  # one line for "tau, margin: ..."
default_role = "code"
highlight_language = "none"
smartquotes = False
nitpick_ignore_regex = [
    ("py:.*", r"(torch|pathlib|collections)\..*|.*\.Row"),  # no inventories of others are fetched
    ("py:exc", "a ValueError"),  # napoleon reads "DataError (a ValueError): ..." as two classes
]

ROOT = Path(__file__).resolve().parents[1]


def as_plain_text(app, what, name, obj, options, lines):
    """Docstrings are written to be read in the source: their *, | and _ are themselves, columns stay columns, "Args beyond ...:" are Args."""
    found, literal = [], False
    for before, line in zip(["", *lines], lines, strict=False):
        if what == "module" and line.startswith("    ") and not before.strip():
            literal = True
            found[-2] += "::"
        literal = literal and (not line.strip() or line.startswith("    "))
        if not literal:
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
            parts[-1] = re.sub(r"(: )([A-Z]\.)$", r"\1\\\2", parts[-1])  # "num_classes: K." is no list
            line = "".join(f"`{part}`" if part.startswith("`") else part for part in parts)
        if beyond := re.fullmatch(r"Args (.+):", line):
            found += [f"Arguments {beyond[1]}:", "", "Args:"]
        else:
            found.append(line)
    lines[:] = found


def without_field_numbers(app, what, name, obj, skip, options):
    """A NamedTuple's fields are in its signature; their docstrings only count them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def outside_the_site(app, docname, source):
    """Links to the repository's folders and other Markdown pages become text; to its files they are downloads, which MyST makes."""

    def text(link):
        path = ROOT / "docs" / link[2].partition("#")[0]
        return link[1] if path.is_dir() or (path.suffix == ".md" and path.exists()) else link[0]

    source[0] = re.sub(r"\[([^\]]*)\]\((\.\./[^)\s]*)\)", text, source[0])


def setup(app):
    app.connect("autodoc-process-docstring", as_plain_text, priority=400)  # before napoleon's
    app.connect("autodoc-skip-member", without_field_numbers)
    app.connect("source-read", outside_the_site)
