"""Every relative link in a Markdown file of the repository leads somewhere: file and #anchor."""

import re
from pathlib import Path

import pytest
from support import ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`[^`\n]*`")
HEADING = re.compile(r"(?m)^#{1,6} +(.+?) *#*$")
ELSEWHERE = ("http://", "https://", "mailto:")


def pages() -> list:
    """Those that belong to the repository: not what tests and tools leave in the folder."""
    skipped = {".venv", ".git", "build", "node_modules", ".pytest_cache", ".ruff_cache"}
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return sorted(str(path) for path in found if not skipped.intersection(path.parts))


def anchors(text) -> set:
    """What GitHub calls the headings of a page: lower case, hyphens for blanks, no punctuation."""
    found, counts = set(), {}
    for heading in HEADING.findall(re.sub(r"(?ms)^```.*?^```$", "", text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link's text alone
        name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        number = counts.get(name, 0)
        counts[name] = number + 1
        found.add(f"{name}-{number}" if number else name)
    return found


def broken_links(page: Path) -> list:
    text = page.read_text(encoding="utf-8")
    broken = []
    for link in LINK.findall(CODE.sub(lambda match: match[0].replace("](", ""), text)):
        if link.startswith(ELSEWHERE):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            broken.append(f"{link}: there is no such file")
        elif anchor and re.fullmatch(r"L[0-9]+(-L[0-9]+)?", anchor):
            continue  # lines of a source file
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(f"{link}: there is no such heading")
    return broken


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    assert broken_links(ROOT / page) == []


def test_the_front_page_names_every_page_of_docs():
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in front, page.name


def test_the_front_page_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# A `name`, and more\n\n## Twice\n\n## Twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md#a-name-and-more) [b](other.md#twice-1) [c](#here) [d](https://x)\n"
        "[e](none.md) [f](other.md#nothing) [g](#nowhere) `[h](in-code.md)`\n"
    )
    assert [link.partition(":")[0] for link in broken_links(page)] == [
        "none.md", "other.md#nothing", "#nowhere"
    ]  # fmt: skip
