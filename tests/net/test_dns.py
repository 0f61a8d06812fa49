"""Where a hostname leads: what the resolver says, and which addresses are this machine's."""

import socket

import pytest

from gotunnel_server.net.dns import NoAnswer, is_always_here, is_own, own_addresses, resolve


@pytest.mark.parametrize(
    ("hostname", "expected"),
    [("localhost", True), ("app.localhost", True), ("localhost.example.com", False),
     ("notlocalhost", False), ("127.0.0.1", False)],
)  # fmt: skip
def test_localhost_and_what_is_below_it_is_always_here(hostname, expected):
    assert is_always_here(hostname) is expected


def test_addresses_are_sorted_and_each_comes_once(monkeypatch):
    def getaddrinfo(hostname, port, **_):
        found = ["192.0.2.9", "192.0.2.10", "192.0.2.9", "fe80::1%eth0"]
        return [(None, None, 0, "", (address, 0)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert resolve("app.example.com") == ["192.0.2.10", "192.0.2.9", "fe80::1"]


def test_an_address_is_its_own():
    assert resolve("127.0.0.1") == ["127.0.0.1"]


@pytest.mark.parametrize(
    "failure",
    [socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
     UnicodeError("label too long")],
)  # fmt: skip
def test_who_has_no_address_is_told_in_words(monkeypatch, failure):
    def getaddrinfo(*_, **__):
        raise failure

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(OSError, match="^(Name or service not known|label too long)$") as caught:
        resolve("app.example.com")
    assert not isinstance(caught.value, NoAnswer)


def test_a_resolver_that_may_answer_later_is_told_from_one_that_says_no(monkeypatch):
    def getaddrinfo(*_, **__):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(NoAnswer, match="^Temporary failure in name resolution$"):
        resolve("app.example.com")


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("192.0.2.1", False), ("2001:db8::1", False)],
)
def test_only_own_addresses_can_be_bound(address, expected):
    assert is_own(address) is expected


def test_the_addresses_that_we_call_from_are_our_own():
    assert all(map(is_own, own_addresses()))


def test_a_machine_without_a_way_out_has_none(monkeypatch):
    class Cut(socket.socket):
        def connect(self, address):
            raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "socket", Cut)
    assert own_addresses() == []
