"""Settings that the TLS contexts of both programs share."""

import ssl

# OpenSSL 3 treats an end of TCP without TLS's close_notify as an error (a truncation attack), and
# would send an alert to clients that half-close and wait for their answer. Many programs close
# without close_notify, and HTTP tells by its lengths whether a message is whole.
IGNORE_UNEXPECTED_EOF = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)

# Ciphers for TLS 1.2, in OpenSSL's notation: forward secrecy and authenticated encryption (AEAD,
# RFC 9325 §4.2), no CBC. TLS 1.3 has no others. Programs of the last ten years know them.
AEAD = "ECDHE+AESGCM:ECDHE+CHACHA20"
