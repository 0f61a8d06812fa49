"""Numbers as an operator writes them: whole numbers, bytes, and rates of requests with their
bounds; and as a person reads them in a table: durations and sizes."""

import re

# Requests a second. Less than one an hour is better written as deny. More than a million would have
# no effect: this gateway cannot serve so many.
LEAST_RATE = 1 / 3600
MOST_RATE = MOST_BURST = 1_000_000
RATE_KEYS = ("per_address", "burst", "total", "total_burst")  # the keys of a rate limit

# Visits of an agent in a pool, relative to the others. Machines differ by less.
MOST_WEIGHT = 100

# A number of requests, and the period if it is not a second.
_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:/([smh]))?")
_PERIODS = {"s": 1, "m": 60, "h": 3600}  # seconds
_SECONDS = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(ms|s|sec|m|min|h)?")
_LENGTHS = {"ms": 0.001, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}  # in seconds
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


def seconds_of(text: str) -> float | None:
    """The seconds that a text such as 5, 5s, 500ms, 2 min or 1h stands for; None if it is no such
    text."""
    match = _SECONDS.fullmatch(text.lower())
    return float(match[1]) * _LENGTHS[match[2] or "s"] if match else None


def bytes_of(text: str) -> int | None:
    """The bytes that a text such as 65536, 64K, 64KB, 64 KiB or 1GiB stands for; None if it is no
    such text. K is 1024 in all of them: for a limit the difference does not matter."""
    match = _BYTES.fullmatch(text.lower())
    return int(match[1]) * _UNITS[match[2][:1]] if match else None


def duration(seconds: float) -> str:
    """At most seven characters."""
    if seconds < 0.9995:
        return f"{max(0, seconds) * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3570 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """A number of bytes, in at most seven characters up to a petabyte."""
    if count < 1000:
        return f"{count} B"
    amount, units = count / 1000, ["kB", "MB", "GB", "TB"]
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{amount:.1f} {units[0]}" if amount < 99.95 else f"{amount:.0f} {units[0]}"
