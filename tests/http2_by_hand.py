"""An HTTP/2 visitor made by hand: its test says which frames go, and sees each that comes."""

from contextlib import contextmanager
from struct import Struct

from hpack import Decoder, Encoder
from support import APP, dial_tls, tls_context

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER = Struct("!HBBBL")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY = range(8)
WINDOW_UPDATE, CONTINUATION, PRIORITY_UPDATE = 8, 9, 16
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITISED = 1, 1, 4, 8, 32
CODES = (
    "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT",
    "STREAM_CLOSED", "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR",
    "CONNECT_ERROR", "ENHANCE_YOUR_CALM", "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED",
)  # fmt: skip


def frame(kind, flags=0, stream=0, payload=b"") -> bytes:
    size = len(payload)
    return HEADER.pack(size >> 8, size & 0xFF, kind, flags, stream) + payload


def number(value) -> bytes:
    return value.to_bytes(4, "big")


def settings(**values) -> bytes:
    """A SETTINGS frame; ``values`` such as s4=65535, by the setting's identifier."""
    pairs = [(int(name[1:]), value) for name, value in values.items()]
    payload = b"".join(key.to_bytes(2, "big") + number(value) for key, value in pairs)
    return frame(SETTINGS, payload=payload)


def head(*fields, method="GET", path="/", host=APP, scheme="https") -> list:
    """A header list; None leaves a pseudo-header field out."""
    pseudo = {":method": method, ":scheme": scheme, ":authority": host, ":path": path}
    return [(name, value) for name, value in pseudo.items() if value is not None] + list(fields)


class Http2:
    """A connection that has sent its preface."""

    def __init__(self, wire, first=None):
        self.wire = wire
        self.encoder, self._decoder = Encoder(), Decoder()
        wire.send(PREFACE + (settings() if first is None else first))

    def send(self, *frames):
        self.wire.send(b"".join(frames))

    def headers(self, stream, block, end=True) -> bytes:
        flags = END_HEADERS | (END_STREAM if end else 0)
        return frame(HEADERS, flags, stream, self.encoder.encode(block))

    def ask(self, stream, *fields, end=True, **pseudo):
        self.send(self.headers(stream, head(*fields, **pseudo), end))

    def grant(self, size=2**30, *streams):
        for stream in streams or (0,):
            self.send(frame(WINDOW_UPDATE, 0, stream, number(size)))

    def read(self) -> tuple:
        """The next frame: type, flags, stream, payload; its header list in place of HEADERS'."""
        high, low, kind, flags, stream = HEADER.unpack(self.wire.read_exactly(HEADER.size))
        payload = self.wire.read_exactly(high << 8 | low)
        if kind == HEADERS:
            while not flags & END_HEADERS:
                high, low, more, flags, _ = HEADER.unpack(self.wire.read_exactly(HEADER.size))
                assert more == CONTINUATION
                payload += self.wire.read_exactly(high << 8 | low)
            payload = self._decoder.decode(payload)
        return kind, flags, stream, payload

    def wait_for(self, *kinds, stream=None) -> tuple:
        """The next frame of one of these types, on this stream if one is given."""
        while True:
            found = self.read()
            if found[0] in kinds and stream in (None, found[2]):
                return found

    def answer(self, stream) -> tuple:
        """Status, fields and body of an answer that is whole; trailers are among the fields."""
        fields, body = [], b""
        while True:
            kind, flags, _, payload = self.wait_for(HEADERS, DATA, RST_STREAM, stream=stream)
            assert kind != RST_STREAM, CODES[int.from_bytes(payload, "big")]
            if kind == HEADERS:
                fields += payload
            else:
                body += payload
            if flags & END_STREAM:
                found = dict(fields)
                return int(found.pop(":status")), found, body

    def reset(self, stream) -> str:
        """The code by which a stream is reset."""
        payload = self.wait_for(RST_STREAM, stream=stream)[3]
        return CODES[int.from_bytes(payload, "big")]

    def goodbye(self) -> tuple:
        """The last stream and the code of a GOAWAY frame."""
        payload = self.wait_for(GOAWAY)[3]
        return int.from_bytes(payload[:4], "big"), CODES[int.from_bytes(payload[4:8], "big")]

    def outcome(self, stream) -> str:
        """The code by which a stream, or the connection, ends; "answered" for an answer."""
        kind, _, _, payload = self.wait_for(GOAWAY, RST_STREAM, HEADERS)
        if kind == HEADERS:
            return "answered"
        return CODES[int.from_bytes(payload[-4:] if kind == RST_STREAM else payload[4:8], "big")]


def context_for(gateway, *protocols):
    context = tls_context(gateway.ca_file)
    context.set_alpn_protocols(list(protocols or ("h2", "http/1.1")))
    return context


@contextmanager
def http2_visitor(gateway, hostname=APP, first=None):
    """A visitor that has chosen HTTP/2."""
    with dial_tls(gateway.public_port, hostname, context_for(gateway)) as wire:
        assert wire.sock.selected_alpn_protocol() == "h2"
        yield Http2(wire, first)
