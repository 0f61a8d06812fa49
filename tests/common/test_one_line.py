"""A peer's texts on one line of a log."""

from time import monotonic

import pytest

from gotunnel_agent.common.one_line import (
    MOST_LINK,
    on_one_line,
    some,
    without_secrets,
    words_and_link,
    words_on_one_line,
)

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


def test_the_longest_link_is_kept_whole_and_the_rest_is_cut():
    link = "https://portal.example/unpause?jwt=" + "x" * 900
    assert words_and_link(f"a\n{link} b") == f"a {link} b"
    shown = words_and_link(f"http://a.b/ see {link} {'b' * 600}")
    assert shown.startswith(f"http://a.b/ see {link} bbb") and shown.endswith("b...")
    assert len(shown) == 500 + len(link)
    shown = words_and_link(f"{'a' * 600} {link}")
    assert shown == f"{'a' * 497}... {link}"
    assert words_and_link(shown) == shown  # doing it twice changes nothing
    assert words_and_link("short") == "short" and words_and_link("x" * 501) == "x" * 497 + "..."


def test_a_link_has_a_bound_too():
    endless = "https://a.b/" + "x" * MOST_LINK
    for text in (endless, endless * 1000, f"a {endless} b"):
        assert len(words_and_link(text)) == 500
    assert words_and_link(f"https://a.b/\x1b[31m{'x' * 600}").isprintable()


@pytest.mark.parametrize(
    "count, end",
    [(0, ""), (1, "0"), (20, "18, 19"), (21, "19 and 1 more"), (3000, "and 2980 more")],
)
def test_a_list_has_twenty_names_and_a_count(count, end):
    assert some(range(count)).endswith(end) and some(range(count)).count(", ") <= 19


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("'gotunnel://a:S@h:1' begins with gotunnel://, expected http://",
         "'gotunnel://...' begins with gotunnel://, expected http://"),
        ("gotunnel://a:S@h:1?ca=sha256:aa: cannot be read", "gotunnel://...: cannot be read"),
        ("(there is no /x/gotunnel:/a:S@h:1): join", "(there is no /x/gotunnel:/...): join"),
        ("no gotunnel://:S", "no gotunnel://..."),
        ("token eyJhbGci.eyJpc3.S-x: no", "token eyJhbGci....: no"),
        ("expected gotunnel://NAME:SECRET@HOST:PORT, as printed", None),
        ("a target http://a:1", None),
    ],
)  # fmt: skip
def test_no_join_string_or_token_stays_in_a_message(message, shown):
    assert without_secrets(message) == (message if shown is None else shown)


@pytest.mark.parametrize("piece", ["gotunnel:/", "gotunnel://:", ":", "eyJ", "eyJ.", "a"])
def test_secrets_are_found_in_linear_time(piece):
    started = monotonic()
    without_secrets(f"gotunnel://{20_000 * piece}")
    assert monotonic() - started < 1
