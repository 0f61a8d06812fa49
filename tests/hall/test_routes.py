"""Who serves which hostname."""

import threading

import pytest

from gotunnel_server.routes import HostnameTaken, Registry, Route


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
    assert caught.value.tunnels == {"first"}
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


def test_a_table_that_is_being_read_does_not_change():
    """Visits look hostnames up while ports open for them, and hold no lock."""
    registry = Registry()
    registry.claim(routes("a tunnel", "a.test", "b.test"))
    being_read = iter(registry._table[0].items())
    next(being_read)
    opened = Route("b.test", "tcp", "a tunnel", port=2200)
    registry.update({"b.test": opened})
    registry.claim(routes("another", "c.test"))
    registry.release("a tunnel")
    assert list(being_read) == [("b.test", Route("b.test", "http", "a tunnel"))]
    assert registry.lookup("a.test") is None and registry.lookup("c.test") is not None


# Wildcards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hostname", "route"),
    [
        ("x.dev.test.example", "*.dev.test.example"),
        ("y.x.dev.test.example", "*.dev.test.example"),
        ("x.test.example", "*.test.example"),
        ("dev.test.example", "*.test.example"),  # not by its own wildcard
        ("exact.dev.test.example", "exact.dev.test.example"),
        ("x.exact.dev.test.example", "*.dev.test.example"),
        ("test.example", None),
        ("example", None),
        ("xtest.example", None),
        ("gateway.test.example", None),
        ("x.gateway.test.example", "*.test.example"),
        ("", None),
        (".", None),
        ("*.dev.test.example", "*.dev.test.example"),
    ],
)
def test_the_longest_match_wins_and_an_exact_one_beats_all(hostname, route):
    registry = Registry(reserved={"gateway.test.example"})
    registry.claim(routes("a", "*.test.example", "*.dev.test.example", "exact.dev.test.example"))
    found = registry.lookup(hostname)
    assert (found and found.hostname) == route


def test_a_wildcard_that_is_released_matches_nothing():
    registry = Registry()
    registry.claim(routes("a", "*.dev.test"))
    registry.release("a")
    assert registry.lookup("x.dev.test") is None


def test_a_conflict_names_every_hostname_and_whose_they_are():
    registry = Registry()
    registry.claim(routes("first", "a.test"))
    registry.claim(routes("second", "b.test"))
    with pytest.raises(HostnameTaken, match="^host already registered: a.test, b.test$") as caught:
        registry.claim(routes("third", "a.test", "b.test", "c.test"))
    assert caught.value.tunnels == {"first", "second"}


def test_a_conflict_of_very_many_hostnames_is_a_short_line():
    registry, many = Registry(), [f"{number}.test" for number in range(3000)]
    registry.claim(routes("first", *many))
    with pytest.raises(HostnameTaken, match="0.test, .*, 19.test and 2980 more$"):
        registry.claim(routes("second", *many))


def test_a_claim_that_is_not_permitted_takes_nothing():
    registry = Registry()
    first, second = routes("first", "a.test"), routes("second", "b.test", "c.test")
    registry.claim(first)
    seen = []

    def refuse(all_there_would_be):
        seen.append(all_there_would_be)
        raise PermissionError

    with pytest.raises(PermissionError):
        registry.claim(second, refuse)
    assert seen == [{**first, **second}] and registry.routes() == first
    registry.claim(second, lambda _: None)


def test_a_name_of_the_gateway_is_nobodys():
    registry = Registry(reserved={"gateway.test"})
    registry.claim(routes("first", "a.test"))
    with pytest.raises(HostnameTaken, match="^not allowed: gateway.test: reserved") as caught:
        registry.claim(routes("second", "a.test", "gateway.test"))
    assert not caught.value.tunnels


def test_update_changes_only_what_its_tunnel_still_holds():
    """A session may end, and another take its hostname, while its ports open."""
    registry = Registry()
    registry.claim(routes("first", "a.test", "b.test", "gone.test"))
    registry.release("first")
    registry.claim(routes("first", "a.test"))
    registry.claim(routes("second", "b.test"))
    opened = {
        hostname: route._replace(port=2200)
        for hostname, route in routes("first", "a.test", "b.test", "gone.test").items()
    }
    registry.update(opened)
    assert registry.routes() == {"a.test": opened["a.test"], **routes("second", "b.test")}


def test_hostnames_in_tcp_mode_are_remembered_when_they_are_released(monkeypatch):
    monkeypatch.setattr("gotunnel_server.routes.MOST_LEFT", 2)
    registry = Registry(reserved={"gateway.test"})
    tcp = {name: Route(name, "tcp", "first") for name in ("a.test", "*.test")}
    registry.claim({**tcp, **routes("first", "web.example")})
    assert not registry.has_left_in_tcp("a.test")
    registry.release("first")
    assert registry.has_left_in_tcp("a.test") and registry.has_left_in_tcp("b.c.test")
    for name in "web.example", "gateway.test", "test", "example":
        assert not registry.has_left_in_tcp(name)
    registry.claim(routes("second", "*.test"))
    registry.release("second")
    assert registry.has_left_in_tcp("a.test") and not registry.has_left_in_tcp("b.c.test")
    for number in range(2):  # no more than so many
        registry.claim({f"{number}.test": Route("x", "tcp", "third")})
        registry.release("third")
    assert not registry.has_left_in_tcp("a.test") and registry.has_left_in_tcp("1.test")


# Routes to agents of other gateways


def test_a_route_elsewhere_is_found_until_an_agent_here_has_one():
    registry = Registry(reserved={"gateway.test"})
    registry.put_elsewhere(routes("peer", "a.test", "b.test", "gateway.test"))
    assert registry.lookup("a.test").tunnel == "peer"
    assert registry.lookup("gateway.test") is None
    registry.claim(routes("own", "a.test"), permit=lambda all: all.pop("b.test", None))
    assert registry.lookup("a.test").tunnel == "own"
    assert registry.held() == routes("own", "a.test")
    assert registry.routes() == {**routes("own", "a.test"), **routes("peer", "b.test")}
    registry.release("own")
    assert registry.lookup("a.test").tunnel == "peer"
    assert not registry.absent
    registry.put_elsewhere({})
    assert registry.routes() == {}
    assert set(registry.absent) == {"a.test", "b.test"}


def test_the_longest_name_wins_wherever_its_agent_is():
    registry = Registry()
    registry.claim(routes("own", "*.dev.test"))
    registry.put_elsewhere(routes("peer", "a.dev.test", "*.x.dev.test"))
    assert registry.lookup("a.dev.test").tunnel == "peer"
    assert registry.lookup("b.x.dev.test").tunnel == "peer"
    assert registry.lookup("b.dev.test").tunnel == "own"


def test_those_who_wait_for_a_hostname_hear_of_it_elsewhere():
    registry, heard = Registry(), []
    registry.on_claim = lambda: heard.append(registry.lookup("a.test") is not None)
    registry.claim({"a.test": Route("a.test", "tcp", "own")})
    registry.release("own")
    assert registry.awaits("a.test") and registry.has_left_in_tcp("a.test")
    registry.put_elsewhere(routes("peer", "a.test"))
    assert heard == [True, True]
    assert not registry.awaits("a.test") and not registry.has_left_in_tcp("a.test")


def test_changes_of_agents_here_are_told():
    registry, heard = Registry(), []
    registry.on_change = lambda: heard.append(sorted(registry.held()))
    registry.claim(routes("own", "a.test"))
    registry.update({"a.test": Route("a.test", "http", "own", port=1)})
    registry.put_elsewhere(routes("peer", "b.test"))
    registry.release("own")
    assert heard == [["a.test"], ["a.test"], []]


def test_what_is_free_is_told_once_nobody_has_it():
    registry, told = Registry(), []
    registry.on_free = lambda hostnames: told.append(set(hostnames))
    registry.claim(routes("first", "a.test", "b.test", "c.test"))
    registry.claim(routes("second", "b.test", "d.test"), instead_of=["first"])
    assert told == [{"a.test", "c.test"}]  # the successor has done without them
    registry.release("first")
    registry.release("second")
    assert told[1:] == [{"b.test", "d.test"}]


def test_holders_are_those_of_exactly_this_hostname_here():
    registry = Registry()
    registry.claim(routes("a tunnel", "a.test", "*.test"))
    registry.put_elsewhere(routes("peer", "b.test"))
    assert registry.holders("a.test") == registry.holders("*.test") == ["a tunnel"]
    assert registry.holders("b.test") == registry.holders("c.test") == []
