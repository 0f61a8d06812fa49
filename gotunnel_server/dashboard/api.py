"""The dashboard's JSON API: what each path answers. docs/dashboard.md has an example of each.

The router (site.py) has checked who calls before it calls a function here.
"""

from __future__ import annotations

from collections.abc import Callable

from ..visitors.pages import JSON, Page
from . import acts
from .acts import Hall
from .calls import Call, May, Refused, Way, json_page
from .live import MOST_KEPT, MOST_SHOWN, Live, Overview
from .state import Document, of_block

BOOLEANS = {"": None, "1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def ways(hall: Hall, live: Live, full: Overview, public: Overview) -> tuple[Way, ...]:
    """The paths under api/v1/, but for api/v1/events (events.py). ``full`` is the document for
    callers that may READ, ``public`` that for others."""

    def state(call: Call) -> Page:
        text = (full if call.who.may >= May.READ else public).text()
        return Page(200, text.encode() + b"\n", JSON)

    def visits(call: Call) -> Page:
        return json_page({"visits": _visits(live, call)})

    def blocks(call: Call) -> Page:
        return json_page({"blocks": [of_block(block) for block in hall.blocks.all()]})

    def act(
        function: Callable[[Hall, Call], Document], status: int = 200
    ) -> Callable[[Call], Page]:
        def answer(call: Call) -> Page:
            done = function(hall, call)
            full.touch()
            return json_page(done, status)

        return answer

    unblock = act(acts.unblock)
    return (
        Way("GET", "api/v1/state", May.LOOK, state),
        Way("GET", "api/v1/visits", May.READ, visits),
        Way("GET", "api/v1/blocks", May.READ, blocks),
        Way("POST", "api/v1/blocks", May.ACT, act(acts.block, 201)),
        Way("DELETE", "api/v1/blocks/{}", May.ACT, unblock),
        Way("DELETE", "api/v1/blocks/{}/{}", May.ACT, unblock),  # a network, with its slash
        Way("POST", "api/v1/blocks/{}/remove", May.ACT, unblock),  # for a form, which has no DELETE
        Way("POST", "api/v1/sessions/{}/end", May.ACT, act(acts.end_session)),
        Way("POST", "api/v1/certificates/{}/renew", May.ACT, act(acts.renew, 202)),
    )  # fmt: skip


def _visits(live: Live, call: Call) -> list[Document]:
    """Raises Refused."""
    query = call.query
    limit = query.get("limit", "")
    if limit and not (limit.isascii() and limit.isdigit()):
        raise Refused(400, "bad-limit", f"limit: {limit[:20]!r} came, expected a whole number.")
    failed = query.get("failed", "").lower()
    if failed not in BOOLEANS:
        raise Refused(400, "bad-failed", f"failed: {failed[:20]!r} came, expected 1 or 0.")
    most = min(int(limit[:9] or MOST_SHOWN), MOST_KEPT)  # more digits are more than there are
    return live.last(most, query.get("hostname", "").lower(), BOOLEANS[failed])
