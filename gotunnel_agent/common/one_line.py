"""Texts of a peer's, made fit for one line of a log."""


def on_one_line(text: str, limit=500) -> str:
    """A text of a peer's, for the log: what cannot be printed is escaped, what is long is cut."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:limit]
    )
