"""Records as the inspector keeps them, of several kinds, for tests of what shows or uses them."""

from gotunnel_agent.inspector.record import OPEN, Kept, Message, Record, Ring

AT = 1_700_000_000.0  # wall-clock time of the first one


def head(*lines):
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def a_record(method="GET", path="/", status=200, *, asked=b"", answered=b"ok", **more):
    """A record of a request and its whole answer. ``asked`` and ``answered`` are the bodies, or a
    Kept of which not all is kept; ``fields`` and ``answer_fields`` are further lines of the
    heads."""
    asked = asked if isinstance(asked, Kept) else Kept(asked, len(asked))
    answered = answered if isinstance(answered, Kept) else Kept(answered, len(answered))
    lengths = [f"Content-Length: {body.size}" for body in (asked, answered)]
    values = {
        "hostname": "app.example.com",
        "target": "127.0.0.1:8000",
        "visitor": "192.0.2.7",
        "began": AT,
        "duration": 0.012,
        "first_byte": 0.010,
        "request_head": head(
            f"{method} {path} HTTP/1.1",
            "Host: app.example.com",
            "X-Forwarded-For: 192.0.2.7",
            *([lengths[0]] if asked.size else []),
            *more.pop("fields", ()),
        ),
        "response_head": head(
            f"HTTP/1.1 {status} Some Reason", lengths[1], *more.pop("answer_fields", ())
        )
        if status
        else b"",
    } | more
    return Record(
        method=method,
        path=path,
        status=status,
        request_body=asked,
        response_body=answered if status else Kept(),
        **values,
    )


def samples():
    """One record of each kind, the first one the oldest."""
    form = ["Content-Type: application/x-www-form-urlencoded"]
    html = ["Content-Type: text/html; charset=utf-8"]
    json = ["Content-Type: application/json"]
    png = b"\x89PNG\r\n\x1a\n" + bytes(64)
    records = [
        a_record(path="/page?q=1", answered=b"<p>hello</p>", answer_fields=html),
        a_record("POST", "/login", 302, asked=b"user=me&password=secret", fields=form),
        a_record(
            "POST", "/api/orders", 500, asked=b'{"id": 7}', answered=b'{"error": "no stock"}',
            fields=[*json, "Authorization: Bearer abc.def.ghi", "Cookie: session=1234"],
            answer_fields=[*json, "Set-Cookie: session=5678"],
        ),
        a_record("PUT", "/file", asked=Kept(b"x" * 1000, 10_000_000)),
        a_record(path="/picture", answered=png, answer_fields=["Content-Type: image/png"]),
        a_record(path="/gone", status=0, problem="no answer", first_byte=None),
        a_record(path="/\x1b[31m<script>alert(1)</script>\xff", status=404),
        a_record(path="/slow", status=0, state=OPEN, duration=None, first_byte=None),
        a_record(path="/ws", status=101, answered=b"", fields=["Upgrade: websocket"]),
        a_record(path="/events", answer_fields=["Content-Type: text/event-stream"]),
        Record(hostname="app.example.com", began=AT, problem="not followed: HTTP/2"),
    ]  # fmt: skip
    for number, record in enumerate(records):
        record.began = AT + number
    socket, events = records[8], records[9]
    for message in (
        Message(AT + 8.1, True, "text", b"hello", 5),
        Message(AT + 8.2, False, "binary", bytes(range(32)), 100_000),
        Message(AT + 8.3, False, "ping", b"", 0),
        Message(AT + 8.4, True, "close", b"\x03\xe8bye", 5),
    ):
        socket.add_message(message, 1_000_000)
    events.add_message(Message(AT + 9.1, False, "event", b"event: tick\ndata: 1", 19), 1_000_000)
    return records


def a_ring(budget=1_000_000):
    """A Ring with the samples."""
    ring = Ring(budget)
    for record in samples():
        ring.add(record)
    return ring
