"""Writes a visit as one line of the access log: the combined format, or JSON.

The combined format is nginx's and Apache's, which goaccess, fail2ban and many other programs read.
More values follow it as name="value"; those programs ignore them. On one line:

    192.0.2.7 - - [29/Nov/2026:23:56:36 +0000] "GET /a HTTP/1.1" 200 612 "-" "curl/8"
      host="app.example.com" agent="office" error="" in=80 first=0.012 time=0.013 stream=2 id="5f"

A visitor chooses path, hostname, Referer and User-Agent. No character of them can end a line or a
quoted value (log injection): the quote, the backslash, and all but printable ASCII are written as
\\xHH. JSON has escapes of its own. A visit in tcp mode has TCP as its method, and
its hostname in place of the path.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime, timezone
from functools import lru_cache
from time import localtime, strftime

from .visit import TCP, Visit

# Characters of a value that a visitor chooses; the rest is cut off. A head may have 64 KiB, and one
# visitor should not fill a disk, or the queue (log_file.py), sooner than others.
MOST = 2048
_UNSAFE = re.compile(r"[^ !#-\[\]-~]")
_encode = json.JSONEncoder(separators=(",", ":")).encode  # ASCII alone

Line = Callable[[Visit], str]


def escaped(text: str) -> str:
    """The first MOST characters of a value, escaped to stand in quotes. nginx escapes alike."""
    return _UNSAFE.sub(_escape, text[:MOST])


def _escape(found: re.Match[str]) -> str:
    # A head is read as Latin-1, so that a character is a byte. Characters beyond Latin-1, which an
    # agent's name may have, are written as UTF-8.
    character = found[0]
    data = character.encode("latin-1" if character <= "\xff" else "utf-8", "replace")
    return "".join(f"\\x{byte:02X}" for byte in data)


def combined(visit: Visit) -> str:
    """The line in the combined format, without a newline."""
    visitor, method, path, hostname = visit.visitor, visit.method, visit.path, visit.hostname
    referer, user_agent, agent = visit.referer, visit.user_agent, visit.agent
    # Few lines have anything to escape, so one look is at all values.
    all_ = f"{visitor}{method}{path}{referer}{user_agent}{hostname}{agent}"
    if (
        len(all_) > MOST
        or not (all_.isascii() and all_.isprintable())
        or '"' in all_
        or "\\" in all_
    ):
        visitor, method, path, hostname = map(escaped, (visitor, method, path, hostname))
        referer, user_agent, agent = map(escaped, (referer, user_agent, agent))
    if method:
        request = f"{method} {path or '-'} {visit.protocol}"
    elif visit.protocol == TCP:
        request = f"TCP {hostname} TCP"
    else:  # the request's head could not be parsed
        request = "-"
    first = visit.first_byte_at
    return (
        f'{visitor or "-"} - - [{_local(int(visit.at))}] "{request}" {visit.status} {visit.sent} '
        f'"{referer or "-"}" "{user_agent or "-"}" host="{hostname}" agent="{agent}" '
        f'error="{visit.error}" in={visit.received} '
        f"first={'-' if first is None else f'{first - visit.began:.3f}'} "
        f'time={visit.duration:.3f} stream={visit.stream} id="{visit.request_id}"'
    )


@lru_cache(maxsize=8)  # many visits begin in the same second
def _local(at: int) -> str:
    return strftime("%d/%b/%Y:%H:%M:%S %z", localtime(at))


def as_json(visit: Visit) -> str:
    """The line as a JSON object, without a newline. Times are in seconds, sizes in bytes."""
    first = visit.first_byte
    at = datetime.fromtimestamp(visit.at, timezone.utc)
    return _encode({
        "time": at.isoformat(timespec="milliseconds"),
        "visitor": visit.visitor,
        "hostname": visit.hostname[:MOST],
        "agent": visit.agent,
        "method": visit.method[:MOST],
        "path": visit.path[:MOST],
        "protocol": visit.protocol,
        "scheme": visit.scheme,
        "status": visit.status,
        "error": visit.error,
        "received": visit.received,
        "sent": visit.sent,
        "first_byte": None if first is None else round(first, 6),
        "duration": round(visit.duration, 6),
        "stream": visit.stream,
        "request_id": visit.request_id,
        "referer": visit.referer[:MOST],
        "user_agent": visit.user_agent[:MOST],
    })  # fmt: skip


FORMATS: dict[str, Line] = {"text": combined, "json": as_json}  # by LOG_FORMAT
