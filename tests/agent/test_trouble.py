"""Why an agent has no session, in its log: what it says if its file names another port, another
host, another CA or another credential. A row is a mistake, made with a real agent."""

import contextlib
import datetime
import re
import ssl
import time
from types import SimpleNamespace

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support import (
    APP,
    GATEWAY_HOST,
    SECRET,
    TUNNEL_HOST,
    Gateway,
    Origin,
    agent_here,
    deaf_port,
    gateway_here,
    reserved_port,
    wait_until,
)

from gotunnel import SPEAKS_HTTP, SessionClosed
from gotunnel_agent import greeting, trouble, trust
from gotunnel_agent import link as link_module
from gotunnel_agent.trust import ClosedInHandshake, NoTLS
from gotunnel_server.certs.local_ca import Authority

PORT = "tunnel_addr has to name the gateway's TUNNEL_PORT (9443)"
HOST = "tunnel_addr has to name the gateway's TUNNEL_HOST"


@pytest.fixture
def said(tmp_path, caplog, monkeypatch):
    """A function: what an agent with this tunnel_addr says, without the address and the delay."""
    monkeypatch.setattr(link_module, "DIAL_TIMEOUT", 0.3)
    monkeypatch.setattr(link_module, "ACK_TIMEOUT", 0.3)

    def said(tunnel_addr, ca_file=None, **keys):
        nowhere = Gateway.__new__(Gateway)
        nowhere.tunnel_port, nowhere.ca_file = 1, ca_file
        keys = {"tunnel_addr": tunnel_addr, "ca_file": ca_file and str(ca_file), **keys}
        caplog.clear()
        with agent_here(nowhere, tmp_path, {APP: 1}, ready=False, **keys):
            line = wait_until(lambda: next((each for each in caplog.messages if "; next try in "
                                            in each), ""))  # fmt: skip
        address, _, problem = line.partition("; next try in ")[0].partition(": ")
        assert address == tunnel_addr
        return problem

    return said


# Another port ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "speaks"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "speaks SSH without TLS"),
        (b"220 mail.example.com ESMTP Postfix\r\n", "speaks SMTP (mail) without TLS"),
        (b"220 (vsFTPd 3.0.5)\r\n", "speaks FTP without TLS"),
        (b"* OK [CAPABILITY IMAP4rev1] ready.\r\n", "speaks IMAP (mail) without TLS"),
        (b"+OK POP3 ready\r\n", "speaks POP3 (mail) without TLS"),
        (b"J\0\0\0\n8.0.36\0", "speaks MySQL's protocol without TLS"),
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            "speaks HTTP without TLS, as a gateway's dashboard an",
        ),
        (b"what is this?\r\n", "does not speak TLS"),
        (b"", "closed the connection in the TLS handshake"),
    ],
)
def test_port_of_another_program_is_named_by_what_it_says(said, origin, first, speaks):
    origin.serve(lambda wire: (first and wire.send(first), wire.read(), wire.finish()))
    problem = said(f"localhost:{origin.port}")
    assert problem.startswith(f"the program there {speaks}") and PORT in problem


@contextlib.contextmanager
def tls_program(pair, script):
    """The port of a program with TLS that is no gateway."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)

    def run(wire):
        with contextlib.suppress(OSError):  # the agent does not trust it
            wire.sock = context.wrap_socket(wire.sock, server_side=True)
            script(wire)

    with Origin() as origin:
        origin.serve(run)
        yield origin.port


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            lambda wire: (wire.read(), wire.send(b"HTTP/1.1 400 Bad Request\r\n\r\n"), wire.read()),
            f"the program there speaks HTTP, so this may be the port for visitors; {PORT}",
        ),
        (
            lambda wire: (wire.read(), wire.sock.unwrap()),
            f"the peer closed the connection before it accepted the agent; {PORT}",
        ),
        (
            lambda wire: (wire.send(b"* OK IMAP4 ready, and more\r\n"), wire.read_to_end()),
            f"it does not speak gotunnel's protocol (protocol error: frame version 42, expected 0)"
            f"; {PORT}",
        ),
        (lambda wire: wire.read_to_end(), f"the gateway was silent for 0.3 s; {PORT}"),
    ],
)
def test_program_with_tls_that_is_no_gateway(said, cache, script, problem):
    authority = Authority(cache / "local")
    with tls_program(authority.issue(TUNNEL_HOST), script) as port:
        assert said(f"localhost:{port}", authority.ca_file) == problem


def test_other_ports_and_names_of_a_gateway(said, cache):
    with gateway_here(cache, HTTP_PORT="auto") as gateway:
        visitors = f"the program there speaks HTTP, so this may be the port for visitors; {PORT}"
        plain = (
            "the program there speaks HTTP without TLS, as a gateway's dashboard and port 80 do; "
            f"{PORT}"
        )
        address = "its certificate is not to be trusted: IP address mismatch, certificate is not "
        address += f"valid for '127.0.0.1'; {HOST}; the certificate there is for {TUNNEL_HOST}"
        nobody = f"the gateway there knows no such hostname; {HOST}"
        for tunnel_addr, problem in (
            (f"localhost:{gateway.public_port}", visitors),
            (f"{GATEWAY_HOST}:{gateway.public_port}", visitors),
            (f"localhost:{gateway.dashboard_port}", plain),
            (f"localhost:{gateway.inner.http_port}", plain),
            (f"127.0.0.1:{gateway.tunnel_port}", address),
            (f"nobody.localhost:{gateway.tunnel_port}", nobody),
        ):
            assert said(tunnel_addr, gateway.ca_file) == problem


def test_port_that_does_not_answer(said):
    with deaf_port() as deaf, reserved_port() as unused:
        firewall = f"no answer; {PORT}, and firewalls have to let that through"
        assert said(f"127.0.0.1:{deaf}") == firewall
        refused = "connection refused: no program listens there"
        assert said(f"127.0.0.1:{unused}") == refused


def test_port_that_accepts_and_says_nothing(said, origin):
    origin.serve(lambda wire: wire.read_to_end())
    problem = f"the program there did not answer in TLS in time; {PORT}"
    assert said(f"localhost:{origin.port}") == problem


def test_a_session_that_was_accepted_gets_no_advice_about_the_port():
    error = SessionClosed("the gateway ended the session")
    assert trouble.of_dial(error, None, served=True) == "the gateway ended the session"


@pytest.mark.parametrize(
    ("error", "lasts"),
    [
        (NoTLS("speaks SSH without TLS", "SSH"), True),
        (ClosedInHandshake("closed the connection in the TLS handshake"), False),
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), True),
        (SessionClosed(f"protocol error: {SPEAKS_HTTP}"), True),
        (SessionClosed("the gateway ended the session"), False),
        (ConnectionRefusedError(111, "Connection refused"), False),
    ],
)
def test_what_somebody_has_to_change_is_told_from_what_passes(error, lasts):
    assert trouble.lasts(error) is lasts


@pytest.mark.parametrize(
    ("first", "protocol"),
    [
        (b"\x15\x03\x01\x00\x02\x02\x46", "TLS"),
        (b"\0\0\x12\x04\0\0\0\0\0", "HTTP/2"),
        (b"-NOAUTH Authentication required.\r\n", "Redis's protocol"),
        (b"RFB 003.008\n", "VNC"),
        (b"AMQP\0\0\x09\x01", "AMQP"),
        (b"220 welcome\r\n", "SMTP or FTP"),
        (b"<!DOCTYPE html>", "HTTP"),
        (b"", ""),
        (b"\0\0\0\0", ""),
    ],
)
def test_protocol_by_its_first_bytes(first, protocol):
    assert greeting.protocol_of(first) == protocol


# Another CA, another clock -----------------------------------------------------------------------


def made_pair(folder, issuer, days=(0, 9)):
    """Files of a certificate for TUNNEL_HOST, signed by itself as ``issuer``, and of its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    begin, end = (now + datetime.timedelta(day) for day in days)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(TUNNEL_HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, private = folder / "pair.crt", folder / "pair.key"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return pem, private


OWN_CA = "if it has a CA of its own, ca_file has to name that"
OTHER_CA = (
    "ca_file names another CA: if the gateway has a new one, join it again, with what "
    "gotunnel-server agents rotate prints"
)


def test_ca_file_of_another_ca(said, cache, tmp_path, monkeypatch):
    authority, other = Authority(cache / "local"), Authority(tmp_path / "another CA")
    with tls_program(authority.issue(TUNNEL_HOST), lambda wire: wire.read()) as port:

        def advice(ca_file=None):
            problem = said(f"localhost:{port}", ca_file)
            assert problem.startswith("its certificate is not to be trusted: ")
            return problem.partition("; ")[2]

        assert advice() == OWN_CA
        assert advice(other.ca_file) == OTHER_CA

        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))  # a public CA, as it were
        remove = "it is from a CA that this system trusts, so remove ca_file"
        assert advice(other.ca_file) == remove


def test_system_without_any_ca(said, cache, tmp_path, monkeypatch):
    """As a bare Debian has none, and a Python of python.org on macOS."""
    chain, key = Authority(cache / "local").issue(TUNNEL_HOST)
    leaf = (
        tmp_path / "leaf.crt"
    )  # as a public CA's: the last certificate, the CA's own, is not sent
    leaf.write_text(chain.read_text().partition("-----END CERTIFICATE-----\n")[0]
                    + "-----END CERTIFICATE-----\n")  # fmt: skip
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none either"))
    with tls_program((leaf, key), lambda wire: wire.read()) as port:
        assert said(f"localhost:{port}").endswith(f"; {trust.NO_SYSTEM_CAS}")
        monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))  # which is not empty
        assert said(f"localhost:{port}").endswith(f"; {OWN_CA}")


def test_certificate_of_lets_encrypts_staging(said, tmp_path):
    pair = made_pair(tmp_path, "(STAGING) Tenuous Tomato R13")
    with tls_program(pair, lambda wire: wire.read()) as port:
        assert said(f"localhost:{port}").endswith(f"; {trouble.STAGING}")


@pytest.mark.parametrize(
    ("days", "problem"),
    [
        (
            (1, 9),
            r"certificate is not yet valid; set this machine's clock, which says 20..-..-.. .*",
        ),
        (
            (-9, -1),
            "certificate has expired; the gateway has to renew it, unless this machine's clock is "
            r"wrong, which says 20\d\d-\d\d-\d\d \d\d:\d\d UTC",
        ),
    ],
)
def test_certificate_of_another_time_is_a_question_of_the_clock(said, tmp_path, days, problem):
    pair = made_pair(tmp_path, "gateway", days)
    with tls_program(pair, lambda wire: wire.read()) as port:
        came = said(f"localhost:{port}", pair[0])
    assert re_match(f"its certificate is not to be trusted: {problem}", came)


def re_match(pattern, text):

    return re.fullmatch(pattern, text) or pytest.fail(f"{text!r} does not fit {pattern!r}")


# Another credential ------------------------------------------------------------------------------


def config(**keys):
    values = {"jwt_secret": "", "token": "", "jwt_issuer": "office"} | keys
    return SimpleNamespace(**values)


TOKEN = jwt.encode({"iss": "office"}, SECRET, "HS256")


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ({"jwt_secret": SECRET}, ""),
        ({"jwt_secret": f"{SECRET} "}, "; jwt_secret begins or ends with a blank"),
        ({"jwt_secret": f"{SECRET}\nx"}, "; jwt_secret has a line break in it"),
        (
            {"jwt_secret": f"'{SECRET}'"},
            "; jwt_secret begins with a quotation mark, which is part ",
        ),
        (
            {"jwt_secret": f"“{SECRET}”"},
            "; jwt_secret begins with a quotation mark, which is part o",
        ),
        ({"jwt_secret": TOKEN}, "; jwt_secret looks like a token: token takes that"),
        ({"token": TOKEN, "jwt_issuer": ""}, ""),
        ({"token": f"Bearer {TOKEN}"}, "; token has the word Bearer in front"),
        ({"token": __file__}, "; token is the path of a file: token_file takes that"),
    ],
)
def test_doubtful_credential_is_told_when_the_gateway_refuses_it(keys, advice):
    said = trouble.of_refusal("auth failed", config(**keys))
    assert said.startswith(advice) and bool(said) == bool(advice)
    assert SECRET not in said and TOKEN not in said
    assert trouble.of_refusal("host already registered: a.example", config(**keys)) == ""


def test_a_secret_that_does_not_fit_and_has_no_name_is_told_so():
    words = "; there is no jwt_issuer, which a secret of AGENTS_FILE needs"
    nameless = config(jwt_secret=SECRET, jwt_issuer="")
    assert trouble.of_refusal("auth failed: the token's signature does not fit", nameless) == words
    assert trouble.of_refusal("auth failed", nameless) == ""  # a Go gateway, which has no such file
    assert trouble.of_refusal("auth failed: the token's signature ...", config(token=TOKEN)) == ""


def test_refusal_by_the_clock_shows_this_one(said, cache):
    ahead = int(time.time()) + 600
    token = jwt.encode({"iss": "x", "iat": ahead, "exp": ahead + 60}, SECRET, "HS256")
    with gateway_here(cache) as gateway:
        address = f"localhost:{gateway.tunnel_port}"
        problem = said(address, gateway.ca_file, jwt_secret=None, token=token)
        assert "auth failed: the token was issued" in problem
        assert re_match(r".*; this machine's clock says 20\d\d-\d\d-\d\d \d\d:\d\d UTC", problem)
        blank = said(address, gateway.ca_file, jwt_secret=f"{SECRET} ", jwt_issuer="office")
        assert blank.endswith("; jwt_secret begins or ends with a blank")
        assert SECRET not in blank
