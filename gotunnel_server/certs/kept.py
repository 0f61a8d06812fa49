"""Values that a file of ours has kept, which may have been damaged. Pure."""


def number(value: object, most: float = 1e11) -> float:
    """The number that was read from a file; 0 if it is none, is negative, or is not below
    ``most``. The default is beyond any instant in seconds since 1970."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if good and 0 <= value < most else 0.0
