"""The join string that the gateway prints with a new credential: its address, the credential, and
the fingerprint of its CA, if that is one that an agent's system does not know.

    ACME_ENV=local     the gateway's own CA, whose certificate goes along with each leaf
    CERT_DIR           a private CA, if its certificate is in the file of TUNNEL_HOST, behind the
                       leaf
    ACME               none: systems know public CAs; a private one has to be named by --ca-file
"""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from gotunnel_agent.common.join_string import JoinString, JoinStringError

from ..certs.cert_dir import Pair
from ..certs.local_ca import FOLDER as LOCAL_FOLDER
from ..certs.local_ca import Authority, CertificateError
from ..config import DIRECTORIES, Config
from ..net import safe_read
from ..net.safe_read import MALFORMED
from .certificates import read_pairs

COMMAND = "gotunnel join"


class NoInvitation(Exception):
    """No join string can be printed; the text says why, and what to do."""


def join_string(config: Config, *, name: str = "", secret: str = "", token: str = "") -> str:
    """The join string for a secret of the agent ``name``, or for a token. Raises NoInvitation."""
    if not config.tunnel_port:
        raise NoInvitation("TUNNEL_PORT is auto, so agents do not know it: set one")
    joined = JoinString(
        config.tunnel_host, config.tunnel_port, name, secret, token, fingerprint(config)
    )
    try:
        return str(joined)
    except JoinStringError as error:
        raise NoInvitation(str(error)) from None


def command(text: str) -> str:
    """The line that the agent's operator types. All shells take the double quotes; zsh needs some,
    for the ``?``."""
    return f'{COMMAND} "{text}"' if "?" in text else f"{COMMAND} {text}"


def remarks(config: Config) -> Iterator[str]:
    """What keeps an agent from joining now."""
    if config.acme is None:
        return
    if config.acme.directory == DIRECTORIES["staging"]:
        yield (
            "ACME_ENV is staging: no agent trusts those certificates. Set ACME_ENV=production "
            "before the agent joins"
        )
    elif config.acme.ca_file is not None:
        yield (
            "the CA is a private one (ACME_CA_FILE): an agent whose system does not trust it needs "
            f"a copy of its root: {COMMAND} --ca-file ROOT STRING"
        )


def fingerprint(config: Config) -> str:
    """The SHA-256 of the CA's certificate that agents have to trust, in hexadecimal digits; "" if
    their systems trust it. Raises NoInvitation."""
    if config.cert_dir is not None and (pair := _pair_of(config.cert_dir, config.tunnel_host)):
        return _root_in(pair)
    if not config.local_ca:
        return ""
    folder = config.acme_cache / LOCAL_FOLDER
    if not os.path.exists(folder / "ca.crt") and not _is_ours(folder):
        raise NoInvitation(
            f"the gateway makes its CA in {folder} when it first starts, as its own user: start "
            "it, and let it print a join string by: gotunnel-server agents rotate NAME"
        )
    try:
        return _digest(safe_read.read(Authority(folder).ca_file))
    except (CertificateError, OSError, *MALFORMED) as error:
        raise NoInvitation(str(error)) from None


def _is_ours(folder: Path) -> bool:
    """Whether we may make a folder that the gateway has to write later: the folder that exists
    above it is this user's, and not root's on behalf of another."""
    above = next(path for path in folder.absolute().parents if os.path.exists(path))
    return above.stat().st_uid == os.geteuid()


def _pair_of(cert_dir: Path, hostname: str) -> Pair | None:
    """The pair in CERT_DIR that is served to agents; None if there is none."""
    try:
        cert_dir_read = read_pairs(cert_dir)
    except CertificateError:  # the gateway's start names it
        return None
    wildcard = "*." + hostname.partition(".")[2]
    for name in (hostname, wildcard):
        fitting = [pair for pair in cert_dir_read.report.pairs if name in pair.names]
        if fitting:
            return max(fitting, key=lambda pair: pair.ends)
    return None


def _root_in(pair: Pair) -> str:
    """The fingerprint of the last certificate of a pair, if it is a root that this system does not
    trust; else ""."""
    try:
        last = x509.load_pem_x509_certificates(safe_read.read(pair.certificate_file))[-1]
    except (OSError, *MALFORMED):  # it has changed just now
        return ""
    content = last.public_bytes(Encoding.DER)
    if last.issuer != last.subject or content in ssl.create_default_context().get_ca_certs(True):
        return ""
    return hashlib.sha256(content).hexdigest()


def _digest(pem: bytes) -> str:
    certificate = x509.load_pem_x509_certificate(pem)
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
