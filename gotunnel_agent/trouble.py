"""Says why there is no session with the gateway, and what to do: for the agent's log and status.

Each function takes what the network, TLS or the gateway has said, and returns one line.
"""

import os
import socket
import ssl

from gotunnel import SPEAKS_HTTP, SessionClosed

from .config import Config
from .connect import NoAnswer
from .mistakes import QUOTES, TOKEN
from .second_look import is_of_staging, shown, trusted_names
from .trust import (
    EXPIRED,
    NO_SYSTEM_CAS,
    NO_TLS,
    NOT_YET_VALID,
    OTHER_ADDRESS,
    OTHER_NAME,
    UNKNOWN_CA,
    UNKNOWN_NAME,
    ClosedInHandshake,
    NoTLS,
    clock_advice,
    system_has_no_cas,
    this_clock,
)

NO_PROGRAM = "connection refused: no program listens there"
RIGHT_PORT = "tunnel_addr has to name the gateway's TUNNEL_PORT (9443)"
PROTOCOL_ERROR = "protocol error"  # how a session says that it ends by one
OWN_CA = "if it has a CA of its own, ca_file has to name that"
OTHER_CA = (
    "ca_file names another CA: if the gateway has a new one, join it again, with what "
    "gotunnel-server agents rotate prints"
)
STAGING = (
    "it is from Let's Encrypt's staging environment, which is for trials; the gateway needs "
    "ACME_ENV=production"
)
RIGHT_HOST = "tunnel_addr has to name the gateway's TUNNEL_HOST"


def of_dial(error: OSError, config: Config | None, *, served: bool = False) -> str:
    """Why there is no connection, or it has ended. ``served``: the gateway had accepted the agent.
    With a ``config`` the gateway may be dialled again, to say more about its certificate."""
    text = error.strerror or str(error)
    if isinstance(error, ConnectionRefusedError):
        return NO_PROGRAM
    if isinstance(error, ssl.SSLCertVerificationError):
        return of_certificate(error, config)
    if isinstance(error, socket.gaierror):
        return f"no address was found ({text}); check the name in tunnel_addr, and DNS"
    if isinstance(error, ClosedInHandshake):
        return f"the program there {error}; {RIGHT_PORT}, or the gateway has too many connections"
    if isinstance(error, NoTLS):
        kind = ", as a gateway's dashboard and port 80 do" if error.protocol == "HTTP" else ""
        return f"the program there {error}{kind}; {RIGHT_PORT}"
    if SPEAKS_HTTP in text:
        return f"the program there speaks HTTP, so this may be the port for visitors; {RIGHT_PORT}"
    if isinstance(error, ssl.SSLError):
        if error.reason == UNKNOWN_NAME:
            return f"the gateway there knows no such hostname; {RIGHT_HOST}"
        if error.reason in NO_TLS:
            return f"the program there does not speak TLS; {RIGHT_PORT}"
        return f"the TLS handshake failed ({error.reason or text}); {RIGHT_PORT}"
    if isinstance(error, NoAnswer):
        return f"no answer; {RIGHT_PORT}, and firewalls have to let that through"
    if not served and isinstance(error, SessionClosed):
        if text.startswith(PROTOCOL_ERROR):
            return f"it does not speak gotunnel's protocol ({text}); {RIGHT_PORT}"
        return f"{text} before it accepted the agent; {RIGHT_PORT}"
    if not served and isinstance(error, TimeoutError):
        return f"{text}; {RIGHT_PORT}"
    return text


def of_certificate(error: ssl.SSLCertVerificationError, config: Config | None) -> str:
    """Why the gateway's certificate does not count; ``config`` as for of_dial()."""
    text = f"its certificate is not to be trusted: {error.verify_message.rstrip('.')}"
    advice = _advice(error.verify_code, config)
    return f"{text}; {advice}" if advice else text


def _advice(code: int, config: Config | None) -> str:
    if code in (NOT_YET_VALID, EXPIRED):
        return clock_advice(code, "the gateway has to renew it")
    place = None if config is None else (config.tunnel_host, config.tunnel_port)
    ca_file = None if config is None else config.ca_file
    if code in (OTHER_NAME, OTHER_ADDRESS):
        names = place and trusted_names(*place, ca_file=ca_file)
        return RIGHT_HOST + (f"; the certificate there is for {shown(names)}" if names else "")
    if code not in UNKNOWN_CA:
        return ""
    if ca_file is None and system_has_no_cas(code):
        return NO_SYSTEM_CAS
    if place and ca_file and trusted_names(*place) is not None:
        return "it is from a CA that this system trusts, so remove ca_file"
    if place and is_of_staging(*place):
        return STAGING
    return OWN_CA if ca_file is None else OTHER_CA


def lasts(error: OSError) -> bool:
    """Whether a dial fails again until somebody changes something."""
    if isinstance(error, ClosedInHandshake):  # the gateway stops, or has too many connections
        return False
    if isinstance(error, (ssl.SSLCertVerificationError, NoTLS)) or SPEAKS_HTTP in str(error):
        return True
    return isinstance(error, ssl.SSLError) and error.reason in (*NO_TLS, UNKNOWN_NAME)


def of_refusal(text: str, config: Config) -> str:
    """What to do about a refusal by the gateway, to be put behind its words; "" if there is no more
    to say."""
    if not text.startswith("auth failed"):
        return ""
    found = _doubts(config)
    if "signature" in text and config.jwt_secret and not config.jwt_issuer:
        found.append("there is no jwt_issuer, which a secret of AGENTS_FILE needs")
    if "clock" in text:
        found.append(f"this machine's clock says {this_clock()}")
    return "".join(f"; {doubt}" for doubt in found)


def _doubts(config: Config) -> list[str]:
    """What looks wrong with the credential. None of it shows a character of that."""
    key = "token" if config.token else "jwt_secret"
    text = config.token or config.jwt_secret
    bare = text.strip()
    checks = [
        (bare != text, "begins or ends with a blank"),
        ("\n" in bare, "has a line break in it"),
        (bare[:1] in {*QUOTES, *"\"'"}, "begins with a quotation mark, which is part of it"),
    ]
    if config.token:
        checks += [
            (bare.lower().startswith("bearer "), "has the word Bearer in front"),
            (_is_file(bare), "is the path of a file: token_file takes that"),
        ]
    else:
        checks.append((TOKEN.fullmatch(bare) is not None, "looks like a token: token takes that"))
    return [f"{key} {words}" for doubtful, words in checks if doubtful]


def _is_file(text: str) -> bool:
    try:
        return os.path.isfile(text)
    except (OSError, ValueError):
        return False
