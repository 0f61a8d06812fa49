"""From nothing to a public page, as an operator types it: `gotunnel-server init`, the gateway,
`gotunnel join`, `gotunnel files`. The CA is the local one, or Pebble, whose root the visitor and
the agent have to be given."""

import re
import subprocess
import sys

import pytest
from pebble import pebble
from support import ROOT, TIMEOUT, dial_tls, request, reserved_port, running, tls_context

SERVER, AGENT = (
    [sys.executable, str(ROOT / name)] for name in ("gotunnel_server", "gotunnel_agent")
)
NAME = "gateway.localhost"  # names below it are this machine's as well
GOTUNNEL = re.compile(r'gotunnel join "?(gotunnel://[^"\s]+)')


def typed(command, folder, **environment):
    """What a command prints."""
    ran = subprocess.run(command, cwd=folder, env={"HOME": str(folder), **environment}, text=True,
                         capture_output=True, timeout=TIMEOUT)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "gotunnel://" not in ran.stderr
    return ran.stdout


def is_served(agent, root):
    """Whether the page is at the public address that the agent prints."""
    host, port = agent.wait_for(rf"^https://([a-z0-9-]+\.{NAME}):(\d+)$").groups()
    agent.wait_for("certificate: ready")
    with dial_tls(int(port), host, tls_context(root)) as visitor:
        visitor.send(request("GET", "/page.json", host=f"{host}:{port}"))
        return visitor.read_message()[1] == b'{"hello": "world"}'


@pytest.fixture
def machines(tmp_path):
    """The folders of the gateway's machine and of the agent's, which has a page."""
    for name in ("public", "private", "private/site"):
        (tmp_path / name).mkdir()
    (tmp_path / "private" / "site" / "page.json").write_text('{"hello": "world"}')
    return tmp_path / "public", tmp_path / "private"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "acme"])
def test_from_nothing_to_a_public_page(machines, tmp_path, kind):
    public, private = machines
    with reserved_port() as tls, reserved_port() as plain, reserved_port() as tunnel:
        settings = [f"GATEWAY_PORT={tls}", f"TUNNEL_PORT={tunnel}", "DASHBOARD_PORT=0"]
        if kind == "local":
            root, options, joining = public / "cert-cache" / "local" / "ca.crt", ["--local"], []
            story(public, private, settings, options, joining, root)
            return
        with pebble(tmp_path / "pebble", plain, tls) as ca:
            root = tmp_path / "root.pem"
            root.write_text(ca.root())
            settings += [f"HTTP_PORT={plain}", f"ACME_DIRECTORY={ca.directory}",
                         f"ACME_CA_FILE={ca.ca_file}"]  # fmt: skip
            options, joining = ["--host", NAME, "--acme", "production"], ["--ca-file", str(root)]
            story(public, private, settings, options, joining, root)


def story(public, private, settings, options, joining, root):
    words = [word for setting in settings for word in ("--set", setting)]
    said = typed([*SERVER, "init", "--yes", "--no-check", "--agent", "office", *options, *words],
                 public)  # fmt: skip
    with running(*SERVER, cwd=public) as gateway:
        gateway.wait_for(" is ready$")
        if joining:
            gateway.wait_for(f"{NAME}: certificate until")
        typed([*AGENT, "join", GOTUNNEL.search(said)[1], *joining], private)
        with running(*AGENT, "files", "site", "--plain", cwd=private, HOME=str(private)) as agent:
            assert is_served(agent, root)
