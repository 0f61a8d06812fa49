"""Why an agent turns an http visit away: values that agent and gateway share.

An agent says so by the code beside a RST (gotunnel.StreamReset) if the gateway knows the feature
FEATURE, and the gateway makes the page. A page of the agent's own, which every other gateway gets,
cannot be told from a page of its target, so nobody could believe its X-Gotunnel-Error.
"""

from typing import NamedTuple

FEATURE = "refusals"


class Refusal(NamedTuple):
    """``code`` is beside the RST; ``word`` is what programs read, ``text`` what people do."""

    code: int
    word: str
    text: str


# A code once given keeps its meaning: agents and gateways of several versions meet. 1 is
# gotunnel.REFUSED.
UNREACHABLE = Refusal(
    2, "target-unreachable", "The service behind this address does not answer."
)
TIMED_OUT = Refusal(
    3, "target-timed-out", "The service behind this address does not answer in time."
)
UNTRUSTED = Refusal(
    4, "target-untrusted",
    "The service behind this address has a certificate that is not to be trusted.",
)  # fmt: skip
MISCONFIGURED = Refusal(
    5, "target-misconfigured",
    "The service behind this address needs more than this gateway can do.",
)  # fmt: skip
BY_CODE = {
    refusal.code: refusal for refusal in (UNREACHABLE, TIMED_OUT, UNTRUSTED, MISCONFIGURED)
}
