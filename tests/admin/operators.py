"""What tests of an operator's commands share: configurations, files, the program itself."""

import os
import subprocess
import sys

from support import ROOT, TIMEOUT, gateway_environment

from gotunnel_server.config import load

APP = "app.example.com"
URL = "https://ca.example/dir"


def config_of(cache, **changes):
    return load(os.devnull, gateway_environment(cache, **changes))


def ordering(cache, **changes):
    return config_of(cache, ACME_ENV="", ACME_DIRECTORY=URL, HTTP_PORT="0", **changes)


def put_pair(folder, stem, pair):
    key, chain = pair
    (folder / f"{stem}.key").write_bytes(key)
    (folder / f"{stem}.key").chmod(0o600)
    (folder / f"{stem}.crt").write_bytes(chain)


def tree(folder):
    """All that is in a folder, and what it is."""
    return {
        path: (path.stat().st_mode, path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(*arguments, **environment):
    """The program as an operator calls it: status, output, errors."""
    command = [sys.executable, str(ROOT / "gotunnel_server"), *arguments]
    ended = subprocess.run(
        command, cwd=environment["ACME_CACHE"], env=environment, text=True, capture_output=True,
        timeout=TIMEOUT,
    )  # fmt: skip
    return ended.returncode, ended.stdout, ended.stderr
