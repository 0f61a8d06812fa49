"""looks.py finds what is wrong with a page, and nothing else."""

import looks
import photographer
import pytest
from looks import SCHEMES, WIDTHS

PAGE = "<!doctype html><meta name=viewport content='width=device-width'><body style='{}'>{}"


@pytest.mark.parametrize(
    "style, html, fault",
    [
        ("", "<p>text</p><button>press</button><label>name <input></label>", None),
        ("", "<p style='color:#777'>text</p>", 'contrast 4.48 of "text"'),
        ("", "<p style='color:#767676'>text</p>", None),
        ("", "<p style='color:#888;font-size:24px'>text</p>", None),
        ("background:#000", "<p style='color:#fff8'>text</p>", None),
        ("background:#000", "<p style='color:#fff6'>text</p>", 'contrast 3.66 of "text"'),
        ("background:#fff", "<p style='background:#000c'>text</p>", 'contrast 1.66 of "text"'),
        ("", "<button disabled style='color:#ccc'>text</button>", None),
        ("", "<p hidden style='color:#fff'>text</p>", None),
        ("", "<div style='width:400px'>text</div>", "the page is 408 wide, the window 360"),
        ("", "<div style='overflow:auto'><p style='width:500px'>text</p></div>", None),
        ("", "<button></button>", "a button has no name"),
        ("", "<input>", "a textbox has no name"),
        ("", "<a href='/'></a>", "a link has no name"),
    ],
)
def test_a_fault_of_a_page_is_found(page, tmp_path, style, html, fault):
    (tmp_path / "page.html").write_text(PAGE.format(style, html))
    page.as_wide_as(360).open((tmp_path / "page.html").as_uri())
    found = looks.faults(page)
    assert (fault in found) if fault else found == []


def test_a_page_takes_on_each_look(page):
    seen = []
    for width, scheme in looks.in_each_look(page):
        dark = page.script("return matchMedia('(prefers-color-scheme: dark)').matches")
        assert (page.script("return innerWidth"), dark) == (width, scheme == "dark")
        seen.append((width, scheme))
    assert len(seen) == 6


def test_a_scene_is_photographed_in_each_look(browser, tmp_path):
    def scene(stage):
        return browser.page("data:text/html,<meta name=viewport content=width=device-width><input>")

    faults = photographer.photograph(browser, None, scene, tmp_path / "a-scene")
    assert len(faults) == 6 and set(faults) >= {"360 light: a textbox has no name"}
    names = sorted(path.stem.removeprefix("a-scene-") for path in tmp_path.iterdir())
    assert names == sorted(f"{width}-{scheme}" for width in WIDTHS for scheme in SCHEMES)


def test_a_scene_that_does_not_come_about_is_a_fault(browser, tmp_path):
    def scene(stage):
        raise AssertionError("'Live': still not so")

    assert photographer.photograph(browser, None, scene, tmp_path / "a") == ["'Live': still not so"]
