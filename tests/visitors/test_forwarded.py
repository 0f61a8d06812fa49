"""What a target learns about its visitor: first as values, then on the wire, by every byte that a
target receives."""

import ipaddress
import socket

import pytest
from support import (
    APP,
    GATEWAY_HOST,
    RAW,
    agent_here,
    answer,
    dial_tls,
    fields_of,
    gateway_here,
    request,
    status_of,
    tls_context,
)

from gotunnel_agent.common.http1 import Fields, kind
from gotunnel_server import listeners
from gotunnel_server.visitors.forwarded import KINDS, Proxies, fields, visitor

HOST = "app.example.com"
PROXIES = Proxies(
    ipaddress.ip_network(network) for network in ("10.0.0.0/8", "192.0.2.1", "2001:db8::/32")
)


def told(peer, *came, proxies=PROXIES):
    """What a target is told about a request with the fields that came."""
    return fields(Fields(list(came)), peer, "https", HOST, proxies)


# Trusted proxies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "trusted"),
    [
        ("10.1.2.3", True),
        ("11.1.2.3", False),
        ("192.0.2.1", True),
        ("192.0.2.2", False),
        ("::ffff:10.1.2.3", True),
        ("::FFFF:0a01:0203", True),
        ("2001:db8::7", True),
        ("2001:db9::7", False),
        ("10.1.2.3:4567", True),
        ("[2001:db8::7]:4567", True),
        ("fe80::1%eth0", False),
        ("unknown", False),
        ("", False),
    ],
)
def test_proxies_are_known_by_address(address, trusted):
    assert (address in PROXIES) == trusted


def test_nobody_is_believed_unless_named():
    assert "127.0.0.1" not in Proxies()


LIES = [
    ("X-Forwarded-For", "1.2.3.4"), ("X-Forwarded-Proto", "http"), ("x-forwarded-host", "bank"),
    ("X-Forwarded-Port", "1"), ("X-Real-IP", "1.2.3.4"), ("Forwarded", "for=1.2.3.4"),
    # CGI and its like take these for the same names. Proxies do not write them so.
    ("X_Forwarded_For", "4.3.2.1"), ("X_Real_IP", "4.3.2.1"), ("X_FORWARDED-port", "2"),
]  # fmt: skip


def test_stranger_is_not_believed():
    assert told("198.51.100.7", *LIES) == [
        ("X-Forwarded-For", "198.51.100.7"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", HOST),
        ("X-Real-IP", "198.51.100.7"),
    ]


def test_every_lie_concerns_who_a_visitor_is():
    assert {kind(name) for name, _ in LIES} <= KINDS
    assert not KINDS & {kind(name) for name in ("x-forwarded", "forwarded-by", "via")}


@pytest.mark.parametrize("name", [
    "X.Forwarded-For", "X~Real-IP", "x_forwarded_proto", "X-Forwarded!Host", "For.warded",
    "X|Forwarded^Port",
])  # fmt: skip
def test_lie_in_a_spelling_that_cgi_cannot_tell_is_one(name):
    assert (kind(name) in KINDS) is (name != "For.warded")
    assert told("192.0.2.9", (name, "1.2.3.4")) == told("192.0.2.9")
    assert told("10.0.0.1", (name, "1.2.3.4")) == told("10.0.0.1")


def test_visitor_of_a_proxy_cannot_spell_a_field_of_the_proxys_another_way():
    cert = ("X-Forwarded-Client-Cert", "none")
    fields = told("10.0.0.1", cert, ("X-Forwarded-Client_Cert", "Subject=admin"))
    assert fields[4:] == [cert]


def test_proxy_that_says_nothing_is_the_visitor():
    assert told("10.0.0.1") == [
        ("X-Forwarded-For", "10.0.0.1"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", HOST),
        ("X-Real-IP", "10.0.0.1"),
    ]


def test_proxy_is_believed_and_its_fields_grow():
    assert told("10.0.0.1", *LIES) == [
        ("X-Forwarded-For", "1.2.3.4, 10.0.0.1"),
        ("X-Forwarded-Proto", "http"),
        ("X-Forwarded-Host", "bank"),
        ("X-Real-IP", "1.2.3.4"),
        ("Forwarded", f'for=1.2.3.4, for=10.0.0.1;host="{HOST}";proto=https'),
        ("X-Forwarded-Port", "1"),
    ]


@pytest.mark.parametrize(
    ("chain", "client"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("1.2.3.4, 198.51.100.7", "198.51.100.7"),  # to the left of an untrusted address: forged
        ("198.51.100.7, 10.9.9.9", "198.51.100.7"),
        ("1.2.3.4,198.51.100.7 ,\t10.9.9.9,2001:db8::5", "198.51.100.7"),
        ("10.9.9.9, 10.8.8.8", "10.9.9.9"),  # all are trusted: the leftmost is the visitor
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("198.51.100.7, ::ffff:10.9.9.9", "198.51.100.7"),
        ("198.51.100.7:5678", "198.51.100.7"),
        ("[2001:DB9::0:7]:5678", "2001:db9::7"),
        ("2001:db9::7", "2001:db9::7"),
        ("1.2.3.4, unknown", "10.0.0.1"),  # left of "unknown" nothing counts
        ("1.2.3.4, unknown, 10.9.9.9", "10.9.9.9"),
        ("1.2.3.4, [unclosed", "10.0.0.1"),
        (" , ,", "10.0.0.1"),
    ],
)
def test_visitor_is_the_rightmost_address_that_is_no_proxys(chain, client):
    assert dict(told("10.0.0.1", ("X-Forwarded-For", chain)))["X-Real-IP"] == client


def test_list_in_several_lines_is_one():
    came = [("X-Forwarded-For", "1.2.3.4"), ("x-forwarded-for", "198.51.100.7, 10.9.9.9")]
    said = dict(told("10.0.0.1", *came))
    assert said["X-Forwarded-For"] == "1.2.3.4, 198.51.100.7, 10.9.9.9, 10.0.0.1"
    assert said["X-Real-IP"] == "198.51.100.7"


def test_proxy_may_name_the_visitor_alone():
    said = dict(told("10.0.0.1", ("X-Real-IP", "198.51.100.7")))
    assert said["X-Real-IP"] == "198.51.100.7"
    assert said["X-Forwarded-For"] == "198.51.100.7, 10.0.0.1"


def test_list_counts_more_than_a_single_name():
    """A proxy that writes only the list passes on the visitor's own X-Real-IP."""
    said = dict(told("10.0.0.1", ("X-Real-IP", "1.2.3.4"), ("X-Forwarded-For", "198.51.100.7")))
    assert said["X-Real-IP"] == "198.51.100.7"


def test_hop_of_an_ipv6_proxy_is_quoted():
    said = dict(told("2001:db8::1", ("Forwarded", "for=unknown"), ("forwarded", "for=_x")))
    hop = f'for="[2001:db8::1]";host="{HOST}";proto=https'
    assert said["Forwarded"] == f"for=unknown, for=_x, {hop}"


# On the wire -------------------------------------------------------------------------------------


@pytest.fixture
def visit(cache, tmp_path, origin):
    """visit(*field lines, **environment): what the target received, and what the visitor did, each
    a whole message."""

    def visit(*lines, reply=(), method="GET", **environment):
        with gateway_here(cache, **environment) as gateway:
            with agent_here(gateway, tmp_path, http={APP: origin.port}):
                with gateway.dial(APP) as visitor:
                    visitor.send(request(method, "/", *lines))
                    target = origin.accept()
                    received = target.read_head()
                    target.send(answer(b"ok", *reply))
                    return received, b"".join(visitor.read_message())

    return visit


def head(*lines):
    return "\r\n".join(["GET / HTTP/1.1", f"Host: {APP}", *lines, "", ""]).encode()


LIE_LINES = [f"{name}: {value}" for name, value in LIES]


def test_target_receives_nothing_of_what_a_stranger_says(visit):
    assert visit("Accept: a", *LIE_LINES, TRUSTED_PROXIES="192.0.2.1")[0] == head(
        "Accept: a",
        "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Proto: https",
        f"X-Forwarded-Host: {APP}",
        "X-Real-IP: 127.0.0.1",
    )


def test_target_receives_what_a_trusted_proxy_says(visit):
    assert visit(*LIE_LINES, "Accept: a", TRUSTED_PROXIES="127.0.0.0/8")[0] == head(
        "Accept: a",
        "X-Forwarded-For: 1.2.3.4, 127.0.0.1",
        "X-Forwarded-Proto: http",
        "X-Forwarded-Host: bank",
        "X-Real-IP: 1.2.3.4",
        f'Forwarded: for=1.2.3.4, for=127.0.0.1;host="{APP}";proto=https',
        "X-Forwarded-Port: 1",
    )


def test_visitor_of_a_port_for_both_families_is_told_as_ipv4(visit, monkeypatch):
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    monkeypatch.setattr(listeners, "bind", bind_for_both_families)
    assert visit()[0] == head(*ABOUT_THE_VISITOR)
    believed, _ = visit("X-Forwarded-For: 1.2.3.4", TRUSTED_PROXIES="127.0.0.1")
    assert b"\r\nX-Real-IP: 1.2.3.4\r\n" in believed


def bind_for_both_families(setting, addresses, port, inherited):
    """As bind() does where BIND is unset, but on loopback alone."""
    sock = socket.socket(socket.AF_INET6)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::ffff:127.0.0.1", port))
    sock.listen()
    return [sock]


ABOUT_THE_VISITOR = (
    "X-Forwarded-For: 127.0.0.1",
    "X-Forwarded-Proto: https",
    f"X-Forwarded-Host: {APP}",
    "X-Real-IP: 127.0.0.1",
)


@pytest.mark.parametrize(
    "hop",
    [
        ["Connection: X-Mine", "X-Mine: 1"],
        ["connection: close, x-mine", "X-MINE: 1", "X-Mine: 2"],
        ["Connection: ,X-Mine,,", "Connection: X-Yours", "X-Mine: 1", "X-Yours: 2"],
        ["Keep-Alive: timeout=9", "Proxy-Connection: keep-alive", "TE: trailers"],
        ["Proxy-Authorization: Basic x", "Upgrade: websocket"],  # Upgrade without Connection
        # Connection must not remove fields that name the recipient or the sender.
        ["Connection: X-Forwarded-For, X-Real-IP, Host, Forwarded"],
    ],
)
def test_target_receives_no_field_of_the_visitors_connection(visit, hop):
    assert visit("Accept: a", *hop, "X-Other: 2")[0] == head(
        "Accept: a", "X-Other: 2", *ABOUT_THE_VISITOR
    )


@pytest.mark.parametrize("via", [[], ["Via: 1.1 theirs"]])
def test_via_is_passed_on_and_not_added(visit, via):
    received, got = visit(*via, reply=via)
    assert received == head(*via, *ABOUT_THE_VISITOR)
    assert [line for line in fields_of(got) if line.startswith("via")] == [v.lower() for v in via]


@pytest.mark.parametrize(
    "hop",
    [
        ["Connection: X-Mine", "X-Mine: 1"],
        ["connection: keep-alive, x-mine", "X-MINE: 1", "X-Mine: 2"],
        ["Connection: close", "Keep-Alive: timeout=9", "Proxy-Connection: keep-alive"],
        ["Connection: upgrade", "Upgrade: h2c", "Proxy-Authenticate: Basic"],
    ],
)
def test_visitor_receives_no_field_of_the_targets_connection(visit, hop):
    got = visit(reply=["X-One: 1", *hop, "X-Other: 2"])[1]
    assert got == b"HTTP/1.1 200 OK\r\nX-One: 1\r\nX-Other: 2\r\nContent-Length: 2\r\n\r\nok"


# Which hostnames a connection may reach ----------------------------------------------------------


@pytest.fixture
def gateway(cache, tmp_path, origin):
    ports = {"http": {APP: origin.port}, "tcp": {RAW: origin.port}}
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, **ports):
        yield gateway


@pytest.mark.parametrize("sni", [APP, GATEWAY_HOST])
@pytest.mark.parametrize("host", ["other.localhost", "localhost", RAW, "127.0.0.1", "[::1]"])
def test_misdirected_request_reaches_no_target(gateway, origin, sni, host):
    with gateway.dial(sni) as visitor:
        visitor.send(request(host=host))
        head, _ = visitor.read_message()
        assert status_of(head) == 421
        assert "x-gotunnel-error: misdirected" in fields_of(head)
    assert origin.was_left_alone()


def test_each_request_of_a_connection_is_checked(gateway, origin):
    with gateway.dial(APP) as visitor:
        visitor.send(request())
        target = origin.accept()
        target.read_head()
        target.send(answer())
        assert status_of(visitor.read_message()[0]) == 200
        visitor.send(request(host=GATEWAY_HOST))
        assert status_of(visitor.read_message()[0]) == 421
        visitor.send(request("GET", f"http://{GATEWAY_HOST}/", host=GATEWAY_HOST))
        assert status_of(visitor.read_message()[0]) == 421
        visitor.send(request("GET", "/again"))
        assert target.read_head().startswith(b"GET /again ")
        target.send(answer())
        assert status_of(visitor.read_message()[0]) == 200


def test_visitor_without_sni_is_routed_by_host(gateway, origin):
    context = tls_context(gateway.ca_file)
    context.check_hostname = False
    with dial_tls(gateway.public_port, None, context) as visitor:
        visitor.send(request())
        target = origin.accept()
        assert target.read_head().startswith(b"GET / ")
        target.send(answer())
        assert status_of(visitor.read_message()[0]) == 200
        visitor.send(request(host=RAW))
        head, _ = visitor.read_message()
        assert status_of(head) == 421 and "x-gotunnel-error: not-http" in fields_of(head)


@pytest.mark.parametrize(
    ("chain", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("203.0.113.9, 192.0.2.1", "192.0.2.1"),
        ("192.0.2.1, 10.0.0.1", "192.0.2.1"),
        ("10.0.0.1", "10.0.0.1"),
        ("", "10.0.0.9"),
        ("unknown, 192.0.2.1", "192.0.2.1"),
        ("192.0.2.1, unknown", ""),
        ("192.0.2.1, _hidden, 10.0.0.1", ""),
        ("garbage", ""),
    ],
)
def test_whom_a_policy_judges(chain, address):
    """If a trusted proxy names no address, the visitor has none, and no list of addresses lets it
    in."""
    proxies = Proxies([ipaddress.ip_network("10.0.0.0/8")])
    came = Fields([("X-Forwarded-For", chain)] if chain else [])
    assert visitor(came, "10.0.0.9", proxies) == address
    assert visitor(came, "192.0.2.7", proxies) == "192.0.2.7"
