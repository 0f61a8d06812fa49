"""Numbers as an operator writes them: whole numbers, bytes, and rates of requests with their
bounds."""

import re

# Requests a second. Less than one an hour is better written as deny. More than a million would have
# no effect: this gateway cannot serve so many.
LEAST_RATE = 1 / 3600
MOST_RATE = MOST_BURST = 1_000_000
RATE_KEYS = ("per_address", "burst", "total", "total_burst")  # the keys of a rate limit

# A number of requests, and the period if it is not a second.
_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:/([smh]))?")
_PERIODS = {"s": 1, "m": 60, "h": 3600}  # seconds
_BYTES = re.compile(r"([0-9]{1,9}) ?(b?|[kmg](?:i?b)?)")
_UNITS = {"": 1, "b": 1, "k": 1024, "m": 1024**2, "g": 1024**3}


def whole_number(text: str) -> int | None:
    """The number in ``text``, of at most nine digits; None if it is none. int() alone would also
    take "1_000", " 7" and digits of other scripts."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def rate(text: str) -> float | None:
    """Requests a second, of a text such as 10, 10/s, 600/m or 1/h; None if it is none of them. The
    caller checks LEAST_RATE and MOST_RATE."""
    match = _RATE.fullmatch(text)
    return float(match[1]) / _PERIODS[match[2] or "s"] if match else None


def bytes_of(text: str) -> int | None:
    """The bytes that a text such as 65536, 64K, 64KB, 64 KiB or 1GiB stands for; None if it is no
    such text. K is 1024 in all of them: for a limit the difference does not matter."""
    match = _BYTES.fullmatch(text.lower())
    return int(match[1]) * _UNITS[match[2][:1]] if match else None
