"""Reads the configuration again on SIGHUP, and applies what can change while the gateway runs.

    at once                  the settings in APPLIED; for DEFAULT_... and H2C_HOSTS, tunnels that
                             register from then on
    within seconds anyway    AGENTS_FILE and CERT_DIR, with their files, which are looked at now
    from the next start on   all other settings; SIGUSR2 is a start without a gap

Of the settings only those in the env file can have changed, and the files that they name: a process
cannot get another environment.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Protocol

from gotunnel import NoThread, spawn

from .config import Config, load
from .variables import ConfigError

log = logging.getLogger("gotunnel.reloading")

APPLIED = frozenset({
    "DEFAULT_ALLOW", "DEFAULT_BASIC_AUTH", "DEFAULT_BASIC_AUTH_FILE", "DEFAULT_DENY",
    "DEFAULT_RATE_LIMIT", "DRAIN_TIMEOUT", "H2C_HOSTS", "IDLE_TIMEOUT", "JWT_ISSUER", "JWT_SECRET",
    "JWT_SECRET_FILE", "JWT_SECRET_OLD", "JWT_SECRET_OLD_FILE", "LOG_LEVEL", "MAX_HOSTS_PER_AGENT",
    "PAGES_DIR", "RESPONSE_TIMEOUT", "STALL_TIMEOUT",
})  # fmt: skip
# ... if one of these was set when the gateway started: else nothing counts visits for the page.
DASHBOARD = frozenset({
    "DASHBOARD_PASSWORD", "DASHBOARD_PASSWORD_FILE", "DASHBOARD_TOKEN", "DASHBOARD_TOKEN_FILE",
})  # fmt: skip
LOOKED_AT = "AGENTS_FILE, CERT_DIR and the access log's file are looked at"


class Gateway(Protocol):
    """What a Reloading needs of a gateway.Gateway."""

    def change(self, config: Config) -> None: ...

    def reload(self) -> None: ...


class Reloading:
    """The settings that a gateway runs with. start() for each SIGHUP."""

    def __init__(
        self,
        gateway: Gateway,
        config: Config,
        env_file: str | None,
        environ: Mapping[str, str],
    ):
        """``config`` is what the gateway was made of, as load() read it from the other two."""
        self._gateway = gateway
        self._typed = config.typed
        self._applied = APPLIED | DASHBOARD if DASHBOARD & config.typed.keys() else APPLIED
        self._env_file, self._environ = env_file, environ
        self._lock = threading.Lock()  # held to read and to apply, which one thread does at a time

    def start(self) -> None:
        """Read in a thread, since a disk may hang, and a password takes a while to be hashed."""
        try:
            spawn("reload", self.run)
        except NoThread as error:
            log.warning("SIGHUP: %s; nothing is read again", error)

    def run(self) -> None:
        """Read, apply, and say in one line what was done."""
        with self._lock:
            try:
                self._gateway.reload()
                config = load(self._env_file, self._environ)
            except ConfigError as error:
                log.error("SIGHUP: %s; the settings stay as they were; %s", error, LOOKED_AT)
                return
            before, self._typed = self._typed, config.typed
            found = config.typed
            changed = {name for name in {*before, *found} if before.get(name) != found.get(name)}
            if changed & self._applied:
                self._gateway.change(config)
                logging.getLogger().setLevel(config.log_level.upper())
                self._gateway.reload()  # sessions may have lost their secret
            log.info("SIGHUP: %s", "; ".join([LOOKED_AT, *self._told(changed)]))

    def _told(self, changed: set[str]) -> list[str]:
        groups = {
            "changed": changed & self._applied,
            "changed from the next start on, such as by SIGUSR2": changed - self._applied,
        }
        return [f"{how}: {', '.join(sorted(names))}" for how, names in groups.items() if names]
