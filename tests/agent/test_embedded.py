"""gotunnel.forward(): a tunnel inside another program, its errors, and what it leaves behind."""

import gc
import hashlib
import json
import logging
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from contextlib import ExitStack

import pytest
from support import (
    ROOT,
    SECRET,
    TICK,
    TIMEOUT,
    TUNNEL_HOST,
    Origin,
    answer,
    deaf_port,
    fields_of,
    gateway_here,
    request,
    reserved_port,
    routes_of,
    status_of,
    wait_until,
)
from test_agent import HandMadeGateway

import gotunnel
import gotunnel_agent
from gotunnel import Ack
from gotunnel_agent import embedded
from gotunnel_agent import link as link_module
from gotunnel_agent.common.join_string import JoinString
from gotunnel_server.agents import tunnel as tunnel_module

OFFICE = "the secret-of-one-alone for the office"
AGENTS = f"""
office:
  secret: {OFFICE}
  hosts: ["*.dev.localhost", fixed.localhost]
  ports: 1-65535
"""


@pytest.fixture
def gateway(cache, tmp_path):
    file = tmp_path / "agents.yaml"
    file.write_text(AGENTS)
    file.chmod(0o600)
    with (
        reserved_port() as port,
        gateway_here(cache, AGENTS_FILE=str(file), TCP_PORTS=str(port)) as gateway,
    ):
        yield gateway


@pytest.fixture(autouse=True)
def leaves_at_once(monkeypatch):
    """The gateway looks sooner than usual whether a tunnel that is closed has visits left."""
    monkeypatch.setattr(tunnel_module, "LEFT_LOOK", TICK)


@pytest.fixture
def account(gateway, tmp_path, monkeypatch):
    """The account that `join` would have made; yields its file."""
    return joined(monkeypatch, tmp_path, tunnel_addr=f"{TUNNEL_HOST}:{gateway.tunnel_port}",
                  ca_file=str(gateway.ca_file))  # fmt: skip


def joined(monkeypatch, folder, **keys):
    file = folder / "joined.yaml"
    file.write_text(json.dumps({"jwt_issuer": "office", "jwt_secret": OFFICE, **keys}))
    monkeypatch.setenv("GOTUNNEL_CONFIG", str(file))
    monkeypatch.delenv("GOTUNNEL_JOIN", raising=False)
    return file


@pytest.fixture
def site():
    with Origin() as origin:
        origin.serve(lambda target: (target.read_head(), target.send(answer(b"from the site"))))
        yield origin


def served(gateway):
    return {name for name in routes_of(gateway.inner) if name.endswith(".localhost")}


# A tunnel ----------------------------------------------------------------------------------------


def test_a_tunnel_serves_when_forward_returns_and_is_gone_when_it_is_closed(gateway, account, site):
    with gotunnel.forward(site.port) as tunnel:
        assert tunnel.hostname.endswith(".dev.localhost")
        assert tunnel.url == f"https://{tunnel.hostname}:{gateway.public_port}"
        assert gateway.get(tunnel.hostname) == (200, b"from the site")
        assert (tunnel.problem, tunnel.certificate) == ("", "ready")
        assert tunnel.url in repr(tunnel) and "open" in repr(tunnel)
        assert not tunnel.wait(timeout=0)
    assert tunnel.wait(timeout=0) and "closed" in repr(tunnel)
    assert tunnel.hostname not in served(gateway)
    tunnel.close()
    gone = weakref.ref(tunnel)
    del tunnel
    assert wait_until(lambda: gc.collect() and gone() is None)


def test_several_tunnels_of_one_program_have_names_of_their_own(gateway, account, site):
    with ExitStack() as open_ones:
        tunnels = [open_ones.enter_context(gotunnel.forward(site.port)) for _ in range(3)]
        assert len({tunnel.hostname for tunnel in tunnels}) == 3
        assert {gateway.get(tunnel.hostname)[0] for tunnel in tunnels} == {200}
        tunnels[0].close()
        assert [gateway.get(tunnel.hostname)[0] for tunnel in tunnels[1:]] == [200, 200]


@pytest.mark.parametrize(
    ("host", "hostname"),
    [
        ("demo", "demo.dev.localhost"),
        ("demo.*", "demo.dev.localhost"),
        ("Fixed.Localhost.", "fixed.localhost"),
    ],
)
def test_host_is_a_hostname_or_a_label_below_the_wildcard(gateway, account, site, host, hostname):
    with gotunnel.forward(f"localhost:{site.port}", host=host) as tunnel:
        assert tunnel.hostname == hostname
        assert gateway.get(hostname)[0] == 200


def test_tcp_with_a_public_port(gateway, account, origin):
    origin.serve(lambda target: target.send(target.read()))
    with gotunnel.forward(origin.port, tcp=True, port="auto") as tunnel:
        scheme, _, port = tunnel.url.rpartition(":")
        assert scheme == f"tcp://{tunnel.hostname}"
        with socket.create_connection(("127.0.0.1", int(port)), TIMEOUT) as visitor:
            visitor.sendall(b"ping")
            assert visitor.recv(10) == b"ping"


def test_basic_auth_asks_visitors_for_a_password(gateway, account, site):
    users = {"alice": "correct-horse battery"}
    with gotunnel.forward(site.port, basic_auth=users) as tunnel:
        assert gateway.get(tunnel.hostname)[0] == 401
        with gateway.dial(tunnel.hostname) as visitor:
            credentials = "YWxpY2U6Y29ycmVjdC1ob3JzZSBiYXR0ZXJ5"
            visitor.send(
                request("GET", "/", f"Authorization: Basic {credentials}", host=tunnel.hostname)
            )
            assert status_of(visitor.read_head()) == 200


def test_the_target_may_get_another_host(gateway, account, origin):
    with gotunnel.forward(origin.port, host_header="localhost:3000") as tunnel:
        with gateway.dial(tunnel.hostname) as visitor:
            visitor.send(request(host=tunnel.hostname))
            target = origin.accept()
            assert "host: localhost:3000" in fields_of(target.read_head())
            target.send(answer())
            visitor.read_message()
            target.close()


def test_a_random_name_that_is_taken_is_replaced_by_another(gateway, account, site, monkeypatch):
    labels = iter(["busy-bee", "busy-bee", "busy-bee", "calm-cat"])
    monkeypatch.setattr(embedded, "random_label", lambda: next(labels))
    with gotunnel.forward(site.port) as first, gotunnel.forward(site.port) as second:
        assert (first.hostname, second.hostname) == (
            "busy-bee.dev.localhost",
            "calm-cat.dev.localhost",
        )
        assert gateway.get(second.hostname)[0] == 200


def test_a_running_visit_ends_whole_when_the_tunnel_is_closed(gateway, account, origin):
    with gotunnel.forward(origin.port) as tunnel, gateway.dial(tunnel.hostname) as visitor:
        visitor.send(request(host=tunnel.hostname))
        target = origin.accept()
        target.read_head()
        assert tunnel.visits == 1
        closing = threading.Thread(target=tunnel.close, name="closing")
        closing.start()
        wait_until(lambda: tunnel._agent.snapshot().stopping)
        target.send(answer(b"late but whole"))
        assert visitor.read_message()[1] == b"late but whole"
        target.close()
        closing.join(TIMEOUT)
        assert tunnel.wait(timeout=0)


def test_visits_are_told_when_they_are_over(gateway, account, site):
    seen = queue.SimpleQueue()
    with gotunnel.forward(site.port, on_visit=seen.put) as tunnel:
        assert gateway.get(tunnel.hostname, "/a?b")[0] == 200
        visit = seen.get(timeout=TIMEOUT)
    assert visit[:4] == (tunnel.hostname, "GET", "/a?b", 200)
    assert visit.bytes_out == len("from the site")


def test_a_callback_that_fails_harms_no_visit(gateway, account, site, caplog):
    with gotunnel.forward(site.port, on_visit=lambda seen: seen.nonsense) as tunnel:
        assert [gateway.get(tunnel.hostname) for _ in range(2)] == [(200, b"from the site")] * 2
        wait_until(lambda: "on_visit has failed" in caplog.text)
    assert "(bug" not in caplog.text


def test_another_thread_that_closes_ends_wait(gateway, account, site):
    tunnel = gotunnel.forward(site.port)
    closing = threading.Thread(target=tunnel.close, name="closing")
    closing.start()
    assert tunnel.wait(timeout=TIMEOUT)
    closing.join(TIMEOUT)


# The account -------------------------------------------------------------------------------------


def join_string(gateway, secret=OFFICE, **more):
    return str(JoinString(TUNNEL_HOST, gateway.tunnel_port, "office", secret, **more))


def fingerprint_of(ca_file):
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca_file.read_text())).hexdigest()


def test_a_join_string_is_an_account_and_pins_the_gateways_ca(gateway, site, tmp_path, monkeypatch):
    monkeypatch.setenv("GOTUNNEL_CONFIG", str(tmp_path / "none.yaml"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    join = join_string(gateway, fingerprint=fingerprint_of(gateway.ca_file))
    with gotunnel.forward(site.port, join=join) as tunnel:
        assert gateway.get(tunnel.hostname)[0] == 200


def test_a_configuration_gives_its_account_and_not_its_tunnels(gateway, account, site):
    keys = json.loads(account.read_text())
    other = account.with_name("other.yaml")
    tunnels = [{"hostname": "fixed.localhost", "target": "127.0.0.1:1"}]
    other.write_text(json.dumps(keys | {"tunnels": tunnels, "metrics_port": str(site.port)}))
    account.unlink()
    with gotunnel.forward(site.port, config=other) as tunnel:
        assert served(gateway) & {tunnel.hostname, "fixed.localhost"} == {tunnel.hostname}


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"target": 0}, "target: '0' has no port from 1 to 65535"),
        ({"target": "a:b@c"}, "target holds a user or password"),
        ({"target": "nowhere"}, "has no port"),
        ({"host": "under_score.example.com"}, "hostname: 'under_score.example.com'"),
        ({"host": ""}, "hostname"),
        ({"port": 2222}, "expected mode tcp"),
        ({"host_header": "a b"}, "host_header: 'a b' came"),
        ({"tcp": True, "port": 70000}, "port: '70000' came"),
        ({"tcp": True, "basic_auth": "a:visitor's password"}, "expected mode http"),
        ({"basic_auth": ["without a colon"]}, "expected USER:PASSWORD"),
        ({"basic_auth": []}, "expected USER:PASSWORD"),
        ({"join": "gotunnel://a:b@c:1", "config": "agent.yaml"}, "expected only one of them"),
        ({"timeout": 0}, "timeout: 0 came"),
    ],
)
def test_a_wrong_argument_is_a_value_error(account, arguments, text):
    with pytest.raises(ValueError) as caught:
        gotunnel.forward(**{"target": 8080} | arguments)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def refused(kind, *arguments, **options):
    """The line of an error that forward() raises."""
    with pytest.raises(kind) as caught:
        gotunnel.forward(*arguments, **options)
    assert isinstance(caught.value, gotunnel.ForwardError)
    assert "\n" not in str(caught.value) and OFFICE not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


def test_without_an_account_the_error_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GOTUNNEL_CONFIG", str(tmp_path / "none.yaml"))
    monkeypatch.delenv("GOTUNNEL_JOIN", raising=False)
    text = refused(gotunnel.NoAccount, 8080)
    assert "none.yaml" in text and "join" in text


@pytest.mark.parametrize("join", ["gotunnel://office:own-secret", "own-secret", ""])
def test_a_join_string_that_is_damaged_is_not_shown(join):
    text = refused(gotunnel.NoAccount, 8080, join=join)
    assert "join string" in text and "own-secret" not in text


def test_a_join_string_in_a_wrong_place_is_not_shown(account, monkeypatch):
    wrong = f"gotunnel://office:{OFFICE.replace(' ', '%20')}@localhost:1"
    for options in ({"target": wrong}, {"host": wrong}, {"host_header": wrong}):
        with pytest.raises(ValueError) as caught:
            gotunnel.forward(**{"target": 8080} | options)
        assert "secret-of" not in f"{caught.value!r} {caught.value.__context__!r}"
    assert "secret-of" not in refused(gotunnel.NoAccount, 8080, config=wrong)
    monkeypatch.setenv("GOTUNNEL_CONFIG", wrong)
    assert "secret-of" not in refused(gotunnel.NoAccount, 8080)


def test_a_configuration_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    file = joined(monkeypatch, tmp_path)
    assert "tunnel_addr" in refused(gotunnel.NoAccount, 8080)
    assert str(tmp_path / "gone.yaml") in refused(
        gotunnel.NoAccount, 8080, config=tmp_path / "gone.yaml"
    )
    joined(monkeypatch, tmp_path, tunnel_addr="localhost:1", ca_file=str(file))
    assert "expected certificates as PEM" in refused(gotunnel.NoAccount, 8080)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"host": "www.example.com"}, "www.example.com"),
        ({"tcp": True, "port": 1, "host": "fixed.localhost"}, ""),
    ],
)
def test_a_refusal_is_told_in_the_gateways_words_at_once(account, options, text):
    began = time.monotonic()
    assert text in refused(gotunnel.NotGranted, 8080, **options)
    assert time.monotonic() - began < TIMEOUT / 2


def test_a_refusal_is_no_bug_in_the_log(gateway, account, caplog):
    refused(gotunnel.NotGranted, 8080, host="www.example.com")
    assert not [record for record in caplog.records if record.name == "gotunnel"]


def test_a_tunnel_that_was_granted_is_asked_for_again_whatever_the_gateway_says_later(
    cache, tmp_path, monkeypatch
):
    """Another agent may have the hostname while the connection is lost."""
    monkeypatch.setattr(link_module, "retry_delay", lambda *arguments: TICK)
    with HandMadeGateway(cache) as by_hand:
        place = by_hand.place
        joined(monkeypatch, tmp_path, tunnel_addr=f"{TUNNEL_HOST}:{place.tunnel_port}",
               ca_file=str(place.ca_file))  # fmt: skip
        meeting = threading.Thread(target=by_hand.meet, name="meeting")
        meeting.start()
        with gotunnel.forward(8080, host="a.example.com") as tunnel:
            meeting.join(TIMEOUT)
            assert tunnel.url == "https://a.example.com"
            by_hand.hang_up()
            by_hand.meet(Ack(False, "host already registered: a.example.com"))
            wait_until(lambda: "already registered" in tunnel.problem)
            by_hand.hang_up()
            by_hand.meet()
            wait_until(lambda: tunnel.problem == "")
            assert not tunnel.wait(timeout=0)
            by_hand.hang_up()


def test_a_hostname_in_use_is_refused(gateway, account, site):
    with gotunnel.forward(site.port, host="fixed.localhost"):
        text = refused(gotunnel.NotGranted, site.port, host="fixed.localhost")
        assert "already registered" in text and "was not closed" in text
        assert gateway.get("fixed.localhost")[0] == 200


def test_a_wrong_secret_is_refused(gateway, site, tmp_path, monkeypatch):
    joined(monkeypatch, tmp_path, tunnel_addr=f"{TUNNEL_HOST}:{gateway.tunnel_port}",
           ca_file=str(gateway.ca_file), jwt_secret=SECRET)  # fmt: skip
    assert "auth failed" in refused(gotunnel.NotGranted, site.port)


def test_a_gateway_that_is_not_trusted_is_told_at_once(gateway, site, tmp_path, monkeypatch):
    joined(monkeypatch, tmp_path, tunnel_addr=f"{TUNNEL_HOST}:{gateway.tunnel_port}")
    began = time.monotonic()
    assert "not to be trusted" in refused(gotunnel.Unreachable, site.port)
    assert time.monotonic() - began < TIMEOUT / 2


def test_the_visitors_port_is_no_gateways(gateway, site, tmp_path, monkeypatch):
    joined(monkeypatch, tmp_path, tunnel_addr=f"{TUNNEL_HOST}:{gateway.public_port}",
           ca_file=str(gateway.ca_file))  # fmt: skip
    assert "TUNNEL_PORT" in refused(gotunnel.Unreachable, site.port)


def test_a_gateway_that_is_away_is_waited_for_until_the_timeout(tmp_path, monkeypatch):
    with reserved_port() as port:
        joined(monkeypatch, tmp_path, tunnel_addr=f"{TUNNEL_HOST}:{port}")
        text = refused(gotunnel.Unreachable, 8080, timeout=0.1)
    assert text.startswith(f"{TUNNEL_HOST}:{port}: connection refused")


def test_a_gateway_that_cannot_be_asked_for_its_ca_is_unreachable(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with reserved_port() as port:
        join = str(JoinString(TUNNEL_HOST, port, "office", OFFICE, fingerprint="0" * 64))
        assert "cannot be asked for its CA" in refused(gotunnel.Unreachable, 8080, join=join)


def test_a_network_that_swallows_all_is_told(tmp_path, monkeypatch):
    with deaf_port() as port:
        joined(monkeypatch, tmp_path, tunnel_addr=f"127.0.0.1:{port}")
        assert "no answer in 0.1 s" in refused(gotunnel.Unreachable, 8080, timeout=0.1)


def test_ctrl_c_meanwhile_leaves_nothing_behind(tmp_path, monkeypatch):
    """no_thread_left looks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
    try:
        with deaf_port() as port:
            joined(monkeypatch, tmp_path, tunnel_addr=f"127.0.0.1:{port}")
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                gotunnel.forward(8080)
    finally:
        signal.signal(signal.SIGINT, before)


# The process -------------------------------------------------------------------------------------


def run(script, account, *, options=(), status=0):
    """What a program prints that uses a tunnel."""
    done = subprocess.run(
        [sys.executable, *options, "-c", script], capture_output=True, text=True, timeout=TIMEOUT,
        cwd=account.parent, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (status, "")
    return done.stdout


STATE = """
import logging, os, resource, signal, sys, threading, warnings

def state():
    loggers = [logging.getLogger(name) for name in ("root", "gotunnel", "gotunnel.agent")]
    return {
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "wakeup": signal.set_wakeup_fd(-1),
        "logging": [(log.handlers[:], log.level, log.filters[:]) for log in loggers],
        "raise": logging.raiseExceptions,
        "warnings": warnings.filters[:],
        "switch": sys.getswitchinterval(),
        "cpus": (os.sched_getaffinity(0), os.sched_getscheduler(0)),
        "environment": dict(os.environ),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "standard error": (sys.stderr, threading.excepthook),
        "folder": (os.getcwd(), os.umask(0o22), sys.path[:]),
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_nothing_of_the_process_is_changed(gateway, account, site):
    script = f"""{STATE}
def use():
    with gotunnel.forward({site.port}):
        return state()

before = state()
import gotunnel
during = use()
for thread in threading.enumerate():  # the last one of a session may be about to end
    if thread is not threading.main_thread():
        thread.join(10)
after = state()
for name, value in before.items():
    assert after[name] == value, (name, value, after[name])
    assert during[name] == value or name in ("threads", "descriptors"), (name, value, during[name])
"""
    run(script, account, options=["-W", "error", "-X", "dev"])


def test_a_program_that_closes_nothing_ends_at_once_and_frees_the_hostname(gateway, account, site):
    script = f"import gotunnel; print(gotunnel.forward({site.port}, host='left-open').hostname)"
    assert run(script, account, options=["-W", "error", "-X", "dev"]) == "left-open.dev.localhost\n"
    assert "left-open.dev.localhost" not in served(gateway)


def test_a_visit_that_runs_when_the_program_ends_is_still_served(gateway, account, origin):
    script = (
        "import gotunnel, os, sys\n"
        f"tunnel = gotunnel.forward({origin.port}, host='at-the-end')\n"
        "print(tunnel.url, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    hostname = "at-the-end.dev.localhost"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=account.parent, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as program:  # fmt: skip
        program.stdout.readline()
        with gateway.dial(hostname) as visitor:
            visitor.send(request(host=hostname))
            target = origin.accept()
            target.read_head()
            program.stdin.close()
            wait_until(lambda: not any(gateway.inner.tunnels.registered()) or program.poll())
            target.send(answer(b"late but whole"))
            assert visitor.read_message()[1] == b"late but whole"
            target.close()
        assert program.wait(TIMEOUT) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_a_fork_leaves_the_tunnel_to_its_parent(gateway, account, site):
    script = f"""
import gotunnel, os, sys
tunnel = gotunnel.forward({site.port}, host="parents")
child = os.fork()
if not child:
    tunnel.close()
    sys.exit(7)  # which calls what is to be called at exit
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert tunnel.problem == "" and not tunnel.wait(0.1)
print("the parent's")
"""
    assert run(script, account, options=["-W", "ignore"]) == "the parent's\n"


def test_names_are_found_on_first_use_and_not_before():
    script = (
        "import gotunnel, gotunnel_agent, sys; late = {'yaml', 'gotunnel_agent.agent'}\n"
        "assert not (late | {'jwt'}) & set(sys.modules), sys.modules.keys()\n"
        "gotunnel.forward, gotunnel_agent.Agent\n"
        "assert late <= set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=TIMEOUT)


def test_gotunnel_has_all_names_of_the_module():
    assert set(gotunnel.EMBEDDED) == set(embedded.__all__)


@pytest.mark.parametrize("module", [gotunnel, gotunnel_agent])
def test_other_names_are_none(module):
    for name in ("nonsense", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(module, name)


def test_warnings_of_a_tunnel_are_logged_and_not_printed_otherwise(tmp_path, monkeypatch, caplog):
    with reserved_port() as port:
        joined(monkeypatch, tmp_path, tunnel_addr=f"{TUNNEL_HOST}:{port}")
        refused(gotunnel.Unreachable, 8080, timeout=0.1)
    assert {record.name for record in caplog.records if record.levelno >= logging.WARNING} == {
        "gotunnel.link"
    }
