"""A whole agent, written from docs/protocol.md alone: it shows that the page is complete.

One thread copies bytes between the gateway's streams and the targets, in both modes. It knows one
extension (half_close), and does not dial again. The sections are those of the page.

    python3 minimal_agent.py HOST PORT SECRET HOSTNAME TARGET_PORT [CA_FILE]
"""

import base64
import hashlib
import hmac
import json
import select
import socket
import ssl
import struct
import sys
import time

HEADER = struct.Struct("!BBHII")  # section 3: version, type, flags, stream id, length
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
WINDOW = 262144
REFUSED = 1  # section 6: there is no target


def make_token(secret: str, issuer: str) -> str:
    """Section 5."""

    def part(data):
        return base64.urlsafe_b64encode(data).rstrip(b"=")

    now = int(time.time())
    claims = {"iss": issuer, "iat": now, "exp": now + 3600}
    signed = b".".join(part(json.dumps(one).encode()) for one in ({"alg": "HS256"}, claims))
    return b".".join((signed, part(hmac.digest(secret.encode(), signed, hashlib.sha256)))).decode()


class Stream:
    def __init__(self, stream_id):
        self.id = stream_id
        self.may_send = WINDOW  # bytes
        self.owed = 0  # bytes that were used, and not yet given credit for
        self.buffer = b""  # of a data header, or a control message, that is not whole
        self.target = None  # once the data header has come
        self.mode = ""
        self.sent_fin = self.got_fin = False


class Agent:
    def __init__(self, host, port, ca_file=None):
        """Section 2: SNI is the host, no ALPN, and the certificate is checked."""
        context = ssl.create_default_context(cafile=ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        sock = socket.create_connection((host, port))
        self._tls = context.wrap_socket(sock, server_hostname=host)
        self._control = Stream(1)
        self._streams = {1: self._control}
        self._routes = {}  # hostname: (address of the target, mode)

    def run(self, token, routes):
        """Serve until the session ends, or the gateway refuses it: ConnectionError."""
        self._routes = routes
        self._send(WINDOW_UPDATE, SYN, 1)
        targets = {name: f"{host}:{port}" for name, ((host, port), _) in routes.items()}
        modes = {name: mode for name, (_, mode) in routes.items()}
        self._say(type="register", token=token, routes=targets, modes=modes,
                  features=["half_close"])  # fmt: skip
        while True:
            sources = {
                stream.target: stream
                for stream in self._streams.values()
                if stream.target and stream.may_send and not stream.sent_fin
            }
            if self._tls.pending() or self._tls in select.select([self._tls, *sources], [], [])[0]:
                self._take_frame()
            else:
                for source in select.select(sources, [], [], 0)[0]:
                    self._take_answer(sources[source])

    def close(self):
        self._tls.close()
        for stream in self._streams.values():
            if stream.target:
                stream.target.close()

    # Section 3

    def _send(self, kind, flags, stream_id, length=0, payload=b""):
        self._tls.sendall(HEADER.pack(0, kind, flags, stream_id, length) + payload)

    def _read_exactly(self, count):
        data = b""
        while len(data) < count:
            data += self._tls.recv(count - len(data)) or self._fail("it closed the connection")
        return data

    def _fail(self, why):
        raise ConnectionError(f"the gateway: {why}")

    def _take_frame(self):
        version, kind, flags, stream_id, length = HEADER.unpack(self._read_exactly(HEADER.size))
        if version != 0 or kind > GO_AWAY:
            self._fail("it does not speak yamux")
        payload = self._read_exactly(length) if kind == DATA else b""
        if kind == PING and flags & SYN:
            self._send(PING, ACK, 0, length)
        if kind == GO_AWAY and length:
            self._fail(f"it ended the session with code {length}")
        if kind in (DATA, WINDOW_UPDATE):
            if flags & SYN:
                self._streams[stream_id] = Stream(stream_id)
                self._send(WINDOW_UPDATE, ACK, stream_id)
            if stream_id in self._streams:  # else it is over
                self._take_stream(self._streams[stream_id], flags, length, payload)

    def _take_stream(self, stream, flags, length, payload):
        if flags & RST:
            self._end(stream, cut=True)
        elif payload:
            self._take_payload(stream, payload)
        else:
            stream.may_send += length
        if flags & FIN and stream.id in self._streams:
            if stream is self._control:
                self._fail("it ended the control stream")
            stream.got_fin = True
            if stream.mode == "tcp" and not stream.sent_fin:
                stream.target.shutdown(socket.SHUT_WR)
            else:  # section 6: in http mode FIN ends the visit
                self._finish(stream)

    def _finish(self, stream):
        if not stream.sent_fin:
            self._send(WINDOW_UPDATE, FIN, stream.id)
        stream.sent_fin = True
        if stream.got_fin:
            self._end(stream)

    def _end(self, stream, cut=False):
        del self._streams[stream.id]
        if stream.target:
            if cut:  # closing sends RST
                linger = struct.pack("ii", 1, 0)
                stream.target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            stream.target.close()

    def _reset(self, stream, code=0):
        self._end(stream, cut=True)
        self._send(WINDOW_UPDATE, RST, stream.id, code)

    def _take_payload(self, stream, payload):
        stream.owed += len(payload)
        if stream.owed >= WINDOW // 2:
            self._send(WINDOW_UPDATE, 0, stream.id, stream.owed)
            stream.owed = 0
        if stream is self._control:
            self._take_messages(payload)
        elif stream.target or (payload := self._read_data_header(stream, payload)):
            try:
                stream.target.sendall(payload)
            except OSError:
                self._reset(stream)

    # Section 4

    def _say(self, **message):
        data = json.dumps(message).encode() + b"\n"
        self._send(DATA, 0, 1, len(data), data)

    def _take_messages(self, payload):
        self._control.buffer += payload
        while text := self._control.buffer.decode(errors="replace").strip():
            try:
                message, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                return  # the rest is to come
            self._control.buffer = text[end:].encode()
            if message["type"] == "ack" and not message["ok"]:
                self._fail(f"it refused: {message.get('error')}")
            if message["type"] == "ping":
                self._say(type="pong", ts=int(time.time() * 1000))

    # Section 6

    def _read_data_header(self, stream, payload):
        """Connect to the target if the header is whole; what came behind it."""
        head = stream.buffer = stream.buffer + payload
        end = 3 + int.from_bytes(head[1:3], "big")
        if len(head) < end:
            return b""
        try:
            address, stream.mode = self._routes[head[3:end].decode()]
            stream.target = socket.create_connection(address)
        except (KeyError, OSError):
            self._reset(stream, REFUSED)
            return b""
        return head[end:]

    def _take_answer(self, stream):
        if stream.id not in self._streams:
            return  # another one's end was its own
        try:
            data = stream.target.recv(min(stream.may_send, 16384))
        except OSError:
            self._reset(stream)  # never FIN: half an answer must not look whole
            return
        stream.may_send -= len(data)
        if data:
            self._send(DATA, 0, stream.id, len(data), data)
        else:
            self._finish(stream)


if __name__ == "__main__":
    host, port, secret, hostname, target_port = sys.argv[1:6]
    routes = {hostname: (("127.0.0.1", int(target_port)), "http")}
    Agent(host, int(port), *sys.argv[6:7]).run(make_token(secret, "minimal"), routes)
