"""The proofs for a CA: what is published, for whom, and for how long."""

import hashlib
import os
import ssl

import pytest
from cryptography import x509

from gotunnel_server.certs.acme_errors import CaError
from gotunnel_server.certs.challenges import PATH, Challenges
from gotunnel_server.net.client_hello import ACME_TLS

HOST, OTHER = "app.example.com", "other.example.com"
TOKEN = "LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0"


def test_file_is_there_for_its_hostname_as_long_as_it_is_needed():
    challenges = Challenges(())
    assert challenges.body(HOST, PATH + TOKEN) is None
    with challenges.http(HOST, TOKEN, b"proof"):
        assert challenges.body(HOST, PATH + TOKEN) == b"proof"
        assert challenges.body(OTHER, PATH + TOKEN) is None
    assert challenges.body(HOST, PATH + TOKEN) is None


@pytest.mark.parametrize(
    "path",
    ["/", PATH, TOKEN, PATH + "x", PATH + "../" + TOKEN, PATH + TOKEN + "/",
     PATH + "%4c" + TOKEN[1:], PATH + TOKEN + "?x", PATH + "a" * 10_000, "/x" + PATH + TOKEN],
    ids=lambda path: path[:40],
)  # fmt: skip
def test_no_other_path_leads_to_a_file(path):
    challenges = Challenges(())
    with challenges.http(HOST, TOKEN, b"proof"):
        assert challenges.body(HOST, path) is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [(PATH, True), (PATH + TOKEN, True), (PATH + "../x", True), (PATH[:-1], False), ("/", False),
     ("/x" + PATH, False), ("*", False), (PATH.upper() + TOKEN, False)],
)  # fmt: skip
def test_where_a_ca_looks_is_known_whether_there_is_a_file_or_not(path, expected):
    assert Challenges.is_asked_for(path) is expected


def test_what_is_published_can_be_adopted_by_a_successor(tmp_path):
    first, second = Challenges(()), Challenges((), tmp_path)
    digest = hashlib.sha256(b"key authorization").digest()
    assert first.published() == ()
    with first.http(HOST, TOKEN, b"proof"), first.alpn(OTHER, digest):
        proofs = first.published()
    assert first.published() == ()
    second.adopt(proofs)
    assert second.body(HOST, PATH + TOKEN) == b"proof"
    assert second.context(HOST) is None
    der, protocol = shake_hands(second.context(OTHER))
    proof = x509.load_der_x509_certificate(der).extensions.get_extension_for_oid(
        x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")
    )
    assert proof.value.value.endswith(digest) and protocol == ACME_TLS


def test_adopted_proofs_have_a_bound_and_none_that_cannot_be_published_stops_the_others(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("gotunnel_server.certs.challenges.MOST_ADOPTED", 2)
    challenges = Challenges((), tmp_path / "missing")
    challenges.adopt([(HOST, "", "00" * 32), (HOST, TOKEN, "proof"), (OTHER, TOKEN, "more")])
    assert challenges.context(HOST) is None
    assert challenges.body(HOST, PATH + TOKEN) == b"proof"
    assert challenges.body(OTHER, PATH + TOKEN) is None
    assert "a predecessor's proof cannot be published" in caplog.text


def test_certificate_carries_the_proof_and_no_other_name():
    challenges = Challenges(())
    digest = hashlib.sha256(b"key authorization").digest()
    with challenges.alpn(HOST, digest):
        assert challenges.context(OTHER) is None
        der, protocol = shake_hands(challenges.context(HOST))
    assert challenges.context(HOST) is None
    certificate = x509.load_der_x509_certificate(der)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == [HOST]
    proof = certificate.extensions.get_extension_for_oid(
        x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")
    )
    assert proof.critical and proof.value.value == b"\x04\x20" + digest
    assert protocol == ACME_TLS


def test_a_proof_that_cannot_be_written_is_a_refusal_and_not_published(tmp_path):
    challenges = Challenges((), tmp_path / "missing")
    with pytest.raises(CaError, match="the proof cannot be written in .*missing: No such file"):
        with challenges.alpn(HOST, bytes(32)):
            pass
    assert challenges.context(HOST) is None


def test_proof_leaves_no_file(tmp_path):
    with Challenges((), tmp_path).alpn(HOST, bytes(32)):
        assert list(tmp_path.iterdir()) == []


def shake_hands(server_context):
    """The certificate and the protocol that a CA sees."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([ACME_TLS])
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(to_client, to_server, server_hostname=HOST)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
    return client.getpeercert(binary_form=True), client.selected_alpn_protocol()


def test_only_old_proofs_that_a_killed_gateway_left_are_swept(tmp_path):
    old, new, foreign = (tmp_path / f".{name}.tmp" for name in ("proof-x", "proof-y", "somebody's"))
    for path in (old, new, foreign):
        path.write_bytes(b"half")
    for path in (old, foreign):
        os.utime(path, (0, 0))
    Challenges((), tmp_path)
    assert not old.exists() and new.exists() and foreign.exists()
