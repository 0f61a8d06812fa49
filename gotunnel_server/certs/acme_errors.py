"""Classifies the errors of a certificate authority: each becomes a CaError. No network here.

What an error concerns (its kind) decides what happens next. It follows from an error code (RFC 8555
§6.7), the identifiers of subproblems (§6.7.1), a status, a header and a sentence of the CA. The
sentence is used last:

    kind         concerns                      for example
    CONFIG       what the operator set         an account without binding, a name it never signs
    HOST         one hostname                  the challenge was not answered
    LATER        one hostname, for a while     no resolver answered, so the CA was not asked
    LIMITED      one hostname or domain        too many certificates for it; come back later
    ACCOUNT      everything we ask for         too many orders; come back later
    TRANSPORT    the CA or the way to it       no route, a timeout, status 500, an answer that is
                                               not ACME

A rate limit concerns what it names, in an identifier or in the sentence: the hostname of the order,
or a domain above it. It concerns the hostname, too, if the sentence matches OF_ONE_NAME. What CAs
send, by their sources and logs (tests/certs/test_acme_errors.py has all of it), and what that
concerns:

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
    ZeroSSL         429 Too Many Requests, by nginx, without a problem document        all, shortly
    step-ca         no rate limits; "account is not active" when it has closed one
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_tz
from typing import Any

from gotunnel_agent.common.one_line import LINK, words_and_link, words_on_one_line

from .schedule import DAY

_Problem = Mapping[str, Any]  # a problem document (RFC 7807): JSON of any shape

CONFIG, HOST, LATER, LIMITED = "config", "host", "later", "limited"
ACCOUNT, TRANSPORT = "account", "transport"

# Error codes that only the operator can mend. In an answer to newAccount they concern every
# hostname.
CONFIG_CODES = {
    "badCSR", "badPublicKey", "badSignatureAlgorithm", "caa", "externalAccountRequired",
    "invalidContact", "invalidProfile", "malformed", "rejectedIdentifier", "unsupportedContact",
    "unsupportedIdentifier", "userActionRequired",
}  # fmt: skip
# Error codes that every hostname's order would get.
ACCOUNT_CODES = {"accountDoesNotExist", "externalAccountRequired"}
# Top-level codes that say less than those of their subproblems.
VAGUE_CODES = {"", "compound", "malformed"}
# Matches a hostname in a sentence.
NAME = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)+"
# Sentences of rate limits that name no hostname, and concern the order's hostname alone.
OF_ONE_NAME = re.compile(r"exact set of|failed (authoriz|valid)ation", re.IGNORECASE)

# Bounds of a Retry-After, in seconds: "0" must not become a loop, and "in a year" is an error of
# the CA's clock or ours.
LEAST_RETRY_AFTER, MOST_RETRY_AFTER = 5.0, DAY
# Seconds, for a rate limit that does not say when it ends: Let's Encrypt's last for hours. Also
# for a paused hostname, which the operator resumes by the CA's link.
RATE_LIMIT_PAUSE = 3600.0
# Characters of an URL, and of a code: they go into a log line and a file.
MOST_URL, MOST_CODE = 200, 50


class CaError(Exception):
    """The CA refused, or could not be asked. str() is one line with the URL, the code and the CA's
    own words; a link in them is never cut.

    ``kind`` is one of the six above; ``code`` is RFC 8555's without its prefix, or "" if there
    was none; ``words`` are the CA's. ``retry_after`` is in seconds, None if the CA did not say.
    ``account_wide``: any other hostname would be refused, too. ``domain``: a LIMITED error concerns
    all hostnames beneath it, "" for only the order's hostname. ``challenge``: the type of the
    challenge that failed, "" if none did.
    """

    def __init__(self, kind: str, url: str, words: object, *, code: str = "", status: int = 0,
                 retry_after: float | None = None, account_wide: bool = False, domain: str = "",
                 challenge: str = "") -> None:  # fmt: skip
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
    """We gave the order up: the hostname is no longer wanted, or the gateway stops."""


def refusal(url: str, status: int, headers: Mapping[str, str], problem: object, *, now: float,
            hostname: str = "", signing_in: bool = False) -> CaError:  # fmt: skip
    """The CaError for an answer with an error status.

    ``problem`` is the problem document (RFC 7807), or a text if the CA sent none; ``now`` is in
    seconds since 1970. ``hostname`` is being ordered. ``signing_in``: the request was newAccount.
    """
    retry_after = parse_retry_after(headers.get("Retry-After"), now)
    if status == 503 and retry_after is not None:
        _, words = problem_of(problem, hostname)
        return CaError(ACCOUNT, url, words or "no reason given", status=status,
                       retry_after=retry_after)  # fmt: skip
    if status == 429 and not isinstance(problem, dict) and retry_after is None:
        # From a server in front of the CA, which limits requests and not orders.
        return CaError(TRANSPORT, url, str(problem), status=status)
    if (status >= 500 or status < 400) and problem_of(problem)[0] != "rateLimited":
        code, words = problem_of(problem, hostname)
        return CaError(TRANSPORT, url, words or "no reason given", code=code, status=status,
                       retry_after=retry_after)  # fmt: skip
    return judge(url, problem, now=now, hostname=hostname, status=status,
                 retry_after=retry_after, signing_in=signing_in)  # fmt: skip


def judge(url: str, problem: object, *, now: float, hostname: str = "", status: int = 0,
          retry_after: float | None = None, signing_in: bool = False, challenge: str = "",
          otherwise: str = "no reason given") -> CaError:  # fmt: skip
    """The CaError for a problem document: of an answer, or (status 0) of an order or of a challenge
    of that type. ``otherwise`` stands in for missing words."""
    code, words = problem_of(problem, hostname)
    domain = ""
    if status == 429 or code == "rateLimited":
        named = _named(problem, words, hostname)
        is_narrow = bool(named or OF_ONE_NAME.search(words)) and not signing_in
        kind = LIMITED if is_narrow else ACCOUNT
        domain = named if is_narrow and named != hostname else ""
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


def problem_of(problem: object, hostname: str = "") -> tuple[str, str]:
    """Code and words of a problem document; any document gives two texts. A vague code is replaced
    by that of the subproblem about ``hostname``."""
    if not isinstance(problem, dict):
        return "", words_and_link(problem or "")
    code = _code(problem)
    if code in VAGUE_CODES:
        own = (part for part in _subproblems(problem) if _identifier(part) == hostname != "")
        code = next(filter(None, map(_code, own)), code)
    words = [str(part.get("detail") or "") for part in (problem, *_subproblems(problem))]
    if code == "userActionRequired":
        words.append(str(problem.get("instance") or ""))  # a URL that says what to do (§6.7)
    return code, words_and_link("; ".join(filter(None, words)))


def _code(problem: _Problem) -> str:
    return words_on_one_line(str(problem.get("type") or "").rpartition(":")[2], MOST_CODE)


def _subproblems(problem: object) -> list[_Problem]:
    parts = problem.get("subproblems") if isinstance(problem, dict) else None
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _identifier(part: _Problem) -> str:
    """The hostname that a subproblem is about, "" if it names none."""
    identifier = part.get("identifier")
    value = identifier.get("value") if isinstance(identifier, dict) else None
    return value.lower().removeprefix("*.").rstrip(".") if isinstance(value, str) else ""


def _named(problem: object, words: str, hostname: str) -> str:
    """``hostname``, or the longest domain above it, if the CA names it: by an identifier, else in
    its words, quoted or not. "" if it names only others, or none."""
    in_words = re.findall(NAME, LINK.sub(" ", words).lower())
    for names in (map(_identifier, _subproblems(problem)), in_words):
        above = [name for name in names if "." in name and f".{hostname}".endswith(f".{name}")]
        if above:
            return max(above, key=len)
    return ""


def parse_retry_after(
    value: str | None, now: float, least: float = LEAST_RETRY_AFTER
) -> float | None:
    """Seconds to wait by a Retry-After field (RFC 9110 §10.2.3), from ``least`` to a day.

    It is a number of seconds or a date in GMT. None if it is missing or neither.
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return _bounded(float(text[:12]), least)  # a longer number is above the bound anyway
    try:
        date = parsedate_tz(text)
        if date is None:
            return None
        # GMT, whatever this machine's time zone: the ACME library would read it as local time.
        return _bounded(datetime(*date[:6], tzinfo=timezone.utc).timestamp() - now, least)
    except (ValueError, TypeError, OverflowError):
        return None


def _time_in(words: str, now: float) -> float | None:
    """Seconds to wait by the CA's sentence, used without a header: Let's Encrypt's "retry after
    2026-01-31 12:00:00 UTC" and Google's "Try again in 12.476542291s"."""
    if found := re.search(r"[Tt]ry again in ([0-9]{1,6})(?:\.[0-9]+)?s", words):
        return _bounded(float(found[1]) + 1)
    found = re.search(r"[Rr]etry after (\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)", words)
    if found is None:
        return None
    try:
        instant = datetime.fromisoformat(found[1]).replace(tzinfo=timezone.utc)
    except ValueError:
        return None
    return _bounded(instant.timestamp() - now)


def _bounded(seconds: float, least: float = LEAST_RETRY_AFTER) -> float:
    return min(max(seconds, least), MOST_RETRY_AFTER)
