"""Whom a CA's refusal holds up: with the words that CAs use."""

import pytest
from fake_ca import DAY, NOW

from gotunnel_server.certs.acme_errors import (
    ACCOUNT,
    CONFIG,
    HOST,
    LIMITED,
    RATE_LIMIT_PAUSE,
    TRANSPORT,
    refusal,
)

APP = "app.dev.example.com"
LINK = f"https://portal.letsencrypt.org/sfe/v1/unpause?jwt={'eyJ' * 300}"


def of(code, detail, *parts, **more):
    """A problem document; ``parts`` are its subproblems: code, name, detail."""
    found = {"type": f"urn:ietf:params:acme:error:{code}", "detail": detail, **more}
    if parts:
        found["subproblems"] = [
            {"type": f"urn:ietf:params:acme:error:{code}", "detail": detail,
             "identifier": {"type": "dns", "value": name}}
            for code, name, detail in parts
        ]  # fmt: skip
    return found


LIMIT = "rateLimited"
AT = "retry after 2027-01-15 10:00:00 UTC: see https://letsencrypt.org/docs/rate-limits/"
TABLE = [  # status, problem, kind, domain, seconds
    # Let's Encrypt: ratelimits/limiter.go and wfe2/wfe.go of Boulder
    (429, of(LIMIT, f'too many certificates (50) already issued for "example.com" in the last '
             f"168h0m0s, {AT}#new-certificates-per-registered-domain"),
     LIMITED, "example.com", 7200),
    (429, of(LIMIT, "too many certificates (5) already issued for this exact set of identifiers "
             f"in the last 168h0m0s, {AT}"), LIMITED, "", 7200),
    (429, of(LIMIT, "too many certificates (5) already issued for this exact set of domains in "
             "the last 168 hours, retry after 2027-01-15T10:00:00Z"), LIMITED, "", 7200),
    (429, of(LIMIT, f'too many failed authorizations (5) for "{APP}" in the last 1h0m0s, {AT}'),
     LIMITED, "", 7200),
    (429, of(LIMIT, "Error creating new order :: too many failed authorizations recently: see "
             "https://letsencrypt.org/docs/failed-validation-limit/"), LIMITED, "", None),
    (429, of(LIMIT, "Error creating new cert :: Too many certificates already issued for: "
             "example.com"), LIMITED, "example.com", None),
    (429, of(LIMIT, "Your account is temporarily prevented from requesting certificates for "
             f"{APP} and possibly others. Please visit: {LINK}"), LIMITED, "", None),
    (429, of(LIMIT, f"too many new orders (300) from this account in the last 3h0m0s, {AT}"),
     ACCOUNT, "", 7200),
    (429, of(LIMIT, "too many new registrations (10) from this IP address in the last 3h0m0s, "
             f"{AT}"), ACCOUNT, "", 7200),
    (429, of(LIMIT, "Service busy; retry later."), ACCOUNT, "", None),
    (503, of(LIMIT, "Service busy; retry later."), ACCOUNT, "", None),
    (400, of("rejectedIdentifier", f'Error creating new order :: Cannot issue for "{APP}": The '
             "ACME server refuses to issue a certificate for this domain name, because it is "
             "forbidden by policy"), CONFIG, "", None),
    (403, of("caa", f"Error finalizing order :: Rechecking CAA for {APP} failed"),
     CONFIG, "", None),
    (403, of("unauthorized", "Account in use did not issue specified certificate"),
     HOST, "", None),
    # Google
    (429, of(LIMIT, "'default@gcp.api.pki.goog' is over quota (30 requests in 60 seconds) for the "
             "given ACME resource: challenge. Try again in 12.476542291s."), ACCOUNT, "", 13),
    # ZeroSSL, by the server in front
    (429, "<html> <head><title>429 Too Many Requests</title></head>", TRANSPORT, "", None),
    # step-ca
    (401, of("unauthorized", "account is not active"), HOST, "", None),
    (401, of("accountDoesNotExist", "Account does not exist"), CONFIG, "", None),
    (403, of("rejectedIdentifier", "The server will not issue certificates for the identifier"),
     CONFIG, "", None),
    # By subproblems, whatever the words are (RFC 8555 §6.7.1)
    (429, of(LIMIT, "no", (LIMIT, APP, "no")), LIMITED, "", None),
    (429, of(LIMIT, "no", (LIMIT, "EXAMPLE.com.", "no")), LIMITED, "example.com", None),
    (429, of(LIMIT, "no", (LIMIT, "*.dev.example.com", "no")), LIMITED, "dev.example.com", None),
    (429, of(LIMIT, "no: example.com", (LIMIT, APP, "no")), LIMITED, "", None),
    (429, of(LIMIT, "no", (LIMIT, "other.example", "no")), ACCOUNT, "", None),
    (403, of("compound", "no", (LIMIT, APP, "no")), LIMITED, "", None),
    (403, of("malformed", "no", ("rejectedIdentifier", APP, "no")), CONFIG, "", None),
    # Names that are none of ours, or only seem to be
    (429, of(LIMIT, "see https://example.com/docs"), ACCOUNT, "", None),
    (429, of(LIMIT, 'too many for "ample.com" and com'), ACCOUNT, "", None),
    (429, of(LIMIT, "no", **{"subproblems": [{"identifier": 5}, 7, {"identifier": {}}]}),
     ACCOUNT, "", None),
]  # fmt: skip


@pytest.mark.parametrize("status, problem, kind, domain, seconds", TABLE)
def test_a_refusal_holds_up_those_whom_it_concerns(status, problem, kind, domain, seconds):
    error = refusal("https://ca.example/new-order", status, {}, problem, now=NOW, hostname=APP)
    assert (error.kind, error.domain) == (kind, domain)
    if kind in (LIMITED, ACCOUNT):
        assert error.retry_after == (RATE_LIMIT_PAUSE if seconds is None else seconds)
    code = problem.get("type", "").rpartition(":")[2] if isinstance(problem, dict) else ""
    assert error.account_wide == (kind == ACCOUNT or code == "accountDoesNotExist")


@pytest.mark.parametrize("status, problem, kind, domain, seconds", TABLE)
def test_the_header_comes_before_the_words(status, problem, kind, domain, seconds):
    headers = {"Retry-After": "30"}
    error = refusal("https://ca.example/x", status, headers, problem, now=NOW, hostname=APP)
    assert error.retry_after == 30 and (error.domain == domain or status == 503)


@pytest.mark.parametrize(
    "words",
    ["Try again in 999999s.", "Try again in 99999999999999s.", "retry after 9999-99-99 00:00:00"],
)
def test_times_in_words_have_bounds(words):
    error = refusal("x", 429, {}, of(LIMIT, words), now=NOW, hostname=APP)
    assert error.retry_after in (DAY, RATE_LIMIT_PAUSE)


def test_a_link_is_whole_in_all_that_is_said_of_it():
    problem = of(LIMIT, f"{'Your account is prevented. ' * 30} Please visit: {LINK}")
    assert LINK in str(refusal("https://ca.example/x", 429, {}, problem, now=NOW, hostname=APP))
    problem = of("userActionRequired", "The terms have changed", instance=LINK)
    assert LINK in str(refusal("https://ca.example/x", 403, {}, problem, now=NOW, hostname=APP))
