"""The inspector's page as a file: what its policy allows, and whether its colours can be read. What
it does in a browser is tested in tests/browser."""

import base64
import hashlib
import importlib
import re
import sys
import zipfile

import pytest

from gotunnel_agent.common import content_policy
from gotunnel_agent.inspector.page import FILE, page, policy

TEXT = FILE.read_text(encoding="utf-8")
SCRIPT = TEXT.partition("<script>")[2].partition("</script>")[0]
STYLE = TEXT.partition("<style>")[2].partition("</style>")[0]


def test_policy_allows_the_pages_own_style_and_script_and_nothing_else():
    for text in STYLE, SCRIPT:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in page().policy
    assert page().body == FILE.read_bytes()
    assert page().policy.count("sha256-") == 2
    assert "unsafe" not in page().policy
    for rule in (
        "default-src 'none'", "connect-src 'self'", "form-action 'self'", "base-uri 'none'",
        "frame-ancestors 'none'", "img-src blob: data:", "require-trusted-types-for 'script'",
    ):  # fmt: skip
        assert rule in page().policy.split("; ")


def test_the_page_is_found_in_an_archive(tmp_path, monkeypatch):
    """gotunnel.pyz is one."""
    archive = tmp_path / "program.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("boxed", "boxed/common", "boxed/inspector"):
            file.writestr(f"{name}/__init__.py", "")
        file.write(content_policy.__file__, "boxed/common/content_policy.py")
        file.write(FILE.with_suffix(".py"), "boxed/inspector/page.py")
        file.write(FILE, "boxed/inspector/page.html")
    monkeypatch.syspath_prepend(archive)
    assert importlib.import_module("boxed.inspector.page").page() == page()
    for name in [name for name in sys.modules if name.partition(".")[0] == "boxed"]:
        monkeypatch.delitem(sys.modules, name)


def test_policy_names_each_style_and_script_of_a_page():
    assert policy(b"<style>a</style><script>b</script><script>c</script>").count("sha256-") == 3


@pytest.mark.parametrize(
    "pattern",
    [
        r"\sstyle=",  # the policy refuses these
        r"\son[a-z]+=",
        r"\.(?:inner|outer)HTML\b|insertAdjacentHTML|document\.write|\beval\(|new Function",
        r"srcdoc|<iframe|<object|<embed|<base\b",
        r"javascript:",
        r"(?:src|href)=\"(?!data:,|api/|#)",  # nothing from outside
        r"@import|url\(",
        r"<script [^>]|<style [^>]",  # one that the policy would not name
    ],
)
def test_page_has_nothing_that_could_run_or_load_what_a_visit_holds(pattern):
    assert re.findall(pattern, TEXT) == []


def test_all_ids_that_the_script_asks_for_are_there():
    made = set(re.findall(r'\bid="([a-z-]+)"', TEXT))
    asked = set(re.findall(r'\$\("([a-z-]+)"\)', SCRIPT))
    panels = {
        f"{part}-{name}" for part in ("tab", "panel") for name in ("overview", "messages", "replay")
    }
    assert asked - made - panels == set()


def _colours(scheme: str) -> dict[str, str]:
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    found = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", light))
    if scheme == "dark":
        found |= dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", dark))
    return found


def _luminance(colour: str) -> float:
    """WCAG 2.2, "relative luminance"."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_that_wcag_asks_for(scheme):
    colours = _colours(scheme)
    grounds = ("back", "panel", "hover", "pick", "code")
    pairs = [(text, ground, 4.5) for ground in grounds
             for text in ("text", "quiet", "link", "good", "warn", "bad", "word")]  # fmt: skip
    pairs += [("text", ground, 4.5) for ground in ("added", "removed", "changed")]
    pairs += [("on-link", "link", 4.5)]
    pairs += [("edge", ground, 3.0) for ground in ("back", "panel")]
    weak = [
        (*pair, round(_contrast(colours[pair[0]], colours[pair[1]]), 2))
        for pair in pairs
        if _contrast(colours[pair[0]], colours[pair[1]]) < pair[2]
    ]
    assert weak == []
