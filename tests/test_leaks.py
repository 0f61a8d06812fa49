"""The watch on log lines sees what it is there for."""

import logging
import sys

import leaks
import pytest
from support import SECRET, running

from gotunnel_agent.common.passwords import hash_password
from gotunnel_agent.registering import make_token

TOKEN = make_token(SECRET, "x", 60)
KEY = "-----BEGIN PRIVATE KEY-----"
JOIN = "gotunnel://office:5ec7e7@tunnel.example.com:9443"


@pytest.mark.parametrize("secret", [SECRET, TOKEN, hash_password("x"), KEY, JOIN], ids=range(5))
def test_a_secret_in_a_log_line_is_found(secret):
    logging.getLogger("gotunnel.any").debug("what came is %s", secret)
    found, leaks.found = leaks.found, []
    assert len(found) == 1 and secret in found[0]


def test_a_secret_in_an_error_that_is_logged_is_found():
    try:
        raise ValueError(SECRET)
    except ValueError:
        logging.getLogger("gotunnel.any").exception("it failed")
    found, leaks.found = leaks.found, []
    assert found


def test_a_secret_in_a_programs_log_is_found(tmp_path):
    line = f"2026-11-23 12:00:00,000 INFO    {TOKEN}"
    script = f"print({line!r}); print({TOKEN!r})"
    with running(sys.executable, "-c", script, cwd=tmp_path) as program:
        program.wait_for("^eyJ")
    found, leaks.found = leaks.found, []
    assert found == [line + "\n"]  # and not what a command prints for its caller
