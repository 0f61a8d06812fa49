"""Text in cells."""

import pytest

from gotunnel_agent.common.cells import MOST_MARKS, fit, pad, safe, width, wrap

A, ACUTE = "a", "\N{COMBINING ACUTE ACCENT}"


@pytest.mark.parametrize(
    "text, cells",
    [
        ("", 0),
        ("abc", 3),
        ("日本", 4),
        ("e" + ACUTE, 1),
        ("ｗ", 2),
        ("→●…", 3),
        ("🙂", 2),
        ("한", 2),
    ],
)
def test_width(text, cells):
    assert width(text) == cells


@pytest.mark.parametrize(
    "text, expected",
    [
        ("/plain?x=1", "/plain?x=1"),
        ("/\x1b[2J\x07\r\n\t", r"/\x1b[2J\x07\r\n\t"),
        ("\x9b31m", r"\x9b31m"),  # CSI in one byte
        ("\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe", r"\u202egpj.exe"),
        ("a\N{ZERO WIDTH JOINER}b", r"a\u200db"),
        ("\N{LINE SEPARATOR}", r"\u2028"),
        ("x\N{VARIATION SELECTOR-16}y", "xy"),
        ("日e" + ACUTE, "日e" + ACUTE),
        (ACUTE + "a", "a"),  # it would join the text before
        (A + ACUTE * 50 + "b", A + ACUTE * MOST_MARKS + "b"),
        ("\ud800", r"\ud800"),
        ("\x00\x1b" + ACUTE, r"\x00\x1b" + ACUTE),
    ],
)
def test_safe(text, expected):
    assert safe(text) == expected


def test_safe_text_has_nothing_that_a_terminal_acts_on():
    for number in range(0x3000):
        text = safe("a" + chr(number))
        assert "\x1b" not in text and all(c.isprintable() for c in text)


@pytest.mark.parametrize(
    "text, most, expected",
    [
        ("abc", 3, "abc"),
        ("abcd", 3, "ab…"),
        ("日本語", 5, "日本…"),
        ("日本語", 4, "日…"),
        ("e" + ACUTE + "xyz", 2, "e" + ACUTE + "…"),
        ("abc", 1, "…"),
        ("abc", 0, ""),
    ],
)
def test_fit(text, most, expected):
    assert fit(text, most, "…") == expected
    assert width(expected) <= most


def test_pad():
    assert pad("日", 4) == "日  " and pad("abc", 2) == "abc"


@pytest.mark.parametrize(
    "text, most, expected",
    [
        ("", 5, [""]),
        ("one two three", 7, ["one two", "three"]),
        ("abcdefgh ij", 3, ["abc", "def", "gh", "ij"]),
        ("日本語 x", 4, ["日本", "語 x"]),
        ("日", 1, ["日"]),
    ],
)
def test_wrap(text, most, expected):
    assert wrap(text, most) == expected
