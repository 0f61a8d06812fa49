"""What a certificate authority's "no" means: one exception for all of them. No network here.

Whom a refusal concerns decides what happens next, and that the CA says by a code (RFC 8555 §6.7),
the identifiers of its subproblems (§6.7.1), a status, a header and a sentence, which is read last:

    kind         concerns                      for example
    CONFIG       what the operator set         an account without binding, a name it never signs
    HOST         one hostname                  the challenge was not answered
    LATER        one hostname, not its fault   no resolver answered, so the CA was not asked
    LIMITED      one hostname or domain        too many certificates for it; come back later
    ACCOUNT      everything we ask for         too many orders; come back later
    TRANSPORT    the CA or the way to it       no route, a timeout, status 500, an answer in no form

A rate limit is that of what it names: the hostname of the order, or the domain above it, in an
identifier or in the sentence; and the hostname's if the sentence is of those in OF_ONE_NAME. What
CAs send, as their sources and logs have it (tests/certs/test_acme_errors.py has all of it):

    Let's Encrypt   too many certificates (50) already issued for "example.com" in     the domain
                    the last 168h0m0s, retry after 2026-01-31 12:00:00 UTC
                    too many certificates (5) already issued for this exact set of     the hostname
                    identifiers in the last 168h0m0s, retry after ...
                    too many failed authorizations (5) for "app.example.com" in the    the hostname
                    last 1h0m0s, retry after ...
                    Your account is temporarily prevented from requesting              the hostname
                    certificates for app.example.com and possibly others. Please
                    visit: https://portal.letsencrypt.org/sfe/v1/unpause?jwt=...
                    too many new orders (300) from this account in the last            all
                    3h0m0s, retry after ...
                    Service busy; retry later.                                         all
    Google          'X' is over quota (30 requests in 60 seconds) for the given ACME   all
                    resource: challenge. Try again in 12.476542291s.
    ZeroSSL         429 Too Many Requests, by nginx, without a word of ACME            all, shortly
    step-ca         no rate limits; "account is not active" for an account's end
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from email.utils import parsedate_tz

from gotunnel_agent.common.one_line import LINK, words_and_link, words_on_one_line

from .schedule import DAY

CONFIG, HOST, LATER, LIMITED = "config", "host", "later", "limited"
ACCOUNT, TRANSPORT = "account", "transport"

# Only a person changes these; those of newAccount concern every hostname.
CONFIG_CODES = {
    "badCSR", "badPublicKey", "badSignatureAlgorithm", "caa", "externalAccountRequired",
    "invalidContact", "invalidProfile", "malformed", "rejectedIdentifier", "unsupportedContact",
    "unsupportedIdentifier", "userActionRequired",
}  # fmt: skip
# Those that every hostname would meet.
ACCOUNT_CODES = {"accountDoesNotExist", "externalAccountRequired"}
# Top-level codes that say less than those of their subproblems.
VAGUE_CODES = {"", "compound", "malformed"}
# What may be a hostname in a sentence.
NAME = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)+"
# Sentences of rate limits that name nobody, and yet are about the hostname of the order.
OF_ONE_NAME = re.compile(r"exact set of|failed (authoriz|valid)ation", re.IGNORECASE)

# Seconds. A CA that says "0" is not to be asked in a loop, and one that says "in a year" has an
# error in its clock or in ours.
LEAST_RETRY_AFTER, MOST_RETRY_AFTER = 5.0, DAY
# For a rate limit that does not say when it ends: Let's Encrypt's last for hours. A pause of one
# hostname, which ends when the operator follows the CA's link, is tried again as often.
RATE_LIMIT_PAUSE = 3600.0
# Characters of an URL, and of a code: they go into a log line and a file.
MOST_URL, MOST_CODE = 200, 50


class CaError(Exception):
    """The CA refused, or could not be asked; str() is one line with url, code and its own words,
    and a link in them is whole.

    ``kind`` is one of the six above; ``code`` is RFC 8555's without its prefix, or "" if there
    was none; ``words`` are the CA's. ``retry_after`` is in seconds, None if nothing was said.
    ``account_wide``: no other hostname would fare better. ``domain``: of a LIMITED one, what all
    hostnames lie beneath that it concerns, "" if it is one hostname's. ``challenge``: the type of
    the proof that was not believed, "" if it did not come to that.
    """

    def __init__(self, kind, url, words, *, code="", status=0, retry_after=None,
                 account_wide=False, domain="", challenge=""):  # fmt: skip
        self.kind = kind
        self.url = words_on_one_line(url, MOST_URL)
        self.code = words_on_one_line(code, MOST_CODE)
        self.status = status
        self.words = words_and_link(words)
        self.retry_after = retry_after
        self.account_wide = account_wide or kind == ACCOUNT
        self.domain = domain
        self.challenge = challenge
        said = " ".join(filter(None, (str(status or ""), self.code)))
        super().__init__(": ".join(filter(None, (self.url, said, self.words))))


class Abandoned(Exception):
    """The order was given up by us: the hostname is no longer wanted, or the gateway stops."""


def refusal(url, status, headers, problem, *, now, hostname="", signing_in=False) -> CaError:
    """The CaError that an answer with an error status is.

    ``problem`` is the problem document (RFC 7807), or a text if the CA sent none; ``now`` is in
    seconds since 1970. ``hostname``: what is being ordered. ``signing_in``: the request was
    newAccount.
    """
    retry_after = parse_retry_after(headers.get("Retry-After"), now)
    if status == 503 and retry_after is not None:
        _, words = problem_of(problem, hostname)
        return CaError(ACCOUNT, url, words or "no reason given", status=status,
                       retry_after=retry_after)  # fmt: skip
    if status == 429 and not isinstance(problem, dict) and retry_after is None:
        # A server in front of the CA, which counts requests and not orders.
        return CaError(TRANSPORT, url, str(problem), status=status)
    if (status >= 500 or status < 400) and problem_of(problem)[0] != "rateLimited":
        code, words = problem_of(problem, hostname)
        return CaError(TRANSPORT, url, words or "no reason given", code=code, status=status,
                       retry_after=retry_after)  # fmt: skip
    return judge(url, problem, now=now, hostname=hostname, status=status,
                 retry_after=retry_after, signing_in=signing_in)  # fmt: skip


def judge(url, problem, *, now, hostname="", status=0, retry_after=None, signing_in=False,
          challenge="", otherwise="no reason given") -> CaError:  # fmt: skip
    """The CaError that a problem document is: of an answer, or (status 0) of an order or of a
    challenge of that type. ``otherwise`` is said if it says nothing."""
    code, words = problem_of(problem, hostname)
    domain = ""
    if status == 429 or code == "rateLimited":
        named = _named(problem, words, hostname)
        is_ours = (named or OF_ONE_NAME.search(words)) and not signing_in
        kind = LIMITED if is_ours else ACCOUNT
        domain = named if is_ours and named != hostname else ""
        retry_after = retry_after or _time_in(words, now) or RATE_LIMIT_PAUSE
    elif code in ("serverInternal", "badNonce"):
        kind = TRANSPORT
    elif code in ACCOUNT_CODES or signing_in:
        kind = CONFIG
    elif code in CONFIG_CODES and not challenge:
        kind = CONFIG
    else:
        kind = HOST
    words = words or otherwise
    return CaError(
        kind, url, f"{challenge}: {words}" if challenge else words, code=code, status=status,
        retry_after=retry_after, domain=domain, challenge=challenge,
        account_wide=kind == CONFIG and (signing_in or code in ACCOUNT_CODES),
    )  # fmt: skip


def problem_of(problem, hostname="") -> tuple[str, str]:
    """Code and words of a problem document; whatever a CA puts there, two texts come out. A code
    that says little gives way to that of the subproblem about ``hostname``."""
    if not isinstance(problem, dict):
        return "", words_and_link(problem or "")
    code = _code(problem)
    if code in VAGUE_CODES:
        own = (part for part in _subproblems(problem) if _identifier(part) == hostname != "")
        code = next(filter(None, map(_code, own)), code)
    words = [str(part.get("detail") or "") for part in (problem, *_subproblems(problem))]
    if code == "userActionRequired":
        words.append(str(problem.get("instance") or ""))  # RFC 8555 §6.7: there is what to do
    return code, words_and_link("; ".join(filter(None, words)))


def _code(problem) -> str:
    return words_on_one_line(str(problem.get("type") or "").rpartition(":")[2], MOST_CODE)


def _subproblems(problem) -> list[dict]:
    parts = problem.get("subproblems") if isinstance(problem, dict) else None
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _identifier(part) -> str:
    """The name that a subproblem is about, "" if there is none."""
    identifier = part.get("identifier")
    value = identifier.get("value") if isinstance(identifier, dict) else None
    return value.lower().removeprefix("*.").rstrip(".") if isinstance(value, str) else ""


def _named(problem, words, hostname) -> str:
    """``hostname``, or the longest domain above it, if the CA names it: by an identifier, or else
    in its words, with quotation marks or without. "" if it names others, or nobody."""
    in_words = re.findall(NAME, LINK.sub(" ", words).lower())
    for names in (map(_identifier, _subproblems(problem)), in_words):
        above = [name for name in names if "." in name and f".{hostname}".endswith(f".{name}")]
        if above:
            return max(above, key=len)
    return ""


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


def _time_in(words, now) -> float | None:
    """Seconds, for when the header is missing: Let's Encrypt's "retry after 2026-01-31 12:00:00
    UTC" and Google's "Try again in 12.476542291s"."""
    if found := re.search(r"[Tt]ry again in ([0-9]{1,6})(?:\.[0-9]+)?s", words):
        return _bounded(float(found[1]) + 1)
    found = re.search(r"[Rr]etry after (\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)", words)
    try:
        return found and _bounded(
            datetime.fromisoformat(found[1]).replace(tzinfo=timezone.utc).timestamp() - now
        )
    except ValueError:
        return None


def _bounded(seconds, least=LEAST_RETRY_AFTER) -> float:
    return min(max(seconds, least), MOST_RETRY_AFTER)
