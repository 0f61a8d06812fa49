"""Numbers as an operator writes them: whole numbers, and rates of requests with their bounds."""

import re

# Requests a second. Less than one an hour is better written as deny. More than a million would have
# no effect: this gateway cannot serve so many.
LEAST_RATE = 1 / 3600
MOST_RATE = MOST_BURST = 1_000_000
RATE_KEYS = ("per_address", "burst", "total", "total_burst")  # the keys of a rate limit

# A number of requests, and the period if it is not a second.
_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:/([smh]))?")
_PERIODS = {"s": 1, "m": 60, "h": 3600}  # seconds


def whole_number(text: str) -> int | None:
    """The number in ``text``, of at most nine digits; None if it is none. int() alone would also
    take "1_000", " 7" and digits of other scripts."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def rate(text: str) -> float | None:
    """Requests a second, of a text such as 10, 10/s, 600/m or 1/h; None if it is none of them. The
    caller checks LEAST_RATE and MOST_RATE."""
    match = _RATE.fullmatch(text)
    return float(match[1]) / _PERIODS[match[2] or "s"] if match else None
