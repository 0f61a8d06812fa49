"""A certificate's error in a few words."""

import pytest

from gotunnel_server.certs.order_queue import WAITS
from gotunnel_server.certs.state import FAILED, State
from gotunnel_server.certs.summary import MOST, OF_CODES, summary

URL = "https://acme-v02.api.letsencrypt.org/acme/new-order"


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("", ""),
        (f"{URL}: 429 rateLimited: too many certificates (5) already issued for this exact set",
         OF_CODES["rateLimited"]),
        (f"{URL}: dns: http-01: DNS problem: NXDOMAIN looking up A for a.example.com",
         OF_CODES["dns"]),
        (f"{URL}: 403 unauthorized: tls-alpn-01: the wrong certificate", OF_CODES["unauthorized"]),
        (f"{URL}: connection: http-01: 192.0.2.1: Timeout during connect", OF_CODES["connection"]),
        (f"{URL}: 400 rejectedIdentifier: no", OF_CODES["rejectedIdentifier"]),
        (f"{URL}: 503: Service busy; retry later.", OF_CODES["serverInternal"]),
        (f"{URL}: 429: <html>Too Many Requests</html>", OF_CODES["rateLimited"]),
        (f"{URL}: the read operation timed out", "no answer in time"),
        (WAITS + "more new hostnames than the CA takes", "it waits for its turn: a rate limit"),
        ("ACME_CACHE: /x/y: Permission denied", "ACME_CACHE cannot be used"),
        ("there is no certificate for it", "there is no certificate for it"),
        ("a\nb\x1b[2J", "a b [2J"),
    ],
)  # fmt: skip
def test_few_words_say_what_an_error_means(reason, said):
    assert summary(reason) == said
    assert State(FAILED, reason).summary == said


def test_any_error_has_a_short_summary():
    assert len(summary("x" * 5000)) == MOST
    assert all(len(words) <= MOST for words in OF_CODES.values())
