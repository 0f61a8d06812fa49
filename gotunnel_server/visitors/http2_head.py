"""The head of an HTTP/2 request, checked as strictly as one of HTTP/1.1 (RFC 9113 §8).

A target reads the request as HTTP/1.1. So what HTTP/1.1 cannot say must not become something else
in it: a CR or LF in a value would be a second field, a space in ``:path`` another version, a
``transfer-encoding`` another end of the body (request smuggling). Such a request is malformed, and
its stream is reset with PROTOCOL_ERROR. Values in, values out; no I/O.
"""

import re
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from gotunnel_agent.common import http1
from gotunnel_agent.common.http1 import FIELD_LIMIT, Fields, Malformed

# Names and values as they came, in order.
Block = Sequence[tuple[str, str]]

# All fields of a list at once, a line each for name and value: names in lower case, and values that
# neither begin nor end with white space (§8.2.1).
_FIELDS = re.compile(
    r"(?:[!#$%&'*+\-.^_`|~0-9a-z]+\n"
    r"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?\n)*"
)
_METHOD = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_LENGTH = re.compile(r"[0-9]{1,18}")  # as in http1.py
_URGENCY = re.compile(r"(?:^|[,;])\s*u=([0-7])(?![0-9.])")
# Fields of one HTTP/1.1 connection, which HTTP/2 does not have (§8.2.2).
_FORBIDDEN = frozenset({
    "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade",
})  # fmt: skip
_PSEUDO = frozenset({":method", ":scheme", ":authority", ":path", ":protocol"})
# Methods whose requests have a length even without content: some targets refuse them without
# (RFC 9110 §8.6).
_WITH_LENGTH = frozenset({"POST", "PUT", "PATCH"})

URGENCY = 3  # of a request that names none; 0 is the most urgent, 7 the least (RFC 9218 §4.1)


class Head(NamedTuple):
    """A request's head; the attributes as those of request.Request.

    ``protocol``: of an extended CONNECT (RFC 8441), else None. ``urgency``: see URGENCY.
    ``too_large``: why the request gets a page instead of an answer, None if it is not.
    """

    method: str
    hostname: str
    authority: str
    path: str
    fields: Fields
    has_body: bool
    body_length: int | None
    protocol: str | None
    urgency: int
    too_large: Malformed | None


def read_head(block: Block, ended: bool) -> Head:
    """Check and translate a request's header list. ``ended``: it has END_STREAM. Raises Malformed
    for a request that has to be reset."""
    pseudo, fields = _split(block)
    method = pseudo.get(":method", "")
    if not _METHOD.fullmatch(method):
        raise Malformed(400, "no :method that is a token")
    protocol = pseudo.get(":protocol")
    if method == "CONNECT" and protocol is None:
        if ":path" in pseudo or ":scheme" in pseudo:
            raise Malformed(400, "CONNECT with :scheme or :path, expected :authority alone")
        target = pseudo.get(":authority", "")
        path = None
    else:
        if protocol is not None and method != "CONNECT":
            raise Malformed(400, "a :protocol without CONNECT")
        if pseudo.get(":scheme") not in ("https", "http"):
            raise Malformed(400, "no :scheme that is https or http")
        target = path = pseudo.get(":path", "")
        if not path.startswith("/") and (path != "*" or method != "OPTIONS"):
            raise Malformed(400, "no :path that begins with a slash")
    too_large: Malformed | None = None
    if len(fields) > FIELD_LIMIT:
        too_large = Malformed(431, f"{len(fields)} fields, expected at most {FIELD_LIMIT}")
    try:
        target = http1.read_target(target)
    except Malformed as error:
        if error.status == 400:
            raise
        too_large = error
    hosts = fields.all("host")
    authority = pseudo.get(":authority") or (hosts[0] if hosts else "")
    if len(hosts) > 1 or not authority or hosts and hosts[0].lower() != authority.lower():
        raise Malformed(400, "no :authority, or host fields that differ from it")
    # Version 1.0 may lack a Host field, and the authority says the same here.
    hostname = http1.hostname(http1.Request(method, target, 0, fields, authority, path))
    has_body, length = _framing(method, fields, ended)
    if method == "CONNECT":
        if length is not None:
            raise Malformed(400, "CONNECT with a content-length")
        has_body = False  # what follows is for the other end
    priority = fields.all("priority")
    return Head(
        method, hostname, authority, "" if path is None else target, fields, has_body, length,
        protocol, read_urgency(",".join(priority)) if priority else URGENCY, too_large,
    )  # fmt: skip


def read_urgency(priority: str) -> int:
    """The urgency in a ``priority`` field (RFC 9218 §4.1); other parameters are ignored."""
    match = _URGENCY.search(priority)
    return int(match[1]) if match else URGENCY


def read_trailers(block: Block) -> list[tuple[str, str]]:
    """A request's trailers, without those that a trailer must not have. Raises Malformed."""
    pseudo, fields = _split(block)
    if pseudo:
        raise Malformed(400, "pseudo-header fields in trailers")
    if len(fields) > FIELD_LIMIT:
        raise Malformed(431, f"{len(fields)} trailers, expected at most {FIELD_LIMIT}")
    return [item for item in fields if not http1.comes_too_late(item[0])]


def _split(block: Block) -> tuple[dict[str, str], Fields]:
    """Pseudo-header fields, which come first, and the others: cookies joined. Raises Malformed."""
    pseudo: dict[str, str] = {}
    for name, value in block:
        if name[:1] != ":":
            break
        if name not in _PSEUDO or name in pseudo:
            raise Malformed(400, "a pseudo-header field that is unknown or twice")
        pseudo[name] = value
    items = list(block[len(pseudo) :])
    # Checked as one text: with a line end in one of them there are more lines. No name has a colon,
    # so there is no late pseudo-header field either.
    text = "\n".join((*chain.from_iterable(items), ""))
    if not _FIELDS.fullmatch(text) or text.count("\n") != 2 * len(items):
        raise Malformed(400, "a field name or value with characters that it must not have")
    fields = Fields(items)
    named = fields.named
    if not _FORBIDDEN.isdisjoint(named):
        raise Malformed(400, f"a field that HTTP/2 does not have: {min(_FORBIDDEN & {*named})}")
    if "te" in named and any(value.lower() != "trailers" for value in named["te"]):
        raise Malformed(400, "a field that HTTP/2 does not have: te")
    cookies = named.get("cookie", ())
    if len(cookies) > 1:  # HTTP/1.1 has one (RFC 9113 §8.2.3)
        joined = "cookie", "; ".join(cookies)
        fields = Fields([*(item for item in items if item[0] != "cookie"), joined])
    return pseudo, fields


def _framing(method: str, fields: Fields, ended: bool) -> tuple[bool, int | None]:
    """Whether the request has a body, and its length. Raises Malformed."""
    lengths = fields.all("content-length")
    if lengths:
        if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
            raise Malformed(400, "a content-length that is not one number of 1 to 18 digits")
        length = int(lengths[0])
        if ended and length:
            raise Malformed(400, f"content-length {length}, and no DATA")
        return True, length
    if ended:
        return (True, 0) if method in _WITH_LENGTH else (False, None)
    return True, None
