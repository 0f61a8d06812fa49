"""From a token to who its bearer is and what may be claimed (RFC 7519).

    the token's issuer (iss)      is checked with           may claim
    stands in AGENTS_FILE         the secret there alone    what the entry and the token both allow
    any other, or none            JWT_SECRET                what the token allows

HS256 and nothing else, so that a token cannot choose how it is checked. It must say when it ends
(``exp``), and may say ``hosts`` and ``ports``; those that cannot be read are refused, not passed
over. The signature is looked at before anything that depends on the file, and an issuer that is
unknown costs the same work and gets the same text as a wrong secret: a stranger does not
learn which issuers there are.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import jwt

from gotunnel_agent.common.one_line import on_one_line

from . import agents_file, scope
from .agents_file import MAX_NAME, AgentsFileError, Entry
from .identity import MOST_SHOWN, Identity

log = logging.getLogger("gotunnel.credentials")

ALGORITHM = "HS256"
CLOCK_LEEWAY = 60  # seconds that an agent's clock may be off; few small hosts keep better time
MAX_TOKEN = 64 * 1024  # characters; tokens have some hundred, and a control message has no more
MOST_TIME = 253_402_300_800  # the year 10000, in seconds: later is a time in milliseconds

_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")  # RFC 7515 §3.1

# Secrets of less than 32 bytes are in use with Go gateways; at start we say so ourselves, once.
warnings.filterwarnings("ignore", message="The HMAC key is")


class TokenInvalid(Exception):
    """A token does not prove what its bearer says; the text, which that one may read, says why."""


class Credentials:
    """Checks tokens. Any thread."""

    def __init__(
        self, secret: str | None, issuer: str | None = None, agents_file: Path | None = None
    ):
        """``secret``: of those who are not in ``agents_file``, None if nobody else may come.
        ``issuer``: the one that their tokens must have; None permits any. Raises
        AgentsFileError."""
        self._secret = secret
        self._issuer = issuer
        self._path = agents_file
        # Random key for unknown issuers, so that rejecting them takes as long as rejecting a wrong
        # signature (no timing oracle).
        self._nobodys = secrets.token_hex(32)
        self._entries = {}  # by issuer; replaced whole, so that readers need no lock
        self._files = () if agents_file is None else (agents_file,)
        self._seen = None  # the files' stamps when they were read; None: read them again
        self._looked_at = None  # their stamps at the last look
        self._problem = ""  # with the file, that was logged last
        self._said = frozenset()  # warnings that were logged and still hold
        self._reading = threading.Lock()  # held to read: an older state must not follow a newer one
        if agents_file is not None:
            self._read()
            if not self._entries and secret is None:
                log.warning("nobody can register: AGENTS_FILE has no agent, JWT_SECRET is not set")

    def identify(self, token: str) -> Identity:
        """Whom the token speaks for. Raises TokenInvalid if for nobody; its text is one clause that
        its bearer may read."""
        if len(token) > MAX_TOKEN:
            came = len(token)
            raise TokenInvalid(f"the token has {came} characters, expected at most {MAX_TOKEN}")
        if not _COMPACT.fullmatch(token):
            raise TokenInvalid("what came is no token, expected three parts of base64url with dots")
        _check_algorithm(token)
        claimed = _decode(token, None).get("iss", "")
        entry = self._entries.get(claimed) if isinstance(claimed, str) else None
        secret = self._secret if entry is None else entry.secret
        claims = _decode(token, self._nobodys if secret is None else secret)

        # From here on the bearer has the secret.
        if not isinstance(claimed, str) or len(claimed) > MAX_NAME:
            raise TokenInvalid(f"the token's iss is not text of at most {MAX_NAME} characters")
        name = on_one_line(claimed, MOST_SHOWN)
        _check_times(claims)
        if entry is None:
            if self._issuer is not None and claimed != self._issuer:
                came = name or "missing"
                raise TokenInvalid(f"the token's issuer is {came}, expected another one")
        elif why := lapsed(entry):
            raise TokenInvalid(f"issuer {name} {why}")
        # An agent with a secret signs a new one whenever it comes; what names hosts was given.
        ends = _time_of(claims, "exp") if "hosts" in claims else None
        return Identity(claimed, *_claimable(claims, entry), entry, ends)

    def named_ports(self) -> frozenset:
        """The ports that an entry of AGENTS_FILE names by their numbers, not as part of a range.
        Any thread."""
        return frozenset(
            ports[0] for entry in self._entries.values() for ports in entry.ports if len(ports) == 1
        )

    def reload(self, force: bool = False) -> bool:
        """Take up what changed in AGENTS_FILE since it was read; without ``force`` a look at its
        time is all if nothing did, or if it did only now. True if some credential changed.

        It raises nothing: a file that cannot be used is named in the log, once, and what was read
        before stays.
        """
        with self._reading:
            if self._path is None:
                return False
            stamps = agents_file.stamps(self._files)
            # What changed a moment ago may be half written, and be an end to agents in the other
            # half. One more look decides: by a clock that was put back, nothing would ever settle.
            settled = agents_file.are_settled(stamps, time.time()) or stamps == self._looked_at
            self._looked_at = stamps
            if not force and (stamps == self._seen or not settled):
                return False
            before = self._entries
            try:
                self._read()
            except AgentsFileError as error:  # and _seen stays, so that each look reads it again
                if str(error) != self._problem:
                    log.error("%s; what was read before stays", error)
                self._problem = str(error)
                return False
            if self._entries == before:
                if self._problem:
                    log.info("AGENTS_FILE can be read again")
                self._problem = ""
                return False
            self._problem = ""
            log.info("AGENTS_FILE has changed; agents in it now: %d", len(self._entries))
            return True

    def taken_away(self, identity: Identity, hostnames: Iterable[str] = ()) -> str | None:
        """Why a session with these hostnames must end now; None: it may go on. To be asked from
        time to time, also if reload() saw no change: credentials run out."""
        entry, was = self._entries.get(identity.issuer), identity.entry
        issuer = f"issuer {identity.name}"
        if identity.ends is not None and identity.ends <= time.time() - CLOCK_LEEWAY:
            return f"its token expired {shown_seconds(time.time() - identity.ends)} ago"
        if entry is None:
            return None if was is None else f"{issuer} was removed from AGENTS_FILE"
        if was is None:
            return f"{issuer} has got a secret of its own in AGENTS_FILE"
        if why := lapsed(entry):
            return f"{issuer} {why}"
        for what in ("secret", "ports", "limits"):
            if getattr(entry, what) != getattr(was, what):
                verb = "was" if what == "secret" else "were"
                return f"the {what} of {issuer} {verb} changed in AGENTS_FILE"
        for hostname in hostnames:
            if not scope.allows(entry.hosts, hostname):
                return f"{issuer} may no longer claim {hostname}"
        return None

    def _read(self):
        """Read the file. Raises AgentsFileError; then everything is as it was."""
        agents = agents_file.read(self._path)
        stamps = agents_file.stamps(agents.files)
        # What changed while we read, or may change without showing it, is read again next time.
        self._seen = stamps if agents_file.are_settled(stamps, time.time()) else None
        self._files = agents.files
        for warning in agents.warnings:
            if warning not in self._said:
                log.warning("%s", warning)
        self._said = frozenset(agents.warnings)
        self._entries = agents.entries


# --- Tokens --------------------------------------------------------------------------------------


def _check_algorithm(token):
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


def _decode(token, secret):
    """The claims; ``secret`` None: without a look at the signature. What they say is not judged."""
    checks = ("exp", "nbf", "iat", "aud", "iss", "sub", "jti")
    options = {f"verify_{name}": False for name in checks}
    options["verify_signature"] = secret is not None
    try:
        return jwt.decode(token, secret or "", algorithms=[ALGORITHM], options=options)
    except jwt.InvalidSignatureError:
        # The same text for a wrong secret and for no entry: which entries there are is a secret.
        raise TokenInvalid(
            "the token's signature does not fit: compare jwt_secret and jwt_issuer with the "
            "gateway's"
        ) from None
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        # The last three: what a stranger puts into a token can be odder than PyJWT expects.
        raise TokenInvalid("the token's claims cannot be read, expected a JSON object") from None


def _check_times(claims):
    now = time.time()
    exp, iat, nbf = (_time_of(claims, name) for name in ("exp", "iat", "nbf"))
    if exp is None:
        raise TokenInvalid("the token has no exp, expected the time when it ends")
    if exp <= now - CLOCK_LEEWAY:
        ago = shown_seconds(now - exp)
        raise TokenInvalid(f"the token expired {ago} ago: get a new one, or compare the clocks")
    if iat is not None and iat > now + CLOCK_LEEWAY:
        ahead = shown_seconds(iat - now)
        raise TokenInvalid(f"the token was issued {ahead} from now: compare the clocks")
    if nbf is not None and nbf > now + CLOCK_LEEWAY:
        raise TokenInvalid(f"the token begins {shown_seconds(nbf - now)} from now")


def _time_of(claims, name):
    """A claim that is a time (RFC 7519 §2, NumericDate), None if it is missing."""
    value = claims.get(name)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < MOST_TIME:  # which NaN is not either
        raise TokenInvalid(f"the token's {name} is no time, expected seconds since 1970")
    return value


def _claimable(claims, entry):
    """The hosts and ports that a token, and its entry if it has one, allow."""
    hosts, ports = _scope_of(claims, "hosts"), _scope_of(claims, "ports")
    if entry is None:
        return hosts, ports
    return (
        entry.hosts if hosts is None else scope.common_hosts(hosts, entry.hosts),
        entry.ports if ports is None else scope.common_ports(ports, entry.ports),
    )


def _scope_of(claims, name):
    """A claim that narrows what may be claimed, None if it is missing."""
    if name not in claims:
        return None
    read = scope.read_hosts if name == "hosts" else scope.read_ports
    try:
        return read(claims[name])
    except scope.ScopeError as error:
        raise TokenInvalid(f"the token's {name} cannot be read: {error}") from None


def lapsed(entry: Entry) -> str | None:
    """Why an entry of AGENTS_FILE counts no more, as "is disabled"; None: it does."""
    if entry.disabled:
        return "is disabled in AGENTS_FILE"
    left = math.inf if entry.expires is None else entry.expires - time.time()
    return None if left > 0 else f"expired in AGENTS_FILE {shown_seconds(-left)} ago"


def shown_seconds(seconds: float) -> str:
    """A length of time in its largest unit, as "3 h"."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
