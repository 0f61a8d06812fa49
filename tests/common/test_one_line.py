"""A peer's texts on one line of a log."""

import pytest

from gotunnel_agent.common.one_line import on_one_line, words_on_one_line

ODD = "a\r\nb\x1b[31m\0\u202e\ud800\u00e9"


@pytest.mark.parametrize("shorten", [on_one_line, words_on_one_line])
def test_line_is_printable_and_bounded(shorten):
    assert shorten(ODD).isprintable()
    assert shorten(ODD * 1000, 100).isprintable()
    assert len(words_on_one_line(ODD * 1000, 100)) == 100
    assert len(on_one_line("x" * 1000, 100)) == 100


def test_values_are_escaped_and_cut():
    assert on_one_line(ODD) == "a\\r\\nb\\x1b[31m\\x00\\u202e\\ud800\u00e9"
    assert on_one_line("a  b ", 4) == "a  b"


def test_words_lose_their_line_breaks_and_say_that_they_are_cut():
    assert words_on_one_line(" a\r\nb  c\t") == "a b c"
    assert words_on_one_line(ODD) == "a b [31m \u00e9"
    assert words_on_one_line("x" * 501) == "x" * 497 + "..."
    assert words_on_one_line(ValueError("why")) == "why"
