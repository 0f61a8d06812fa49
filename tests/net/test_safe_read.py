"""Files of other people: nothing blocks, nothing is endless."""

import datetime
import os
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support import ROOT

from gotunnel_server.net.safe_read import MALFORMED, MOST_BYTES, Unfit, read


def test_a_regular_file_is_read_whole(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * MOST_BYTES)
    (tmp_path / "link").symlink_to("file")
    assert read(tmp_path / "link") == read(str(tmp_path / "file")) == b"x" * MOST_BYTES


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero", "/dev/null"):
        with pytest.raises(Unfit) as caught:
            read(path)
        assert caught.value.strerror == "not a regular file" and caught.value.filename == str(path)
    with pytest.raises(IsADirectoryError):
        read(tmp_path)


def test_a_long_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * (MOST_BYTES + 1))
    with pytest.raises(Unfit, match="longer than"):
        read(tmp_path / "file")


def certificate(key, name):
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder().subject_name(name).issuer_name(name)
        .public_key(key.public_key()).serial_number(5)
        .not_valid_before(now).not_valid_after(now + datetime.timedelta(days=9))
        .sign(key, hashes.SHA256())
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_a_certificate_with_any_byte_changed_is_malformed_or_fine():
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a.test")])
    der = certificate(key, name).public_bytes(serialization.Encoding.DER)
    refused = 0
    for place in range(len(der)):
        for value in (0, 7, 0xA3, 0xFF):
            changed = der[:place] + bytes([value]) + der[place + 1 :]
            try:
                leaf = x509.load_der_x509_certificate(changed)
                leaf.public_key(), leaf.issuer.rfc4514_string(), leaf.subject, leaf.extensions
            except MALFORMED:
                refused += 1
    assert refused > len(der)


LOOK = """
import sys
sys.path.insert(0, sys.argv[1])
from cryptography import x509
from gotunnel_server.certs import cert_dir
x509.load_der_x509_certificate(bytes.fromhex(sys.argv[2])).issuer
"""


@pytest.mark.filterwarnings("ignore:Attribute's length")
def test_a_name_that_is_too_long_is_no_line_in_the_log():
    key = ec.generate_private_key(ec.SECP256R1())
    der = certificate(key, x509.Name([
        x509.NameAttribute(x509.NameOID.COMMON_NAME, "n" * 65, _validate=False)
    ])).public_bytes(serialization.Encoding.DER)  # fmt: skip
    command = [sys.executable, "-c", LOOK, str(ROOT), der.hex()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")
