"""How a certificate is ordered: at the fake CA, which misbehaves as no real one should, and at
Pebble."""

import base64
import contextlib
import gzip
import itertools
import json
import logging
import os
import re
import socket
import ssl
import threading
import time
from types import SimpleNamespace

import josepy
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fake_ca import DAY, NOW, SILENCE, Clock, FakeCa, Proofs, problem
from pebble import Answers, pebble
from support import TIMEOUT, reserved_port

from gotunnel_server.certs import acme, bounded_http
from gotunnel_server.certs.acme import Ca, ari_id
from gotunnel_server.certs.acme_errors import (
    ACCOUNT,
    CONFIG,
    HOST,
    LIMITED,
    TRANSPORT,
    Abandoned,
    CaError,
)
from gotunnel_server.certs.cancel import Stop
from gotunnel_server.certs.challenges import Challenges
from gotunnel_server.certs.folder import open_store
from gotunnel_server.certs.schedule import Window
from gotunnel_server.certs.store import ca_id, check

APP = "app.example.com"
PAUSED = (
    "Your account is temporarily prevented from requesting certificates for {} and possibly "
    "others. Please visit: {}"
)
BOTH = ["http-01", "tls-alpn-01"]


@pytest.fixture
def fake():
    with FakeCa(Clock()) as fake:
        yield fake


@pytest.fixture
def store(tmp_path, fake):
    return open_store(tmp_path / "cache", fake.directory)


@pytest.fixture
def ca(fake, store):
    return Ca(fake.directory, store, clock=fake.clock)


def order(ca, hostname=APP, challenge="http-01", challenges=None, **more):
    return ca.order(hostname, challenge, challenges or Proofs(), Stop(), **more)


def refused(ca, **more) -> CaError:
    with pytest.raises(CaError) as caught:
        order(ca, **more)
    assert "\n" not in str(caught.value) and caught.value.url in str(caught.value)
    return caught.value


def leaf_of(chain):
    return x509.load_pem_x509_certificates(chain)[0]


# The straight story


@pytest.mark.parametrize("challenge", BOTH)
def test_an_order_ends_with_a_certificate_of_its_own_key(fake, ca, store, challenge):
    proofs = Proofs()
    key, chain = order(ca, challenge=challenge, challenges=proofs)
    stored = store.save(APP, key, chain)
    assert stored.leaf == leaf_of(chain)
    assert [(kind, name) for kind, name, _ in proofs.seen] == [
        ("http-01", "token-of-http-01-000000") if challenge == "http-01" else (challenge, APP)
    ]
    assert not proofs.published
    assert fake.payloads("new-order") == [{"identifiers": [{"type": "dns", "value": APP}]}]
    assert fake.payloads("challenge") == [{}]


def test_the_account_is_made_once_and_kept(fake, ca, store):
    order(ca)
    order(ca, hostname="b.example.com")
    order(Ca(fake.directory, store, clock=fake.clock), hostname="c.example.com")
    assert fake.count("new-account") == 1 and len(fake.accounts) == 1
    assert fake.payloads("new-account") == [{"termsOfServiceAgreed": True}]


def test_the_address_for_mail_is_the_contact(fake, store):
    order(Ca(fake.directory, store, email="me@example.com", clock=fake.clock))
    assert fake.payloads("new-account")[0]["contact"] == ["mailto:me@example.com"]


def test_the_key_is_kept_before_the_account_is_made(fake, ca, store):
    fake.script["new-account"] = [problem(500, "serverInternal")]
    refused(ca)
    kept = store.account()["key"]
    order(ca)
    assert store.account()["key"] == kept and store.account()["url"].endswith("/account/0")


def test_an_account_that_the_ca_forgot_is_made_again_with_the_same_key(fake, ca, store):
    order(ca)
    key = store.account()["key"]
    forgotten = fake.accounts[:]
    fake.accounts[:] = []
    order(ca)
    assert fake.accounts == forgotten and store.account()["key"] == key
    assert fake.count("new-account") == 2


def test_a_broken_account_file_is_a_new_key(fake, ca, store):
    order(ca)
    for broken in ({}, {"key": 1}, {"key": {"kty": "EC"}}, {"key": {"kty": "?"}, "url": "x"}):
        store.save_account(broken)
        order(ca)
    assert len(fake.accounts) == 5


EC_KEY = josepy.JWKEC(key=ec.generate_private_key(ec.SECP256R1()))
P384_KEY = josepy.JWKEC(key=ec.generate_private_key(ec.SECP384R1()))


@pytest.mark.parametrize("key", [EC_KEY.public_key(), P384_KEY], ids=["public", "P-384"])
def test_a_key_that_cannot_sign_is_set_aside_for_a_new_one(fake, ca, store, caplog, key):
    order(ca)
    store.save_account({**store.account(), "key": key.to_json()})
    order(ca)
    assert len(fake.accounts) == 2
    [line] = [record.getMessage() for record in caplog.records
              if record.name == "gotunnel.folder"]  # fmt: skip
    assert "expected a private key" in line and "renamed to account.json.bad" in line


def test_an_account_with_the_url_of_another_is_found_by_its_key(fake, ca, store):
    order(ca)
    url = store.account()["url"]
    for wrong in ("https://other.example/account/7", {"a": 1}):
        store.save_account({**store.account(), "url": wrong})
        fake.script["new-order"] = [problem(400, "malformed")] * isinstance(wrong, str)
        order(ca)
        assert store.account()["url"] == url
    assert len(fake.accounts) == 1


def test_an_account_that_is_refused_blames_no_setting_that_is_not_there(fake, ca, store):
    fake.script["new-account"] = [problem(400, "malformed")] * 2
    assert "ACME_EMAIL" not in refused(ca).words
    ca = Ca(fake.directory, store, email="me@example.com", clock=fake.clock)
    assert "check ACME_EMAIL" in refused(ca).words


def test_a_proof_that_cannot_be_written_leaves_no_authorization_pending(fake, ca, tmp_path):
    challenges = Challenges(("tls-alpn-01",), tmp_path / "missing")
    error = refused(ca, challenge="tls-alpn-01", challenges=challenges)
    assert error.kind == HOST and "the proof cannot be written" in error.words
    assert fake.payloads("authz")[-1] == {"status": "deactivated"}


def test_many_orders_at_once_make_one_account(fake, ca):
    threads = [
        threading.Thread(target=order, args=(ca, f"h{number}.example.com")) for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert fake.count("new-account") == 1 and fake.count("cert") == 6


def test_a_name_that_the_ca_remembers_needs_no_proof(fake, ca):
    proofs = Proofs()
    fake.script["authz"] = [(200, {}, {"status": "valid"})]
    fake.script["order"] = [(200, {}, {"status": "ready", "finalize": f"{fake.url}/finalize/0"})]
    order(ca, challenges=proofs)
    assert not proofs.seen and fake.count("challenge") == 0


# What a CA refuses


def test_a_proof_that_is_not_believed_is_the_hosts_in_the_cas_words(fake, ca):
    fake.verdicts["http-01"] = {
        "type": "urn:ietf:params:acme:error:connection",
        "detail": "no route\nto 127.0.0.9",
    }
    error = refused(ca)
    assert (error.kind, error.code, error.words) == (
        HOST,
        "connection",
        "http-01: no route to 127.0.0.9",
    )


def test_an_unauthorized_proof_is_the_hosts_and_not_the_accounts(fake, ca):
    fake.verdicts["http-01"] = {"type": "urn:ietf:params:acme:error:unauthorized", "detail": "x"}
    error = refused(ca)
    assert error.kind == HOST and not error.account_wide


def test_a_proof_is_withdrawn_when_the_order_fails(fake, ca):
    proofs = Proofs()
    fake.script["challenge"] = [problem(400, "malformed")]
    refused(ca, challenges=proofs)
    assert proofs.seen and not proofs.published


def test_an_authorization_that_never_becomes_valid_is_given_up_and_deactivated(
    fake, ca, monkeypatch
):
    monkeypatch.setattr(acme, "PROOF_PATIENCE", 0.3)
    pending = {
        "status": "pending",
        "challenges": [
            {"type": "http-01", "token": "t" * 20, "url": f"{fake.url}/challenge/0/http-01"}
        ],
    }
    fake.script["authz"] = [(200, {}, pending)] * 50
    error = refused(ca)
    assert error.kind == HOST and "no result within 0.3 s" in error.words
    assert fake.payloads("authz")[-1] == {"status": "deactivated"}


@pytest.mark.parametrize("status", ["deactivated", "expired", "revoked", "invalid", None, 7])
def test_an_authorization_in_any_other_state_is_named(fake, ca, status):
    fake.script["authz"] = [(200, {}, {"status": status})]
    error = refused(ca)
    assert error.kind == HOST and str(status) in error.words


def test_a_challenge_that_is_not_offered_is_named(fake, ca):
    fake.script["authz"] = [(200, {}, {"status": "pending", "challenges": [{"type": "dns-01"}]})]
    error = refused(ca)
    assert error.kind == HOST and "dns-01, expected a pending http-01" in error.words


@pytest.mark.parametrize(
    "code, kind", [("serverInternal", TRANSPORT), ("caa", CONFIG), ("unheardOf", HOST), ("", HOST)]
)
def test_an_order_that_dies_at_finalize_says_why(fake, ca, code, kind):
    error = {"type": f"urn:ietf:params:acme:error:{code}", "detail": "it died"}
    fake.script["order"] = [
        (200, {}, {"status": "ready", "finalize": f"{fake.url}/finalize/0"}),
        (200, {}, {"status": "invalid", "error": error if code else None}),
    ]
    error = refused(ca)
    assert (error.kind, error.code) == (kind, code)
    assert error.words == ("it died" if code else "the order is invalid, expected valid")


def test_a_refused_finalize_is_an_error(fake, ca):
    fake.script["finalize"] = [problem(403, "orderNotReady")]
    assert refused(ca).code == "orderNotReady"


def test_retry_after_is_obeyed_between_looks(fake, ca, monkeypatch):
    waits = []

    class Impatient(Stop):
        def wait(self, seconds):
            waits.append(seconds)
            return False

    processing = {"status": "processing"}
    fake.script["order"] = [
        (200, {}, {"status": "ready", "finalize": f"{fake.url}/finalize/0"}),
        (200, {"Retry-After": "17"}, processing),
        (200, {"Retry-After": "1"}, processing),
        (200, {"Retry-After": "Fri, 15 Jan 2027 08:00:40 GMT"}, processing),
        (200, {"Retry-After": "soon"}, processing),
        (200, {}, processing),
    ]
    ca.order(APP, "http-01", Proofs(), Impatient())
    assert waits == [17, 1, 40, 8 * acme.FIRST_LOOK, 16 * acme.FIRST_LOOK]


LIMITS = [
    ("3600", "", 3600),
    ("Fri, 15 Jan 2027 09:00:00 GMT", "", 3600),
    (None, "retry after 2027-01-15 10:00:00 UTC: see our page", 7200),
    ("garbage", "", 3600),
    (None, "", 3600),
    ("999999999999", "", DAY),
    ("0", "", 5),
    ("Fri, 99 Jan 2027 09:00:00 GMT", "", 3600),
]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
@pytest.mark.parametrize("header, words, seconds", LIMITS)
def test_a_rate_limit_says_for_how_long(fake, ca, monkeypatch, zone, header, words, seconds):
    fake.script["new-order"] = [problem(429, "rateLimited", words, Retry_After=header)]
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        error = refused(ca)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert (error.kind, error.retry_after, error.account_wide) == (ACCOUNT, seconds, True)


@pytest.mark.parametrize("words, domain", [
    ("too many certificates (5) already issued for this exact set of identifiers", ""),
    ('too many failed authorizations (5) for "app.example.com" in the last 1h', ""),
    ('too many certificates (50) already issued for "example.com" in the last 168h',
     "example.com")])  # fmt: skip
def test_a_rate_limit_of_one_name_holds_up_no_other(fake, ca, words, domain):
    fake.script["new-order"] = [problem(429, "rateLimited", words, Retry_After="7200")]
    error = refused(ca)
    assert (error.kind, error.retry_after, error.account_wide) == (LIMITED, 7200, False)
    assert error.domain == domain


@pytest.mark.parametrize("endpoint", ["new-order", "order", "finalize", "cert"])
def test_unauthorized_is_the_accounts_only_if_the_ca_says_so_of_the_account(fake, ca, endpoint):
    fake.script[endpoint] = [
        problem(403, "unauthorized", "Account in use did not issue specified certificate")
    ]
    error = refused(ca)
    assert (error.kind, error.account_wide) == (HOST, False)
    assert fake.count("account") == 1


@pytest.mark.parametrize("answer", [
    problem(401, "unauthorized", "account is not active"), (200, {}, {"status": "deactivated"})],
    ids=["refused", "shown"])  # fmt: skip
def test_a_closed_account_says_which_file_to_remove(fake, ca, store, answer):
    fake.script["new-order"] = [
        problem(403, "unauthorized", 'Account is not valid, has status "deactivated"')
    ]
    fake.script["account"] = [answer]
    error = refused(ca)
    assert (error.kind, error.account_wide) == (CONFIG, True)
    assert f"remove {store.where_account()}" in error.words
    fake.script["new-account"] = [problem(403, "unauthorized", "An account with the provided "
                                          "public key exists but is deactivated")]  # fmt: skip
    store.save_account({**store.account(), "url": None})
    assert f"remove {store.where_account()}" in refused(ca).words


def test_a_link_is_shown_whole_however_long_it_is(fake, ca):
    link = f"https://portal.letsencrypt.org/sfe/v1/unpause?jwt={'x' * 1500}"
    fake.script["new-order"] = [problem(429, "rateLimited", PAUSED.format(APP, link))]
    error = refused(ca)
    assert link in str(error) and (error.kind, error.domain) == (LIMITED, "")


def test_a_limit_that_a_proof_meets_is_no_fault_of_the_hostname(fake, ca):
    """As seen at Google's."""
    fake.verdicts["http-01"] = {
        "type": "urn:ietf:params:acme:error:rateLimited",
        "detail": "'default@gcp.api.pki.goog' is over quota (30 requests in 60 seconds) for the "
        "given ACME resource: challenge. Try again in 12.476542291s.",
    }
    error = refused(ca)
    assert (error.kind, error.retry_after) == (ACCOUNT, 13)


@pytest.mark.parametrize("answer, kind, wide", [
    (problem(403, "unauthorized"), HOST, False),  # the account is all right
    (problem(403, "externalAccountRequired"), CONFIG, True),
    ((429, {}, b"<h1>429 Too Many Requests</h1>"), TRANSPORT, False),  # ZeroSSL's nginx
    (problem(400, "rejectedIdentifier"), CONFIG, False),
    (problem(400, "dns"), HOST, False),
    (problem(500, "serverInternal"), TRANSPORT, False),
    ((503, {"Retry-After": "30"}, b"<h1>busy</h1>"), ACCOUNT, True),
    ((503, {}, b"<h1>busy</h1>"), TRANSPORT, False),
    ((200, {}, b"<h1>hello</h1>"), TRANSPORT, False),
    ((200, {}, b"[]"), TRANSPORT, False),
    ((201, {}, {"status": "pending"}), TRANSPORT, False),  # and no Location
    ((201, {"Location": "x"}, {"authorizations": 7}), TRANSPORT, False),
    ((400, {}, b'{"type": 7, "detail": [1], "subproblems": 3}'), HOST, False),
    ((418, {}, b"\xff\xfe"), HOST, False),
    ((301, {"Location": "/dir"}, b""), TRANSPORT, False),
])  # fmt: skip
def test_every_refusal_of_an_order_has_its_kind(fake, ca, answer, kind, wide):
    fake.script["new-order"] = [answer]
    error = refused(ca)
    assert (error.kind, error.account_wide) == (kind, wide)


@pytest.mark.parametrize(
    "endpoint",
    ["dir", "nonce", "new-account", "new-order", "order", "authz", "challenge", "finalize", "cert"],
)
@pytest.mark.parametrize("answer", [
    (200, {}, b""), (200, {}, b"\0garbage"), (200, {}, b"null"), (200, {}, b"{}"),
    (200, {"Replay-Nonce": None}, b"{}"), (200, {"Replay-Nonce": "!!"}, b"{}"),
    (400, {}, b"{"), (500, {}, b"oops"), (409, {}, b"{}"), (302, {}, b""),
    (400, {}, b"[]"), (400, {}, b"7"), (400, {}, b'{"type": {}, "identifier": 5}'),
    (400, {}, b'{"subproblems": [{"detail": {}}, 7]}'), (400, {}, b"[" * 100_000),
    (302, {"Location": "ftp://x"}, b""), (200, {"Content-Encoding": "gzip"}, b"x"),
    (200, {}, b'{"status": "valid", "authorizations": [1], "certificate": 7}'),
])  # fmt: skip
def test_whatever_comes_it_is_a_ca_error_or_a_chain(fake, ca, endpoint, answer, monkeypatch):
    for name in ("FIRST_LOOK", "PROOF_PATIENCE", "FINALIZE_PATIENCE"):
        monkeypatch.setattr(acme, name, 0.01)
    fake.script[endpoint] = [answer] * 4
    try:
        order(ca)
    except CaError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


def test_a_redirect_loop_costs_few_requests(fake, ca):
    fake.script["dir"] = [(302, {"Location": "/dir"}, b"")] * 50
    assert refused(ca).kind == TRANSPORT
    assert fake.count("dir") == bounded_http.MOST_REDIRECTS + 1


def test_bad_nonces_are_repeated_at_once_and_not_for_ever(fake, ca):
    order(ca)
    fake.script["new-order"] = [problem(400, "badNonce")] * 5
    order(ca)
    assert fake.count("new-order") == 1 + 6
    fake.script["new-order"] = [problem(400, "badNonce")] * 50
    error = refused(ca)
    assert (error.code, error.kind) == ("badNonce", TRANSPORT)  # no hostname's fault
    assert fake.count("new-order") == 7 + 6


def test_nobody_there_is_the_transports(tmp_path):
    with reserved_port() as port:
        url = f"http://127.0.0.1:{port}/dir"
        error = refused(Ca(url, open_store(tmp_path, url)))
    assert error.kind == TRANSPORT and error.url == url
    assert error.words.startswith("cannot be asked: ") and "refused" in error.words
    assert "object at" not in error.words


def test_a_ca_that_is_not_trusted_is_the_transports(tmp_path):
    with Answers() as answers, pebble(tmp_path, answers.http_port, answers.tls_port) as running:
        store = open_store(tmp_path / "cache", running.directory)
        error = refused(Ca(running.directory, store))
        assert error.kind == TRANSPORT and "certificate verify failed" in error.words
        (tmp_path / "empty.crt").write_text("")
        for file in ("missing.crt", "empty.crt"):
            error = refused(Ca(running.directory, store, ca_file=tmp_path / file))
            assert error.kind == TRANSPORT


def trickle(head):
    """An answer that begins with ``head``, goes on byte by byte, and does not end."""

    def send(file):
        file.write(head)
        while True:
            file.write(b" ")
            time.sleep(0.01)  # a slow answer is what this tests; the client ends it

    return send


TRICKLES = {
    "nothing": b"", "a status": b"HTTP/1.1 200", "a field": b"HTTP/1.1 200 OK\r\nX:",
    "a body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
    "a body without end": b"HTTP/1.1 200 OK\r\n\r\n",
    "a piece": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFF\r\n",
}  # fmt: skip


@pytest.mark.parametrize("head", TRICKLES.values(), ids=TRICKLES)
def test_an_answer_that_trickles_in_is_given_up_in_time(fake, ca, monkeypatch, head):
    monkeypatch.setattr(bounded_http, "REQUEST_TIMEOUT", 0.2)
    fake.script["new-order"] = [trickle(head)]
    began = time.monotonic()
    error = refused(ca)
    assert time.monotonic() - began < 2
    assert error.kind == TRANSPORT and "no whole answer within 0.2 s" in error.words


@pytest.mark.parametrize("answer", [SILENCE, trickle(TRICKLES["a body"])], ids=["silent", "slow"])
def test_an_answer_that_is_waited_for_ends_soon_when_it_is_stopped(fake, ca, answer):
    stop, begun, ends = Stop(), threading.Event(), []

    def send(file):
        begun.set()
        answer(file)

    def run():
        try:
            ca.order(APP, "http-01", Proofs(), stop)
        except Abandoned as error:
            ends.append(error)

    fake.script["new-order"] = [SILENCE if answer is SILENCE else send]
    thread = threading.Thread(target=run)
    thread.start()
    if answer is SILENCE:
        fake.silent.get(timeout=TIMEOUT)
    else:
        assert begun.wait(TIMEOUT)
    stop.set()
    thread.join(2)
    assert ends


def for_ever(data, first=b""):
    def send(file):
        file.write(first)
        while True:
            file.write(data)

    return send


@pytest.mark.parametrize("answer", [
    for_ever(b"HTTP/1.1 100 Continue\r\n\r\n"), for_ever(b"SSH-2.0-x"), lambda file: None,
    for_ever(b"X: y\r\n", b"HTTP/1.1 200 OK\r\n"),
], ids=["one that is not the last", "not http", "none", "fields"])  # fmt: skip
def test_an_answer_that_is_none_is_given_up_in_time(fake, ca, monkeypatch, answer):
    monkeypatch.setattr(bounded_http, "REQUEST_TIMEOUT", 0.5)
    fake.script["new-order"] = [answer]
    began = time.monotonic()
    assert refused(ca).kind == TRANSPORT
    assert time.monotonic() - began < 2


def test_a_long_answer_is_not_read_to_its_end(fake, ca):
    sent = []

    def send(file):
        file.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        while sum(sent) < 100_000_000:
            sent.append(file.write(b"[" * 65536))

    fake.script["dir"] = [send]
    error = refused(ca)
    assert error.kind == TRANSPORT and "more than 1048576 bytes" in error.words
    assert sum(sent) < 50_000_000  # at most what the kernel buffers for both ends


def test_a_small_answer_that_unpacks_to_a_long_one_is_refused(fake, ca):
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) < bounded_http.MOST_BYTES
    fake.script["new-order"] = [(201, {"Content-Encoding": "gzip"}, bomb)]
    assert "more than 1048576 bytes" in refused(ca).words


LINKS = [
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/x",
    "http://[::1]:{port}/",
    "file:///etc/passwd",
    "ftp://127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    "x" * 5000,
    "http://127.0.0.1:{ours}@127.0.0.1:{port}/",
    "\0",
    "",
    "http://",
    "https://\ud800/",
]
# One that has no address in it leads back to the CA.
REDIRECTS = [link for link in LINKS if "{port}" in link]


@pytest.mark.parametrize("name, link", [
    *itertools.product(["order", "authz", "challenge", "directory"], LINKS),
    *itertools.product(["redirect"], REDIRECTS)])  # fmt: skip
def test_no_link_leads_to_another_port_of_this_machine(fake, ca, name, link):
    with socket.create_server(("127.0.0.1", 0)) as other:
        link = link.format(port=other.getsockname()[1], ours=fake.url.rpartition(":")[2])
        fake.script = {
            "order": {"new-order": [(201, {"Location": f"{fake.url}/order/0"}, {
                "status": "pending", "authorizations": [link]})]},
            "authz": {"authz": [(200, {}, {"status": "pending", "challenges": [
                {"type": "http-01", "token": "t" * 20, "url": link}]})]},
            "challenge": {"order": [(200, {}, {"status": "ready", "finalize": link})]},
            "redirect": {"new-order": [lambda file: file.write(
                b"HTTP/1.1 307 Over There\r\nContent-Length: 0\r\nLocation: "
                + link.encode() + b"\r\n\r\n")]},
            "directory": {"dir": [(200, {}, {
                key: link for key in ("newNonce", "newAccount", "newOrder")})]},
        }[name]  # fmt: skip
        error = refused(ca)
        assert error.kind in (TRANSPORT, HOST) and len(str(error)) < 1000
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()


def test_a_ca_by_https_never_leads_to_plain_http():
    with contextlib.closing(bounded_http.Session("https://ca.example/dir", Stop())) as session:
        with pytest.raises(requests.exceptions.InvalidSchema):
            session.get("http://ca.example/dir")


def test_what_the_ca_says_is_one_printable_line_of_bounded_length(fake, ca):
    words = "a\r\nb\x1b[31m\0\u202e\ud800" + "c" * 5000
    fake.script["new-order"] = [problem(400, "x\n" * 5000, words)]
    error = refused(ca)
    assert str(error).isprintable() and len(str(error)) < 1000
    assert error.words.startswith("a b [31m c")


def test_a_certificate_that_has_run_out_is_not_taken(fake, ca):
    make = fake.mint.chain
    fake.mint.chain = lambda hostname, key, *_: make(hostname, key, NOW - 2 * DAY, DAY)
    error = refused(ca)
    assert error.kind == HOST and "expired on 2027-01-14" in error.words


def test_an_order_that_is_stopped_leaves_no_authorization_pending(fake, ca):
    stop = Stop()

    class Impatient(Proofs):
        @contextlib.contextmanager
        def http(self, *proof):
            with super().http(*proof):
                stop.set()  # as if the hostname was dropped just then
                yield

    with pytest.raises(Abandoned):
        ca.order(APP, "http-01", Impatient(), stop)
    assert fake.payloads("authz")[-1] == {"status": "deactivated"}


def test_a_silent_ca_is_given_up(fake, ca, monkeypatch):
    monkeypatch.setattr(acme, "NETWORK_TIMEOUT", 0.2)
    fake.script["new-order"] = [SILENCE]
    assert refused(ca).kind == TRANSPORT


def test_a_binding_that_is_missing_is_asked_for_by_name(fake, ca):
    fake.script["new-account"] = [problem(403, "externalAccountRequired")]
    error = refused(ca)
    assert (error.kind, error.account_wide) == (CONFIG, True) and "ACME_EAB_KID" in error.words


def test_a_binding_that_is_no_base64_is_named_and_not_shown(fake, store):
    error = refused(Ca(fake.directory, store, eab=("kid", "ä?geheim"), clock=fake.clock))
    assert error.kind == CONFIG and "ACME_EAB_HMAC_KEY" in error.words
    assert "geheim" not in str(error) and fake.count("new-account") == 0


@pytest.mark.parametrize("off, stops", [(2 * DAY, True), (-2 * DAY, True), (600, False)])
def test_a_wrong_clock_orders_nothing(fake, store, caplog, off, stops):
    ca = Ca(fake.directory, store, clock=lambda: fake.clock() + off)
    with caplog.at_level(logging.WARNING):
        if stops:
            error = refused(ca)
            assert (error.kind, error.code) == (ACCOUNT, "clock") and "clock is" in error.words
        else:
            order(ca)
            assert "clock is 600 s ahead" in caplog.text
    assert (fake.count("new-order") == 0) == stops


def test_an_order_ends_soon_when_it_is_stopped(fake, ca):
    stop, ends = Stop(), []
    fake.script["order"] = [(200, {"Retry-After": "60"}, {"status": "pending"})] * 2

    def run():
        try:
            ca.order(APP, "http-01", Proofs(), stop)
        except Abandoned as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    stop.set()
    thread.join(2)
    assert ends


# Renewal information


def window(fake, start, end, **headers):
    return (
        200,
        {name.replace("_", "-"): value for name, value in headers.items()},
        json.dumps({"suggestedWindow": {"start": start, "end": end}}).encode(),
    )


def info(ca, leaf):
    return ca.renewal_info(leaf, Stop())


def test_the_window_and_when_to_ask_again(fake, ca):
    leaf = leaf_of(order(ca)[1])
    fake.renewal_info = True
    fake.windows = [
        window(
            fake, "2027-01-15T08:00:10.123456789Z", "2027-01-15T09:00:20+01:00", Retry_After="600"
        )
    ]
    assert info(ca, leaf) == (Window(NOW + 10, NOW + 20), 600)


@pytest.mark.parametrize("header, seconds", [("5", 60), ("259200", DAY), (None, 6 * 3600)])
def test_the_ca_is_asked_neither_too_often_nor_too_seldom(fake, ca, header, seconds):
    fake.renewal_info = True
    fake.windows = [
        window(fake, "2027-01-15T08:00:10Z", "2027-01-15T08:00:20Z", Retry_After=header)
    ]
    assert info(ca, leaf_of(order(ca)[1]))[1] == seconds


@pytest.mark.parametrize("answer", [
    window(None, "2027-01-16T08:00:00Z", "2027-01-15T08:00:00Z"),  # ends before it starts
    window(None, "2027-01-16T08:00:00", "2027-01-17T08:00:00"),  # where?
    window(None, 7, None), window(None, "x", "y"), (200, {}, b"{}"), (200, {}, b"garbage"),
    (200, {}, b'{"suggestedWindow": 5}'), (503, {}, b""), problem(404, "malformed"),
])  # fmt: skip
def test_a_window_that_makes_no_sense_is_none(fake, ca, answer):
    fake.renewal_info = True
    fake.windows = [answer]
    assert info(ca, leaf_of(order(ca)[1]))[0] is None


def test_a_ca_without_renewal_information_is_not_asked(fake, ca):
    assert info(ca, leaf_of(order(ca)[1])) == (None, 6 * 3600)
    assert fake.count("ari") == 0


def test_the_name_of_a_certificate_in_renewal_information():
    """The example of RFC 9773 §4.1."""

    class Example:
        serial_number = 0x87654321

        class extensions:
            @staticmethod
            def get_extension_for_class(_):
                class Extension:
                    class value:
                        key_identifier = bytes.fromhex("69885b6b87464041e1b37b847ba0ae2cde01c8d4")

                return Extension

    assert ari_id(Example) == "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE"


def test_a_serial_number_may_be_negative():
    identifier = x509.AuthorityKeyIdentifier(b"k", None, None)
    leaf = SimpleNamespace(serial_number=-5, extensions=x509.Extensions([
        x509.Extension(identifier.oid, False, identifier)]))  # fmt: skip
    assert ari_id(leaf) == "aw.-w"


def test_a_renewal_says_what_it_replaces_unless_the_ca_will_not_hear_of_it(fake, ca):
    leaf = leaf_of(order(ca)[1])
    order(ca, replaces=leaf)  # the CA has no renewal information
    fake.renewal_info = True
    order(ca, replaces=leaf)
    fake.script["new-order"] = [problem(409, "alreadyReplaced")]
    order(ca, replaces=leaf)
    named = [payload.get("replaces") for payload in fake.payloads("new-order")]
    assert named == [None, None, ari_id(leaf), ari_id(leaf), None]


# Pebble


def of_pebble(running, folder, **more):
    store = open_store(folder / "cache", running.directory)
    return Ca(running.directory, store, ca_file=running.ca_file, **more), store


@pytest.mark.parametrize("challenge", BOTH)
def test_pebble_signs_for_both_challenges(tmp_path, challenge):
    with Answers() as answers, pebble(tmp_path, answers.http_port, answers.tls_port) as running:
        ca, store = of_pebble(running, tmp_path)
        stored = store.save(APP, *order(ca, challenge=challenge, challenges=answers))
        assert check(store.pem(stored), APP) == stored.leaf
        context = ssl.create_default_context(cadata=running.root())
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(tmp_path / "cache" / stored.key)
        assert handshake(server, context)["subjectAltName"] == (("DNS", APP),)
        if challenge == "http-01":
            assert [ask[::3] for ask in answers.asked] == [("http-01", 200)] * 3
            assert not any(answers.body(APP, path) for _, _, path, _ in answers.asked)
        else:
            assert answers.asked == [("tls-alpn-01", APP, "acme-tls/1", b"")] * 3
            assert answers.context(APP) is None


def handshake(server_context, context):
    """The peer's certificate, once a client of ``context`` has verified it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = context.wrap_bio(to_client, to_server, server_hostname=APP)
    for end in (client, server, client, server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
    return client.getpeercert()


@pytest.mark.slow
def test_pebble_with_many_bad_nonces_signs_all_the_same(tmp_path):
    with (
        Answers() as answers,
        pebble(
            tmp_path, answers.http_port, answers.tls_port, PEBBLE_WFE_NONCEREJECT="20"
        ) as running,
    ):
        ca, _ = of_pebble(running, tmp_path)
        for number in range(8):
            assert order(ca, f"h{number}.example.com", challenges=answers)


def test_pebble_started_anew_gets_the_same_key(tmp_path):
    with Answers() as answers, reserved_port() as port:
        ports = answers.http_port, answers.tls_port
        with pebble(tmp_path / "a", *ports, port=port) as running:
            ca, store = of_pebble(running, tmp_path)
            order(ca, challenges=answers)
            kept = store.account()
        with pebble(tmp_path / "b", *ports, port=port) as running:
            ca = Ca(running.directory, store, ca_file=running.ca_file)
            order(ca, challenges=answers)
        assert store.account()["key"] == kept["key"] and store.account()["url"] != kept["url"]


def test_pebble_that_asks_for_a_binding(tmp_path, caplog):
    right = base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip("=")
    wrong = base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip("=")
    with (
        caplog.at_level(logging.DEBUG),
        Answers() as answers,
        pebble(tmp_path, answers.http_port, answers.tls_port, eab=("kid-1", right)) as running,
    ):
        for eab in (None, ("kid-2", right), ("kid-1", wrong)):
            error = refused(of_pebble(running, tmp_path, eab=eab)[0], challenges=answers)
            assert (error.kind, error.account_wide) == (CONFIG, True)
            assert "ACME_EAB_KID" in error.words
        order(of_pebble(running, tmp_path, eab=("kid-1", right))[0], challenges=answers)
        restarted, store = of_pebble(running, tmp_path)  # Pebble finds the account by its key
        order(restarted, challenges=answers)
        private = store.account()["key"]["d"]
    kept = "".join(path.read_text() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    for secret in (right, wrong):
        assert secret not in kept and secret not in caplog.text
    assert private in kept and private not in caplog.text


def test_pebble_and_an_account_that_was_closed(tmp_path):
    with Answers() as answers, pebble(tmp_path, answers.http_port, answers.tls_port) as running:
        ca, store = of_pebble(running, tmp_path)
        order(ca, challenges=answers)
        with ca._conversation(Stop()) as conversation:
            ca._sign_in(conversation)
            conversation.post(conversation.account, acme._Payload(status="deactivated"))
        error = refused(ca, challenges=answers)
        assert (error.kind, error.account_wide) == (CONFIG, True)
        file = tmp_path / "cache" / ca_id(running.directory) / "account.json"
        assert f"remove {file}" in error.words
        file.unlink()
        order(ca, challenges=answers)  # this makes another account


def test_pebble_with_a_broken_proof_says_what_it_saw(tmp_path):
    with Answers() as answers, pebble(tmp_path, answers.http_port, answers.tls_port) as running:
        ca, _ = of_pebble(running, tmp_path)
        error = refused(ca, challenges=Proofs())  # which publishes nothing
        assert error.kind == HOST and re.search("http-01: .*404", error.words)


def test_the_key_on_disk_is_pkcs8(ca):
    key, _ = order(ca)
    assert key.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert serialization.load_pem_private_key(key, None).curve.name == "secp256r1"


def test_a_system_without_threads_is_no_defect_of_ours(fake, ca, monkeypatch):
    def fail(timer):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", fail)
    error = refused(ca)
    assert error.kind == TRANSPORT and "can't start new thread" in error.words
