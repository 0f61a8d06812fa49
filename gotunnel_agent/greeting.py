"""Tells by the first bytes of a peer which protocol it speaks, for messages about a wrong port."""

import re

# What a program says first, or answers to bytes that it does not understand. The first that fits
# counts.
_GREETINGS = (
    (rb"HTTP/\d|<(!doctype|html)", "HTTP"),
    (rb"SSH-", "SSH"),
    (rb"220[ -].*ftp", "FTP"),
    (rb"220[ -].*(smtp|mail|postfix|exim)", "SMTP (mail)"),
    (rb"(220|500|502|554)[ -]", "SMTP or FTP"),
    (rb"\* (OK|PREAUTH|BYE)", "IMAP (mail)"),
    (rb"\+OK", "POP3 (mail)"),
    (rb"-(ERR|NOAUTH|DENIED)", "Redis's protocol"),
    (rb"RFB \d", "VNC"),
    (rb".{3}\0(\n[3-9]\.|\n1\d\.|\xff)", "MySQL's protocol"),
    (rb"AMQP", "AMQP"),
    (rb"[\x14-\x17]\x03[\x00-\x04]", "TLS"),
    # A SETTINGS frame, the first that an HTTP/2 server sends (RFC 9113 §3.4).
    (rb"\0.{2}\x04\0\0\0\0\0", "HTTP/2"),
)
_PATTERNS = [(re.compile(pattern, re.I | re.DOTALL), name) for pattern, name in _GREETINGS]


def protocol_of(first: bytes) -> str:
    """The protocol of a peer's ``first`` bytes; "" if it is not known."""
    line = first[:200]
    return next((name for pattern, name in _PATTERNS if pattern.match(line)), "")
