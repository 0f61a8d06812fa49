"""Floods of yamux frames that nobody needs, by strangers and by agents: they are cut off, and an
honest agent's visitors hardly notice."""

import contextlib
import sys
import time

import pytest
from hand_made import HOUR
from support import (
    APP,
    SECRET,
    TUNNEL_HOST,
    agent_process,
    answer,
    at_length,
    dial_tls,
    gateway_here,
    gateway_process,
    request,
    running,
    wait_until,
)

from gotunnel import (
    ACK,
    DATA,
    GO_AWAY,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Header,
    Register,
    encode_message,
)
from gotunnel_agent.registering import make_token
from gotunnel_server.agents import newcomer

# The flooders are a process of their own: they must not take the gateway's turns. It dials so many
# connections, says on each what it is told to (hexadecimal), then the flood over and over; what the
# gateway says is dropped. It comes again when it is cut, and prints each time how long that took.
FLOOD = """
import socket, ssl, sys, threading, time
port, count, ca_file, host, flood = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
flood, openings = bytes.fromhex(flood), [bytes.fromhex(text) for text in sys.argv[6:]]
context = ssl.create_default_context(cafile=ca_file)

def send(number):
    while True:
        began = None
        try:
            with socket.create_connection(("127.0.0.1", port), 20) as sock:
                with context.wrap_socket(sock, server_hostname=host) as tls:
                    tls.sendall(openings[number % len(openings)])
                    came = b"" if b"register" in openings[0] else b"ack"
                    while b"ack" not in came:
                        more = tls.recv(65536)
                        if not more:
                            raise OSError
                        came += more
                    tls.setblocking(False)
                    began, print_once = time.monotonic(), number == 0
                    if print_once:
                        print("begins", flush=True)
                    view = flood
                    while True:
                        try:
                            view = view[tls.send(view):] or flood
                        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                            time.sleep(0.001)
                        try:
                            if not tls.recv(65536):
                                break
                        except ssl.SSLWantReadError:
                            pass
        except OSError:
            pass
        if began is not None:
            print(f"cut after {time.monotonic() - began:.2f} s", flush=True)
        time.sleep(0.2)

for number in range(count):
    threading.Thread(target=send, args=(number,), daemon=True).start()
time.sleep(600)
"""
FRAMES = {
    "window updates of 0": Header(WINDOW_UPDATE, 0, 1, 0),
    "data without payload": Header(DATA, 0, 1, 0),
    "resets of unknown streams": Header(WINDOW_UPDATE, RST, 9999, 0),
    "pings": Header(PING, SYN, 0, 1),
    "pongs that nobody has asked for": Header(PING, ACK, 0, 1),
    "go away again and again": Header(GO_AWAY, 0, 0, 0),
}
BATCH = 1300  # frames in a TLS record


def opening(message):
    return Header(DATA, SYN, 1, len(message)).encode() + message


def registration(number):
    token = make_token(SECRET, "flood", HOUR)
    hostname = f"flood{number}.localhost"
    return opening(encode_message(Register(token, {hostname: "127.0.0.1:9"}, {})))


@contextlib.contextmanager
def flooding(gateway, folder, frame, count, *openings):
    arguments = (str(gateway.tunnel_port), str(count), str(gateway.ca_file), TUNNEL_HOST)
    flood = (frame.encode() * BATCH).hex()
    command = (sys.executable, "-c", FLOOD, *arguments, flood, *(text.hex() for text in openings))
    with running(*command, cwd=folder) as program:
        program.wait_for("^begins$")
        yield program


def times_of_visits(gateway, count):
    """Seconds that each visit takes, handshake and all, the longest last."""
    times = []
    for _ in range(count):
        began = time.monotonic()
        with gateway.dial(APP) as visitor:
            visitor.send(request())
            assert visitor.read_message()[1] == b"page"
        times.append(time.monotonic() - began)
    return sorted(times)


@pytest.fixture
def served(cache, tmp_path, origin):
    """A gateway, with an agent that serves APP, both as programs."""
    origin.serve(lambda target: (target.read_head(), target.send(answer(b"page"))))
    with gateway_process(cache) as gateway, agent_process(gateway, tmp_path, {APP: origin.port}):
        yield gateway


@pytest.fixture
def gateway_here_too(cache):
    with gateway_here(cache) as gateway:
        yield gateway


STRANGERS, AGENTS = 64, 8


# Strangers differ from agents in how they are cut off, not in what counts as a flood.
@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("window updates of 0", "agents"), ("window updates of 0", "strangers"),
        *(pytest.param(name, "agents", marks=pytest.mark.slow) for name in list(FRAMES)[1:]),
        *(at_length(name, "strangers") for name in list(FRAMES)[1:]),
    ],
)  # fmt: skip
def test_a_flood_is_cut_off_and_visitors_hardly_notice(served, tmp_path, name, who):
    frame = FRAMES[name]
    openings = [opening(b"{")] if who == "strangers" else map(registration, range(AGENTS))
    count = STRANGERS if who == "strangers" else AGENTS
    with flooding(served, tmp_path, frame, count, *openings) as program:
        times = times_of_visits(served, 50)
        assert program.wait_for("^cut after")
        assert times[len(times) // 2] < 0.5 and times[-1] < 5, times


def test_a_long_registration_in_small_frames_is_taken(gateway_here_too):
    """Other agents may cut it as they like."""
    hostnames = {f"{'x' * 50}{number}.localhost": "127.0.0.1:9" for number in range(45)}
    hostnames |= {f"{APP}:{port}": "127.0.0.1:9" for port in range(10_000, 10_005)}
    token = make_token(SECRET, "x" * 40_000, HOUR)
    message = encode_message(Register(token, hostnames, {}))
    assert len(message) > 55_000
    with dial_tls(gateway_here_too.tunnel_port, TUNNEL_HOST, gateway_here_too.context) as agent:
        agent.send(opening(b""))
        for at in range(0, len(message), 512):
            piece = message[at : at + 512]
            agent.send(Header(DATA, 0, 1, len(piece)).encode() + piece)
        data = b""
        while b'"type":"ack"' not in data:
            data += agent.read()
        assert b"auth failed" in data or b'"ok":true' in data


def test_a_flood_counts_as_a_failed_attempt(gateway_here_too):
    attempts = gateway_here_too.inner._newcomers.attempts
    with dial_tls(gateway_here_too.tunnel_port, TUNNEL_HOST, gateway_here_too.context) as stranger:
        with contextlib.suppress(OSError):
            stranger.send(opening(b"{") + Header(WINDOW_UPDATE, 0, 1, 0).encode() * 10_000)
            stranger.read_to_end()
    wait_until(lambda: attempts._failures("127.0.0.1") == 1)


def test_a_stranger_that_is_refused_does_not_go_on_for_ever(gateway_here_too, monkeypatch):
    monkeypatch.setattr(newcomer, "PARTING_TIMEOUT", 60)
    address = gateway_here_too.tunnel_port, TUNNEL_HOST, gateway_here_too.context
    strangers = gateway_here_too.inner._newcomers._newcomers
    for first in (b'{"type":"register"}', b'{"type":"register","routes":1}'):
        with dial_tls(*address) as stranger:
            with contextlib.suppress(OSError):
                stranger.send(opening(first))
                for _ in range(64):
                    stranger.send(Header(DATA, 0, 1, 65536).encode() + bytes(65536))
            wait_until(lambda: not strangers)
