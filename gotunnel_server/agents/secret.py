"""Finds secrets that are easily guessed: JWT_SECRET, and those in AGENTS_FILE."""

from __future__ import annotations

# An attacker with one overheard token can try secrets offline (HS256). A random secret of 16 bytes
# has 128 bits, which is out of reach.
LEAST_SECRET = 16  # bytes
WELL_KNOWN_SECRETS = {
    "to-try-things-out-only",  # conf/server.env
    "supersecretjwtkey",
    "your-256-bit-secret",
    "your-super-secret-key",
    "changemechangeme",
    "changeme",
    "secret",
}


def secret_weakness(secret: str) -> str | None:
    """Why a secret is easily guessed, as "is well known"; None if it is not."""
    if secret.lower() in WELL_KNOWN_SECRETS:
        return "is well known"
    if len(secret.encode()) < LEAST_SECRET:
        return f"is shorter than {LEAST_SECRET} bytes"
    return None
