"""A plan: a configuration and the objects made from it (TLS contexts, routes). Also compares two
configurations, for the log.

The agent serves one plan at a time. On SIGHUP it makes a new plan of the changed file. A session
keeps the plan that it began with.
"""

import ssl
from collections.abc import Iterator

from .common.hostnames import normal_hostname
from .common.one_line import some
from .common.tls import AEAD
from .config import Config, Tunnel
from .roster import Place
from .target import Route
from .trust import tls_context

# Keys that have an effect at the start only.
AT_START = ("status_socket", "log_format", "metrics_port", "metrics_bind")
# Keys whose change needs no new session: they concern the process alone.
OF_PROCESS = (*AT_START, "drain_timeout", "log_level", "inspect")
# Fields of Config that have another name in the file.
KEYS = {
    "tunnel_host": "tunnel_addr",
    "tunnel_port": "tunnel_addr",
    "more_addrs": "tunnel_addr",
    "credential_file": "path of the credential",
}


class Plan:
    """What a session needs of a configuration. It is never changed."""

    def __init__(self, config: Config):
        """Raises CannotTrust."""
        self.config = config
        self.context = tls_context(config.ca_file, config.skip_tls_verify)
        self.context.set_ciphers(AEAD)
        # Tunnels with equal settings share a context: the system's CAs take megabytes in each.
        contexts: dict[tuple[str | None, bool, str] | None, ssl.SSLContext | None] = {None: None}
        for tunnel in config.tunnels:
            trust = _trust(tunnel)
            if trust is not None and trust not in contexts:
                context = contexts[trust] = tls_context(*trust[:2], "target_ca_file")
                if tunnel.protocol:
                    context.set_alpn_protocols([tunnel.protocol])
        self.routes = {
            normal_hostname(tunnel.hostname): Route(tunnel, contexts[_trust(tunnel)])
            for tunnel in config.tunnels
        }

    @property
    def cas(self) -> list[list[bytes]]:
        """The certificates of all trusted CAs. Two plans may differ in these only, if a CA file has
        new content."""
        contexts = (self.context, *(route.context for route in self.routes.values()))
        return [context.get_ca_certs(True) for context in contexts if context is not None]

    @property
    def places(self) -> tuple[Place, ...]:
        """The gateway's addresses, in the order of the configuration."""
        config = self.config
        first = (config.tunnel_host, config.tunnel_port)
        return tuple(Place(host, port, host) for host, port in (first, *config.more_addrs))

    @property
    def address(self) -> str:
        """The gateway's, for the log."""
        return str(self.places[0])


def _trust(tunnel: Tunnel) -> tuple[str | None, bool, str] | None:
    """How to check a target's certificate, as arguments of tls_context(), and the protocol to be
    offered, "" for none; None without TLS."""
    target = tunnel.target
    return (target.ca_file, target.skip_tls_verify, tunnel.protocol) if target.tls else None


def changes(old: Config, new: Config) -> list[str]:
    """What differs, a few words each, for the log: hostnames and names of keys, never a value."""
    was, now = _by_hostname(old), _by_hostname(new)
    kinds = {
        "new": [name for name in now if name not in was],
        "changed": [name for name in now if name in was and now[name] != was[name]],
        "gone": [name for name in was if name not in now],
    }
    found = [f"{kind} {some(names)}" for kind, names in kinds.items() if names]
    keys = [KEYS.get(key, key) for key in _changed_keys(old, new) if key != "tunnels"]
    late = " (from the next start on)"
    told = (f"another {key}{late if key in AT_START else ''}" for key in dict.fromkeys(keys))
    return [*found, *told]


def needs_session(old: Config, new: Config) -> bool:
    """Whether the difference needs a new session. With an inspector that there was not before it
    does: the gateway has idle streams in the old one, whose visits it would not see."""
    inspected = old.inspect is None and new.inspect is not None
    return inspected or any(key not in OF_PROCESS for key in _changed_keys(old, new))


def _by_hostname(config: Config) -> dict[str, Tunnel]:
    return {tunnel.hostname: tunnel for tunnel in config.tunnels}


def _changed_keys(old: Config, new: Config) -> Iterator[str]:
    for name, before, now in zip(Config._fields, old, new):
        if name != "secret_files" and before != now:  # not a setting: it follows from others
            yield name
