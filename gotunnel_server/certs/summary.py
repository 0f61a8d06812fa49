"""Says in a few words what a certificate's error means. Values in, values out.

The whole text has a CA's URL, its code and its own sentence, and may be 500 characters long. A
table has room for a few words; the whole text stays one click away.
"""

from __future__ import annotations

import re
from functools import lru_cache

from gotunnel_agent.common.one_line import LINK, words_on_one_line

MOST = 80  # characters of a summary

# By error code (RFC 8555 §6.7), without its prefix.
OF_CODES = {
    "accountDoesNotExist": "the CA does not know the account",
    "badCSR": "the CA refuses the request",
    "badPublicKey": "the CA refuses the key",
    "caa": "a CAA record in DNS forbids this CA",
    "connection": "the CA could not connect to the hostname",
    "dns": "the CA could not look the hostname up in DNS",
    "externalAccountRequired": "the CA wants ACME_EAB_KID and ACME_EAB_HMAC",
    "incorrectResponse": "the hostname leads to another server",
    "invalidContact": "the CA refuses ACME_EMAIL",
    "malformed": "the CA refuses the request",
    "rateLimited": "a rate limit of the CA is reached",
    "rejectedIdentifier": "the CA never signs this hostname",
    "serverInternal": "the CA has a problem of its own",
    "tls": "the CA's TLS connection to the hostname failed",
    "unauthorized": "the hostname leads to another server",
    "unsupportedIdentifier": "the CA never signs this hostname",
    "userActionRequired": "the CA wants something of the operator",
}
_CODE = re.compile(r"(?<![\w./-])(?:[1-5][0-9]{2} )?(" + "|".join(OF_CODES) + r")(?=:|$)")
# Sentences of ours, and of CAs without a code: a pattern, and the summary.
OF_WORDS = (
    (re.compile(r"it waits for its turn"), "it waits for its turn: a rate limit"),
    (re.compile(r"\b429\b|too many|rate limit", re.I), "a rate limit of the CA is reached"),
    (re.compile(r"timed out|timeout|no answer in", re.I), "no answer in time"),
    (re.compile(r"certificate verify failed", re.I), "the CA's own certificate is not trusted"),
    (re.compile(r"No space left", re.I), "the disk is full"),
    (re.compile(r"^ACME_CACHE", re.I), "ACME_CACHE cannot be used"),
    (re.compile(r"\b5[0-9]{2}\b"), "the CA has a problem of its own"),
)


@lru_cache(1000)  # one takes 10 µs, and hundreds of hostnames may have one
def summary(reason: str) -> str:
    """At most MOST characters; "" for no error."""
    if not reason:
        return ""
    if found := _CODE.search(reason):
        return OF_CODES[found[1]]
    plain = LINK.sub("", reason)
    for pattern, words in OF_WORDS:
        if pattern.search(plain):
            return words
    return words_on_one_line(plain.strip(" :"), MOST)
