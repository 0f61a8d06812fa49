"""Who serves which hostname."""

import threading

import pytest

from gotunnel_server.registry import HostnameTaken, Registry, Route


def routes(tunnel, *hostnames):
    return {hostname: Route(hostname, "http", tunnel) for hostname in hostnames}


def test_claimed_hostnames_are_found_and_others_are_not():
    registry = Registry()
    registry.claim(routes("a tunnel", "a.test", "b.test"))
    assert registry.lookup("a.test") == Route("a.test", "http", "a tunnel")
    assert registry.lookup("c.test") is None
    assert registry.routes() == routes("a tunnel", "a.test", "b.test")


def test_route_keeps_the_agents_own_spelling():
    registry = Registry()
    registry.claim({"a.test": Route("A.Test:80", "tcp", "a tunnel")})
    assert registry.lookup("a.test").hostname == "A.Test:80"


def test_claim_takes_all_or_nothing():
    registry = Registry()
    registry.claim(routes("first", "b.test"))
    with pytest.raises(HostnameTaken, match="^host already registered: b.test$") as caught:
        registry.claim(routes("second", "a.test", "b.test", "c.test"))
    assert caught.value.hostname == "b.test"
    assert registry.routes() == routes("first", "b.test")


@pytest.mark.parametrize("own", ["gateway.test", "Gateway.Test", "gateway.test."])
def test_the_gateways_own_names_cannot_be_claimed(own):
    registry = Registry(reserved={own})
    with pytest.raises(HostnameTaken, match="gateway.test"):
        registry.claim(routes("a tunnel", "gateway.test"))


def test_release_gives_back_what_the_tunnel_had_and_nothing_else():
    registry = Registry()
    registry.claim(routes("first", "a.test", "b.test"))
    registry.claim(routes("second", "c.test"))
    registry.release("first")
    registry.release("first")  # twice does no harm
    assert registry.routes() == routes("second", "c.test")
    registry.claim(routes("third", "a.test"))
    assert registry.lookup("a.test").tunnel == "third"


def test_routes_is_a_copy():
    registry = Registry()
    registry.routes()["a.test"] = None
    assert registry.lookup("a.test") is None


def test_of_many_that_claim_at_once_one_gets_everything():
    registry = Registry()
    hostnames = [f"{number}.test" for number in range(50)]
    start = threading.Barrier(20)
    winners = []

    def claim(number):
        start.wait()
        try:
            # Each from another end: whoever took them one by one would meet another half-way.
            registry.claim(routes(number, *hostnames[number:], *hostnames[:number]))
            winners.append(number)
        except HostnameTaken:
            pass

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert {route.tunnel for route in registry.routes().values()} == set(winners)
    assert len(registry.routes()) == len(hostnames)
