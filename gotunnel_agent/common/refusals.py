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
    visitor."""

    code: int
    word: str
    text: str


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
