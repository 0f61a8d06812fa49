"""An inspector that shows samples, to develop its page with: no agent, no gateway.

    python3 tests/agent/inspector/dev_inspector.py [--port 4040] [--flood N] [--page FILE]

It prints the address with the token. One sample a second is added, and with --flood N further
visits a second. The page is read anew for each request.
"""

import argparse
import gzip
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from gotunnel_agent.inspector.access import Door
from gotunnel_agent.inspector.api import Api
from gotunnel_agent.inspector.page import policy
from gotunnel_agent.inspector.record import ENDED, OPEN, Kept, Message, Record, Ring
from gotunnel_agent.inspector.server import InspectorServer, listen

TOKEN = "dev-" + "0" * 39
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000100000001008020000009091683600000017494441547801"
    "63fccfc0f09f81048cc488a8064685c8d60003b9c3010f3a2a5b0c0000000049454e44ae426082"
)


def visit(method, path, status, fields=(), body=b"", answer=(), content=b"", **more):
    """A record. ``fields`` and ``answer`` are more lines of the heads."""
    head = [f"{method} {path} HTTP/1.1", "Host: app.example.com", "X-Forwarded-Proto: https",
            "X-Forwarded-For: 192.0.2.7", "User-Agent: sample/1.0", *fields]  # fmt: skip
    if body:
        head.append(f"Content-Length: {len(body)}")
    response = [f"HTTP/1.1 {status} {'OK' if status < 300 else 'Sample'}", *answer,
                f"Content-Length: {len(content)}"]  # fmt: skip
    values = dict(
        hostname="app.example.com", target="localhost:3000", visitor="192.0.2.7", began=time.time(),
        duration=0.042, first_byte=0.03, method=method, path=path, status=status,
        request_head=("\r\n".join(head) + "\r\n\r\n").encode("latin-1"),
        response_head=("\r\n".join(response) + "\r\n\r\n").encode("latin-1") if status else b"",
        request_body=Kept(body, len(body)), response_body=Kept(content, len(content)), state=ENDED,
    )  # fmt: skip
    return Record(**{**values, **more})


def samples():
    """One of each kind."""
    secret = json.dumps({"user": "ann", "password": "hunter2", "nested": {"api_key": "k-123"}})
    boundary = "----sample"
    parts = (
        f"--{boundary}\r\nContent-Disposition: form-data; name=\"title\"\r\n\r\nA <b>title</b>\r\n"
        f"--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.png\"\r\n"
        "Content-Type: image/png\r\n\r\n"
    ).encode() + PNG + f"\r\n--{boundary}--\r\n".encode()  # fmt: skip
    html = b"<!doctype html><script>alert(1)</script><h1>Hello</h1>"
    now = time.time()
    socket = visit("GET", "/socket", 101, ["Upgrade: websocket", "Connection: Upgrade"],
                   answer=["Upgrade: websocket", "Connection: Upgrade"])  # fmt: skip
    for number in range(20):
        socket.add_message(
            Message(now + number / 10, number % 2 == 0, "text", b'{"n": %d}' % number, 8), 1 << 20
        )
    socket.add_message(Message(now + 3, False, "binary", bytes(range(256)), 70_000, "cut"), 1 << 20)
    socket.add_message(Message(now + 4, False, "close", b"\x03\xe8bye", 5), 1 << 20)
    events = visit("GET", "/events", 200, ["Accept: text/event-stream"], state=OPEN, duration=None,
                   answer=["Content-Type: text/event-stream"],
                   content=b"event: tick\ndata: 1\n\n: ping\n\ndata: 2\ndata: 3\n\n")  # fmt: skip
    for number in range(5):
        events.add_message(Message(now + number, False, "event", b"data: %d" % number, 8), 1 << 20)
    return [
        visit("GET", "/", 200, answer=["Content-Type: text/html; charset=utf-8"], content=html),
        visit("POST", "/api/login?token=abcdef&next=/home", 200,
              ["Content-Type: application/json", "Authorization: Bearer abc.def.ghi",
               "Cookie: session=s3cret; theme=dark"], secret.encode(),
              ["Content-Type: application/json", "Set-Cookie: session=new; HttpOnly; Path=/"],
              json.dumps({"ok": True, "access_token": "eyJhbGciOi.eyJzdWIiOi.c2ln",
                          "list": list(range(30))}).encode()),
        visit("POST", "/form", 303, ["Content-Type: application/x-www-form-urlencoded"],
              b"name=J%C3%BCrgen&password=geheim&note=a+b", ["Location: /form?done=1"]),
        visit("POST", "/upload", 201, [f"Content-Type: multipart/form-data; boundary={boundary}"],
              parts, ["Content-Type: text/plain"], b"stored\n"),
        visit("GET", "/logo.png", 200, answer=["Content-Type: image/png"], content=PNG),
        visit("GET", "/fake.png", 200, answer=["Content-Type: image/png"], content=html),
        visit("GET", "/zipped", 200, ["Accept-Encoding: gzip"],
              answer=["Content-Type: application/json", "Content-Encoding: gzip"],
              content=gzip.compress(json.dumps({"zipped": ["yes"] * 100}).encode())),
        visit("POST", "/webhook", 500, ["Content-Type: application/json", "X-Hub-Signature-256: 1"],
              b'{"event": "push", "id": 17}', ["Content-Type: text/plain"], b"Traceback: ..."),
        visit("GET", "/slow", 0, problem="no answer", duration=30.0, first_byte=None),
        visit("GET", "/gone", 404, answer=["Content-Type: text/plain"], content=b"not found\n"),
        visit("GET", "/<img src=x onerror=alert(1)>?q=\x1b[31m".replace("\x1b", "%1b"), 200,
              ["X-Evil: <script>alert(1)</script>", "X-Bytes: \xff\xfe\x80"],
              answer=["Content-Type: text/plain"],
              content=b"\x1b[2J\x07\x00 bidi \xe2\x80\xae evil \xff\xfe"),
        visit("GET", "/large", 200, answer=["Content-Type: text/plain"],
              content=b"line of text\n" * 5000, 
              response_body=Kept(b"line of text\n" * 5000, 1 << 30)),
        visit("PUT", "/binary", 204, ["Content-Type: application/octet-stream"], bytes(range(256))),
        visit("GET", "/long/" + "x" * 3000, 200),
        socket,
        events,
        visit("", "", 0, problem="not followed: HTTP/2", request_head=b"",
              request_body=Kept(b"", 900)),
        visit("GET", "/imported", 200, imported=True, began=now - 86400),
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=4040)
    parser.add_argument("--flood", type=int, default=0, help="further visits a second")
    parser.add_argument("--memory", type=int, default=64 * 1024 * 1024)
    parser.add_argument("--page", help="the page (default: the program's)")
    options = parser.parse_args()
    folder = Path(__file__).parents[3] / "gotunnel_agent" / "inspector"
    file = Path(options.page) if options.page else folder / "page.html"

    def page():
        body = file.read_bytes()
        return body, policy(body)

    ring = Ring(options.memory)
    listening = listen("127.0.0.1", options.port)
    port = listening.getsockname()[1]
    door = Door(TOKEN, "127.0.0.1", port)
    told = {"tunnels": [{"hostname": "app.example.com", "target": "localhost:3000",
                           "url": "https://app.example.com/"}]}  # fmt: skip
    server = InspectorServer(listening, door, Api(ring, door, lambda: told, show=page))
    server.start()
    print(f"http://127.0.0.1:{port}/?token={TOKEN}", flush=True)
    for record in samples():
        ring.add(record)
    try:
        while True:
            for _ in range(options.flood):
                ring.add(visit("GET", f"/flood/{random.random()}", 200))
                time.sleep(1 / options.flood)
            if not options.flood:
                time.sleep(1)
                record = ring.add(
                    visit("GET", "/new", 0, state=OPEN, duration=None, first_byte=None)
                )
                time.sleep(0.5)
                record.status, record.duration, record.state = 200, 0.5, ENDED
                ring.update(record)
    except KeyboardInterrupt:
        server.close()


if __name__ == "__main__":
    main()
