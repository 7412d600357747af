"""The documentation: links and anchors of the Markdown pages lead somewhere, and the quick start runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page):
    """The page without its code, fenced and inline."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("[", " ").replace("(", " "), text)


def anchors(page):
    """What GitHub makes of the headings: lower case, nothing but letters, digits, - and _, spaces as -, -1 behind a second one."""
    found = {}
    for title in re.findall(
        r"^#{1,6} +(.+?) *#*$", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S), re.M
    ):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if i == 0 else f"{slug}-{i}" for slug, count in found.items() for i in range(count + 1)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_quick_start_runs(tmp_path, monkeypatch):
    for needed in ("sklearn", "pooch", "PIL"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "quick-start.md"
    blocks = list(re.finditer(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
    assert len(blocks) >= 8
    names = {"__name__": "quick_start"}
    for block in blocks:
        lines_before = page.read_text(encoding="utf-8")[: block.start(1)].count("\n")
        exec(compile("\n" * lines_before + block[1], str(page), "exec"), names)  # errors name the page's line
    assert names["history"][-1]["epoch"] == 3
    assert names["history"][-1]["test vote"] > 0.9
    assert (tmp_path / "image.png").exists()
