"""Makes a peer's text safe for one line of a log: no line breaks, no terminal escapes, and not too
long (log injection). Shortens lists for such a line, and takes secrets out of it."""

import re
from collections.abc import Iterable

MOST = 500  # characters
LINK = re.compile(r"https?://[!-~]+")
# Longest link that is shown whole, in characters. Let's Encrypt's link for resuming a paused
# hostname has up to a thousand, since it holds the hostnames and a signature.
MOST_LINK = 2000
# A join string, also as a path, which has one slash less; or a token (JWT). The punctuation of a
# message behind it stays, and so do the pattern of a join string, and one that is hidden already.
_SECRET = re.compile(
    r"(gotunnel:(?://|/(?!/))(?!,|NAME:SECRET@|\.\.\.@)|\beyJ[\w-]+\.(?=[\w-]))"
    r"[^\s'\"]+?(?=[):;,]{0,2}(?:[\s'\"]|$))",
    re.ASCII,
)
MOST_NAMED = 20  # hostnames, agents or ports in a line; there may be thousands


def on_one_line(text: str, limit: int = MOST) -> str:
    """The text with its unprintable characters escaped. For names and values, in which each
    character counts."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:limit]
    )


def words_on_one_line(text: object, limit: int = MOST) -> str:
    """The words of a text with one blank between them, and "..." at the end if it was cut. For
    sentences, in which a line break means no more than a blank."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def words_and_link(text: object, limit: int = MOST) -> str:
    """As words_on_one_line(), but the longest link in the text stays whole, and does not count
    towards ``limit``: the operator has to open it."""
    line = words_on_one_line(text, limit + 2 * MOST_LINK)
    link = max(LINK.finditer(line), key=lambda found: len(found[0]), default=None)
    if len(line) <= limit or link is None or len(link[0]) > MOST_LINK:
        return words_on_one_line(line, limit)
    before, after = line[: link.start()], line[link.end() :]
    if len(before) > limit:
        return f"{words_on_one_line(before, limit)} {link[0]}"
    room = max(3, limit - len(before))
    return before + link[0] + (after if len(after) <= room else after[: room - 3] + "...")


def without_secrets(text: str) -> str:
    """A message without the join strings and tokens in it: users put them in the place of a file, a
    host or a target, which the message then names."""
    return _SECRET.sub(r"\1...", text)


def some(names: Iterable[object]) -> str:
    """The first names, separated by commas, and how many more there are."""
    words = list(names)
    more = f" and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else ""
    return ", ".join(map(str, words[:MOST_NAMED])) + more
