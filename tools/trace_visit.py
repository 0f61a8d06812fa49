"""The visit that trace.py shows: runs gateway, agent, target and visitor, and records them.

    trace_visit.py KIND UPLOAD HTML      KIND is http, tcp, websocket or upload; UPLOAD is bytes;
                                         HTML is a file, "" for a ladder on standard output

trace.py starts it, with the repository on PYTHONPATH. All four parties are threads of this process,
so that one clock times them all.
"""

import base64
import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import ssl
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from time import monotonic

import bootstrap
import trace_page
import trace_text
from trace_ladder import CONTROL_STREAM, KEPT, VISIT_OVER, Event, FrameCutter, Ladder

from gotunnel import FIN, PING, RST
from gotunnel_agent import config as agent_config
from gotunnel_agent.agent import Agent
from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.common.process import print_answer
from gotunnel_server import config as gateway_config
from gotunnel_server.certs.local_ca import FOLDER as LOCAL_FOLDER
from gotunnel_server.gateway import Gateway

LOOPBACK = "127.0.0.1"
GATEWAY_HOST, TUNNEL_HOST = "gateway.example.com", "localhost"
HOSTNAMES = {"tcp": "db.example.com"}  # kind of visit: hostname
HOSTNAME = "app.example.com"  # ... of all others
TIMEOUT = 30  # seconds for any one wait: only something that failed takes so long
PIECE = 64 * 1024  # bytes of a write, and asked for by a read
LAST_LINES = 5  # of the log, shown if the visit fails
PLAIN_WIDTH = 100  # columns, where no terminal says how many it has
WIDTHS = 80, 120  # the least and the most that a terminal is given

PAGE = b"Hello from the target.\n"
# From RFC 6455 §1.3; it makes the key's answer.
WEBSOCKET_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
WEBSOCKET_CLOSE = 8


class Failed(Exception):
    """The visit cannot be shown; the text says why."""


class Tape:
    """What has happened. Any thread."""

    def __init__(self):
        self.events = []
        self.received = {"gateway": [], "agent": []}  # frames, by the side that got them
        self.ready = threading.Event()  # the agent serves, with a certificate
        self.over = threading.Event()  # the visit's stream is
        self._ended = set()  # sides that have sent FIN on it
        self._start = None  # monotonic, of the first event

    def add(self, source, sink, data=b"", *, header=None, note=""):
        """Record bytes, a frame if it has a ``header``, or the ``note`` that something was done."""
        now = monotonic()
        if self._start is None:
            self._start = now
        self.events.append(
            Event(now - self._start, source, sink, header, bytes(data[:KEPT]), len(data), note)
        )

    def observer(self, here, there):
        """What a Session is to call for each frame of its end ``here``."""

        outgoing, incoming = FrameCutter(), FrameCutter()

        def observe(sent, data):
            if sent:
                for header, payload in outgoing.cut(data):
                    self.add(here, there, payload, header=header)
                    self._look_for_end(here, header)
                return
            for header, payload in incoming.cut(data):
                self.received[here].append((header, bytes(payload[:KEPT]), len(payload)))
                if here == "agent" and b'"type":"certificate"' in payload:
                    self.ready.set()

        return observe

    def _look_for_end(self, side, header):
        if header.type != PING and header.stream_id not in (0, CONTROL_STREAM):
            if header.flags & FIN:
                self._ended.add(side)
            if header.flags & RST or len(self._ended) == 2:
                self.over.set()


class End:
    """A connection of the visitor or the target, whose bytes are recorded."""

    def __init__(self, duplex, tape, here, there):
        self.duplex = duplex
        self._tape, self._here, self._there = tape, here, there
        self._buffer = b""

    def send(self, data):
        self._tape.add(self._here, self._there, data)
        self.duplex.write(data, timeout=TIMEOUT)

    def note(self, text):
        self._tape.add(self._here, self._there, note=text)

    def _receive(self):
        data = self.duplex.read(timeout=TIMEOUT)
        if data:
            self._tape.add(self._there, self._here, data)
        else:
            self._tape.add(self._there, self._here, note=f"the {self._there} sends no more")
        return data

    def read(self, count):
        """So many bytes; fewer if the other side has ended."""
        while len(self._buffer) < count and (data := self._receive()):
            self._buffer += data
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def read_until(self, mark):
        """What comes up to ``mark``, which is part of it; b"" if the other side has ended."""
        while mark not in self._buffer:
            data = self._receive()
            if not data:
                return b""
            self._buffer += data
        return self.read(self._buffer.index(mark) + len(mark))

    def read_to_end(self):
        while self._receive():
            pass

    def finish(self, text):
        """Half-close."""
        self.note(text)
        self.duplex.finish(timeout=TIMEOUT)

    def close(self, text):
        self.note(text)
        self.duplex.close()


class Target:
    """An ordinary server: a thread that calls ``script(end)`` for each connection."""

    def __init__(self, tape, script):
        self._tape, self._script = tape, script
        self._listening = socket.create_server((LOOPBACK, 0))
        self.port = self._listening.getsockname()[1]
        self._connections = []
        self._thread = threading.Thread(target=self._serve, name="target")
        self._thread.start()

    def _serve(self):
        with contextlib.suppress(OSError):  # close(): its socket is gone
            while True:
                sock, _ = self._listening.accept()
                self._tape.add("agent", "target", note=f"the agent connects to port {self.port}")
                duplex = Duplex(sock)
                self._connections.append(duplex)
                with contextlib.suppress(OSError):  # the visit failed, which the visitor tells
                    self._script(End(duplex, self._tape, "target", "agent"))
                duplex.close()

    def close(self):
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for duplex in self._connections:
            duplex.reset()
        self._thread.join(TIMEOUT)


# What the target does ----------------------------------------------------------------------------


def serve_http(end):
    """Answer requests with a page, or with what a POST has brought."""
    while head := end.read_until(b"\r\n\r\n"):
        length = int(fields(head).get("content-length", 0))
        body = PAGE
        if length:
            digest = hashlib.sha256()
            left = length
            while left and (data := end.read(min(left, PIECE))):
                digest.update(data)
                left -= len(data)
            body = f"{length - left} bytes came, SHA-256 {digest.hexdigest()}\n".encode()
        end.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )


def serve_lines(end):
    """Greet, send each line back in capitals, and say goodbye behind the visitor's end."""
    end.send(b"hello, this is the target\n")
    while line := end.read_until(b"\n"):
        end.send(line.upper())
    end.send(b"goodbye\n")
    end.close("the target closes its connection")


def serve_websocket(end):
    head = end.read_until(b"\r\n\r\n")
    key = fields(head)["sec-websocket-key"].encode()
    answer = base64.b64encode(hashlib.sha1(key + WEBSOCKET_MAGIC).digest())
    end.send(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + answer + b"\r\n\r\n"
    )
    while True:
        opcode, text = read_websocket(end)
        end.send(websocket(opcode, text.upper() if opcode != WEBSOCKET_CLOSE else text))
        if opcode == WEBSOCKET_CLOSE:
            end.close("the target closes its connection")
            return


# What the visitor does ---------------------------------------------------------------------------


def visit_http(end, size):
    body = bytes(range(256)) * (size // 256 + 1) if size else b""
    body = body[:size]
    lines = [f"{'POST' if size else 'GET'} / HTTP/1.1", f"Host: {HOSTNAME}", "User-Agent: trace"]
    if size:
        lines += ["Content-Type: application/octet-stream", f"Content-Length: {size}"]
    end.send("\r\n".join([*lines, "", ""]).encode())
    for at in range(0, size, PIECE):
        end.send(body[at : at + PIECE])
    head = end.read_until(b"\r\n\r\n")
    answer = end.read(int(fields(head).get("content-length", 0)))
    expected = hashlib.sha256(body).hexdigest().encode() if size else PAGE
    if not head.startswith(b"HTTP/1.1 200 ") or expected not in answer:
        raise Failed(f"another answer came: {(head + answer)[:200]!r}")
    end.close("the visitor has its answer, and closes its connection")


def visit_lines(end, size):
    greeting = end.read_until(b"\n")
    end.send(b"can you hear me?\n")
    answer = end.read_until(b"\n")
    if not greeting or answer != b"CAN YOU HEAR ME?\n":
        raise Failed(f"another answer came: {answer!r}")
    end.finish("the visitor sends no more, but goes on reading (half-close)")
    end.read_to_end()
    end.close("the visitor closes its connection")


def visit_websocket(end, size):
    key = base64.b64encode(secrets.token_bytes(16)).decode()
    end.send(
        f"GET /chat HTTP/1.1\r\nHost: {HOSTNAME}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    head = end.read_until(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 101 "):
        raise Failed(f"another answer came: {head[:200]!r}")
    end.send(websocket(1, b"can you hear me?", mask=secrets.token_bytes(4)))
    if read_websocket(end) != (1, b"CAN YOU HEAR ME?"):
        raise Failed("another WebSocket message came")
    end.send(websocket(WEBSOCKET_CLOSE, b"\x03\xe8", mask=secrets.token_bytes(4)))
    read_websocket(end)
    end.read_to_end()
    end.close("the visitor closes its connection")


def fields(head):
    """The fields of an HTTP head, by their names in lower case."""
    pairs = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
    return {name.lower(): value.strip() for name, _, value in pairs}


def websocket(opcode, payload, mask=b""):
    """A WebSocket frame of at most 125 bytes (RFC 6455 §5.2); visitors must mask theirs."""
    head = bytes([0x80 | opcode, len(payload) | (0x80 if mask else 0)])
    return head + mask + masked(payload, mask)


def masked(payload, mask):
    return bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload)) if mask else payload


def read_websocket(end):
    """The next WebSocket frame: its opcode and payload."""
    head = end.read(2)
    if len(head) < 2:
        raise ConnectionError("the WebSocket ended without a close frame")
    opcode, length = head[0] & 0x0F, head[1] & 0x7F
    mask = end.read(4) if head[1] & 0x80 else b""
    return opcode, masked(end.read(length), mask)


SCRIPTS = {  # kind of visit: (of the target, of the visitor)
    "http": (serve_http, visit_http),
    "upload": (serve_http, visit_http),
    "tcp": (serve_lines, visit_lines),
    "websocket": (serve_websocket, visit_websocket),
}


# The scene ---------------------------------------------------------------------------------------


def record(kind, size=0):
    """Make one visit; return its Tape. Raises Failed."""
    log = deque(maxlen=LAST_LINES)
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: log.append(entry.getMessage())
    logger = logging.getLogger("gotunnel")
    logger.addHandler(handler)
    try:
        return _record(kind, size)
    except (OSError, Failed) as error:
        said = "".join(f"\n    {line}" for line in log)
        raise Failed(f"the visit failed: {error}{said}") from None
    finally:
        logger.removeHandler(handler)


def _record(kind, size):
    hostname = HOSTNAMES.get(kind, HOSTNAME)
    serve, visit = SCRIPTS[kind]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gotunnel-trace-")))
        secret = secrets.token_hex(32)
        gateway = start_gateway(folder, secret)
        stack.callback(gateway.stop)
        tape = Tape()
        gateway.tunnels.observer = tape.observer("gateway", "agent")
        target = Target(tape, serve)
        stack.callback(target.close)
        mode = "tcp" if kind == "tcp" else "http"
        stack.enter_context(
            running_agent(folder, gateway.tunnel_port, secret, hostname, mode, target.port, tape)
        )
        trust = ssl.create_default_context(cafile=ca_file(folder))
        words = f"the visitor connects: TCP, then TLS with SNI {hostname}"
        tape.add("visitor", "gateway", note=words)
        duplex = Duplex(socket.create_connection((LOOPBACK, gateway.public_port), TIMEOUT))
        stack.callback(duplex.close)
        duplex.start_tls(trust, server_side=False, server_hostname=hostname)
        duplex.handshake_within(TIMEOUT)
        visit(End(duplex, tape, "visitor", "gateway"), size)
        # After a GET without a body the gateway keeps the stream. All others end.
        if kind != "http" and not tape.over.wait(TIMEOUT):
            raise Failed(f"the stream did not end in {TIMEOUT} s")
        tape.add("gateway", "gateway", note=VISIT_OVER)
        tape.add("agent", "agent", note="the agent is told to stop")
    return tape


def ca_file(folder):
    return folder / LOCAL_FOLDER / "ca.crt"


def start_gateway(folder, secret):
    environment = {
        "GATEWAY_HOST": GATEWAY_HOST, "GATEWAY_PORT": "auto",
        "TUNNEL_HOST": TUNNEL_HOST, "TUNNEL_PORT": "auto",
        "DASHBOARD_PORT": "0", "HTTP_PORT": "0", "BIND": LOOPBACK,
        "ACME_ENV": "local", "ACME_CACHE": str(folder), "JWT_SECRET": secret,
    }  # fmt: skip
    gateway = Gateway(gateway_config.load(os.devnull, environment))
    gateway.start()
    return gateway


@contextlib.contextmanager
def running_agent(folder, tunnel_port, secret, hostname, mode, port, tape):
    """An agent that serves one hostname; it is registered, and has a certificate."""
    path = folder / "agent.yaml"
    written = {
        "tunnel_addr": f"{TUNNEL_HOST}:{tunnel_port}",
        "ca_file": str(ca_file(folder)),
        "jwt_secret": secret,
        "tunnels": [{"hostname": hostname, "target": f"{LOOPBACK}:{port}", "mode": mode}],
    }
    path.write_text(json.dumps(written), encoding="utf-8")  # which is YAML too
    agent = Agent(agent_config.load(path))
    agent.observer = tape.observer("agent", "gateway")
    tape.add("agent", "gateway", note=f"the agent dials port {tunnel_port}: TCP, then TLS")
    life = threading.Thread(target=agent.run, name="agent")
    life.start()
    try:
        if not tape.ready.wait(TIMEOUT):
            raise Failed(f"the agent was not registered in {TIMEOUT} s")
        yield
    finally:
        agent.stop()
        life.join(TIMEOUT)
        tape.add("agent", "gateway", note="the agent closes the connection, and has stopped")


# The program -------------------------------------------------------------------------------------


def main(arguments):
    kind, size, html = arguments
    try:
        tape = record(kind, int(size))
    except Failed as error:
        print(f"trace.py: {error}", file=sys.stderr)
        return 1
    rows = Ladder(kind).rows(tape.events)
    if not html:
        return print_answer("trace.py", lambda: show(rows))
    try:
        with open(html, "w", encoding="utf-8") as file:
            file.write(trace_page.page(kind, rows))
    except OSError as error:
        print(f"trace.py: {html} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"trace.py: {html} is written", file=sys.stderr)
    return 0


def show(rows):
    """Print the ladder, in colours only on a terminal."""
    on_terminal = sys.stdout.isatty()
    width = PLAIN_WIDTH
    if on_terminal:
        width = min(max(shutil.get_terminal_size().columns, WIDTHS[0]), WIDTHS[1])
    colours = on_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(trace_text.text(rows, width, colours))
    return 0


if __name__ == "__main__":
    bootstrap.tool(main)
