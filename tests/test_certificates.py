"""Certificates by SNI, proved by handshakes of a client that verifies."""
import logging
import os
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from gotunnel_server import authority
from gotunnel_server.authority import Authority
from gotunnel_server.certificates import CertificateError, Certificates

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


def give(cert_dir, stem, issuer, hostname):
    """Put a pair of `issuer` for `hostname` in cert_dir; returns the serial number."""
    certificate_file, key_file = issuer.issue(hostname)
    (cert_dir / f"{stem}.crt").write_bytes(certificate_file.read_bytes())
    (cert_dir / f"{stem}.key").write_bytes(key_file.read_bytes())
    return serial_of(certificate_file)


def serial_of(certificate_file):
    return x509.load_pem_x509_certificate(certificate_file.read_bytes()).serial_number


def client_context(ca, **settings):
    context = ssl.create_default_context(cafile=ca.ca_file)
    context.verify_flags |= ssl.VERIFY_X509_STRICT      # the default since Python 3.13
    for name, value in settings.items():
        setattr(context, name, value)
    return context


def handshake(front, client, hostname, session=None):
    """Both ends of a finished handshake; raises what the client sees if it fails."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    visitor = client.wrap_bio(to_client, to_server, server_hostname=hostname, session=session)
    gateway = front.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):      # flights of a handshake; the server's failure is seen by the client
        for end in (visitor, gateway):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                if end is visitor:
                    raise
    gateway.write(b"!")
    assert visitor.read(1) == b"!"      # with it came the ticket
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
    handshake(certificates.front(address), client_context(ca), address)     # raises if it is not


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
    assert [record.name for record in caplog.records] == ["gotunnel.certificates"]
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


@pytest.mark.parametrize("offered, chosen", [
    (["h2", "http/1.1"], "http/1.1"), (["h2"], None), ([], None)])
def test_alpn_follows_the_context_that_was_swapped_in(ca, offered, chosen):
    certificates = Certificates(None, ca, alpn=("http/1.1",))
    certificates.ensure("a.test")
    front = certificates.front("gw.test")
    front.set_alpn_protocols(["h2"])        # would be chosen if the front had a say
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


def test_every_context_is_strict(ca):
    certificates = Certificates(None, ca)
    certificates.ensure("a.test")
    for context in (certificates.front("gw.test"), certificates.context("a.test")):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_RENEGOTIATION
        assert context.options & ssl.OP_NO_COMPRESSION
        assert getattr(context, "num_tickets", 1) == 1


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


def test_exact_name_comes_before_a_wildcard(ca, cert_dir):
    give(cert_dir, "any", ca, "*.app.test")
    serial = give(cert_dir, "one", ca, "one.app.test")
    front = Certificates(cert_dir, None).front("gw.test")
    assert served_serial(front, client_context(ca), "one.app.test") == serial


@pytest.mark.parametrize("name, hostname", [("a.test", "a.test"), ("*.app.test", "a.app.test")])
def test_cert_dir_comes_before_the_authority(ca, cert_dir, tmp_path, name, hostname):
    own = Authority(tmp_path / "own")
    certificates = Certificates(cert_dir, ca)
    assert certificates.ensure(hostname)        # issued, since nothing was given yet
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
        ca, cert_dir, tmp_path, monkeypatch, stems):
    long = give(cert_dir, stems[0], ca, "a.test")
    monkeypatch.setattr(authority, "LEAF_LIFETIME", timedelta(days=100))
    give(cert_dir, stems[1], Authority(tmp_path / "other"), "a.test")
    front = Certificates(cert_dir, None).front("gw.test")
    assert served_serial(front, client_context(ca), "a.test") == long


def other_key(cert_dir, ca):
    (cert_dir / "bad.key").write_bytes(ca.issue("other.test")[1].read_bytes())


def encrypted_key(cert_dir, ca):
    key = serialization.load_pem_private_key((cert_dir / "bad.key").read_bytes(), None)
    (cert_dir / "bad.key").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret")))


def no_key(cert_dir, ca):
    (cert_dir / "bad.key").unlink()


def broken_certificate(cert_dir, ca):
    (cert_dir / "bad.crt").write_text("-----BEGIN CERTIFICATE-----\nno\n")


def chain_cut_short(cert_dir, ca):
    with open(cert_dir / "bad.crt", "ab") as file:
        file.write(ca.ca_file.read_bytes()[:200])


def no_names(cert_dir, ca):
    for end in ("crt", "key"):
        (cert_dir / f"bad.{end}").write_bytes(
            (ca.ca_file.with_suffix(f".{end}")).read_bytes())


@pytest.mark.parametrize("harm, complaint", [
    (other_key, "bad.key: not the key of bad.crt"),
    (encrypted_key, "bad.key: encrypted, expected a key without password"),
    (no_key, "bad.key: No such file or directory"),
    (broken_certificate, "bad.crt: not a certificate, expected PEM"),
    (chain_cut_short, "bad.crt: "),
    (no_names, "bad.crt: names no host"),
])
def test_broken_pair_is_named_once_and_left_out(ca, cert_dir, caplog, harm, complaint):
    give(cert_dir, "bad", ca, "bad.test")
    give(cert_dir, "good", ca, "good.test")
    harm(cert_dir, ca)
    certificates = Certificates(cert_dir, None)
    certificates.reload()       # nothing changed: nothing to say
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "bad.crt not used" in caplog.text and complaint in caplog.text
    assert certificates.context("bad.test") is None
    handshake(certificates.front("gw.test"), client_context(ca), "good.test")


def test_certificate_that_ran_out_is_warned_about_and_served(ca, cert_dir, caplog, monkeypatch):
    monkeypatch.setattr(authority, "LEAF_LIFETIME", timedelta(minutes=30))  # of a backdated hour
    give(cert_dir, "old", ca, "old.test")
    front = Certificates(cert_dir, None).front("gw.test")
    assert len(caplog.records) == 1 and "old.crt ran out on" in caplog.text
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(front, client_context(ca), "old.test")


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


def test_a_pair_seen_half_written_is_served_as_before(ca, cert_dir, tmp_path, caplog):
    serial = give(cert_dir, "a", ca, "a.test")
    certificates = Certificates(cert_dir, None)
    front = certificates.front("gw.test")
    new_certificate, new_key = Authority(tmp_path / "other").issue("a.test")
    (cert_dir / "a.crt").write_bytes(new_certificate.read_bytes())
    certificates.reload()
    assert served_serial(front, client_context(ca), "a.test") == serial
    assert "a.crt not used, the one read before stays: " in caplog.text
    (cert_dir / "a.key").write_bytes(new_key.read_bytes())
    certificates.reload()
    assert (served_serial(front, client_context(Authority(tmp_path / "other")), "a.test")
            == serial_of(new_certificate))


def test_missing_cert_dir_is_an_error_and_leaves_what_was_there(ca, cert_dir, tmp_path):
    with pytest.raises(CertificateError, match="CERT_DIR .*nowhere"):
        Certificates(tmp_path / "nowhere", None)
    give(cert_dir, "a", ca, "a.test")
    certificates = Certificates(cert_dir, None)
    cert_dir.rename(tmp_path / "moved")
    with pytest.raises(CertificateError):
        certificates.reload()
    assert certificates.context("a.test")


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
        short.setattr(authority, "LEAF_LIFETIME", timedelta(days=29))
        certificates.ensure("a.test")
    old = served_serial(front, client_context(ca), "a.test")
    certificates.ensure("a.test")
    assert served_serial(front, client_context(ca), "a.test") != old


def test_a_slow_thread_does_not_put_an_older_certificate_over_a_newer(ca, tmp_path, monkeypatch):
    newer = ca.issue("a.test")
    monkeypatch.setattr(authority, "LEAF_LIFETIME", timedelta(days=100))
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


def test_second_start_serves_the_same_certificate(ca, tmp_path):
    serials = []
    for start in range(2):
        certificates = Certificates(None, Authority(tmp_path / "ca"))
        certificates.ensure("a.test")
        serials.append(
            served_serial(certificates.front("gw.test"), client_context(ca), "a.test"))
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
        assert (served_serial(front, client_context(ca), hostname)
                == serial_of(tmp_path / "ca" / f"{hostname}.crt"))
