"""What a certificate authority's "no" means: one exception for all of them. No network here.

Whom a refusal concerns decides what happens next, and that the CA says by a code (RFC 8555 §6.7),
a status, a header and a sentence:

    kind         concerns                      for example
    CONFIG       what the operator set         an account without binding, a name it never signs
    HOST         one hostname                  the challenge was not answered
    LATER        one hostname, not its fault   no resolver answered, so the CA was not asked
    ACCOUNT      everything we ask for         too many orders; come back later
    TRANSPORT    the CA or the way to it       no route, a timeout, status 500, an answer in no form
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from email.utils import parsedate_tz

from gotunnel_agent.common.one_line import words_on_one_line

CONFIG, HOST, LATER = "config", "host", "later"
ACCOUNT, TRANSPORT = "account", "transport"

# Only a person changes these; those of newAccount concern every hostname.
CONFIG_CODES = {
    "badCSR", "badPublicKey", "badSignatureAlgorithm", "caa", "externalAccountRequired",
    "invalidContact", "invalidProfile", "malformed", "rejectedIdentifier", "unauthorized",
    "unsupportedContact", "unsupportedIdentifier", "userActionRequired",
}  # fmt: skip

DAY = 86_400.0
# Seconds. A CA that says "0" is not to be asked in a loop, and one that says "in a year" has an
# error in its clock or in ours.
LEAST_RETRY_AFTER, MOST_RETRY_AFTER = 5.0, DAY
# For a rate limit that does not say when it ends; those of Let's Encrypt are hours.
RATE_LIMIT_PAUSE = 3600.0
# Characters of an URL, and of a code: they go into a log line and a file.
MOST_URL, MOST_CODE = 200, 50


class CaError(Exception):
    """The CA refused, or could not be asked; str() is one line with url, code and its own words.

    ``kind`` is one of the five above; ``code`` is RFC 8555's without its prefix, or "" if there
    was none; ``words`` are the CA's. ``retry_after`` is in seconds, None if nothing was said.
    ``account_wide``: no other hostname would fare better.
    """

    def __init__(self, kind, url, words, *, code="", status=0, retry_after=None,
                 account_wide=False):  # fmt: skip
        self.kind = kind
        self.url = words_on_one_line(url, MOST_URL)
        self.code = words_on_one_line(code, MOST_CODE)
        self.status = status
        self.words = words_on_one_line(words)
        self.retry_after = retry_after
        self.account_wide = account_wide or kind == ACCOUNT
        said = " ".join(filter(None, (str(status or ""), self.code)))
        super().__init__(": ".join(filter(None, (self.url, said, self.words))))


class Abandoned(Exception):
    """The order was given up by us: the hostname is no longer wanted, or the gateway stops."""


def refusal(url, status, headers, problem, *, now, hostname="", signing_in=False) -> CaError:
    """The CaError that an answer with an error status is.

    ``problem`` is the problem document (RFC 7807), or a text if the CA sent none; ``now`` is in
    seconds since 1970. ``signing_in``: the request was newAccount.
    """
    code, words = problem_of(problem)
    retry_after = parse_retry_after(headers.get("Retry-After"), now)
    limited = status == 429 or code == "rateLimited"
    if limited or (status == 503 and retry_after is not None):
        kind = HOST if limited and is_about(hostname, words) else ACCOUNT
        retry_after = retry_after or _date_in(words, now) or RATE_LIMIT_PAUSE
    elif status >= 500 or status < 400 or code in ("serverInternal", "badNonce"):
        kind = TRANSPORT
    elif code in CONFIG_CODES or signing_in:
        kind = CONFIG
    else:
        kind = HOST
    return CaError(
        kind, url, words or "no reason given", code=code, status=status, retry_after=retry_after,
        # What "unauthorized" says outside of a challenge is that the account is closed.
        account_wide=kind == CONFIG and (signing_in or code == "unauthorized"),
    )  # fmt: skip


def problem_of(problem) -> tuple[str, str]:
    """Code and words of a problem document; whatever a CA puts there, two texts come out."""
    if not isinstance(problem, dict):
        return "", words_on_one_line(str(problem or ""))
    code = str(problem.get("type") or "").rpartition(":")[2]
    parts = problem.get("subproblems")
    words = [problem, *(parts if isinstance(parts, list) else [])]
    return words_on_one_line(code), words_on_one_line(
        "; ".join(str(part.get("detail") or "") for part in words if isinstance(part, dict))
    )


def parse_retry_after(value, now, least=LEAST_RETRY_AFTER) -> float | None:
    """Seconds to wait by a Retry-After field (RFC 9110 §10.2.3), from ``least`` to a day.

    It is a number of seconds or a date in GMT. None if it is missing or neither.
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return _bounded(float(text[:12]), least)  # a longer number is above the bound anyway
    try:
        date = parsedate_tz(text)
        # GMT, whatever the machine's own zone is: the library would take it for local time.
        if date is None:
            return None
        return _bounded(datetime(*date[:6], tzinfo=timezone.utc).timestamp() - now, least)
    except (ValueError, TypeError, OverflowError):
        return None


def is_about(hostname, words) -> bool:
    """Whether a rate limit is that of one name, or of one domain, and not the account's."""
    if "exact set" in words:
        return True
    named = re.findall(r'"([A-Za-z0-9.-]+)"', words)
    return any(f".{hostname}".endswith(f".{name.lower()}") for name in named if hostname)


def _date_in(words, now) -> float | None:
    """Let's Encrypt's "retry after 2026-01-31 12:00:00 UTC", for when the header is missing."""
    found = re.search(r"retry after (\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)", words)
    try:
        return found and _bounded(
            datetime.fromisoformat(found[1]).replace(tzinfo=timezone.utc).timestamp() - now
        )
    except ValueError:
        return None


def _bounded(seconds, least=LEAST_RETRY_AFTER) -> float:
    return min(max(seconds, least), MOST_RETRY_AFTER)
