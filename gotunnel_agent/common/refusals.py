"""Why an agent turns an http visit away: the reasons and their codes, which both programs share.

If the gateway knows the feature REFUSALS, the agent sends the code with a RST
(gotunnel.StreamReset), and the gateway makes the page. Other gateways get a page made by the agent.
Such a page cannot be told from a page of the target, so its X-Gotunnel-Error proves nothing.
"""

from typing import NamedTuple

from gotunnel import (
    TARGET_MISCONFIGURED,
    TARGET_TIMED_OUT,
    TARGET_UNREACHABLE,
    TARGET_UNTRUSTED,
)


class Refusal(NamedTuple):
    """``code`` goes with the RST, ``word`` is for programs (X-Gotunnel-Error), ``text`` for the
    visitor, who gets it with ``status``."""

    code: int
    word: str
    text: str
    status: int = 502


UNREACHABLE = Refusal(
    TARGET_UNREACHABLE, "target-unreachable",
    "The server of this site does not answer. Try again in a few minutes.",
)  # fmt: skip
TIMED_OUT = Refusal(
    TARGET_TIMED_OUT, "target-timed-out",
    "The server of this site does not answer in time. Try again in a few minutes.",
)  # fmt: skip
UNTRUSTED = Refusal(
    TARGET_UNTRUSTED, "target-untrusted",
    "The server of this site could not prove who it is, so nothing was sent to it. The people who "
    "run the site have to mend that.",
)  # fmt: skip
MISCONFIGURED = Refusal(
    TARGET_MISCONFIGURED, "target-misconfigured",
    "This site needs more than this gateway can do. The people who run it have to change its "
    "settings.",
)  # fmt: skip
BY_CODE = {refusal.code: refusal for refusal in (UNREACHABLE, TIMED_OUT, UNTRUSTED, MISCONFIGURED)}

# Why a gateway does not pass on a visit that another one has sent to it (the gateway's
# cluster/passage.py). Only gateways use these codes. GONE: nothing of the visit was passed on, so
# it may be sent elsewhere; AGENT_GONE: the agent may have got a part of it.
GONE = Refusal(6, "agent-gone", "The connection to this site was lost. Try again in a moment.")
AGENT_GONE = Refusal(7, GONE.word, GONE.text)
AGENT_LIMIT = Refusal(
    8, "agent-limit", "This site serves as many visitors as it may. Try again in a moment.", 503
)
AGENT_BUSY = Refusal(
    9, "agent-busy", "This site takes no more visitors at the moment. Try again in a moment.", 503
)
UNHEALTHY = Refusal(
    10, "unhealthy", "This site is not well at the moment. Try again in a minute.", 503
)  # the gateway shows its own page instead, with Retry-After
OF_GATEWAYS = {
    refusal.code: refusal for refusal in (GONE, AGENT_GONE, AGENT_LIMIT, AGENT_BUSY, UNHEALTHY)
}
