"""The local CA: what it signs, what it keeps, and what it refuses to replace."""

import ipaddress
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gotunnel_server.certs import local_ca
from gotunnel_server.certs.local_ca import Authority, CertificateError, read_pair

ROOT = Path(__file__).resolve().parent.parent.parent
LONGEST_HOSTNAME = ".".join(["a" * 61] * 4) + ".abcde"  # 253 characters


def certificate_in(file):
    return x509.load_pem_x509_certificate(file.read_bytes())


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind)


def mode(path):
    return path.stat().st_mode & 0o777


# The CA


def test_first_start_makes_a_ca_that_may_only_sign_leaves(tmp_path):
    ca = certificate_in(Authority(tmp_path / "ca").ca_file)
    constraints = extension(ca, x509.BasicConstraints)
    usage = extension(ca, x509.KeyUsage)
    assert constraints.critical and constraints.value.ca and constraints.value.path_length == 0
    assert usage.critical and usage.value.key_cert_sign and not usage.value.digital_signature
    assert extension(ca, x509.SubjectKeyIdentifier).value.digest
    assert isinstance(ca.public_key().curve, ec.SECP256R1)
    assert ca.not_valid_after_utc - ca.not_valid_before_utc == timedelta(days=3650)


def test_ca_names_say_what_they_are_and_differ(tmp_path):
    names = {
        certificate_in(Authority(tmp_path / folder).ca_file)
        .subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0]
        .value
        for folder in ("one", "two")
    }
    assert len(names) == 2
    assert all(name.startswith("gotunnel local CA ") for name in names)


def test_keys_are_for_their_owner_only(tmp_path):
    folder = tmp_path / "new" / "ca"
    _, key_file = Authority(folder).issue("app.test")
    assert mode(folder) == 0o700
    assert mode(folder / "ca.key") == mode(key_file) == 0o600


def test_second_start_reads_the_same_ca(tmp_path):
    first = Authority(tmp_path).ca_file.read_bytes()
    assert Authority(tmp_path).ca_file.read_bytes() == first


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("ca.crt", b"", "ca.crt: not a certificate"),
        ("ca.crt", b"-----BEGIN CERTIFICATE-----\nAAAA\n", "ca.crt: not a certificate"),
        ("ca.key", b"no key", "ca.key: not a private key"),
        ("ca.crt", None, "ca.crt: No such file"),
        ("ca.key", None, "ca.key: No such file"),
    ],
)
def test_reject_broken_ca_and_leave_it_alone(tmp_path, name, content, complaint):
    Authority(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CertificateError) as raised:
        Authority(tmp_path)
    assert complaint in str(raised.value)
    assert "remove both" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_reject_ca_with_the_key_of_another(tmp_path):
    Authority(tmp_path / "one")
    Authority(tmp_path / "two")
    (tmp_path / "two" / "ca.key").replace(tmp_path / "one" / "ca.key")
    with pytest.raises(CertificateError, match="ca.key: not the key of ca.crt"):
        Authority(tmp_path / "one")


def test_reject_ca_that_ran_out(tmp_path, monkeypatch):
    monkeypatch.setattr(local_ca, "CA_LIFETIME", timedelta(minutes=30))  # of a backdated hour
    with pytest.raises(CertificateError, match="ca.crt: expired on"):
        Authority(tmp_path)


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()  # a folder without write permission would not stop root
    with pytest.raises(CertificateError) as raised:
        Authority(tmp_path / "file" / "ca")
    assert str(tmp_path / "file" / "ca") in str(raised.value)
    assert "make it writable" in str(raised.value)
    assert "\n" not in str(raised.value)


# Leaves


def test_leaf_is_for_a_server_of_that_name(tmp_path):
    ca = Authority(tmp_path)
    certificate_file, key_file = ca.issue("app.test")
    assert (certificate_file, key_file) == (tmp_path / "app.test.crt", tmp_path / "app.test.key")
    leaf, _ = read_pair(certificate_file, key_file)
    signer = certificate_in(ca.ca_file)
    leaf.verify_directly_issued_by(signer)
    names = extension(leaf, x509.SubjectAlternativeName)
    assert names.critical  # RFC 5280 §4.2.1.6: must be, under an empty subject
    assert list(names.value) == [x509.DNSName("app.test")]
    assert list(extension(leaf, x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not extension(leaf, x509.BasicConstraints).value.ca
    assert (
        extension(leaf, x509.AuthorityKeyIdentifier).value.key_identifier
        == extension(signer, x509.SubjectKeyIdentifier).value.digest
    )
    assert isinstance(leaf.public_key().curve, ec.SECP256R1)


def test_a_chain_ends_with_the_ca_also_if_an_earlier_version_left_it_out(tmp_path):
    ca = Authority(tmp_path)
    certificate_file, _ = ca.issue("app.test")
    pem = certificate_file.read_bytes()
    assert pem.endswith(ca.ca_file.read_bytes()) and pem.count(b"BEGIN CERTIFICATE") == 2
    certificate_file.write_bytes(pem.removesuffix(ca.ca_file.read_bytes()))
    assert ca.issue("app.test")[0].read_bytes().endswith(ca.ca_file.read_bytes())


def test_leaf_lives_397_days_and_began_an_hour_ago(tmp_path):
    leaf = certificate_in(Authority(tmp_path).issue("app.test")[0])
    now = datetime.now(timezone.utc)
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(days=397)
    assert timedelta(minutes=59) < now - leaf.not_valid_before_utc < timedelta(minutes=70)


@pytest.mark.parametrize(
    "hostname, name",
    [
        ("localhost", x509.DNSName("localhost")),
        ("*.app.test", x509.DNSName("*.app.test")),
        ("xn--bcher-kva.test", x509.DNSName("xn--bcher-kva.test")),
        ("127.0.0.1", x509.IPAddress(ipaddress.ip_address("127.0.0.1"))),
        ("::1", x509.IPAddress(ipaddress.ip_address("::1"))),
        (LONGEST_HOSTNAME, x509.DNSName(LONGEST_HOSTNAME)),
    ],
)
def test_what_a_leaf_may_be_called(tmp_path, hostname, name):
    leaf = certificate_in(Authority(tmp_path).issue(hostname)[0])
    assert list(extension(leaf, x509.SubjectAlternativeName).value) == [name]


@pytest.mark.parametrize(
    "hostname",
    [
        "",
        ".",
        "ca",
        "../ca",
        "a/b",
        "a\0b",
        "a b",
        "App.test",
        "app.test.",
        "a..b",
        "-a.test",
        "a-.test",
        "a_b.test",
        "bücher.test",
        "a.*.test",
        "*",
        "app.test\n",
        "app.test:443",
        "a" * 64,
        LONGEST_HOSTNAME + "a",
        "fe80::1%eth0",
    ],
)
def test_reject_hostname_that_cannot_be_certified(tmp_path, hostname):
    ca = Authority(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CertificateError) as raised:
        ca.issue(hostname)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_second_start_keeps_the_leaf(tmp_path):
    first = [file.read_bytes() for file in Authority(tmp_path).issue("app.test")]
    assert [file.read_bytes() for file in Authority(tmp_path).issue("app.test")] == first


def break_nothing(ca, certificate_file, key_file):
    pass


def remove_certificate(ca, certificate_file, key_file):
    certificate_file.unlink()


def remove_key(ca, certificate_file, key_file):
    key_file.unlink()


def cut_certificate(ca, certificate_file, key_file):
    certificate_file.write_bytes(certificate_file.read_bytes()[:100])


def swap_key(ca, certificate_file, key_file):
    key_file.write_bytes(ca.issue("other.test")[1].read_bytes())


def take_from_another_ca(ca, certificate_file, key_file):
    other = Authority(certificate_file.parent / "another")
    for own, foreign in zip((certificate_file, key_file), other.issue("app.test")):
        own.write_bytes(foreign.read_bytes())


@pytest.mark.parametrize(
    "harm, made_again",
    [
        (break_nothing, False),
        (remove_certificate, True),
        (remove_key, True),
        (cut_certificate, True),
        (swap_key, True),
        (take_from_another_ca, True),
    ],
)
def test_leaf_that_cannot_be_used_is_made_again(tmp_path, harm, made_again):
    ca = Authority(tmp_path)
    pair = ca.issue("app.test")
    serial = certificate_in(pair[0]).serial_number
    harm(ca, *pair)
    leaf, _ = read_pair(*ca.issue("app.test"))
    leaf.verify_directly_issued_by(certificate_in(ca.ca_file))
    assert (leaf.serial_number != serial) == made_again


@pytest.mark.parametrize("days_left, made_again", [(29, True), (31, False)])
def test_leaf_is_renewed_when_30_days_are_left(tmp_path, monkeypatch, days_left, made_again):
    ca = Authority(tmp_path)
    monkeypatch.setattr(local_ca, "LEAF_LIFETIME", timedelta(days=days_left))
    serial = certificate_in(ca.issue("app.test")[0]).serial_number
    assert (certificate_in(ca.issue("app.test")[0]).serial_number != serial) == made_again


def test_what_a_crash_left_behind_is_overwritten(tmp_path):
    ca = Authority(tmp_path)
    (tmp_path / "app.test.crt.new").write_bytes(b"half a certificate " * 500)
    read_pair(*ca.issue("app.test"))
    assert not list(tmp_path.glob("*.new"))


# Several at once


def test_threads_that_start_first_at_once_share_one_ca_and_one_leaf(tmp_path):
    count = 8
    start = threading.Barrier(count)

    def first_start(folder):
        start.wait()
        ca = Authority(folder)
        leaf, _ = read_pair(*ca.issue("app.test"))
        return ca.ca_file.read_bytes(), leaf.serial_number

    with ThreadPoolExecutor(count) as pool:
        for attempt in range(10):
            folder = tmp_path / str(attempt)
            assert len(set(pool.map(first_start, [folder] * count))) == 1


def test_processes_that_start_first_at_once_share_one_ca_and_one_leaf(tmp_path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from cryptography import x509\n"
        "from gotunnel_server.certs.local_ca import Authority, read_pair\n"
        "for line in sys.stdin:\n"
        "    ca = Authority(Path(line.strip()))\n"
        "    leaf, _ = read_pair(*ca.issue('app.test'))\n"
        "    leaf.verify_directly_issued_by(\n"
        "        x509.load_pem_x509_certificate(ca.ca_file.read_bytes()))\n"
        "    print(leaf.serial_number, flush=True)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    try:
        for attempt in range(10):
            for process in processes:
                process.stdin.write(f"{tmp_path / str(attempt)}\n")
                process.stdin.flush()
            serials = [process.stdout.readline() for process in processes]
            assert len(set(serials)) == 1 and serials[0].strip()
    finally:
        for process in processes:
            process.communicate()


def test_hostnames_are_those_that_were_issued_without_the_ca_itself(tmp_path):
    authority = Authority(tmp_path)
    assert authority.hostnames() == []
    for name in ("b.test", "*.a.test"):
        authority.issue(name)
    assert Authority(tmp_path).hostnames() == ["*.a.test", "b.test"]
