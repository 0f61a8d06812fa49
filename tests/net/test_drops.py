"""Each connection that ends without a visit or a registration is counted, by its reason; and each
place where the code ends one has a reason that the page for operators explains."""

import ast
import contextlib
import re
import socket
from pathlib import Path

import pytest
from hand_made import HandMade, registration
from support import APP, ROOT, TIMEOUT, gateway_here, request, status_of, tls_context, wait_until

from gotunnel_server.net import drops
from gotunnel_server.net.drops import REASONS

PAGE = (ROOT / "docs" / "operations.md").read_text("utf-8")
VISITORS, AGENTS, NET = (ROOT / "gotunnel_server" / name for name in ("visitors", "agents", "net"))
HEADER = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"
CANCEL = b"\0\0\0\x10\x04\xd2\x16\x2e" + bytes(8)  # PostgreSQL's


@pytest.fixture
def gateway(cache):
    with gateway_here(cache, HEADER_TIMEOUT="0.3", HTTP_PORT="auto") as gateway:
        yield gateway


def dropped(gateway, port):
    return {each.name: each.dropped for each in gateway.inner.listeners.figures()}[port]


@contextlib.contextmanager
def counted(gateway, port, reason, count=1):
    """One connection more is counted there, for this reason and for no other."""
    before = dropped(gateway, port)
    yield
    wait_until(lambda: dropped(gateway, port)[reason] == before[reason] + count)
    assert dropped(gateway, port) - before == {reason: count}


def knock(port, *pieces, leave=False):
    """Connect, say something, and wait until the gateway hangs up."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as sock:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                sock.sendall(piece)
            while not leave and sock.recv(4096):
                pass


PLAIN = [
    ((), drops.SILENT),
    ((b"\x16\x03\x01\x02\x00\x01",), drops.SLOW),
    ((b"\x16\x03\x01\x00\x05hello",), drops.NOT_TLS),
    ((HEADER,), drops.PROXY_HEADER),
]


@pytest.mark.parametrize(
    "first, reason",
    [*PLAIN, ((b"SSH-2.0-x\r\n",), drops.NO_TCP_HOSTNAME), ((CANCEL,), drops.NO_TCP_HOSTNAME)],
)
def test_a_visitor_that_asks_for_nothing_is_counted(gateway, first, reason):
    with counted(gateway, "gateway", reason):
        knock(gateway.public_port, *first)


def test_a_visitor_that_leaves_is_counted(gateway):
    with counted(gateway, "gateway", drops.LEFT):
        knock(gateway.public_port, leave=True)
    with counted(gateway, "http", drops.LEFT):
        knock(gateway.inner.http_port, b"GET / HT", leave=True)


def test_a_handshake_that_fails_is_counted(gateway):
    with counted(gateway, "gateway", drops.TLS_FAILED), pytest.raises(OSError):
        gateway.dial("nobody.example")


def test_a_handshake_without_a_request_is_counted(gateway):
    with counted(gateway, "gateway", drops.LEFT):
        gateway.dial(gateway.inner.own_names[0]).close()


def test_a_validation_without_a_proof_is_counted(gateway):
    with counted(gateway, "gateway", drops.NO_PROOF), pytest.raises(OSError):
        with socket.create_connection(("127.0.0.1", gateway.public_port), TIMEOUT) as sock:
            context = tls_context(gateway.ca_file)
            context.set_alpn_protocols(["acme-tls/1"])
            context.wrap_socket(sock, server_hostname=APP)


def test_a_visitor_that_asks_is_no_drop(gateway):
    before = dropped(gateway, "gateway"), dropped(gateway, "http")
    with gateway.dial(gateway.inner.own_names[0]) as visitor:
        visitor.send(request(host=gateway.inner.own_names[0]))
        assert status_of(visitor.read_head()) == 200
    knock(gateway.inner.http_port, b"nonsense\r\n\r\n")  # gets a page
    knock(gateway.inner.http_port, b"GET / HTTP/1.1\r\n")  # too slow: gets a page
    with counted(gateway, "gateway", drops.LEFT):
        knock(gateway.public_port, leave=True)
    assert dropped(gateway, "gateway") - before[0] == {drops.LEFT: 1}
    assert dropped(gateway, "http") == before[1]


@pytest.mark.parametrize("first, reason", [each for each in PLAIN if each[1] is not drops.SLOW])
def test_an_agent_that_does_not_register_is_counted(cache, monkeypatch, first, reason):
    monkeypatch.setattr("gotunnel_server.gateway.REGISTER_TIMEOUT", 0.3)
    with gateway_here(cache) as gateway, counted(gateway, "tunnel", reason):
        knock(gateway.tunnel_port, *first)


def test_an_agent_that_is_refused_is_counted_as_that_alone(gateway):
    before, refused = dropped(gateway, "tunnel"), gateway.inner._newcomers.refusals.total.value
    with HandMade(gateway, registration(APP, token="none")) as agent:
        assert not agent.hear().ok
    wait_until(lambda: gateway.inner._newcomers.refusals.total.value == refused + 1)
    with counted(gateway, "tunnel", drops.LEFT):
        knock(gateway.tunnel_port, leave=True)
    assert dropped(gateway, "tunnel") - before == {drops.LEFT: 1}


# The places in the code --------------------------------------------------------------------------


def calls(folder):
    """Each call in a folder's modules: the path, the name of what is called, the node."""
    for path in sorted(Path(folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                yield path.name, name, node


def test_each_reason_is_used_and_explained():
    names = {name: value for name, value in vars(drops).items() if isinstance(value, str)}
    names = {name for name, value in names.items() if name.isupper() and value in REASONS}
    assert {getattr(drops, name) for name in names} == set(REASONS)
    paths = (path for folder in (VISITORS, AGENTS, NET) for path in folder.glob("*.py"))
    text = "".join(path.read_text("utf-8") for path in paths if path.name != "drops.py")
    assert names <= set(re.findall(r"[A-Z_]+", text))
    table = PAGE.partition("dropped_connections_total")[2].partition("\n## ")[0]
    for word, text in REASONS.items():
        assert f"| `{word}` | {text} |" in table


def test_no_connection_is_dropped_without_a_reason():
    """ConnectionAbortedError is for visits that have begun, whose end has its own word."""
    for name in ("arrival.py", "visitor.py", "steps.py"):
        for function in ast.walk(ast.parse((VISITORS / name).read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef):
                text = ast.unparse(function)
                if "raise ConnectionAbortedError" in text:
                    assert "fail_visit(" in text, f"{name}: {function.name}"


def test_each_word_for_a_visit_that_failed_is_explained():
    """Those of the error pages, and those of visits that get none."""
    explained = PAGE + (ROOT / "docs" / "visits.md").read_text("utf-8")
    words = set()
    for path, name, node in calls(VISITORS):
        place = {"fail_visit": 0, "fail": 0, "error": 1, "error_page": 1}.get(name)
        if place is not None and len(node.args) > place:
            given = node.args[place]
            if isinstance(given, ast.Constant) and isinstance(given.value, str):
                words.add((path, given.value))
    assert len(words) > 15
    assert [word for word in sorted(words) if f"`{word[1]}`" not in explained] == []
