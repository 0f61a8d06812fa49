"""What both programs answer on their metrics port: /metrics, /healthz and /readyz.

A page of the web could make a browser ask here under a name of its own (DNS rebinding), and read
the answer. On loopback addresses such a name is refused: there, people and programs come by
localhost or by an IP address. On others any name may be the machine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from . import addresses
from .exposition import CONTENT_TYPE, Metric, text

PLAIN = "text/plain; charset=utf-8"
METHODS = ("GET", "HEAD")
NO_SUCH_PAGE = "There are /metrics, /healthz and /readyz."


class Answer(NamedTuple):
    status: int
    body: str
    content_type: str = PLAIN


def answer(
    method: str,
    hostname: str,
    path: str,
    *,
    loopback: bool,
    metrics: Callable[[], Iterable[Metric]],
    unhealthy: Callable[[], str | None],
    unready: Callable[[], str | None],
) -> Answer:
    """``hostname``: the request's. ``loopback``: the port listens on loopback addresses only.
    ``unhealthy()`` and ``unready()`` say what is wrong, None if nothing is."""
    is_address = addresses.parse(hostname.removeprefix("[").removesuffix("]")) is not None
    if loopback and not is_address and hostname != "localhost":
        return Answer(403, "Ask as localhost or by an IP address.\n")
    if method not in METHODS:
        return Answer(405, "This can only be read (GET, HEAD).\n")
    path = path.partition("?")[0]
    if path == "/metrics":
        return Answer(200, text(metrics()), CONTENT_TYPE)
    looks = {"/healthz": unhealthy, "/readyz": unready}
    if path in looks:
        problem = looks[path]()
        return Answer(200, "ok\n") if problem is None else Answer(503, f"{problem}\n")
    return Answer(404, f"{NO_SUCH_PAGE}\n")


def is_loopback(bound: Sequence[str]) -> bool:
    """Whether all these IP addresses are of the loopback interface. None stand for all."""
    parsed = [addresses.parse(address) for address in bound]
    return bool(parsed) and all(each is not None and each.is_loopback for each in parsed)
