"""What the TLS contexts of both programs need."""

import ssl

# OpenSSL 3 takes an end of TCP without TLS's farewell (close_notify) for an attack, and would send
# an alert where half-closing clients wait for their answer. HTTP knows by its lengths whether a
# message is whole, and many programs just close.
IGNORE_UNEXPECTED_EOF = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)

# Ciphers of TLS 1.2, as OpenSSL writes them: those with forward secrecy and authenticated
# encryption (RFC 9325 §4.2), no CBC. TLS 1.3 has no others. Programs of the last ten years have
# them, all peers of ours too.
AEAD = "ECDHE+AESGCM:ECDHE+CHACHA20"
