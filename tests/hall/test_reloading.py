"""SIGHUP at the gateway: what is read again, what counts at once, and the line that says so."""

import contextlib
import logging
import signal
import sys
import threading

import jwt
import pytest
from hand_made import registered
from support import (
    APP,
    GATEWAY_HOST,
    ROOT,
    SECRET,
    ca_of,
    gateway_environment,
    gateway_here,
    routes_of,
    running,
    wait_until,
)

from gotunnel_server import config as server_config
from gotunnel_server.reloading import APPLIED, LOOKED_AT, Reloading

OTHER_SECRET = "another secret that all agents share, for tests"


@pytest.fixture
def level():
    """The level of the process's log, which a change may set."""
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


class Settings:
    """An env file, and a gateway that runs with it."""

    def __init__(self, cache, folder):
        self.values = gateway_environment(cache, DRAIN_TIMEOUT="0", WORKERS="192")
        self.path = folder / "server.env"
        self.write()

    def write(self, **changes):
        self.values.update(changes)
        lines = (f'{name}="{text}"\n' for name, text in self.values.items() if text is not None)
        self.path.write_text("".join(lines))
        self.path.chmod(0o600)


@pytest.fixture
def env(cache, tmp_path):
    return Settings(cache, tmp_path)


@pytest.fixture
def gateway(cache, env):
    with gateway_here(cache) as gateway:
        config = server_config.load(str(env.path), {})
        gateway.reloading = Reloading(gateway.inner, config, str(env.path), {})
        yield gateway


def said(caplog):
    lines = [record.getMessage() for record in caplog.records if "SIGHUP" in record.getMessage()]
    caplog.clear()
    (line,) = lines
    return line


def test_what_can_change_counts_at_once(gateway, env, caplog, level):
    env.write(DRAIN_TIMEOUT="7", IDLE_TIMEOUT="33", MAX_HOSTS_PER_AGENT="1", LOG_LEVEL="warning",
              DEFAULT_ALLOW="192.0.2.0/24")  # fmt: skip
    caplog.set_level(logging.INFO)
    gateway.reloading.run()
    inner = gateway.inner
    assert inner.drain_timeout == 7 and inner._visitors.timeouts.idle == 33
    assert inner._newcomers.terms.most == 1
    assert logging.getLogger().level == logging.WARNING
    inner.drain_timeout = 0
    with registered(gateway, APP):
        assert gateway.get(APP)[0] == 403


def test_the_line_says_what_counts_and_what_does_not(gateway, env, caplog):
    caplog.set_level(logging.INFO)
    gateway.reloading.run()
    assert said(caplog) == f"SIGHUP: {LOOKED_AT}"
    env.write(IDLE_TIMEOUT="33", WORKERS="100", TCP_PORTS="2200")
    gateway.reloading.run()
    assert said(caplog) == (
        f"SIGHUP: {LOOKED_AT}; changed: IDLE_TIMEOUT; changed from the next start on, such as by "
        "SIGUSR2: TCP_PORTS, WORKERS"
    )
    gateway.reloading.run()
    assert said(caplog) == f"SIGHUP: {LOOKED_AT}"


def test_a_bad_setting_changes_nothing_and_is_named(gateway, env, caplog):
    env.write(IDLE_TIMEOUT="33", DRAIN_TIMEOUT="soon")
    gateway.reloading.run()
    line = said(caplog)
    assert line.startswith("SIGHUP: DRAIN_TIMEOUT is 'soon', expected seconds")
    assert "; the settings stay as they were; " in line
    assert gateway.inner._visitors.timeouts.idle == 120
    env.path.unlink()
    gateway.reloading.run()
    assert "the settings stay as they were" in said(caplog)


def test_a_secret_may_be_replaced_without_a_restart(gateway, env, tmp_path, caplog):
    """No line shows one."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "secret"
    path.write_text(OTHER_SECRET)
    with registered(gateway, APP):
        env.write(JWT_SECRET=None, JWT_SECRET_FILE=str(path), JWT_SECRET_OLD=SECRET)
        gateway.reloading.run()
        assert "changed: JWT_SECRET, JWT_SECRET_FILE, JWT_SECRET_OLD" in said(caplog)
        assert routes_of(gateway.inner) == {APP}
    wait_until(lambda: not routes_of(gateway.inner))
    for secret in (OTHER_SECRET, SECRET):
        token = jwt.encode({"iss": "any", "exp": 9_999_999_999}, secret)
        with registered(gateway, APP, token=token):
            pass
        wait_until(lambda: not routes_of(gateway.inner))
    path.write_text("a third secret that all agents share, for tests")
    env.write(JWT_SECRET_OLD=None)
    with registered(gateway, APP, token=jwt.encode({"exp": 9_999_999_999}, OTHER_SECRET)):
        gateway.reloading.run()  # that of its session is neither of the two now
        assert "changed: JWT_SECRET_FILE, JWT_SECRET_OLD" in said(caplog)
        wait_until(lambda: not routes_of(gateway.inner))


def test_settings_are_compared_as_they_were_typed(env):
    """A hash of a plain password has another salt whenever it is made."""
    env.write(DEFAULT_BASIC_AUTH="alice:a long password")
    first, second = (server_config.load(str(env.path), {}) for _ in range(2))
    assert first.typed == second.typed and first.policy_defaults != second.policy_defaults
    assert SECRET not in repr(first)


def test_each_of_them_is_a_setting():
    assert APPLIED < server_config.NAMES


def test_two_at_once_take_turns(gateway, env, caplog):
    caplog.set_level(logging.INFO)
    threads = [threading.Thread(target=gateway.reloading.run) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("SIGHUP" in record.getMessage() for record in caplog.records) == 5


def test_sighup_at_the_program(cache, env, tmp_path):
    command = (sys.executable, str(ROOT / "gotunnel_server"), "--env-file", str(env.path))
    with running(*command, cwd=tmp_path) as program, contextlib.suppress(OSError):
        program.wait_for(" is ready$")
        program.wait_for(rf"visitors: https://{GATEWAY_HOST}:(\d+)/$")
        assert ca_of(cache).exists()
        env.write(RESPONSE_TIMEOUT="77")
        program.signal(signal.SIGHUP)
        program.wait_for(r"INFO +SIGHUP: .*; changed: RESPONSE_TIMEOUT$")
        env.write(RESPONSE_TIMEOUT="never")
        program.signal(signal.SIGHUP)
        program.wait_for(r"ERROR +SIGHUP: RESPONSE_TIMEOUT is 'never', .* stay as they were; ")
        program.signal(signal.SIGTERM)
        assert program.wait() == 0


def test_another_password_of_the_dashboard_counts_at_once_if_there_was_one(cache, env, caplog):
    caplog.set_level(logging.INFO)
    env.write(DASHBOARD_PASSWORD="the first password")
    with gateway_here(cache, DASHBOARD_PASSWORD="the first password") as gateway:
        login = gateway.inner._showing._dashboard.login
        config = server_config.load(str(env.path), {})
        reloading = Reloading(gateway.inner, config, str(env.path), {})
        before, (_, session) = login.passwords, login.sessions.begin()
        env.write(IDLE_TIMEOUT="33")
        reloading.run()  # a plain password has another hash now, and is the same
        assert "changed: IDLE_TIMEOUT" in said(caplog)
        assert login.passwords is before and login.sessions.is_valid(session)
        env.write(DASHBOARD_PASSWORD="another password", DASHBOARD_TOKEN="a-token-of-programs")
        reloading.run()
        assert "; changed: DASHBOARD_PASSWORD, DASHBOARD_TOKEN" in said(caplog)
        assert login.passwords is not before and not login.sessions.is_valid(session)


def test_the_first_password_of_the_dashboard_waits_for_the_next_start(gateway, env, caplog):
    """Nothing has counted visits for it."""
    caplog.set_level(logging.INFO)
    env.write(DASHBOARD_PASSWORD="the first password", IDLE_TIMEOUT="33")
    gateway.reloading.run()
    assert said(caplog).endswith("; changed from the next start on, such as by SIGUSR2: "
                                 "DASHBOARD_PASSWORD")  # fmt: skip
    assert gateway.inner._showing._dashboard.login.passwords is None
