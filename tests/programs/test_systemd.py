"""The gateway as a service of a real systemd: its sockets, Type=notify, a reload that hands over,
and the watchdog.

It is a user's manager, with a /run of its own (mount namespace), which only root can make.
"""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from support import (
    GATEWAY_HOST,
    ROOT,
    Gateway,
    ca_of,
    gateway_environment,
    need,
    reserved_port,
    running,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SYSTEMD = "/usr/lib/systemd/systemd"
RUN = "/run/user/0"
START = (
    f"mount -t tmpfs tmpfs /run && mkdir -p -m 700 /run/systemd/system {RUN} "
    f"&& exec {SYSTEMD} --user"
)
WATCHDOG = 2  # seconds

SERVICE = """
[Unit]
Requires=gateway.socket
After=gateway.socket

[Service]
Type=notify
NotifyAccess=main
WatchdogSec={watchdog}
WatchdogSignal=SIGKILL
Restart=on-failure
RestartSec=0
EnvironmentFile={folder}/environment
WorkingDirectory={folder}
ExecStart={python} {root}/gotunnel_server
ExecReload=/bin/kill -USR2 $MAINPID
StandardOutput=append:{folder}/log
StandardError=append:{folder}/log
"""
# One unit for both ports: then both have its name, and the numbers say what they are for.
SOCKET = """
[Socket]
ListenStream=127.0.0.1:{public}
ListenStream=127.0.0.1:{tunnel}
Backlog=1024
"""


class Manager:
    """A running systemd, and its service "gateway"."""

    def __init__(self, program, environment):
        self._command = (
            need("nsenter"), "-t", str(program.pid), "-m", "systemctl", "--user", "--no-pager",
        )  # fmt: skip
        self._environment = environment

    def call(self, *arguments):
        return subprocess.run(
            [*self._command, *arguments], env=self._environment, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip

    def do(self, *arguments):
        done = self.call(*arguments)
        assert done.returncode == 0, done.stderr

    def show(self, name):
        return self.call("show", "-p", name, "--value", "gateway.service").stdout.strip()


@pytest.fixture
def service(cache, tmp_path):
    """The Manager, and the Gateway that it has started."""
    if os.geteuid() != 0 or not os.path.exists(SYSTEMD):
        need("a systemd, and root's rights")
    unshare = need("unshare")
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_RUNTIME_DIR": RUN,
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        public, tunnel = (stack.enter_context(reserved_port()) for _ in range(2))
        settings = gateway_environment(
            cache, GATEWAY_PORT=str(public), TUNNEL_PORT=str(tunnel), DASHBOARD_PORT="0"
        )
        (tmp_path / "environment").write_text(
            "".join(f'{name}="{value}"\n' for name, value in settings.items())
        )
        units = tmp_path / "config/systemd/user"
        units.mkdir(parents=True)
        (units / "gateway.service").write_text(SERVICE.format(
            watchdog=WATCHDOG, folder=tmp_path, python=sys.executable, root=ROOT
        ))  # fmt: skip
        (units / "gateway.socket").write_text(SOCKET.format(public=public, tunnel=tunnel))
        program = stack.enter_context(running(
            unshare, "-m", "--propagation", "private", "sh", "-c", START, cwd=tmp_path,
            **environment
        ))  # fmt: skip
        manager = Manager(program, environment)
        for _ in range(200):
            if manager.call("is-system-running").stdout.strip() in ("running", "degraded"):
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(0.1)
                pytest.skip("systemd cannot run here")
        manager.do("start", "gateway.service")
        try:
            yield manager, Gateway(public, tunnel, ca_of(cache), None)
        finally:
            manager.call("stop", "gateway.service", "gateway.socket")


def test_systemd_reloads_restarts_and_watches_the_gateway(service):
    manager, gateway = service
    first = manager.show("MainPID")
    assert gateway.get(GATEWAY_HOST)[0] == 200
    assert manager.show("ActiveState") == "active"

    manager.do("reload", "gateway.service")
    second = wait_until(lambda: (found := manager.show("MainPID")) != first and found)
    wait_until(lambda: manager.show("SubState") == "running")
    wait_until(lambda: not os.path.exists(f"/proc/{first}"))
    assert gateway.get(GATEWAY_HOST)[0] == 200

    manager.do("restart", "gateway.service")
    third = manager.show("MainPID")
    assert third not in (first, second) and manager.show("NRestarts") == "0"
    assert gateway.get(GATEWAY_HOST)[0] == 200

    os.kill(int(third), signal.SIGSTOP)  # it tells the watchdog nothing any more
    wait_until(lambda: manager.show("NRestarts") == "1")
    assert gateway.get(GATEWAY_HOST)[0] == 200  # it waits in the backlog
