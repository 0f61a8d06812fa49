"""The join string: one line that holds all that an agent needs to know about a gateway.

    gotunnel://NAME:SECRET@HOST:PORT             the agent signs its own tokens (jwt_issuer NAME)
    gotunnel://token:JWT@HOST:PORT               the agent has a token, and no secret
    gotunnel://...@HOST:PORT?ca=sha256:HEX       the SHA-256 of a CA's certificate (DER), which the
                                                 gateway sends along: the agent trusts it alone

HOST:PORT is the tunnel port's address, an IPv6 address in brackets. NAME may be empty. All but
letters, digits and ``-._~`` is percent-encoded in NAME and SECRET (RFC 3986 §2.1), so the line
needs no quotes in a shell, except for the ``?``, which zsh takes for a pattern.

The line is a secret. No error shows any part of it.
"""

import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import quote, unquote_to_bytes

from .addresses import as_host
from .hostnames import MAX_PORT, normal_hostname, valid_hostname
from .quantities import whole_number

SCHEME = "gotunnel://"
TOKEN = "token"  # in the place of NAME: a token follows, and no secret
CA = "ca=sha256:"
EXPECTED = (
    f"{SCHEME}NAME:SECRET@HOST:PORT, as gotunnel-server agents add prints it on the gateway's "
    "machine"
)
# Characters. A registration has 64 KiB, in which a token is the only long part.
MOST = 64 * 1024

_COMMAND = re.compile(r"(?:[#$%>] *)?gotunnel(?:-agent)? join +", re.ASCII)
_PIECE = re.compile(r"(?:[A-Za-z0-9._~-]|%[0-9A-Fa-f]{2})*", re.ASCII)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^][:]*):([0-9]{1,5})", re.ASCII)


class JoinStringError(ValueError):
    """A text is no join string; the error is a line that shows nothing of it."""


@dataclass(frozen=True)
class JoinString:
    """A gateway and a credential. Exactly one of ``secret`` and ``token`` is set, the other is
    ""."""

    host: str  # a hostname or an IP address, without brackets
    port: int
    name: str = ""  # the tokens' issuer; "" with a token
    secret: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    fingerprint: str = ""  # of the CA's certificate: SHA-256, 64 hexadecimal digits; "": none

    @property
    def address(self) -> str:
        """HOST:PORT, as tunnel_addr has it."""
        return f"{as_host(self.host)}:{self.port}"

    def __str__(self) -> str:
        """The line. Raises JoinStringError if an agent could not read it."""
        if not self.token and self.name == TOKEN:
            raise JoinStringError(f"the name {TOKEN} stands for a token, and cannot be an agent's")
        name, credential = (TOKEN, self.token) if self.token else (self.name, self.secret)
        ca = f"?{CA}{self.fingerprint}" if self.fingerprint else ""
        line = f"{SCHEME}{quote(name, safe='')}:{quote(credential, safe='')}@{self.address}{ca}"
        if parse(line) != self:
            raise JoinStringError("the host is not in its normal form")
        return line


def parse(text: str) -> JoinString:
    """Read a join string. Blanks or quotes around it are not a part of it, nor is the
    command before it, if the whole line was copied. Raises JoinStringError."""
    text = _COMMAND.sub("", text.strip())
    if text[:1] in ("'", '"') and text[-1:] == text[:1]:
        text = text[1:-1]  # the Windows command prompt leaves single quotes where they are
    if not text:
        raise JoinStringError(f"no join string came, expected {EXPECTED}")
    if len(text) > MOST:
        raise JoinStringError(f"{len(text)} characters came, expected at most {MOST}")
    if re.search(r"\s", text):
        raise JoinStringError("a blank or a line break is in the join string: copy it as one line")
    if text[: len(SCHEME)].lower() != SCHEME:
        raise JoinStringError(f"the join string does not begin with {SCHEME}, expected {EXPECTED}")
    rest, _, query = text[len(SCHEME) :].partition("?")
    credential, at, address = rest.partition("@")
    name, colon, secret = credential.partition(":")
    if not at or not colon or not address:
        raise JoinStringError(f"the join string is cut or incomplete, expected {EXPECTED}")
    host, port = _address(address.removesuffix("/"))
    credential = _decoded(secret, "secret")
    if not credential.strip():
        raise JoinStringError(f"the join string has no secret, expected {EXPECTED}")
    fingerprint = _fingerprint(query)
    if name == TOKEN:
        return JoinString(host, port, token=credential, fingerprint=fingerprint)
    return JoinString(host, port, _decoded(name, "name"), credential, fingerprint=fingerprint)


def _decoded(piece: str, what: str) -> str:
    """A percent-encoded text. Raises JoinStringError."""
    try:
        if not _PIECE.fullmatch(piece):
            raise ValueError
        text = unquote_to_bytes(piece).decode()
        if not text.isprintable():
            raise ValueError
        return text
    except ValueError:
        raise JoinStringError(
            f"the {what} in the join string is damaged: a character of it is not percent-encoded, "
            "or no text; copy the whole line"
        ) from None


def _address(text: str) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    port = whole_number(match[2]) if match else None
    if match is None or port is None or not 1 <= port <= MAX_PORT:
        raise JoinStringError(
            f"the join string names no HOST and port from 1 to {MAX_PORT} behind its @, expected "
            f"{EXPECTED}"
        )
    try:
        host = match[1]
        if host.startswith("["):
            return str(ipaddress.IPv6Address(host[1:-1])), port
        if host.replace(".", "").isdigit():
            return str(ipaddress.IPv4Address(host)), port
    except ValueError:
        raise JoinStringError(
            "the join string names an IP address that is none behind its @"
        ) from None
    # Underscores are not valid in hostnames, but container networks use them in service names.
    if not valid_hostname(host.replace("_", "x")):
        raise JoinStringError(
            "the join string names a host that is neither a hostname nor an IP address behind its @"
        )
    return normal_hostname(host), port


def _fingerprint(query: str) -> str:
    if not query:
        return ""
    if CA.startswith(query):
        raise JoinStringError("the join string is cut: copy the whole line, and put it in quotes")
    if not query.startswith(CA):
        raise JoinStringError(
            f"what follows the ? in the join string is not {CA}HEX: the gateway may be newer than "
            "this agent; update the agent"
        )
    digits = query.removeprefix(CA).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise JoinStringError(
            f"the fingerprint in the join string has {len(digits)} characters, or others than "
            "0-9 and a-f; expected 64 of them: copy the whole line"
        )
    return digits
