"""A peer's texts, made fit for one line of a log: nothing in them breaks a line, or moves a
terminal's cursor, and they are not too long."""

MOST = 500  # characters


def on_one_line(text: str, limit: int = MOST) -> str:
    """The text as it came: characters that cannot be printed are escaped. For names and values, of
    which each character counts."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:limit]
    )


def words_on_one_line(text: object, limit: int = MOST) -> str:
    """The words of a text with one blank between them, "..." at its end if it was cut. For
    sentences, in which a line break is a blank."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
