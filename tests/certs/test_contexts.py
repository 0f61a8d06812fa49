"""Certificates by SNI, proved by handshakes of a client that verifies."""

import base64
import errno
import gc
import os
import socket
import ssl
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from support import wait_until

from gotunnel_server.certs import cert_dir as cert_dir_module
from gotunnel_server.certs import choices, contexts, local_ca
from gotunnel_server.certs.cert_dir import names_of
from gotunnel_server.certs.challenges import TLS_ALPN_01, Challenges
from gotunnel_server.certs.contexts import KEY_LIFE, CertificateError, Certificates, Fronts
from gotunnel_server.certs.local_ca import Authority

TLS_VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.fixture
def ca(tmp_path):
    return Authority(tmp_path / "ca")


@pytest.fixture
def cert_dir(tmp_path):
    folder = tmp_path / "certs"
    folder.mkdir()
    return folder


@pytest.fixture
def unraisable(monkeypatch):
    """What a callback let out, which Python prints as "Exception ignored"."""
    seen = []
    monkeypatch.setattr("sys.unraisablehook", seen.append)
    return seen


def put(file, content):
    """Write a file as careful programs do: whole, under a name of its own, then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{threading.get_ident()}.new")
    new.write_bytes(content)
    new.chmod(0o600)
    new.replace(file)


# A CA that signs what the authority does not: any names, any dates, any kind of key.
CA_KEY = ec.generate_private_key(ec.SECP256R1())
CA_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
RSA_KEY = rsa.generate_private_key(65537, 2048)  # one for all, since it takes long to find


def sign(subject, public_key, extension, validity):
    """A certificate by the test CA, valid between two days counted from now."""
    begin, end = (datetime.now(timezone.utc) + timedelta(days=days) for days in validity)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(CA_NAME)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(extension, critical=True)
        .sign(CA_KEY, hashes.SHA256())
    )


CA = sign(CA_NAME, CA_KEY.public_key(), x509.BasicConstraints(True, None), (-1000, 1000))
CA_PEM = CA.public_bytes(serialization.Encoding.PEM)


class Leaf:
    """A certificate with its chain, and its key, both PEM."""

    def __init__(self, certificate, key):
        self.serial = certificate.serial_number
        self.chain = certificate.public_bytes(serialization.Encoding.PEM) + CA_PEM
        self.key = key

    def put(self, certificate_file, key_file):
        """Write the key and then the certificate; returns the serial number."""
        put(key_file, self.key)
        put(certificate_file, self.chain)
        return self.serial


def make(*names, key=None, validity=(-30, 30), encryption=serialization.NoEncryption()):
    key = key or ec.generate_private_key(ec.SECP256R1())
    extension = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
    return Leaf(
        sign(x509.Name([]), key.public_key(), extension, validity), key_pem(key, encryption)
    )


def key_pem(key, encryption=serialization.NoEncryption()):
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


def trusting_client(**settings):
    """A visitor who trusts the test CA."""
    context = ssl.create_default_context(cadata=CA_PEM.decode())
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)  # the CA is a plain one
    for name, value in settings.items():
        setattr(context, name, value)
    return context


def serial_at(certificates, hostname):
    """The serial number of what a visitor of `hostname` is served with, valid or not."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    return served_serial(certificates.front(hostname), client, hostname)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def give(cert_dir, stem, issuer, hostname):
    """Put a pair of `issuer` for `hostname` in cert_dir; returns the serial number."""
    certificate_file, key_file = issuer.issue(hostname)
    put(cert_dir / f"{stem}.crt", certificate_file.read_bytes() + issuer.ca_file.read_bytes())
    put(cert_dir / f"{stem}.key", key_file.read_bytes())
    return serial_of(certificate_file)


def serial_of(certificate_file):
    return x509.load_pem_x509_certificate(certificate_file.read_bytes()).serial_number


def client_context(ca, **settings):
    context = ssl.create_default_context(cafile=ca.ca_file)
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default since Python 3.13
    for name, value in settings.items():
        setattr(context, name, value)
    return context


def handshake(front, client, hostname, session=None):
    """Both ends of a finished handshake; raises what the client sees if it fails."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    visitor = client.wrap_bio(to_client, to_server, server_hostname=hostname, session=session)
    gateway = front.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):  # flights of a handshake; the server's failure is seen by the client
        for end in (visitor, gateway):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                if end is visitor:
                    raise
    gateway.write(b"!")
    assert visitor.read(1) == b"!"  # with it came the ticket
    return visitor, gateway


def served_serial(front, client, hostname):
    certificate = handshake(front, client, hostname)[0].getpeercert(binary_form=True)
    return x509.load_der_x509_certificate(certificate).serial_number


def served_names(front, client, hostname):
    return handshake(front, client, hostname)[0].getpeercert()["subjectAltName"]


# Which context


@pytest.mark.parametrize("version", TLS_VERSIONS)
def test_each_hostname_is_served_with_its_own_certificate(ca, version):
    certificates = Certificates(None, ca)
    assert all(certificates.ensure(name) for name in ("gw.test", "a.test", "b.test"))
    front = certificates.front("gw.test")
    client = client_context(ca, minimum_version=version, maximum_version=version)
    for name in ("a.test", "b.test", "gw.test"):
        assert served_names(front, client, name) == (("DNS", name),)


def test_hostname_in_any_spelling_is_the_same(ca):
    certificates = Certificates(None, ca)
    certificates.ensure("App.Test.")
    front = certificates.front("app.test")
    client = client_context(ca, check_hostname=False)
    for sni in ("app.test", "APP.test", "app.test."):
        assert served_names(front, client, sni) == (("DNS", "app.test"),)
    assert certificates.context("aPP.test.") is certificates.context("app.test")


def test_no_sni_gets_the_default(ca):
    certificates = Certificates(None, ca)
    certificates.ensure("gw.test")
    certificates.ensure("a.test")
    front = certificates.front("GW.test", allowed=lambda hostname: False)
    client = client_context(ca, check_hostname=False)
    assert served_names(front, client, None) == (("DNS", "gw.test"),)
    assert served_names(front, client, "gw.test") == (("DNS", "gw.test"),)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_ip_address_as_default_is_verified_by_the_client(ca, address):
    certificates = Certificates(None, ca)
    assert certificates.ensure(address)
    handshake(certificates.front(address), client_context(ca), address)  # raises if it is not


@pytest.mark.parametrize("version", TLS_VERSIONS)
def test_unknown_hostname_is_refused_with_unrecognized_name(ca, version, unraisable):
    certificates = Certificates(None, ca)
    certificates.ensure("gw.test")
    front = certificates.front("gw.test")
    with pytest.raises(ssl.SSLError) as raised:
        handshake(front, client_context(ca, maximum_version=version), "stranger.test")
    assert raised.value.reason == "TLSV1_UNRECOGNIZED_NAME"
    assert not unraisable


def test_no_sni_without_a_default_certificate_is_refused(ca):
    front = Certificates(None, ca).front("gw.test")
    with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
        handshake(front, client_context(ca, check_hostname=False), None)


def test_a_handshake_never_makes_a_certificate(ca, tmp_path):
    certificates = Certificates(None, ca)
    certificates.ensure("gw.test")
    front = certificates.front("gw.test")
    before = sorted((tmp_path / "ca").iterdir())
    for number in range(20):
        with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
            handshake(front, client_context(ca), f"stranger{number}.test")
    assert sorted((tmp_path / "ca").iterdir()) == before


def test_hostname_that_is_not_allowed_is_refused_until_it_is(ca):
    certificates = Certificates(None, ca)
    certificates.ensure("gw.test")
    certificates.ensure("a.test")
    registered = set()
    front = certificates.front("gw.test", allowed=registered.__contains__)
    client = client_context(ca)
    with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
        handshake(front, client, "a.test")
    registered.add("a.test")
    handshake(front, client, "a.test")


def test_error_in_a_callback_is_an_alert_and_one_log_line(ca, caplog, unraisable):
    def allowed(hostname):
        raise RuntimeError("the registry is broken")

    certificates = Certificates(None, ca)
    certificates.ensure("a.test")
    front = certificates.front("gw.test", allowed)
    with pytest.raises(ssl.SSLError) as raised:
        handshake(front, client_context(ca), "a.test")
    assert raised.value.reason == "TLSV1_ALERT_INTERNAL_ERROR"
    assert not unraisable
    assert [record.name for record in caplog.records] == ["gotunnel.contexts"]
    assert "'a.test'" in caplog.text and "the registry is broken" in caplog.text


# What the wire is


def test_sockets_are_served_as_well_as_memory(ca):
    certificates = Certificates(None, ca)
    certificates.ensure("a.test")
    front = certificates.front("gw.test")
    here, there = socket.socketpair()
    with ThreadPoolExecutor(1) as pool, here, there:
        accepted = pool.submit(front.wrap_socket, there, server_side=True)
        with client_context(ca).wrap_socket(here, server_hostname="a.test") as visitor:
            assert visitor.getpeercert()["subjectAltName"] == (("DNS", "a.test"),)
            with accepted.result() as gateway:
                assert gateway.context is certificates.context("a.test")


@pytest.mark.parametrize(
    "offered, chosen", [(["h2", "http/1.1"], "http/1.1"), (["h2"], None), ([], None)]
)
def test_alpn_follows_the_context_that_was_swapped_in(ca, offered, chosen):
    certificates = Certificates(None, ca, alpn=("http/1.1",))
    certificates.ensure("a.test")
    front = certificates.front("gw.test")
    front.set_alpn_protocols(["h2"])  # would be chosen if the front had a say
    client = client_context(ca)
    if offered:
        client.set_alpn_protocols(offered)
    visitor, gateway = handshake(front, client, "a.test")
    assert visitor.selected_alpn_protocol() == chosen
    assert gateway.selected_alpn_protocol() == chosen


def test_no_alpn_is_chosen_unless_asked_for(ca):
    certificates = Certificates(None, ca)
    certificates.ensure("a.test")
    client = client_context(ca)
    client.set_alpn_protocols(["http/1.1"])
    visitor, _ = handshake(certificates.front("gw.test"), client, "a.test")
    assert visitor.selected_alpn_protocol() is None


def test_a_protocol_of_a_visitors_choice_is_answered_with_the_same_certificate(ca, monkeypatch):
    """Copies are made once, are bounded, and need no file of the certificate."""
    monkeypatch.setattr(choices, "MOST_CHOICES", 2)
    certificates = Certificates(None, ca, alpn=("http/1.1",))
    certificates.ensure("a.test")
    for file in ca.ca_file.parent.glob("a.test*"):
        file.unlink()
    fronts = certificates.fronts("gw.test")
    for protocol in "h2", "imap", "h2", "mine":
        client = client_context(ca)
        client.set_alpn_protocols([protocol, "other"])
        visitor, _ = handshake(fronts.context("a.test", protocol), client, "a.test")
        assert visitor.selected_alpn_protocol() == protocol
    made = certificates._choices._made
    assert [protocol for _, protocol in made] == ["h2", "mine"]
    assert_modern(next(iter(made.values())))
    assert fronts.context("a.test") is fronts.context("a.test")  # as without a choice


def test_where_no_copy_can_be_made_the_visitor_is_served_all_the_same(ca, monkeypatch):
    certificates = Certificates(None, ca, alpn=("http/1.1",))
    certificates.ensure("a.test")

    def no_descriptor(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", no_descriptor)
    client = client_context(ca)
    client.set_alpn_protocols(["h2"])
    front = certificates.fronts("gw.test").context("a.test", "h2")
    assert handshake(front, client, "a.test")[0].selected_alpn_protocol() is None


def test_copy_is_made_where_no_file_can_lie_in_memory(ca, monkeypatch):
    """Not every system has memfd_create()."""
    certificates = Certificates(None, ca, alpn=("http/1.1",))
    certificates.ensure("a.test")
    monkeypatch.delattr(os, "memfd_create")
    client = client_context(ca)
    client.set_alpn_protocols(["h2"])
    front = certificates.fronts("gw.test").context("a.test", "h2")
    assert handshake(front, client, "a.test")[0].selected_alpn_protocol() == "h2"


def test_every_context_is_strict(ca):
    certificates = Certificates(None, ca)
    certificates.ensure("a.test")
    for context in (certificates.front("gw.test"), certificates.context("a.test")):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_RENEGOTIATION
        assert context.options & ssl.OP_NO_COMPRESSION
        assert getattr(context, "num_tickets", 1) == 1
        assert_modern(context)


def assert_modern(context):
    """Every cipher has forward secrecy and authenticated encryption."""
    ciphers = context.get_ciphers()
    assert len({cipher["protocol"] for cipher in ciphers}) == 2  # TLS 1.2, TLS 1.3
    for cipher in ciphers:
        assert cipher["aead"] and cipher["kea"] in ("kx-ecdhe", "kx-any"), cipher["name"]


def test_context_of_a_proof_is_modern_too():
    challenges = Challenges((TLS_ALPN_01,))
    with challenges.alpn("a.test", bytes(32)):
        assert_modern(challenges.context("a.test"))


@pytest.mark.parametrize("cipher", ["ECDHE-ECDSA-AES128-SHA256", "ECDHE-ECDSA-AES256-SHA384"])
def test_visitor_with_cbc_only_is_refused(ca, cipher):
    certificates = Certificates(None, ca)
    certificates.ensure("a.test")
    client = client_context(ca, maximum_version=ssl.TLSVersion.TLSv1_2)
    client.set_ciphers(cipher)
    with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE|handshake failure"):
        handshake(certificates.fronts("a.test").context("a.test"), client, "a.test")


# Tickets


@pytest.mark.parametrize("version", TLS_VERSIONS)
def test_second_visit_resumes_the_session(ca, version):
    certificates = Certificates(None, ca)
    certificates.ensure("a.test")
    front = certificates.front("gw.test")
    client = client_context(ca, minimum_version=version, maximum_version=version)
    first, _ = handshake(front, client, "a.test")
    assert first.session.has_ticket and not first.session_reused
    second, gateway = handshake(front, client, "a.test", session=first.session)
    assert second.session_reused and gateway.session_reused


@pytest.mark.parametrize("version", TLS_VERSIONS)
def test_a_session_is_resumed_across_a_renewal(ca, cert_dir, version):
    give(cert_dir, "a", ca, "a.test")
    certificates = Certificates(cert_dir, None)
    front = certificates.front("gw.test")
    client = client_context(ca, minimum_version=version, maximum_version=version)
    first, _ = handshake(front, client, "a.test")
    give(cert_dir, "a", Authority(cert_dir / "another"), "a.test")
    certificates.reload()
    second, _ = handshake(front, client, "a.test", session=first.session)
    assert second.session_reused


@pytest.fixture
def wildcard(cert_dir):
    """Certificates of a.test, and of *.dev.test."""
    make("a.test").put(cert_dir / "a.crt", cert_dir / "a.key")
    make("*.dev.test").put(cert_dir / "b.crt", cert_dir / "b.key")
    return Certificates(cert_dir, None)


def resumes(fronts, hostname, other, version):
    """Whether a ticket of one hostname resumes at the other."""
    client = trusting_client(minimum_version=version, maximum_version=version)
    first, _ = handshake(fronts.context(hostname), client, hostname)
    assert first.session.has_ticket
    second, gateway = handshake(fronts.context(other), client, other, session=first.session)
    assert second.session_reused == gateway.session_reused
    return second.session_reused


@pytest.mark.parametrize("version", TLS_VERSIONS)
def test_a_ticket_resumes_at_its_own_hostname_alone(wildcard, version):
    fronts = wildcard.fronts("a.test")
    for hostname in ("a.test", "x.dev.test"):
        assert resumes(fronts, hostname, hostname, version)
        assert resumes(fronts, hostname, hostname.upper(), version)
    for hostname, other in (
        ("a.test", "x.dev.test"), ("x.dev.test", "a.test"), ("x.dev.test", "y.dev.test")
    ):  # fmt: skip
        assert not resumes(fronts, hostname, other, version)


@pytest.mark.parametrize("version", TLS_VERSIONS)
def test_a_session_is_resumed_across_a_renewal_by_its_hostnames_front(cert_dir, version):
    make("a.test").put(cert_dir / "a.crt", cert_dir / "a.key")
    certificates = Certificates(cert_dir, None)
    fronts = certificates.fronts("a.test")
    client = trusting_client(minimum_version=version, maximum_version=version)
    first, _ = handshake(fronts.context("a.test"), client, "a.test")
    serial = make("a.test").put(cert_dir / "a.crt", cert_dir / "a.key")
    certificates.reload()
    assert served_serial(fronts.context("a.test"), client, "a.test") == serial
    assert handshake(fronts.context("a.test"), client, "a.test", first.session)[0].session_reused


@pytest.mark.parametrize("version", TLS_VERSIONS)
def test_ticket_keys_live_for_hours_and_their_end_costs_one_full_handshake(wildcard, version):
    now = 1000.0
    fronts = Fronts(wildcard, "a.test", None, lambda: now)
    client = trusting_client(minimum_version=version, maximum_version=version)

    def visit(session=None):
        return handshake(fronts.context("a.test"), client, "a.test", session)[0]

    first = visit()
    now += KEY_LIFE - 1
    assert visit(first.session).session_reused
    now += 2
    second = visit(first.session)
    assert not second.session_reused
    assert visit(second.session).session_reused


def test_keys_that_are_too_old_are_dropped_with_any_handshake(wildcard):
    now = 1000.0
    fronts = Fronts(wildcard, "a.test", None, lambda: now)
    old = weakref.ref(fronts.context("x.dev.test"))
    now += KEY_LIFE
    fronts.context("a.test")
    gc.collect()
    assert old() is None


def test_fronts_are_bounded_and_strangers_names_make_none(wildcard, monkeypatch):
    monkeypatch.setattr(contexts, "MOST_FRONTS", 3)
    fronts = wildcard.fronts("a.test", lambda hostname: hostname.endswith(".dev.test"))
    refusing = fronts.context("b.test")  # without a certificate, or not allowed
    assert fronts.context("x.y.dev.test") is refusing and not fronts._fronts
    with pytest.raises(ssl.SSLError, match="unrecognized name|UNRECOGNIZED_NAME"):
        handshake(refusing, trusting_client(), "b.test")
    for number in range(10):
        fronts.context(f"x{number}.dev.test")
    assert set(fronts._fronts) == {"x7.dev.test", "x8.dev.test", "x9.dev.test"}
    assert fronts.context(None) is fronts.context("A.test.")


def test_a_front_of_one_hostname_takes_no_other(wildcard):
    """A second ClientHello, after a HelloRetryRequest, may name another one."""
    front = wildcard.fronts("a.test").context("x.dev.test")
    for other in ("a.test", "y.dev.test"):
        with pytest.raises(ssl.SSLError, match="unrecognized name|UNRECOGNIZED_NAME"):
            handshake(front, trusting_client(), other)


@pytest.mark.parametrize("version", TLS_VERSIONS)
def test_a_ticket_does_not_open_a_hostname_that_is_gone(ca, version):
    certificates = Certificates(None, ca)
    certificates.ensure("a.test")
    registered = {"a.test"}
    front = certificates.front("gw.test", allowed=registered.__contains__)
    client = client_context(ca, minimum_version=version, maximum_version=version)
    first, _ = handshake(front, client, "a.test")
    registered.clear()
    with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
        handshake(front, client, "a.test", session=first.session)


# CERT_DIR


def test_wildcard_stands_for_exactly_one_label(ca, cert_dir):
    give(cert_dir, "any", ca, "*.app.test")
    certificates = Certificates(cert_dir, None)
    front = certificates.front("gw.test")
    handshake(front, client_context(ca), "one.app.test")
    for stranger in ("app.test", "two.one.app.test", "oneapp.test"):
        assert certificates.context(stranger) is None
        assert not certificates.ensure(stranger)


@pytest.mark.parametrize(
    ("given", "asked", "there"),
    [
        ("*.dev.test", "*.dev.test", True),
        ("*.dev.test", "*.DEV.test.", True),
        ("*.dev.test", "*.test", False),
        ("*.dev.test", "*.x.dev.test", False),
        ("a.dev.test", "*.dev.test", False),
        ("*.test", "*.dev.test", False),
    ],
)
def test_registered_wildcard_needs_a_certificate_of_exactly_that_name(
    cert_dir, given, asked, there
):
    make(given).put(cert_dir / "own.crt", cert_dir / "own.key")
    certificates = Certificates(cert_dir, None)
    assert certificates.ensure(asked) is there
    assert (certificates.context(asked) is not None) is there


def test_authority_issues_a_wildcard_when_it_is_registered(ca, tmp_path):
    certificates = Certificates(None, ca)
    front = certificates.front("gw.test")
    with pytest.raises(ssl.SSLError, match="(?i)unrecognized.name"):
        served_names(front, client_context(ca), "a.dev.test")
    assert certificates.ensure("*.dev.test")
    assert certificates.context("*.dev.test") is certificates.context("a.dev.test")
    assert served_names(front, client_context(ca), "a.dev.test") == (("DNS", "*.dev.test"),)
    for hostname in ("dev.test", "a.b.dev.test"):  # one label: no more, no less
        with pytest.raises(ssl.SSLError, match="(?i)unrecognized.name"):
            served_names(front, client_context(ca), hostname)
    assert ca.hostnames() == ["*.dev.test"]


def test_hostname_of_its_own_comes_before_an_issued_wildcard(ca, tmp_path):
    certificates = Certificates(None, ca)
    front = certificates.front("gw.test")
    certificates.take("a.dev.test", one_file(tmp_path, *ca.issue("a.dev.test")))
    certificates.ensure("*.dev.test")
    assert served_names(front, client_context(ca), "a.dev.test") == (("DNS", "a.dev.test"),)
    assert served_names(front, client_context(ca), "b.dev.test") == (("DNS", "*.dev.test"),)


def one_file(folder, certificate_file, key_file):
    """Key and certificate in one file, as the cache has them."""
    put(folder / "one.pem", key_file.read_bytes() + certificate_file.read_bytes())
    return folder / "one.pem"


def test_exact_name_comes_before_a_wildcard(ca, cert_dir):
    give(cert_dir, "any", ca, "*.app.test")
    serial = give(cert_dir, "one", ca, "one.app.test")
    front = Certificates(cert_dir, None).front("gw.test")
    assert served_serial(front, client_context(ca), "one.app.test") == serial


@pytest.mark.parametrize("name, hostname", [("a.test", "a.test"), ("*.app.test", "a.app.test")])
def test_cert_dir_comes_before_the_authority(ca, cert_dir, tmp_path, name, hostname):
    own = Authority(tmp_path / "own")
    certificates = Certificates(cert_dir, ca)
    assert certificates.ensure(hostname)  # issued, since nothing was given yet
    serial = give(cert_dir, "mine", own, name)
    certificates.reload()
    assert certificates.ensure(hostname)
    assert served_serial(certificates.front("gw.test"), client_context(own), hostname) == serial


def test_nothing_is_issued_for_a_name_that_was_given(ca, cert_dir, tmp_path):
    give(cert_dir, "any", Authority(tmp_path / "own"), "*.app.test")
    assert Certificates(cert_dir, ca).ensure("one.app.test")
    assert not (tmp_path / "ca" / "one.app.test.crt").exists()


@pytest.mark.parametrize("stems", [("a", "b"), ("b", "a")])
def test_of_two_for_one_name_the_one_that_ends_last_is_taken(
    ca, cert_dir, tmp_path, monkeypatch, stems
):
    long = give(cert_dir, stems[0], ca, "a.test")
    monkeypatch.setattr(local_ca, "LEAF_LIFETIME", timedelta(days=100))
    give(cert_dir, stems[1], Authority(tmp_path / "other"), "a.test")
    front = Certificates(cert_dir, None).front("gw.test")
    assert served_serial(front, client_context(ca), "a.test") == long


def other_key(cert_dir, ca):
    (cert_dir / "bad.key").write_bytes(ca.issue("other.test")[1].read_bytes())


def encrypted_key(cert_dir, ca):
    key = serialization.load_pem_private_key((cert_dir / "bad.key").read_bytes(), None)
    (cert_dir / "bad.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )


def no_key(cert_dir, ca):
    (cert_dir / "bad.key").unlink()


def broken_certificate(cert_dir, ca):
    (cert_dir / "bad.crt").write_text("-----BEGIN CERTIFICATE-----\nno\n")


def chain_cut_short(cert_dir, ca):
    with open(cert_dir / "bad.crt", "ab") as file:
        file.write(ca.ca_file.read_bytes()[:200])


def no_names(cert_dir, ca):
    for end in ("crt", "key"):
        (cert_dir / f"bad.{end}").write_bytes((ca.ca_file.with_suffix(f".{end}")).read_bytes())


def other_kind_of_key(cert_dir, ca):
    put(cert_dir / "bad.key", key_pem(RSA_KEY))


def key_cut_short(cert_dir, ca):
    put(cert_dir / "bad.key", (cert_dir / "bad.key").read_bytes()[:100])


def key_in_an_unreadable_place(cert_dir, ca):
    (cert_dir / "bad.key").unlink()
    (cert_dir / "bad.key").mkdir()


def certificate_in_der(cert_dir, ca):
    leaf = x509.load_pem_x509_certificate((cert_dir / "bad.crt").read_bytes())
    put(cert_dir / "bad.crt", leaf.public_bytes(serialization.Encoding.DER))


def link_to_nothing(cert_dir, ca):
    (cert_dir / "bad.crt").unlink()
    (cert_dir / "bad.crt").symlink_to("../gone/bad.crt")


@pytest.mark.parametrize(
    "harm, complaint",
    [
        (other_key, "bad.key: not the key of bad.crt"),
        (encrypted_key, "bad.key: encrypted, expected a key without password"),
        (no_key, "bad.key: No such file or directory"),
        (broken_certificate, "bad.crt: not a certificate, expected PEM"),
        (chain_cut_short, "bad.crt: cut short in its certificate 4"),
        (no_names, "bad.crt: names no host"),
        (other_kind_of_key, "bad.key: not the key of bad.crt"),
        (key_cut_short, "bad.key: not a private key, expected PEM"),
        (key_in_an_unreadable_place, "bad.key: Is a directory"),
        (certificate_in_der, "bad.crt: not a certificate, expected PEM"),
        (link_to_nothing, "bad.crt: No such file or directory"),
    ],
)
def test_broken_pair_is_named_once_and_left_out(ca, cert_dir, caplog, harm, complaint):
    give(cert_dir, "bad", ca, "bad.test")
    give(cert_dir, "good", ca, "good.test")
    harm(cert_dir, ca)
    certificates = Certificates(cert_dir, None)
    certificates.reload()  # nothing changed: nothing to say
    [line] = warnings(caplog)
    assert line.startswith("CERT_DIR: bad.crt not used: ") and complaint in line
    assert certificates.context("bad.test") is None
    handshake(certificates.front("gw.test"), client_context(ca), "good.test")


def test_reload_serves_what_is_there_now(ca, cert_dir, tmp_path):
    give(cert_dir, "a", ca, "a.test")
    give(cert_dir, "b", ca, "b.test")
    certificates = Certificates(cert_dir, None)
    front = certificates.front("gw.test")
    other = Authority(tmp_path / "other")
    serial = give(cert_dir, "a", other, "a.test")
    for file in cert_dir.glob("b.*"):
        file.unlink()
    certificates.reload()
    assert served_serial(front, client_context(other), "a.test") == serial
    assert certificates.context("b.test") is None


def test_reload_builds_nothing_when_nothing_changed(ca, cert_dir):
    give(cert_dir, "a", ca, "a.test")
    certificates = Certificates(cert_dir, None)
    before = certificates.context("a.test")
    certificates.reload()
    assert certificates.context("a.test") is before
    os.utime(cert_dir / "a.crt", ns=(0, 0))
    certificates.reload()
    assert certificates.context("a.test") is not before


def test_file_that_keeps_size_and_time_is_seen_by_its_change_time(cert_dir):
    """As a chown does that lets the gateway read a key, or a copy that keeps times."""
    file = cert_dir / "a.crt"
    make("a.test").put(file, cert_dir / "a.key")
    certificates = Certificates(cert_dir, None)
    before, found = certificates.context("a.test"), file.stat()

    def touch():
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
        return file.stat().st_ctime_ns != found.st_ctime_ns

    wait_until(touch)  # a file system's clock ticks slowly
    certificates.reload()
    assert certificates.context("a.test") is not before


def test_pem_whose_key_is_gone_is_still_a_pair(cert_dir, caplog):
    make("a.test").put(cert_dir / "a.pem", cert_dir / "a-key.pem")
    certificates = Certificates(cert_dir, None)
    make("b.test").put(cert_dir / "b.pem", cert_dir / "b-key.pem")
    (cert_dir / "a-key.pem").unlink()
    certificates.reload()
    [line] = warnings(caplog)
    assert line.startswith("CERT_DIR: a.pem not used, the one read before stays in use: ")
    assert certificates.context("a.test")


def test_a_pair_seen_half_written_is_served_as_before(ca, cert_dir, tmp_path, caplog):
    serial = give(cert_dir, "a", ca, "a.test")
    certificates = Certificates(cert_dir, None)
    front = certificates.front("gw.test")
    new_certificate, new_key = Authority(tmp_path / "other").issue("a.test")
    (cert_dir / "a.crt").write_bytes(new_certificate.read_bytes())
    certificates.reload()
    assert served_serial(front, client_context(ca), "a.test") == serial
    assert "a.crt not used, the one read before stays in use: " in caplog.text
    (cert_dir / "a.key").write_bytes(new_key.read_bytes())
    certificates.reload()
    assert served_serial(
        front, client_context(Authority(tmp_path / "other")), "a.test"
    ) == serial_of(new_certificate)


@pytest.mark.parametrize("half", ["key first", "certificate cut short", "chain cut short"])
def test_a_half_written_pair_is_waited_for(ca, cert_dir, caplog, half):
    old = give(cert_dir, "a", ca, "a.test")
    certificates = Certificates(cert_dir, None)
    live = certificates.context("a.test")
    leaf = make("a.test")
    if half == "key first":
        put(cert_dir / "a.key", leaf.key)
    elif half == "certificate cut short":
        put(cert_dir / "a.crt", leaf.chain[:300])
    else:
        put(cert_dir / "a.crt", leaf.chain[:-300])
    for _ in range(3):
        certificates.reload()
        assert certificates.context("a.test") is live
    assert len(warnings(caplog)) == 1
    leaf.put(cert_dir / "a.crt", cert_dir / "a.key")
    certificates.reload()
    assert serial_at(certificates, "a.test") == leaf.serial != old
    assert len(warnings(caplog)) == 1


def test_a_file_cut_exactly_behind_the_leaf_is_warned_about_and_then_read_whole(cert_dir, caplog):
    leaf = make("a.test")
    put(cert_dir / "a.crt", leaf.chain[: leaf.chain.rindex(b"-----BEGIN")])
    put(cert_dir / "a.key", leaf.key)
    certificates = Certificates(cert_dir, None)
    certificates.reload()
    [line] = warnings(caplog)
    assert line.startswith("CERT_DIR: a.crt: the certificate of its issuer (CN=test CA) is not in")
    put(cert_dir / "a.crt", leaf.chain)
    certificates.reload()
    visitor, _ = handshake(certificates.front("a.test"), trusting_client(), "a.test")
    assert len(warnings(caplog)) == 1


def test_a_complaint_comes_again_only_after_it_was_mended(cert_dir, caplog):
    leaf = make("a.test")
    files = cert_dir / "a.crt", cert_dir / "a.key"
    leaf.put(*files)
    certificates = Certificates(cert_dir, None)
    for _ in range(2):
        for _ in range(2):
            put(files[1], b"nonsense")
            certificates.reload()
        leaf.put(*files)
        certificates.reload()
    assert len(warnings(caplog)) == 2


def test_key_that_everybody_can_read_is_warned_about_once(cert_dir, caplog):
    make("a.test").put(cert_dir / "a.crt", cert_dir / "a.key")
    (cert_dir / "a.key").chmod(0o644)
    certificates = Certificates(cert_dir, None)
    certificates.reload()
    [line] = warnings(caplog)
    assert line.startswith("CERT_DIR: a.key: every user") and f"chmod o-r {cert_dir}/a.key" in line
    assert certificates.context("a.test")
    for mode in (0o640, 0o644):
        (cert_dir / "a.key").chmod(mode)
        certificates.reload()
    assert len(warnings(caplog)) == 2


def test_folder_of_a_key_that_everybody_can_write_is_warned_about(cert_dir, caplog):
    make("a.test").put(cert_dir / "a.crt", cert_dir / "a.key")
    cert_dir.chmod(0o777)
    Certificates(cert_dir, None).reload()
    [line] = warnings(caplog)
    assert line.startswith(f"CERT_DIR: {cert_dir} has mode 0777: everybody on this machine may put")


def test_password_of_a_key_is_never_asked_for(cert_dir, monkeypatch):
    """OpenSSL asks on the terminal if it is left to itself, and the gateway would stand still."""
    leaf = make("a.test", encryption=serialization.BestAvailableEncryption(b"secret"))
    leaf.put(cert_dir / "a.crt", cert_dir / "a.key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with pytest.raises(CertificateError, match="a.key: encrypted, expected a key without password"):
        cert_dir_module.load_pair(cert_dir / "a.crt", cert_dir / "a.key", context)


# CERT_DIR: where pairs lie


@pytest.mark.parametrize(
    "certificate, key",
    [
        ("a.crt", "a.key"),
        ("tls.crt", "tls.key"),
        ("a.test+1.pem", "a.test+1-key.pem"),
        ("a.pem", "a.key"),
        ("fullchain.pem", "privkey.pem"),
        ("a.test/fullchain.pem", "a.test/privkey.pem"),
        ("a.test/a.test.crt", "a.test/a.test.key"),
    ],
)
def test_pair_is_found_under_any_of_its_usual_names(cert_dir, caplog, certificate, key):
    leaf = make("a.test", "*.a.test")
    leaf.put(cert_dir / certificate, cert_dir / key)
    certificates = Certificates(cert_dir, None)
    for hostname in ("a.test", "one.a.test"):
        assert serial_at(certificates, hostname) == leaf.serial
    assert not warnings(caplog)


@pytest.mark.parametrize(
    "certificate, key",
    [
        ("README", "README.txt"),
        ("a.crt.bak", "a.key.bak"),
        ("chain.pem", "other.key"),  # a .pem may be anything
        (".hidden/a.crt", ".hidden/a.key"),  # where Kubernetes keeps versions
        ("one/two/a.crt", "one/two/a.key"),
    ],
)
def test_other_files_are_no_pairs(cert_dir, caplog, certificate, key):
    make("a.test").put(cert_dir / certificate, cert_dir / key)
    certificates = Certificates(cert_dir, None)
    certificates.reload()
    assert certificates.context("a.test") is None
    [line] = warnings(caplog)
    assert line.startswith(f"CERT_DIR: no pair in {cert_dir}, expected NAME.crt with NAME.key")


def test_certificate_of_a_ca_beside_its_leaf_is_no_forgotten_pair(cert_dir, caplog):
    make("a.test").put(cert_dir / "a.crt", cert_dir / "a.key")
    put(cert_dir / "a.issuer.crt", CA_PEM)
    Certificates(cert_dir, None)
    assert not warnings(caplog)


def certbot(root, hostname, version):
    """What certbot leaves of a renewal: a new version in archive/, the links of live/ turned."""
    leaf = make(hostname)
    archive, live = root / "archive" / hostname, root / "live" / hostname
    live.mkdir(parents=True, exist_ok=True)
    leaf_alone, behind, issuer = leaf.chain.rpartition(b"-----BEGIN")
    for name, content in (
        ("privkey", leaf.key),
        ("cert", leaf_alone),
        ("chain", behind + issuer),
        ("fullchain", leaf.chain),
    ):
        put(archive / f"{name}{version}.pem", content)
        (live / "new").symlink_to(f"../../archive/{hostname}/{name}{version}.pem")
        (live / "new").replace(live / f"{name}.pem")
    put(live / "README", b"This directory contains your keys and certificates.")
    return leaf.serial


@pytest.mark.parametrize("folder", ["live", "live/a.test"])
def test_turned_links_of_certbot_are_seen(tmp_path, caplog, folder):
    certbot(tmp_path, "a.test", 1)
    put(tmp_path / "live" / "README", b"This directory contains your keys and certificates.")
    certificates = Certificates(tmp_path / folder, None)
    serial = certbot(tmp_path, "a.test", 2)
    certificates.reload()
    assert serial_at(certificates, "a.test") == serial
    assert not warnings(caplog)


def test_folder_that_cannot_be_read_leaves_what_was_there_and_is_named_once(
    cert_dir, tmp_path, caplog
):
    with pytest.raises(CertificateError, match="nowhere: No such file .* expected CERT_DIR"):
        Certificates(tmp_path / "nowhere", None)
    make("a.test").put(cert_dir / "a.crt", cert_dir / "a.key")
    certificates = Certificates(cert_dir, None)
    for times in (1, 2):
        cert_dir.rename(tmp_path / "moved")
        certificates.reload()
        certificates.reload()
        assert certificates.context("a.test")
        assert len(warnings(caplog)) == times
        (tmp_path / "moved").rename(cert_dir)
        certificates.reload()


@pytest.mark.parametrize("name", ["f.crt", "f.key"])
@pytest.mark.parametrize("what", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_named_and_blocks_nobody(cert_dir, caplog, what, name):
    good = make("a.test").put(cert_dir / "a.crt", cert_dir / "a.key")
    make("f.test").put(cert_dir / "f.crt", cert_dir / "f.key")
    (cert_dir / name).unlink()
    what(cert_dir / name)
    certificates = Certificates(cert_dir, None)
    certificates.reload()
    assert serial_at(certificates, "a.test") == good
    [line] = warnings(caplog)
    assert f"{name}: not a regular file" in line


def odd_certificates():
    """With a name of another kind in subjectAltName, and of a version that there is not."""
    key = ec.generate_private_key(ec.SECP256R1())
    san = x509.UnrecognizedExtension(
        x509.ObjectIdentifier("2.5.29.17"), bytes.fromhex("3004a3023000")
    )  # an x400Address
    leaf = sign(x509.Name([]), key.public_key(), san, (-1, 1))
    yield leaf.public_bytes(serialization.Encoding.PEM)
    der = leaf.public_bytes(serialization.Encoding.DER)
    version = bytes.fromhex("a003020102")
    der = der.replace(version, version[:-1] + b"\x07")
    yield (
        b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
    )


@pytest.mark.parametrize("pem", list(odd_certificates()), ids=["name", "version"])
@pytest.mark.parametrize("key", [True, False], ids=["with its key", "without key"])
def test_odd_certificate_is_named_and_stops_nobody(cert_dir, caplog, pem, key):
    good = make("a.test").put(cert_dir / "a.crt", cert_dir / "a.key")
    put(cert_dir / "odd.crt", pem)
    if key:
        put(cert_dir / "odd.key", key_pem(ec.generate_private_key(ec.SECP256R1())))
    certificates = Certificates(cert_dir, None)
    assert serial_at(certificates, "a.test") == good
    [line] = warnings(caplog)
    assert line.startswith("CERT_DIR: odd.crt not used: ")


def test_what_is_given_tells_a_valid_pair_from_others(cert_dir, monkeypatch):
    make("*.test", validity=VALID).put(cert_dir / "a.crt", cert_dir / "a.key")
    certificates = Certificates(cert_dir, None)
    before = certificates.given
    certificates.reload()
    assert certificates.given == before
    assert certificates.is_given("A.test.") and not certificates.is_given("test")
    monkeypatch.setattr(cert_dir_module, "_now", lambda: NOW + timedelta(days=31))
    certificates.reload()
    assert certificates.given != before and not certificates.is_given("a.test")
    assert Certificates(None, None).given == Certificates(None, None).given


def test_folder_within_that_cannot_be_read_takes_nothing_with_it(cert_dir, caplog, monkeypatch):
    make("a.test").put(cert_dir / "a" / "x.crt", cert_dir / "a" / "x.key")
    make("b.test").put(cert_dir / "b" / "x.crt", cert_dir / "b" / "x.key")
    certificates = Certificates(cert_dir, None)
    scandir = os.scandir

    def forbidden(folder):  # permissions would not stop root
        if folder == f"{cert_dir}/a":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr("os.scandir", forbidden)
    serial = make("b.test").put(cert_dir / "b" / "x.crt", cert_dir / "b" / "x.key")
    certificates.reload()
    certificates.reload()
    [line] = warnings(caplog)
    assert line.startswith("CERT_DIR: a: Permission denied, expected a folder that")
    assert certificates.context("a.test") and serial_at(certificates, "b.test") == serial


# CERT_DIR: who is served


def test_removed_pair_is_served_no_more_unless_it_was_the_last(cert_dir, caplog):
    for name in ("a", "b"):
        make(f"{name}.test").put(cert_dir / f"{name}.crt", cert_dir / f"{name}.key")
    certificates = Certificates(cert_dir, None)
    (cert_dir / "a.crt").unlink()  # its key alone is no pair
    certificates.reload()
    assert certificates.context("a.test") is None and certificates.context("b.test")
    (cert_dir / "b.crt").unlink()
    certificates.reload()
    certificates.reload()
    assert certificates.context("b.test")
    [line] = warnings(caplog)
    assert line.startswith("CERT_DIR: no pair is left: the gateway serves those read")
    make("c.test").put(cert_dir / "c.crt", cert_dir / "c.key")
    certificates.reload()
    assert certificates.context("b.test") is None and certificates.context("c.test")


NOW = datetime.now(timezone.utc)
VALID, LONG_VALID, EXPIRED, FUTURE = (-30, 30), (-30, 60), (-90, -30), (+1, +99)  # days from now


@pytest.mark.parametrize(
    "pairs, served",
    [
        # of (names, validity), the place of the pair that one.app.test is served with
        ([("one.app.test", VALID), ("one.app.test", LONG_VALID)], 1),
        ([("one.app.test", LONG_VALID), ("one.app.test", VALID)], 0),
        ([("one.app.test", EXPIRED), ("one.app.test", VALID)], 1),
        ([("one.app.test", FUTURE), ("one.app.test", VALID)], 1),
        ([("one.app.test", EXPIRED), ("*.app.test", VALID)], 1),
        ([("*.app.test", LONG_VALID), ("one.app.test", VALID)], 1),
        ([("one.app.test", EXPIRED)], 0),
        ([("one.app.test", FUTURE)], 0),
        ([("*.app.test", EXPIRED)], 0),
    ],
)
def test_valid_certificate_comes_before_one_that_is_not(cert_dir, caplog, pairs, served):
    serials = []
    for number, (name, validity) in enumerate(pairs):
        leaf = make(name, validity=validity)
        serials.append(leaf.put(cert_dir / f"{number}.crt", cert_dir / f"{number}.key"))
    certificates = Certificates(cert_dir, None)
    certificates.reload()
    assert certificates.ensure("one.app.test")
    assert serial_at(certificates, "one.app.test") == serials[served]
    outdated = [
        f"CERT_DIR: {number}.crt {'expired on' if validity == EXPIRED else 'is valid from'}"
        for number, (_, validity) in enumerate(pairs)
        if validity in (EXPIRED, FUTURE)
    ]
    lines = warnings(caplog)
    assert len(lines) == len(outdated)
    assert all(line.startswith(start) for line, start in zip(lines, outdated, strict=True))


def test_issued_certificate_comes_before_one_that_was_given_and_ran_out(ca, cert_dir):
    make("a.test", validity=EXPIRED).put(cert_dir / "a.crt", cert_dir / "a.key")
    certificates = Certificates(cert_dir, ca)
    assert certificates.ensure("a.test")
    handshake(certificates.front("gw.test"), client_context(ca), "a.test")


def test_certificate_that_runs_out_gives_way_without_a_change_of_files(
    cert_dir, caplog, monkeypatch
):
    make("a.test", validity=VALID).put(cert_dir / "a.crt", cert_dir / "a.key")
    serial = make("*.test", validity=LONG_VALID).put(cert_dir / "b.crt", cert_dir / "b.key")
    certificates = Certificates(cert_dir, None)
    assert serial_at(certificates, "a.test") != serial
    monkeypatch.setattr(cert_dir_module, "_now", lambda: NOW + timedelta(days=31))
    certificates.reload()
    assert serial_at(certificates, "a.test") == serial
    [line] = warnings(caplog)
    assert line.startswith("CERT_DIR: a.crt expired on ")
    monkeypatch.undo()  # a clock that is set back
    certificates.reload()
    assert serial_at(certificates, "a.test") != serial


def kinds(certificates):
    """The kinds of key that a.test is served with to visitors who know RSA only, and EC only."""
    found = []
    for cipher in ("ECDHE+aRSA", "ECDHE+ECDSA"):
        visitor = trusting_client(maximum_version=ssl.TLSVersion.TLSv1_2)
        visitor.set_ciphers(cipher)
        try:
            handshake(certificates.front("a.test"), visitor, "a.test")
            found.append(cipher)
        except ssl.SSLError:
            pass
    return [cipher.partition("+")[2] for cipher in found]


@pytest.mark.parametrize(
    "rsa_validity, ec_validity, served",
    [
        (VALID, VALID, ["aRSA", "ECDSA"]),
        (LONG_VALID, VALID, ["aRSA", "ECDSA"]),
        (VALID, EXPIRED, ["aRSA"]),
        (EXPIRED, VALID, ["ECDSA"]),
    ],
)
def test_rsa_and_ec_pairs_of_one_name_are_served_together(
    cert_dir, rsa_validity, ec_validity, served
):
    make("a.test", key=RSA_KEY, validity=rsa_validity).put(cert_dir / "r.crt", cert_dir / "r.key")
    make("a.test", validity=ec_validity).put(cert_dir / "e.crt", cert_dir / "e.key")
    certificates = Certificates(cert_dir, None)
    assert kinds(certificates) == served


def test_of_two_kinds_the_one_that_can_be_read_is_renewed(cert_dir):
    make("a.test").put(cert_dir / "e.crt", cert_dir / "e.key")
    make("a.test", key=RSA_KEY).put(cert_dir / "r.crt", cert_dir / "r.key")
    certificates = Certificates(cert_dir, None)
    put(cert_dir / "e.key", b"half")
    serial = make("a.test", key=RSA_KEY, validity=LONG_VALID).put(
        cert_dir / "r.crt", cert_dir / "r.key"
    )
    certificates.reload()
    assert serial_at(certificates, "a.test") == serial


def test_a_handshake_that_has_begun_ends_with_the_certificate_it_began_with(cert_dir):
    files = cert_dir / "a.crt", cert_dir / "a.key"
    serial = make("a.test").put(*files)
    certificates = Certificates(cert_dir, None)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    visitor = trusting_client().wrap_bio(to_client, to_server, server_hostname="a.test")
    gateway = certificates.front("a.test").wrap_bio(to_server, to_client, server_side=True)
    for end in (visitor, gateway):
        with pytest.raises(ssl.SSLWantReadError):
            end.do_handshake()
    new = make("a.test").put(*files)
    certificates.reload()
    visitor.do_handshake()
    gateway.do_handshake()
    certificate = x509.load_der_x509_certificate(visitor.getpeercert(binary_form=True))
    assert certificate.serial_number == serial and serial_at(certificates, "a.test") == new


def test_threads_that_reload_at_once_never_take_a_name_away(cert_dir):
    files = cert_dir / "a.crt", cert_dir / "a.key"
    make("a.test").put(*files)
    certificates = Certificates(cert_dir, None)

    def renew_and_reload(_):
        make("a.test").put(*files)
        certificates.reload()
        return certificates.context("a.test") is not None

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(renew_and_reload, range(40)))
    serial = make("a.test").put(*files)
    certificates.reload()
    assert serial_at(certificates, "a.test") == serial


# The authority


def test_ensure_says_no_when_nobody_can_issue():
    certificates = Certificates(None, None)
    assert not certificates.ensure("a.test")
    assert certificates.context("a.test") is None


def test_ensure_raises_what_the_authority_raises(ca):
    with pytest.raises(CertificateError, match="hostname"):
        Certificates(None, ca).ensure("a/b")


def test_ensure_again_keeps_the_context(ca):
    certificates = Certificates(None, ca)
    certificates.ensure("a.test")
    before = certificates.context("a.test")
    certificates.ensure("a.test")
    assert certificates.context("a.test") is before


def test_ensure_renews_what_the_authority_issued(ca, monkeypatch):
    certificates = Certificates(None, ca)
    front = certificates.front("gw.test")
    with monkeypatch.context() as short:
        short.setattr(local_ca, "LEAF_LIFETIME", timedelta(days=29))
        certificates.ensure("a.test")
    old = served_serial(front, client_context(ca), "a.test")
    certificates.ensure("a.test")
    assert served_serial(front, client_context(ca), "a.test") != old


def test_a_slow_thread_does_not_put_an_older_certificate_over_a_newer(ca, tmp_path, monkeypatch):
    newer = ca.issue("a.test")
    monkeypatch.setattr(local_ca, "LEAF_LIFETIME", timedelta(days=100))
    older = Authority(tmp_path / "other").issue("a.test")

    class SlowThenFast:
        """Issues the newer one to a second caller while the first still waits for the older."""

        first = True

        def issue(self, hostname):
            if not self.first:
                return newer
            self.first = False
            certificates.ensure(hostname)
            return older

    certificates = Certificates(None, SlowThenFast())
    certificates.ensure("a.test")
    front = certificates.front("gw.test")
    assert served_serial(front, client_context(ca), "a.test") == serial_of(newer[0])


@pytest.mark.parametrize(
    ("served", "taken", "which"),
    [
        ((-10, 10), (-20, 20), 0),
        ((-10, 80), (0, 45), 1),
        ((-10, 10), (-10, 10), 1),
        ((-30, -1), (-20, 20), 1),
    ],
    ids=["older", "newer, of a shorter life", "of the same second", "after one that ran out"],
)
def test_an_ordered_certificate_gives_way_to_none_that_is_older(tmp_path, served, taken, which):
    certificates, serials = Certificates(None, None), []
    for number, validity in enumerate((served, taken)):
        leaf = make("a.test", validity=validity)
        file = tmp_path / f"{number}.pem"
        put(file, leaf.key + leaf.chain)
        certificates.take("a.test", file)
        serials.append(leaf.serial)
    assert serial_at(certificates, "a.test") == serials[which]


def test_second_start_serves_the_same_certificate(ca, tmp_path):
    serials = []
    for _ in range(2):
        certificates = Certificates(None, Authority(tmp_path / "ca"))
        certificates.ensure("a.test")
        serials.append(served_serial(certificates.front("gw.test"), client_context(ca), "a.test"))
    assert serials[0] == serials[1]


def test_threads_that_ensure_at_once_all_succeed(ca, tmp_path):
    certificates = Certificates(None, ca)
    start = threading.Barrier(8)

    def ensure(number):
        start.wait()
        return certificates.ensure(f"app{number % 2}.test")

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ensure, range(8)))
    front = certificates.front("gw.test")
    for hostname in ("app0.test", "app1.test"):
        assert served_serial(front, client_context(ca), hostname) == serial_of(
            tmp_path / "ca" / f"{hostname}.crt"
        )


def test_names_that_make_no_sense_are_none():
    (certificate,) = x509.load_pem_x509_certificates(next(odd_certificates()))
    assert names_of(certificate) == frozenset()
