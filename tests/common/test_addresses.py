"""Addresses: one name for one peer, what it is counted by, networks as they are written down."""

import ipaddress

import pytest

from gotunnel_agent.common import addresses


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("::1", "::1"),
        ("::ffff:0:102:304", "::ffff:0:102:304"),
    ],
)
def test_ipv4_peer_of_a_socket_for_both_families_is_known_as_such(host, name):
    assert addresses.unmapped_host(host) == name
    assert str(addresses.parse(host)) == name  # both ways to the same name


@pytest.mark.parametrize("text", ["", "a", "192.0.2.01", "192.0.2.1:80", "[::1]", "1", "::ffff:1"])
def test_parse_says_none_of_what_is_no_address(text):
    try:
        expected = ipaddress.ip_address(text)
    except ValueError:
        expected = None
    assert addresses.parse(text) == expected


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("0.0.0.1", "0:0:0:1::", False),  # the same number, of two families
    ],
)
def test_subscriber_is_an_ipv4_address_or_an_ipv6_64(one, other, equal):
    keys = [addresses.subscriber(addresses.parse(text)) for text in (one, other)]
    assert (keys[0] == keys[1]) is equal


@pytest.mark.parametrize(
    "text", ["10.0.0.0/8", "192.0.2.1", "2001:db8::/32", "2001:db8::1", "::ffff:192.0.2.0/120"]
)
def test_network_of_an_address_or_a_prefix(text):
    assert addresses.network(text) == ipaddress.ip_network(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10.0.0.0/255.0.0.0", "'10.0.0.0/255.0.0.0' came, expected an IP address or a network "),
        ("fe80::1%eth0", "'fe80::1%eth0' came, expected an IP address or a network "),
        ("10.0.0.0/33", "'10.0.0.0/33' came, expected an IP address or a network "),
        ("", "'' came, expected an IP address or a network such as 10.0.0.0/8"),
        ("x" * 99, f"'{'x' * 60}...' came, "),
        ("10.0.0.1/8", "'10.0.0.1/8' has host bits, expected 10.0.0.0/8 for the network, or the "),
    ],
)
def test_network_says_what_is_wrong(text, reason):
    with pytest.raises(ValueError) as caught:
        addresses.network(text)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:192.0.2.1", "192.0.2.1/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::/95", "::/95"),  # holds more than mapped addresses
        ("::1:0:0/96", "::1:0:0/96"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("10.0.0.0/8", "10.0.0.0/8"),
    ],
)
def test_network_of_mapped_addresses_is_an_ipv4_one(text, meant):
    assert str(addresses.unmapped_network(ipaddress.ip_network(text))) == meant
