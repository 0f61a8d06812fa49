"""NTLM, which signs in a connection: curl, and a module of npm as the target."""

import subprocess
from pathlib import Path

import pytest
from support import (
    APP,
    NPM_TIMEOUT,
    TIMEOUT,
    agent_here,
    gateway_here,
    need,
    npm_packages,
    reserved_port,
    running,
)

SITE = Path(__file__).parent / "sites" / "ntlm.js"
PACKAGES = ("express@4.21.2", "express-ntlm@2.7.0")  # exact, so that a new one breaks no test


@pytest.fixture
def gateway(cache, tmp_path, pytestconfig):
    """A gateway whose agent serves APP: the site that wants NTLM."""
    modules = npm_packages(pytestconfig, "ntlm", *PACKAGES)
    with reserved_port() as port:
        command = (need("node"), "--no-deprecation", str(SITE), str(port))
        with running(*command, cwd=tmp_path, NODE_PATH=str(modules)) as program:
            program.wait_for("listening")
            with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, http={APP: port}):
                yield gateway


def curl(gateway, *arguments):
    """What curl prints for two requests over one connection: the bodies, and the last status."""
    url = f"https://{APP}:{gateway.public_port}/"
    command = [
        need("curl"), "--silent", "--show-error", "--cacert", str(gateway.ca_file),
        "--max-time", str(TIMEOUT), "--write-out", "%{http_code}\n", *arguments, url, url,
    ]  # fmt: skip
    done = subprocess.run(command, env={}, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.timeout(NPM_TIMEOUT + 60)
def test_who_signs_in_by_ntlm_does_so_for_nobody_else(gateway):
    for _ in range(3):
        words = curl(gateway, "--ntlm", "-u", "alice:x")
        assert words[:2] == words[4:6] == ["alice", "GET"] and words[3] == words[7] == "200"
        assert words[2] == words[6]  # the target's connection
        assert curl(gateway) == ["401", "401"]
        assert curl(gateway, "--ntlm", "-u", "bob:x")[0] == "bob"


@pytest.mark.slow
@pytest.mark.timeout(NPM_TIMEOUT + 60)
def test_who_has_signed_in_by_ntlm_may_post(gateway):
    words = curl(gateway, "--ntlm", "-u", "alice:x", "--data", "whole")
    assert words[:2] == words[5:7] == ["alice", "POST"]
    assert words[3:5] == words[8:] == ["whole", "200"] and words[2] == words[7]
