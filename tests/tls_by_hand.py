"""A TLS client whose records are made by hand once it has shaken hands, since Python's ssl cannot
send those without payload (RFC 8446 §5.2, §7; RFC 5246 §6.3, RFC 5288)."""

import hmac
import os
import socket
import ssl
import struct
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, PAYLOAD = range(20, 24)  # types of records
KEY_UPDATE = b"\x18\0\0\1"  # and one byte: whether the peer is to update its own key, too
WARNING, USER_CANCELED, NO_RENEGOTIATION = 1, 90, 100
SUITE_12 = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256"
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class HandTls:
    """A connected socket that has shaken hands; send() what the others make. ``with`` closes it."""

    def __init__(self, sock: socket.socket, version="1.3", hostname="localhost"):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version = context.maximum_version = VERSIONS[version]
        context.set_ciphers(SUITE_12)  # of TLS 1.2 only
        self.socket, self._version = sock, version
        came, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        with tempfile.TemporaryDirectory() as folder:
            keys = Path(folder, "keys")
            context.keylog_filename = str(keys)
            self.tls = context.wrap_bio(came, self._out, server_hostname=hostname)
            said = b""
            while True:
                try:
                    self.tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(self._out.read())
                    data = sock.recv(65536)
                    assert data, "the server has ended the handshake"
                    said += data
                    came.write(data)
            sock.sendall(self._out.read())
            secrets = {line.split()[0]: line.split() for line in keys.read_text().splitlines()}
        if version == "1.3":
            self._hash = "sha384" if "SHA384" in self.tls.cipher()[0] else "sha256"
            self._key_size = 16 if "AES_128" in self.tls.cipher()[0] else 32
            assert "GCM" in self.tls.cipher()[0]
            self._secret = bytes.fromhex(secrets["CLIENT_TRAFFIC_SECRET_0"][2])
            self._take_keys()
        else:
            _, client_random, master = secrets["CLIENT_RANDOM"]
            seed = b"key expansion" + said[11:43] + bytes.fromhex(client_random)
            block, link = b"", seed
            while len(block) < 40:
                link = hmac.digest(bytes.fromhex(master), link, "sha256")
                block += hmac.digest(bytes.fromhex(master), link + seed, "sha256")
            self._cipher, self._iv, self._number = AESGCM(block[:16]), block[32:36], 1

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.socket.close()

    def _expand(self, label, size):
        info = struct.pack("!HB", size, 6 + len(label)) + b"tls13 " + label + b"\0\1"
        return hmac.digest(self._secret, info, self._hash)[:size]

    def _take_keys(self):
        self._cipher = AESGCM(self._expand(b"key", self._key_size))
        self._iv, self._number = self._expand(b"iv", 12), 0

    def record(self, kind, content=b"") -> bytes:
        """One record of a type, encrypted as the next one of ours."""
        number, self._number = self._number.to_bytes(8, "big"), self._number + 1
        if self._version == "1.3":
            content += bytes([kind])
            head = struct.pack("!BHH", PAYLOAD, 0x303, len(content) + 16)
            nonce = bytes(a ^ b for a, b in zip(self._iv, b"\0" * 4 + number))
            return head + self._cipher.encrypt(nonce, content, head)
        head = struct.pack("!BHH", kind, 0x303, len(content) + 24)
        seen = number + struct.pack("!BHH", kind, 0x303, len(content))
        return head + number + self._cipher.encrypt(self._iv + number, content, seen)

    def key_update(self, *, answer=False) -> bytes:
        """A KeyUpdate; ``answer``: the peer is to send one, too."""
        record = self.record(HANDSHAKE, KEY_UPDATE + bytes([answer]))
        self._secret = self._expand(b"traffic upd", len(self._secret))
        self._take_keys()
        return record

    def hello(self) -> bytes:
        """A ClientHello within the connection: a renegotiation (RFC 5746 is not asked for)."""
        body = b"\3\3" + os.urandom(32) + b"\0" + b"\0\4\xc0\x2b\xc0\x2f" + b"\1\0"
        return self.record(HANDSHAKE, b"\1" + len(body).to_bytes(3, "big") + body)
