"""The agent: its retries, the gateways it trusts, its handling of each stream."""

import contextlib
import logging
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import warnings
from time import monotonic

import jwt
import pytest
from support import (
    APP,
    RAW,
    ROOT,
    TIMEOUT,
    TUNNEL_HOST,
    Gateway,
    Origin,
    agent_here,
    agent_process,
    agent_yaml,
    answer,
    deaf_port,
    gateway_here,
    gateway_process,
    need,
    request,
    reserved_port,
    routes_of,
    running,
    wait_until,
)

from gotunnel import (
    CERTIFICATES,
    HALF_CLOSE,
    MEMBERS,
    MOVE,
    OVERLAP,
    PARTIAL,
    PORTS,
    REASONS,
    REFUSALS,
    UPGRADES,
    URLS,
    WAITS,
    Ack,
    Certificate,
    End,
    MessageReader,
    Ping,
    Pong,
    Register,
    Session,
    StreamReset,
    encode_data_header,
    encode_message,
)
from gotunnel_agent import link as link_module
from gotunnel_agent import registering
from gotunnel_agent.common import standard_error
from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.config import DRAIN_TIMEOUT
from gotunnel_agent.link import (
    FIRST_DELAY,
    MAX_DELAY,
    REFUSED_DELAY,
    RESTART_DELAY,
    retry_delay,
)
from gotunnel_agent.registering import make_token
from gotunnel_agent.target import hostname_of
from gotunnel_agent.trust import CannotTrust, tls_context
from gotunnel_server.certs.local_ca import Authority

SECRET_OF_ANOTHER = "of another gateway, as long as it should be"


# Pure --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "limits", "expected"),
    [
        (1, {}, FIRST_DELAY),
        (2, {}, 2 * FIRST_DELAY),
        (4, {}, 8 * FIRST_DELAY),
        (7, {}, MAX_DELAY),
        (100_000, {}, MAX_DELAY),
        (1, {"least": REFUSED_DELAY}, REFUSED_DELAY),
        (100, {"most": RESTART_DELAY}, RESTART_DELAY),
    ],
)
def test_retry_delay_doubles_within_its_limits(failures, limits, expected):
    assert retry_delay(failures, **limits, random=lambda: 1.0) == expected
    assert retry_delay(failures, **limits, random=lambda: 0.0) == expected / 2


def test_retry_delays_differ():
    assert len({retry_delay(3) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    ("name", "hostname"),
    [
        ("app.example.com", "app.example.com"),
        ("App.Example.COM", "app.example.com"),
        ("app.example.com.", "app.example.com"),
        ("app.example.com:8443", "app.example.com"),
        ("APP.example.com.:443", "app.example.com"),
        ("app.example.com:", "app.example.com:"),
        ("app.example.com:x", "app.example.com:x"),
        ("", ""),
    ],
)
def test_hostname_of_a_data_header(name, hostname):
    assert hostname_of(name) == hostname


def test_token_has_the_three_claims_that_go_agents_send():
    made = make_token("x" * 32, "mine", 3600)
    assert jwt.get_unverified_header(made)["alg"] == "HS256"
    claims = jwt.decode(made, "x" * 32, ["HS256"])
    assert set(claims) == {"iss", "iat", "exp"} and claims["iss"] == "mine"
    assert claims["exp"] - claims["iat"] == 3600


def test_a_short_secret_signs_without_a_warning():
    """Which pytest would make an error, and which only the gateway's operator could heed."""
    for secret in ("short", "x" * 31, "ü"):
        made = make_token(secret, "me", 60)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            claims = jwt.decode(made, secret, ["HS256"])
        assert claims["iss"] == "me"


def test_file_without_certificates_is_refused_by_name(tmp_path):
    path = tmp_path / "empty.crt"
    path.write_text("")
    with pytest.raises(CannotTrust, match="empty.crt.*expected certificates as PEM"):
        tls_context(str(path), False)


def test_whoever_skips_verification_does_so_altogether():
    context = tls_context(None, True)
    assert context.verify_mode == ssl.CERT_NONE and not context.check_hostname


@pytest.mark.parametrize("key", ["ca_file", "target_ca_file"])
def test_a_gateway_gets_no_renegotiation_and_a_target_may_have_one(cache, tmp_path, key):
    """A renegotiation costs the side that is asked for it more than the side that asks."""
    certificate, private = Authority(cache / "local-ca").issue("localhost")
    with reserved_port() as port:
        command = (
            need("openssl"), "s_server", "-accept", f"127.0.0.1:{port}", "-tls1_2",
            "-cert", certificate, "-key", private,
        )  # fmt: skip
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as server:
            try:
                while not server.stdout.readline().startswith(b"ACCEPT"):
                    pass
                sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
                with contextlib.closing(Duplex(sock)) as duplex:
                    context = tls_context(None, True, key)
                    duplex.start_tls(context, server_side=False, server_hostname="localhost")
                    duplex.handshake_within(TIMEOUT)
                    handshake = duplex._tls.get_channel_binding("tls-unique")
                    server.stdin.write(b"R\n")  # s_server's command to renegotiate
                    server.stdin.flush()
                    duplex.wait_readable(TIMEOUT)  # for the HelloRequest
                    assert duplex.receive() is None
                    server.stdin.write(b"payload\n")
                    server.stdin.flush()
                    if key == "ca_file":
                        with pytest.raises(ssl.SSLError, match="(?i)alert"):
                            duplex.read(timeout=TIMEOUT)
                    else:
                        assert duplex.read(timeout=TIMEOUT) == b"payload\n"

                        def has_shaken_hands_again():
                            """A server may write before it has read our second ClientHello."""
                            server.stdin.write(b"more\n")
                            server.stdin.flush()
                            assert duplex.read(timeout=TIMEOUT)
                            return duplex._tls.get_channel_binding("tls-unique") != handshake

                        wait_until(has_shaken_hands_again)
            finally:
                server.kill()


# A gateway made by hand --------------------------------------------------------------------------


class HandMadeGateway:
    """A gateway that the test plays by hand, for one agent at a time."""

    def __init__(self, cache):
        authority = Authority(cache / "local")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*authority.issue(TUNNEL_HOST))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(TIMEOUT)
        port = self._listening.getsockname()[1]
        self.place = Gateway(None, port, authority.ca_file, lambda *hostnames: None)
        self.session = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._listening.close()
        self.hang_up()

    def meet(self, reply=Ack(True)):
        """Accept an agent and answer its registration, which is returned."""
        duplex = Duplex(self._listening.accept()[0])
        duplex.start_tls(self._context, server_side=True)
        duplex.handshake_within(TIMEOUT)
        self.session = Session(duplex, client=False, name="gateway by hand")
        self.session.start()
        self.control = self.session.accept(TIMEOUT)
        self._messages = self._read()
        registered = self.hear()
        self.control.write(encode_message(reply))
        return registered

    def _read(self):
        reader = MessageReader()
        while data := self.control.read(timeout=TIMEOUT):
            yield from reader.feed(data)

    def hear(self):
        return next(self._messages)

    def open(self, name):
        return self.session.open(encode_data_header(name))

    def hang_up(self):
        if self.session is not None:
            self.session.close()
            self.session.join()


@pytest.fixture
def gateway(cache):
    with HandMadeGateway(cache) as gateway:
        yield gateway


@pytest.fixture
def agent(gateway, tmp_path, origin):
    """A registered agent that serves APP and RAW from the origin."""
    ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
    with agent_here(gateway.place, tmp_path, **ports) as agent:
        gateway.meet()
        yield agent
        gateway.hang_up()


@pytest.fixture
def impatient(monkeypatch):
    """Retries come at once."""
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: 0.01)


def test_registration_says_who_serves_what(gateway, tmp_path):
    ports = {"http": {APP: 8000}, "tcp": {RAW: 22}}
    with agent_here(gateway.place, tmp_path, **ports, jwt_secret="x" * 32, jwt_issuer="me"):
        registered = gateway.meet()
        assert isinstance(registered, Register)
        assert registered.routes == {APP: "127.0.0.1:8000", RAW: "127.0.0.1:22"}
        assert registered.modes == {APP: "http", RAW: "tcp"}
        assert registered.features == (
            CERTIFICATES,
            HALF_CLOSE,
            REASONS,
            UPGRADES,
            REFUSALS,
            OVERLAP,
            URLS,
            PARTIAL,
            MEMBERS,
            WAITS,
        )
        assert jwt.decode(registered.token, "x" * 32, ["HS256"])["iss"] == "me"


def test_token_of_the_configuration_is_sent_as_it_is(gateway, tmp_path):
    path = tmp_path / "token"
    path.write_text("a token from elsewhere\n")
    keys = {"token_file": str(path), "jwt_secret": None}
    with agent_here(gateway.place, tmp_path, {APP: 1}, **keys):
        assert gateway.meet().token == "a token from elsewhere"
        gateway.hang_up()


def test_pings_are_answered(gateway, agent):
    for ts in (0, 1234567890123):
        gateway.control.write(encode_message(Ping(ts)))
        assert isinstance(gateway.hear(), Pong)


def test_messages_that_nobody_knows_are_passed_over(gateway, agent, caplog):
    caplog.set_level(logging.DEBUG, "gotunnel")
    gateway.control.write(b'{"type":"hello"}\n' * 3 + encode_message(Ping(1)))
    assert isinstance(gateway.hear(), Pong)
    assert sum("type hello" in record.getMessage() for record in caplog.records) == 1


def test_a_flood_of_messages_that_nobody_knows_ends_the_session(gateway, agent, impatient):
    gateway.control.write(b'{"type":"hello"}\n' * 2000)
    wait_until(lambda: gateway.session.ended)
    gateway.meet()


@pytest.fixture(params=["GO_AWAY", "End"])
def ask_for_another(request, gateway, monkeypatch):
    """How the gateway asks for another session."""
    monkeypatch.setattr(link_module, "GO_AWAY_LOOK", 0.1)
    monkeypatch.setattr(link_module, "OLD_LOOK", 0.1)
    monkeypatch.setattr(link_module, "OLD_QUIET", 0.3)

    def ask():
        if request.param == "End":
            gateway.control.write(encode_message(End(MOVE, "for a test")))
        else:
            gateway.session.leave()

    return ask


def test_an_agent_that_is_asked_for_another_session_comes_and_its_visits_go_on(
    gateway, tmp_path, origin, impatient, ask_for_another
):
    with agent_here(gateway.place, tmp_path, tcp={RAW: origin.port}):
        before = gateway.meet()
        stream = gateway.open(RAW)
        with origin.accept() as target:
            ask_for_another()
            old = gateway.session
            assert gateway.meet().instance == before.instance
            stream.write(b"question")
            assert target.read_exactly(8) == b"question"
            target.send(b"answer")
            assert stream.read_exactly(6, TIMEOUT) == b"answer"
            new = gateway.open(RAW)
            with origin.accept() as second:
                second.send(b"hello")
                assert new.read_exactly(5, TIMEOUT) == b"hello"
                assert not old.ended
                stream.close()
                target.close()
                wait_until(lambda: old.ended)
                second.send(b"again")
                assert new.read_exactly(5, TIMEOUT) == b"again"
                assert not gateway.session.ended
        gateway.hang_up()


def test_a_gateway_that_takes_no_other_session_keeps_the_old_one(
    gateway, tmp_path, origin, impatient, ask_for_another
):
    """A Go gateway refuses the hostname as long as the old session has it."""
    with agent_here(gateway.place, tmp_path, tcp={RAW: origin.port}):
        gateway.meet()
        ask_for_another()
        old, control = gateway.session, gateway.control
        gateway.meet(Ack(False, f"{registering.TAKEN}: {RAW}"))
        gateway.hang_up()
        stream = old.open(encode_data_header(RAW)) if not old._mux.we_left else None
        if stream is not None:
            with origin.accept() as target:
                target.send(b"hello")
                assert stream.read_exactly(5, TIMEOUT) == b"hello"
                stream.close()
        control.write(encode_message(Ping(1)))
        assert b"pong" in control.read(timeout=TIMEOUT)
        old.close()
        old.join()
        gateway.meet()
        gateway.hang_up()


def test_an_old_session_does_not_last_for_ever(
    gateway, tmp_path, origin, impatient, ask_for_another, monkeypatch
):
    monkeypatch.setattr(link_module, "OLD_SESSION", 0.3)
    with agent_here(gateway.place, tmp_path, tcp={RAW: origin.port}):
        gateway.meet()
        stream = gateway.open(RAW)
        with origin.accept():
            ask_for_another()
            old = gateway.session
            gateway.meet()
            wait_until(lambda: old.ended)
            with pytest.raises(OSError):
                stream.read(timeout=TIMEOUT)
        gateway.hang_up()


def test_old_sessions_are_few(gateway, tmp_path, origin, impatient, monkeypatch):
    monkeypatch.setattr(link_module, "OLD_SESSIONS", 2)
    with agent_here(gateway.place, tmp_path, tcp={RAW: origin.port}):
        old = []
        for _ in range(5):
            gateway.meet()
            old.append((gateway.session, gateway.open(RAW)))
            origin.accept()
            gateway.control.write(encode_message(End(MOVE, "for a test")))
        gateway.meet()
        wait_until(lambda: [bool(session.ended) for session, _ in old] == [1, 1, 1, 0, 0])
        gateway.hang_up()
        for session, _ in old:
            session.close()
            session.join()


def test_stop_ends_old_sessions_too_when_their_visits_are_done(
    gateway, tmp_path, origin, impatient, ask_for_another
):
    with agent_here(gateway.place, tmp_path, tcp={RAW: origin.port}) as agent:
        gateway.meet()
        stream = gateway.open(RAW)
        with origin.accept() as target:
            ask_for_another()
            old = gateway.session
            gateway.meet()
            wait_until(lambda: agent.link.old)
            stopping = threading.Thread(target=agent.stop)
            stopping.start()
            target.send(b"last words")
            assert stream.read_exactly(10, TIMEOUT) == b"last words"
            assert not old.ended
            target.close()
            stream.close()
        stopping.join(TIMEOUT)
        wait_until(lambda: old.ended and gateway.session.ended)


@pytest.mark.parametrize("name", [APP, "APP.localhost", f"{APP}:8443", f"{APP}."])
def test_stream_reaches_its_target_whatever_the_spelling(gateway, agent, origin, name):
    stream = gateway.open(name)
    stream.write(request())
    with origin.accept() as target:
        assert target.read_head() == request()
        target.send(answer(b"yes"))
        assert stream.read_exactly(len(answer(b"yes")), TIMEOUT) == answer(b"yes")
        stream.close()
        assert target.read_to_end() == b""


@pytest.mark.parametrize(
    "header",
    [
        encode_data_header("other.localhost"),
        encode_data_header(""),
        b"\x02\x00\x01a",
        b"\x01\x00\x02\xff\xff",
    ],
)
def test_stream_for_nobody_is_reset_and_the_session_goes_on(gateway, agent, origin, header):
    stream = gateway.session.open(header)
    with pytest.raises(StreamReset):
        stream.read(timeout=TIMEOUT)
    assert origin.was_left_alone()
    gateway.control.write(encode_message(Ping(1)))
    assert isinstance(gateway.hear(), Pong)


def test_data_header_may_come_in_pieces(gateway, agent, origin):
    header = encode_data_header(RAW)
    stream = gateway.session.open(header[:1])
    for byte in header[1:]:
        stream.write(bytes([byte]))
    with origin.accept() as target:
        target.send(b"hello")
        assert stream.read_exactly(5, TIMEOUT) == b"hello"
        stream.close()


def test_half_close_in_tcp_mode_reaches_the_target_which_goes_on(gateway, agent, origin):
    stream = gateway.open(RAW)
    with origin.accept() as target:
        stream.write(b"question")
        stream.finish()
        assert target.read_to_end() == b"question"
        target.send(b"answer")
        target.close()
        assert stream.read_exactly(6, TIMEOUT) == b"answer"
        assert stream.read(timeout=TIMEOUT) == b""


def test_fin_in_http_mode_ends_the_exchange(gateway, agent, origin):
    """A Go gateway sends FIN when it has its answer. The agent then closes the target."""
    stream = gateway.open(APP)
    with origin.accept() as target:
        stream.write(request())
        target.read_head()
        stream.finish()
        with contextlib.suppress(ConnectionResetError):
            assert target.read_to_end() == b""


def test_target_that_resets_resets_the_stream(gateway, agent, origin):
    for name in (APP, RAW):
        stream = gateway.open(name)
        target = origin.accept()
        target.send(b"part")
        assert stream.read_exactly(4, TIMEOUT) == b"part"
        target.reset()
        with pytest.raises(StreamReset):
            stream.read(timeout=TIMEOUT)


def test_target_that_is_down_is_a_502_in_http_mode_and_a_reset_in_tcp_mode(gateway, tmp_path):
    with reserved_port() as port:
        with agent_here(gateway.place, tmp_path, http={APP: port}, tcp={RAW: port}):
            gateway.meet()
            stream = gateway.open(APP)
            page = b""
            while data := stream.read(timeout=TIMEOUT):
                page += data
            assert page.startswith(b"HTTP/1.1 502 ") and b"target-unreachable" in page
            assert b"<h1>This site cannot be reached</h1>\n<p>The server of this site does" in page
            with pytest.raises(StreamReset):
                gateway.open(RAW).read(timeout=TIMEOUT)
            gateway.hang_up()


def test_answer_that_nobody_reads_does_not_stop_other_streams(gateway, agent, origin):
    blocked, other = gateway.open(RAW), gateway.open(RAW)
    with origin.accept() as first, origin.accept() as second:
        blocked.write(b"1")
        other.write(b"2")
        wires = {wire.read(): wire for wire in (first, second)}
        flood = threading.Thread(target=send_until_reset, args=(wires[b"1"],))
        flood.start()
        wires[b"2"].send(b"still here")
        assert other.read_exactly(10, TIMEOUT) == b"still here"
        blocked.reset()
        flood.join(TIMEOUT)
        assert not flood.is_alive()
        other.close()


def send_until_reset(wire):
    with contextlib.suppress(ConnectionError):
        while True:
            wire.send(bytes(100_000))


@pytest.mark.parametrize(
    "reply", [Ack(True), Ack(False, "host already registered: app.localhost"), Ping(1)]
)
def test_agent_comes_back_whatever_the_gateway_said(gateway, tmp_path, impatient, reply):
    with agent_here(gateway.place, tmp_path, {APP: 1}):
        gateway.meet(reply)
        gateway.hang_up()
        gateway.meet()
        gateway.hang_up()


def test_refusal_is_logged_in_the_gateways_words(gateway, tmp_path, caplog):
    with agent_here(gateway.place, tmp_path, {APP: 1}):
        gateway.meet(Ack(False, "not today"))
        wait_until(lambda: "the gateway refused: not today; next try in " in caplog.text)
        gateway.hang_up()


def test_tunnel_whose_port_the_gateway_does_not_know_is_not_served(gateway, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tunnels = [
        {"hostname": RAW, "target": "127.0.0.1:9", "mode": "tcp", "port": "2222"},
        {"hostname": APP, "target": "127.0.0.1:9"},
    ]
    with agent_here(gateway.place, tmp_path, ready=False, tunnels=tunnels):
        gateway.meet(Ack(True))
        wait_until(lambda: f"serving {APP}" in caplog.text)
        assert f"{RAW}: not served: this gateway does not know ports; " in caplog.text
        gateway.hang_up()


def test_texts_of_a_gateway_stay_on_their_line(gateway, tmp_path, impatient, caplog):
    caplog.set_level(logging.INFO)
    text = "x\r\n2026-01-01 ERROR \x1b[31m" + "y" * 5000
    tunnels = [{"hostname": RAW, "target": "127.0.0.1:9", "mode": "tcp", "port": "auto"}]
    with agent_here(gateway.place, tmp_path, ready=False, tunnels=tunnels):
        gateway.meet(Ack(True, features=(PORTS,), ports={RAW: text}))
        wait_until(lambda: f"{RAW}: on port x\\r\\n20 of the gateway" in caplog.text)
        gateway.hang_up()
        gateway.meet(Ack(True, features=(PORTS,), refused={RAW: text}))
        wait_until(lambda: f"{RAW}: not served: x\\r\\n2026" in caplog.text)
        gateway.hang_up()
        gateway.meet(Ack(False, text))
        wait_until(lambda: "the gateway refused: x\\r\\n2026" in caplog.text)
        gateway.hang_up()
    assert all(character not in caplog.text for character in ("\x1b", "\r", "y" * 1000))


def test_silent_gateway_is_left(gateway, tmp_path, impatient, monkeypatch):
    monkeypatch.setattr(link_module, "SILENCE_TIMEOUT", 0.2)
    with agent_here(gateway.place, tmp_path, {APP: 1}):
        gateway.meet()
        first = gateway.session
        gateway.meet()
        wait_until(lambda: first.ended)
        gateway.hang_up()


def test_stop_lets_running_visits_finish(gateway, tmp_path, origin):
    with agent_here(gateway.place, tmp_path, tcp={RAW: origin.port}) as agent:
        gateway.meet()
        stream = gateway.open(RAW)
        with origin.accept() as target:
            leaves = threading.Event()
            gateway.session.on_leave = leaves.set
            stopping = threading.Thread(target=agent.stop)
            stopping.start()
            assert leaves.wait(TIMEOUT)
            target.send(b"the last word")
            target.close()
            assert stream.read_exactly(13, TIMEOUT) == b"the last word"
            stream.close()
        stopping.join(TIMEOUT)
        assert not stopping.is_alive()


def test_stop_ends_visits_whose_target_does_not_read(gateway, tmp_path, origin):
    keys = {"drain_timeout": 0.1}
    with agent_here(gateway.place, tmp_path, tcp={RAW: origin.port}, **keys) as agent:
        gateway.meet()
        stream = gateway.open(RAW)
        with origin.accept() as target:
            target.finish()
            assert stream.read(timeout=TIMEOUT) == b""
            with contextlib.suppress(TimeoutError):  # until all buffers on the way are full
                while True:
                    stream.write(bytes(64 * 1024), timeout=1)
            agent.stop()  # its threads have ended too, or the next line would fail


# What hangs ---------------------------------------------------------------------------------------

# The agent's command, where a name does not resolve for as long as the process may live.
HANGING = """
import logging, socket, sys, time
from gotunnel_agent.cli import main

def getaddrinfo(host, *more, resolve=socket.getaddrinfo, **named):
    if host == b"hangs.example.com":
        logging.getLogger("gotunnel").info("resolving")
        time.sleep(600)
    return resolve(host, *more, **named)

socket.getaddrinfo = getaddrinfo
sys.exit(main(sys.argv[1:]))
"""


def assert_it_ends_at_once(program):
    program.signal(signal.SIGTERM)
    assert program.wait(timeout=8) == 0  # the process has ended; a log line is no proof
    program.wait_for("stopped")


@pytest.mark.parametrize("mode", ["http", "tcp"])
def test_agent_ends_in_its_drain_time_though_the_name_of_a_target_does_not_resolve(
    gateway, tmp_path, mode
):
    path = tmp_path / "agent.yaml"
    tunnel = {"hostname": APP, "mode": mode, "target": "hangs.example.com:80"}
    keys = {"tunnels": [tunnel], "drain_timeout": 0.5}
    path.write_text(agent_yaml(gateway.place, {}, {}, keys))
    command = (sys.executable, "-c", HANGING, "-c", str(path))
    with running(*command, cwd=tmp_path, PYTHONPATH=str(ROOT)) as program:
        gateway.meet()
        gateway.open(APP)
        program.wait_for("resolving")
        assert_it_ends_at_once(program)
        program.wait_for("1 visits did not end in 0.5 s and were cut")


def test_agent_ends_at_once_though_the_name_of_its_gateway_does_not_resolve(tmp_path):
    path = tmp_path / "agent.yaml"
    path.write_text(
        "tunnel_addr: hangs.example.com:9443\njwt_secret: only for tests\n"
        f"tunnels: [{{hostname: {APP}, target: '127.0.0.1:80'}}]\n"
    )
    command = (sys.executable, "-c", HANGING, "-c", str(path))
    with running(*command, cwd=tmp_path, PYTHONPATH=str(ROOT)) as program:
        program.wait_for("resolving")
        assert_it_ends_at_once(program)


@contextlib.contextmanager
def silent_gateway(cache, phase):
    """A gateway that falls silent in one phase of the dial. Yields its address, and a function that
    waits until it is silent."""
    authority, reached, over = Authority(cache / "local"), threading.Event(), threading.Event()
    with contextlib.ExitStack() as stack:
        if phase == "connect":
            port = stack.enter_context(deaf_port())
        else:
            silent = stack.enter_context(Origin())
            port = silent.port

        def go_silent(wire):
            if phase == "register":
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(*authority.issue(TUNNEL_HOST))
                wire.sock = context.wrap_socket(wire.sock, server_side=True)
            wire.read()
            reached.set()
            over.wait(TIMEOUT)

        if phase != "connect":
            silent.serve(go_silent)
            stack.callback(over.set)
        yield Gateway(None, port, authority.ca_file, None), reached.wait


@pytest.mark.parametrize("phase", ["connect", "TLS", "register"])
def test_agent_ends_at_once_though_its_gateway_is_silent(cache, tmp_path, phase):
    with silent_gateway(cache, phase) as (place, wait_for_silence):
        with agent_here(place, tmp_path, {APP: 1}, ready=False) as agent:
            assert phase == "connect" or wait_for_silence(TIMEOUT)
            began = monotonic()
            agent.stop()
            for thread in threading.enumerate():
                if thread.name == "agent":
                    thread.join(TIMEOUT)
            assert monotonic() - began < 2


def test_agent_that_stops_leaves_time_for_its_last_lines_in_the_ten_seconds_that_docker_grants():
    assert DRAIN_TIMEOUT + link_module.LAST_WORDS + standard_error.LAST_LINES < 10


# Real gateways -----------------------------------------------------------------------------------


def test_agent_comes_back_when_the_gateway_has_been_restarted(cache, tmp_path, origin):
    with reserved_port() as port, contextlib.ExitStack() as stack:
        with gateway_here(cache, TUNNEL_PORT=str(port)) as first:
            stack.enter_context(agent_here(first, tmp_path, http={APP: origin.port}))
        with gateway_here(cache, TUNNEL_PORT=str(port)) as second:
            second.wait_for_routes(APP)
            stack.close()


def test_agent_may_start_before_its_gateway(cache, tmp_path, origin, impatient, caplog):
    caplog.set_level(logging.INFO, "gotunnel")
    with gateway_here(cache):
        pass  # so that there is a CA to trust
    with reserved_port() as port, contextlib.ExitStack() as stack:
        place = Gateway(None, port, cache / "local" / "ca.crt", None)
        stack.enter_context(agent_here(place, tmp_path, {APP: origin.port}, ready=False))
        wait_until(lambda: "no program listens there" in caplog.text)
        with gateway_here(cache, TUNNEL_PORT=str(port)) as gateway:
            gateway.wait_for_routes(APP)
            stack.close()


def test_a_dial_that_takes_long_is_no_session_that_worked(cache, tmp_path, monkeypatch):
    """The delays must also grow while the network drops every packet."""
    counts = queue.Queue()
    monkeypatch.setattr(link_module, "retry_delay", lambda failures, *_: counts.put(failures) or 0)
    monkeypatch.setattr(link_module, "DIAL_TIMEOUT", 0.1)
    monkeypatch.setattr(link_module, "HELD", 0.05)
    authority = Authority(cache / "local")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = Gateway(None, silent.getsockname()[1], authority.ca_file, None)
        with agent_here(place, tmp_path, {APP: 1}, ready=False):
            assert [counts.get(timeout=TIMEOUT) for _ in range(3)] == [1, 2, 3]


def test_a_session_that_held_is_followed_by_a_short_delay(gateway, tmp_path, monkeypatch):
    counts = queue.Queue()
    monkeypatch.setattr(link_module, "retry_delay", lambda failures, *_: counts.put(failures) or 0)
    monkeypatch.setattr(link_module, "HELD", 0)
    with agent_here(gateway.place, tmp_path, {APP: 1}, ready=False):
        for _ in range(3):
            gateway.meet()
            gateway.control.write(encode_message(Ping(1)))
            assert isinstance(gateway.hear(), Pong)  # so the agent has read the ack
            gateway.hang_up()
            assert counts.get(timeout=TIMEOUT) == 1


def test_killed_agent_is_replaced_within_seconds(cache, tmp_path, origin):
    with gateway_here(cache) as gateway:
        with agent_process(gateway, tmp_path, http={APP: origin.port}) as first:
            first.signal(signal.SIGKILL)
            first.wait()
            with agent_process(gateway, tmp_path, http={APP: origin.port}, ready=False) as second:
                second.wait_for(": serving ")
                with gateway.dial(APP) as visitor:
                    visitor.send(request())
                    with origin.accept() as target:
                        target.read_head()
                        target.send(answer(b"back"))
                        assert visitor.read_message()[1] == b"back"


def test_state_of_a_certificate_is_told_once_and_of_what_is_served_alone(
    gateway, tmp_path, origin, caplog
):
    caplog.set_level(logging.INFO)
    ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
    with agent_here(gateway.place, tmp_path, **ports):
        gateway.meet(Ack(True, refused={RAW: "its port is taken"}))
        for state in ("waiting", "failed: no DNS", "failed: no DNS", "ready", "waiting"):
            for hostname in (APP, RAW, "no.such.tunnel"):
                gateway.control.write(encode_message(Certificate(hostname, state)))
        gateway.control.write(encode_message(Ping(1)))
        assert isinstance(gateway.hear(), Pong)  # so the agent has read the messages before it
        gateway.hang_up()
    told = [record.getMessage() for record in caplog.records if "certificate" in record.msg]
    assert told == [
        f"{APP}: certificate: {state}"
        for state in ("waiting", "failed: no DNS", "ready", "waiting")
    ]


def test_wrong_secret_is_named_in_the_agents_log(cache, tmp_path):
    with gateway_here(cache) as gateway:
        keys = {"jwt_secret": SECRET_OF_ANOTHER, "ready": False}
        with agent_process(gateway, tmp_path, {APP: 1}, **keys) as agent:
            agent.wait_for(
                "WARNING .*the gateway refused: auth failed: the token's signature .*; next try "
            )
            assert not routes_of(gateway.inner)
            agent.signal(signal.SIGTERM)
            assert agent.wait() == 0


def test_gateway_of_an_unknown_ca_is_not_told_anything(cache, tmp_path):
    stranger = Authority(tmp_path / "another CA")
    with gateway_here(cache) as gateway:
        keys = {"ca_file": str(stranger.ca_file), "ready": False}
        with agent_process(gateway, tmp_path, {APP: 1}, **keys) as agent:
            agent.wait_for("not to be trusted: .*; ca_file names another CA: ")
            assert not routes_of(gateway.inner)
            agent.signal(signal.SIGTERM)
            assert agent.wait() == 0


def test_sigterm_ends_an_agent_with_status_0_and_frees_its_hostname(cache, tmp_path, origin):
    with gateway_here(cache) as gateway:
        with agent_process(gateway, tmp_path, http={APP: origin.port}) as agent:
            agent.signal(signal.SIGTERM)
            assert agent.wait() == 0
            wait_until(lambda: not routes_of(gateway.inner))
            agent.wait_for(" stopped$")
            assert "Traceback (most recent call last):" not in agent.lines


def test_second_sigterm_ends_an_agent_at_once(cache, tmp_path, origin):
    with gateway_here(cache) as gateway:
        with agent_process(gateway, tmp_path, tcp={RAW: origin.port}) as agent:
            with gateway.dial(RAW), origin.accept():
                agent.signal(signal.SIGTERM)
                agent.wait_for("a second signal stops at once")
                agent.signal(signal.SIGTERM)
                assert agent.wait() == 1
                agent.wait_for("WARNING second signal: stopping at once")


def test_gateway_that_ends_takes_no_agent_with_it(cache, tmp_path, origin):
    with gateway_process(cache) as gateway:
        with agent_process(gateway, tmp_path, http={APP: origin.port}) as agent:
            gateway.program.signal(signal.SIGKILL)
            gateway.program.wait()
            agent.wait_for("; next try in ")
            agent.signal(signal.SIGTERM)
            assert agent.wait() == 0


def test_agent_that_was_sent_to_the_port_of_visitors_is_told_which_it_needs(
    cache, tmp_path, caplog
):
    with gateway_here(cache) as gateway:
        wrong = Gateway(None, gateway.public_port, gateway.ca_file, None)
        with agent_here(wrong, tmp_path, {APP: 1}, ready=False):
            wait_until(lambda: "speaks HTTP, so this may be the port for visitors; "
                       "tunnel_addr has to name the gateway's TUNNEL_PORT (9443)"
                       in caplog.text)  # fmt: skip


def test_agent_that_was_sent_to_a_port_without_tls_is_told_which_it_needs(cache, tmp_path, caplog):
    with gateway_here(cache) as gateway:
        wrong = Gateway(None, gateway.dashboard_port, gateway.ca_file, None)
        with agent_here(wrong, tmp_path, {APP: 1}, ready=False):
            wait_until(lambda: "the program there speaks HTTP without TLS, as a gateway's "
                       "dashboard and port 80 do; tunnel_addr has to name the gateway's "
                       "TUNNEL_PORT (9443)"
                       in caplog.text)  # fmt: skip


def test_a_certificate_that_has_expired_is_no_question_of_its_ca(
    gateway, tmp_path, monkeypatch, caplog
):
    def refuse(link, plan, place):
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_code, error.verify_message = 10, "certificate has expired"
        raise error

    monkeypatch.setattr(link_module.Link, "_begin", refuse)
    with agent_here(gateway.place, tmp_path, {APP: 1}, ready=False):
        wait_until(lambda: "to be trusted: certificate has expired; the gateway has to renew it, "
                   "unless this machine's clock is wrong, which says " in caplog.text)  # fmt: skip
    assert "ca_file" not in caplog.text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ssl.SSLCertVerificationError(1, "certificate verify failed"),
            "to be trusted: not valid for '127.0.0.1'; tunnel_addr has to name the gateway's "
            "TUNNEL_HOST; next try in",
        ),
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "no address was found (Name or service not known); check the name in tunnel_addr, and "
            "DNS; next try in",
        ),
    ],
)
def test_a_wrong_host_in_tunnel_addr_is_said_to_be_wrong(
    gateway, tmp_path, monkeypatch, caplog, error, said
):
    error.verify_code, error.verify_message = 64, "not valid for '127.0.0.1'."

    def refuse(link, plan, place):
        raise error

    monkeypatch.setattr(link_module.Link, "_begin", refuse)
    with agent_here(gateway.place, tmp_path, {APP: 1}, ready=False):
        wait_until(lambda: said in caplog.text)


def test_agent_dials_often_while_its_gateway_restarts_behind_a_port_that_goes_on_listening(
    cache, tmp_path, origin, monkeypatch
):
    """systemd holds the sockets: a dial is not refused, but nobody answers."""
    monkeypatch.setattr(link_module, "DIAL_TIMEOUT", 0.1)
    limits = queue.Queue()

    def delay(failures, least, most):
        limits.put(most)
        return 0.01

    with gateway_here(cache) as gateway, contextlib.ExitStack() as stack:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            for given in gateway.inner.listeners.shared():
                stack.enter_context(given.sock)
            monkeypatch.setattr(link_module, "retry_delay", delay)
            gateway.inner.stop()
            limits.get(timeout=TIMEOUT)  # the session was a short one
            for _ in range(5):
                assert limits.get(timeout=TIMEOUT) == RESTART_DELAY
