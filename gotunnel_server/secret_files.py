"""Finds files with secrets of the gateway that other users of the machine can read."""

from gotunnel_agent.common.exposed import exposures

from .certs.folder import key_files
from .config import Config

MOST_LINES = 5  # about ACME_CACHE: a cache that was copied has hundreds of files, all alike


def exposed(config: Config) -> list[str]:
    """Lines for the operator. AGENTS_FILE and CERT_DIR are not among them: they are checked each
    time they are read."""
    lines = exposures(key_files(config.acme_cache))
    if len(lines) > MOST_LINES:
        more = len(lines) - MOST_LINES
        lines[MOST_LINES:] = [f"ACME_CACHE {config.acme_cache}: {more} more such files"]
    return [*exposures(config.secret_files), *lines]
