"""What the TLS contexts of both programs need."""

import ssl

# OpenSSL 3 takes an end of TCP without TLS's farewell (close_notify) for an attack, and would send
# an alert where half-closing clients wait for their answer. HTTP knows by its lengths whether a
# message is whole, and many programs just close.
IGNORE_UNEXPECTED_EOF = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
