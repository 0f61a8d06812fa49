"""Checks agents' tokens (JWT, RFC 7519). A good token gives an Identity: what the agent may claim.

    the token's issuer (iss)      is checked with           may claim
    stands in AGENTS_FILE         the secret there alone    what the entry and the token both allow
    any other, or none            JWT_SECRET                what the token allows

Each of them may have two secrets for a while, the new one and the old one. When the old one is
gone, sessions that it has signed for are asked to come again (RETIRED), and end if they do not.

HS256 is the only algorithm, so that a token cannot choose how it is checked. A token must have an
end (``exp``) and may have ``hosts`` and ``ports``; a token whose hosts or ports cannot be read is
refused. The signature is checked before anything that depends on the file. An unknown issuer costs
the same work and gets the same text as a wrong secret, so that a stranger does not learn which
issuers there are.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jwt

from gotunnel_agent.common.one_line import on_one_line

from . import agents_file, scope
from .agents_file import MAX_NAME, AgentsFileError, Entry, Stamps
from .identity import MOST_SHOWN, Identity

log = logging.getLogger("gotunnel.credentials")

ALGORITHM = "HS256"
# Seconds that a session may go on whose token was signed with the older one of two secrets, when
# that is removed or its date has passed. A new token signed with it is refused at once.
RETIRED = 30
CLOCK_LEEWAY = 60  # seconds that an agent's clock may be off, as small hosts' clocks often are
MAX_TOKEN = 64 * 1024  # characters; tokens have a few hundred, a control message has no more room
MOST_TIME = 253_402_300_800  # seconds, the year 10000; a larger number is in milliseconds

# Claims that PyJWT must not check: identify() checks those that matter, with better texts.
_HALF = re.compile("[\ud800-\udfff]")
CHECKS_OF_CLAIMS = ("exp", "nbf", "iat", "aud", "iss", "sub", "jti")

Scope = TypeVar("Scope")

_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")  # RFC 7515 §3.1

# PyJWT warns of secrets below 32 bytes at each token. The gateway warns at start, once, and only
# below LEAST_SECRET (secret.py), as shorter ones than 32 bytes are in use with Go gateways.
warnings.filterwarnings("ignore", message="The HMAC key is")


class TokenInvalid(Exception):
    """A token is refused; the text says why, and the agent may read it."""


class NoFit(TokenInvalid):
    """The token was signed with another secret."""


class Credentials:
    """Checks tokens. Any thread."""

    def __init__(
        self,
        secret: str | None,
        issuer: str | None = None,
        agents_file: Path | None = None,
        old_secret: str | None = None,
    ):
        """``secret`` checks the tokens of agents that are not in ``agents_file``; None: no other
        agents may register. ``old_secret`` is accepted as well; None: there is none. ``issuer`` is
        the one that their tokens must have; None: any. Raises AgentsFileError."""
        self._shared = _pair(secret, old_secret)  # replaced whole
        self._issuer = issuer
        # Issuer and secret that was the older one of two: until when (monotonic) its sessions may
        # go on. The issuer of the shared secret is None.
        self._retired: dict[tuple[str | None, str], float] = {}
        self._path = agents_file
        # Random key for unknown issuers, so that rejecting them takes as long as rejecting a wrong
        # signature (no timing oracle).
        self._random_secret = secrets.token_hex(32)
        self._entries: Mapping[str, Entry] = {}  # by issuer; replaced whole: readers take no lock
        self._files: tuple[Path, ...] = () if agents_file is None else (agents_file,)
        self._seen: Stamps | None = None  # the files' stamps when they were read; None: read again
        self._looked_at: Stamps | None = None  # their stamps at the last look
        self._problem = ""  # the last logged problem with the file; "" once it can be read again
        self._said: frozenset[str] = frozenset()  # logged warnings that still hold
        self._reading = threading.Lock()  # held to read, so that no older state follows a newer one
        if agents_file is not None:
            self._read(agents_file)
            if not self._entries and secret is None:
                log.warning("no agent can register: AGENTS_FILE has none, and JWT_SECRET is not "
                            "set; add one with: gotunnel-server agents add")  # fmt: skip

    def identify(self, token: str) -> Identity:
        """Check a token. Raises TokenInvalid, whose text is one clause that the agent may read."""
        if len(token) > MAX_TOKEN:
            size = len(token)
            raise TokenInvalid(f"the token has {size} characters, expected at most {MAX_TOKEN}")
        if not _COMPACT.fullmatch(token):
            raise TokenInvalid("the token is malformed, expected three base64url parts with dots")
        _check_algorithm(token)
        claimed = _decode(token, None).get("iss", "")
        entry = self._entries.get(claimed) if isinstance(claimed, str) else None
        accepted = self._shared if entry is None else entry.accepted(time.time())
        claims, secret = self._check(token, accepted)

        # From here on the agent has the secret.
        if not isinstance(claimed, str) or len(claimed) > MAX_NAME:
            raise TokenInvalid(f"the token's iss is not text of at most {MAX_NAME} characters")
        if _HALF.search(claimed):  # JSON permits it; it cannot be hashed, sent or written
            raise TokenInvalid("the token's iss has half of a surrogate pair, expected text")
        name = on_one_line(claimed, MOST_SHOWN)
        _check_times(claims)
        if entry is None:
            if self._issuer is not None and claimed != self._issuer:
                came = name or "missing"
                raise TokenInvalid(f"the token's issuer is {came}, expected another one")
        elif why := lapsed(entry):
            raise TokenInvalid(f"issuer {name} {why}")
        # An agent that holds a secret signs a new token whenever it registers, so the session may
        # outlive it. A token with hosts was given to the agent, and ends the session with it.
        ends = _time_of(claims, "exp") if "hosts" in claims else None
        hosts, ports = _claimable(claims, entry)
        return Identity(claimed, hosts, ports, entry, ends, secret)

    def _check(self, token: str, accepted: Iterable[str]) -> tuple[dict[str, Any], str]:
        """The claims, and the secret that fits. Always two are tried before a refusal, so that its
        time does not tell which issuers have two (no timing oracle). Raises TokenInvalid."""
        first, second, *_ = *accepted, self._random_secret, self._random_secret
        try:
            return _decode(token, first), first
        except NoFit:
            return _decode(token, second), second

    def change_shared(self, secret: str | None, old_secret: str | None, issuer: str | None) -> None:
        """Accept another shared secret from now on. Call Tunnels.end_revoked() then."""
        before, self._shared = self._shared, _pair(secret, old_secret)
        self._issuer = issuer
        self._retire(None, before, self._shared)

    def _retire(self, issuer: str | None, before: tuple[str, ...], now: tuple[str, ...]) -> None:
        """Note an old secret that is gone while the new one stays: a rotation has ended."""
        if len(before) == 2 and now[:1] == before[:1] and before[1] not in now:
            at = time.monotonic()
            self._retired = {key: until for key, until in self._retired.items() if until > at}
            self._retired[issuer, before[1]] = at + RETIRED

    def is_retired(self, identity: Identity) -> bool:
        """Whether the agent should come again, with a token of the new secret."""
        entry = None if identity.entry is None else self._entries.get(identity.issuer)
        if entry is not None and entry.old_until is not None:
            if identity.secret == entry.old_secret:
                return entry.old_until <= time.time() < entry.old_until + RETIRED
        issuer = None if identity.entry is None else identity.issuer
        return time.monotonic() < self._retired.get((issuer, identity.secret), 0)

    def named_ports(self) -> frozenset[int]:
        """The ports that AGENTS_FILE names one by one, not as part of a range. Any thread."""
        return frozenset(
            ports[0] for entry in self._entries.values() for ports in entry.ports if len(ports) == 1
        )

    def reload(self, force: bool = False) -> bool:
        """Read AGENTS_FILE again if it has changed. True if some credential changed.

        Without ``force`` the file is not read if its stamp is the same, or changed only now.
        Raises nothing: the log names a problem with the file, once, and what was read before stays.
        """
        with self._reading:
            path = self._path
            if path is None:
                return False
            stamps = agents_file.stamps(self._files)
            # A file that changed a moment ago may be half written, and the agents in its other half
            # would be cut off. So it is read when it has settled, or when a second check finds it
            # the same: if the clock was set back, the file would not settle for long.
            settled = agents_file.are_settled(stamps, time.time()) or stamps == self._looked_at
            self._looked_at = stamps
            if not force and (stamps == self._seen or not settled):
                return False
            before = self._entries
            try:
                self._read(path)
            except AgentsFileError as error:  # _seen stays, so that each look reads it again
                if str(error) != self._problem:
                    log.error("%s; the entries read before stay in force", error)
                self._problem = str(error)
                return False
            self._retire_all(before)
            if self._entries == before:
                if self._problem:
                    log.info("AGENTS_FILE can be read again")
                self._problem = ""
                return False
            self._problem = ""
            log.info("AGENTS_FILE has changed; agents in it now: %d", len(self._entries))
            return True

    def _retire_all(self, before: Mapping[str, Entry]) -> None:
        """Note which old secrets are gone since the last look."""
        for name, was in before.items():
            entry = self._entries.get(name)
            if entry is not None and was.old_secret:
                now = (entry.secret, entry.old_secret)
                self._retire(name, (was.secret, was.old_secret), now)

    def why_revoked(self, identity: Identity, hostnames: Iterable[str] = ()) -> str | None:
        """Why a session with these hostnames must end now; None if it may go on. To be called from
        time to time, also if reload() saw no change: credentials expire."""
        entry, was = self._entries.get(identity.issuer), identity.entry
        issuer = f"issuer {identity.name}"
        if identity.ends is not None and identity.ends <= time.time() - CLOCK_LEEWAY:
            return f"its token expired {shown_seconds(time.time() - identity.ends)} ago"
        if entry is None and was is None:
            gone = identity.secret and identity.secret not in self._shared
            gone = gone and not self.is_retired(identity)
            return "JWT_SECRET was changed" if gone else None
        if entry is None:
            return f"{issuer} was removed from AGENTS_FILE"
        if was is None:
            return f"{issuer} has got a secret of its own in AGENTS_FILE"
        if why := lapsed(entry):
            return f"{issuer} {why}"
        accepted = (identity.secret or was.secret) in entry.accepted(time.time())
        if not accepted and not self.is_retired(identity):
            return f"the secret of {issuer} was changed in AGENTS_FILE"
        for what in ("ports", "limits"):
            if getattr(entry, what) != getattr(was, what):
                return f"the {what} of {issuer} were changed in AGENTS_FILE"
        for hostname in hostnames:
            if not scope.allows(entry.hosts, hostname):
                return f"{issuer} may no longer claim {hostname}"
        return None

    def _read(self, path: Path) -> None:
        """Read the file. Raises AgentsFileError; then everything is as it was."""
        agents = agents_file.read(path)
        stamps = agents_file.stamps(agents.files)
        # A file that has not settled may have changed while it was read: it is read again.
        self._seen = stamps if agents_file.are_settled(stamps, time.time()) else None
        self._files = agents.files
        for warning in agents.warnings:
            if warning not in self._said:
                log.warning("%s", warning)
        self._said = frozenset(agents.warnings)
        self._entries = agents.entries


def _pair(secret: str | None, old_secret: str | None) -> tuple[str, ...]:
    return tuple(text for text in (secret, old_secret) if text is not None)


# --- Tokens --------------------------------------------------------------------------------------


def _check_algorithm(token: str) -> None:
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        raise TokenInvalid("the token cannot be read, expected a JSON Web Token") from None
    algorithm = header.get("alg")
    if algorithm != ALGORITHM:
        came = on_one_line(algorithm, 20) if isinstance(algorithm, str) else "missing"
        raise TokenInvalid(f"the token's algorithm is {came}, expected {ALGORITHM}")
    if "crit" in header:  # extensions that must be understood (RFC 7515 §4.1.11)
        raise TokenInvalid("the token's header has crit, expected none")


def _decode(token: str, secret: str | None) -> dict[str, Any]:
    """The claims, unchecked; ``secret`` None: the signature is not checked either."""
    options: Any = {f"verify_{name}": False for name in CHECKS_OF_CLAIMS}
    options["verify_signature"] = secret is not None
    try:
        return jwt.decode(token, secret or "", algorithms=[ALGORITHM], options=options)
    except jwt.InvalidSignatureError:
        # The same text for a wrong secret and for an unknown issuer: see the module.
        raise NoFit(
            "the token's signature does not fit: compare jwt_secret and jwt_issuer with the "
            "gateway's"
        ) from None
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        # The last three: PyJWT does not expect everything that a stranger may put into a token.
        raise TokenInvalid("the token's claims cannot be read, expected a JSON object") from None


def _check_times(claims: Mapping[str, Any]) -> None:
    """Only after the signature: a stranger is told nothing about the gateway's clock."""
    now = time.time()
    # An agent that holds a secret signs its tokens when it dials. One with hosts was made for it.
    whose = "its issuer's" if "hosts" in claims else "the agent's"
    set_it = f"; {CLOCK_LEEWAY} s are allowed. Set the clock that is wrong"
    exp, iat, nbf = (_time_of(claims, name) for name in ("exp", "iat", "nbf"))
    if exp is None:
        raise TokenInvalid("the token has no exp, expected the time when it expires")
    if exp <= now - CLOCK_LEEWAY:
        advice = "get a new one, or compare the clocks"
        if iat is not None and iat < exp and "hosts" not in claims:
            advice = f"the agent's clock is {now - iat:.0f} s behind the gateway's{set_it}"
        raise TokenInvalid(f"the token expired {shown_seconds(now - exp)} ago: {advice}")
    if iat is not None and iat > now + CLOCK_LEEWAY:
        advice = f"{whose} clock is {iat - now:.0f} s ahead of the gateway's{set_it}"
        raise TokenInvalid(f"the token was issued {shown_seconds(iat - now)} from now: {advice}")
    if nbf is not None and nbf > now + CLOCK_LEEWAY:
        advice = f"wait {nbf - now:.0f} s, or set {whose} clock back if it is that much ahead"
        raise TokenInvalid(f"the token begins {shown_seconds(nbf - now)} from now: {advice}")


def _time_of(claims: Mapping[str, Any], name: str) -> float | None:
    """A claim that is a time (RFC 7519 §2, NumericDate), None if it is missing."""
    value = claims.get(name)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < MOST_TIME:  # NaN fails here as well
        raise TokenInvalid(f"the token's {name} is not a time, expected seconds since 1970")
    return float(value)


def _claimable(
    claims: Mapping[str, Any], entry: Entry | None
) -> tuple[tuple[str, ...] | None, tuple[range, ...] | None]:
    """The hosts and ports that a token allows; with an entry, those that both allow."""
    hosts = _scope_of(claims, "hosts", scope.read_hosts)
    ports = _scope_of(claims, "ports", scope.read_ports)
    if entry is None:
        return hosts, ports
    return (
        entry.hosts if hosts is None else scope.common_hosts(hosts, entry.hosts),
        entry.ports if ports is None else scope.common_ports(ports, entry.ports),
    )


def _scope_of(
    claims: Mapping[str, Any], name: str, read: Callable[[object], Scope]
) -> Scope | None:
    """A claim that limits what may be claimed, None if it is missing."""
    if name not in claims:
        return None
    try:
        return read(claims[name])
    except scope.ScopeError as error:
        raise TokenInvalid(f"the token's {name} cannot be read: {error}") from None


def lapsed(entry: Entry) -> str | None:
    """Why an entry of AGENTS_FILE has lapsed, that is, was disabled or has expired: "is disabled in
    AGENTS_FILE", for example. None if the entry is valid."""
    if entry.disabled:
        return "is disabled in AGENTS_FILE"
    left = math.inf if entry.expires is None else entry.expires - time.time()
    return None if left > 0 else f"expired in AGENTS_FILE {shown_seconds(-left)} ago"


def shown_seconds(seconds: float) -> str:
    """A length of time in its largest unit, such as "3 h"."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
