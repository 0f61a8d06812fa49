"""Who is a peer: TLS with certificates made of the cluster's secret."""

import ssl
import tempfile

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gotunnel_server.cluster import secret
from gotunnel_server.cluster.secret import NAME, PROTOCOL, Secret

OLD, NEW, OTHER = b"o" * 32, b"n" * 32, b"x" * 44


def shake_hands(client, server, sni=NAME):
    """Run a handshake between two contexts; what each side raises, None for nothing."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, False, sni),
        server.wrap_bio(to_server, to_client, True),
    )
    failed = [None, None]
    for _ in range(4):
        for number, end in enumerate(ends):
            if failed[number] is None:
                try:
                    end.do_handshake()
                    end.read(1)
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError as error:
                    failed[number] = error.reason or str(error)
    return failed, ends


def test_members_with_the_same_secret_know_each_other():
    failed, ends = shake_hands(Secret([NEW]).for_dialling(), Secret([NEW]).for_accepting())
    assert failed == [None, None]
    assert [end.selected_alpn_protocol() for end in ends] == [PROTOCOL, PROTOCOL]
    assert {end.version() for end in ends} == {"TLSv1.3"}


@pytest.mark.parametrize(
    ("one", "other"), [([OLD, NEW], [OLD]), ([OLD, NEW], [NEW, OLD]), ([NEW, OLD], [NEW])]
)
def test_keys_are_replaced_one_after_the_other(one, other):
    for dialling, accepting in (one, other), (other, one):
        contexts = Secret(dialling).for_dialling(), Secret(accepting).for_accepting()
        assert shake_hands(*contexts)[0] == [None, None]


def test_a_member_of_another_cluster_is_refused_at_both_ends():
    failed, _ = shake_hands(Secret([NEW]).for_dialling(), Secret([OTHER]).for_accepting())
    assert failed[0] == "CERTIFICATE_VERIFY_FAILED"
    client = Secret([OTHER]).for_dialling()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    failed, _ = shake_hands(client, Secret([NEW]).for_accepting())
    assert failed[1] == "CERTIFICATE_VERIFY_FAILED"


def test_a_stranger_without_a_certificate_is_refused():
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    failed, _ = shake_hands(client, Secret([NEW]).for_accepting())
    assert failed[1] == "PEER_DID_NOT_RETURN_A_CERTIFICATE"


def test_only_tls_1_3_signs_the_whole_handshake():
    client = Secret([NEW]).for_dialling()
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    failed, _ = shake_hands(client, Secret([NEW]).for_accepting())
    assert failed[1] == "UNSUPPORTED_PROTOCOL"


def test_a_certificate_of_the_cluster_signs_no_other_certificate():
    """A member's own key must not make members, should it get known."""
    member = Secret([NEW])
    signer = serialization.load_pem_private_key(member._own, None)
    issuer = x509.load_pem_x509_certificate(member._own).subject
    key = Ed25519PrivateKey.generate()
    forged = secret._builder(NAME, key, issuer).sign(signer, None)
    impostor = Secret([NEW])
    impostor._own = secret._pem_of_key(key) + secret._pem(forged) + member._own
    failed, _ = shake_hands(impostor.for_dialling(), member.for_accepting())
    assert failed[1] == "CERTIFICATE_VERIFY_FAILED"


def test_the_key_is_shown_nowhere_and_left_on_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert repr(Secret([NEW])) == "<Secret>"
    Secret([NEW]).for_dialling()
    monkeypatch.delattr(secret.os, "memfd_create")
    assert shake_hands(Secret([NEW]).for_dialling(), Secret([NEW]).for_accepting())[0] == [None] * 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keys", [[], [b"short"]])
def test_weak_secrets_are_refused(keys):
    with pytest.raises(ValueError):
        Secret(keys)
