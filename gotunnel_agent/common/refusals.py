"""Why an agent turns an http visit away: values that agent and gateway share.

An agent says so by the code beside a RST (gotunnel.StreamReset) if the gateway knows the feature
REFUSALS, and the gateway makes the page. A page of the agent's own, which every other gateway gets,
cannot be told from a page of its target, so nobody could believe its X-Gotunnel-Error.
"""

from typing import NamedTuple

from gotunnel import (
    TARGET_MISCONFIGURED,
    TARGET_TIMED_OUT,
    TARGET_UNREACHABLE,
    TARGET_UNTRUSTED,
)


class Refusal(NamedTuple):
    """``code`` is beside the RST; ``word`` is what programs read, ``text`` what people do."""

    code: int
    word: str
    text: str


UNREACHABLE = Refusal(
    TARGET_UNREACHABLE, "target-unreachable",
    "The service behind this address does not answer.",
)  # fmt: skip
TIMED_OUT = Refusal(
    TARGET_TIMED_OUT, "target-timed-out",
    "The service behind this address does not answer in time.",
)  # fmt: skip
UNTRUSTED = Refusal(
    TARGET_UNTRUSTED, "target-untrusted",
    "The service behind this address has a certificate that is not to be trusted.",
)  # fmt: skip
MISCONFIGURED = Refusal(
    TARGET_MISCONFIGURED, "target-misconfigured",
    "The service behind this address needs more than this gateway can do.",
)  # fmt: skip
BY_CODE = {refusal.code: refusal for refusal in (UNREACHABLE, TIMED_OUT, UNTRUSTED, MISCONFIGURED)}
