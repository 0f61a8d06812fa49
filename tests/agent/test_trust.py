"""What is said of a CA file that holds no CA's certificates."""

import ssl
import subprocess

import pytest
from support import need

from gotunnel_agent.trust import CannotTrust, client_context, tls_context, why_no_cas
from gotunnel_server.certs.local_ca import Authority


@pytest.fixture
def files(cache, tmp_path):
    """A folder with files that were mistaken for a CA's."""
    authority = Authority(cache / "local")
    certificate, key = authority.issue("localhost")
    pem = authority.ca_file.read_text()
    (tmp_path / "key.pem").write_bytes(key.read_bytes())
    (tmp_path / "ca.der").write_bytes(ssl.PEM_cert_to_DER_cert(pem))
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "cut.pem").write_text(pem[: len(pem) // 2] + "\n-----END CERTIFICATE-----\n")
    request = [need("openssl"), "req", "-new", "-key", str(key), "-subj", "/CN=x"]
    done = subprocess.run(request, capture_output=True, check=True)
    (tmp_path / "request.pem").write_bytes(done.stdout)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("key.pem", "it holds a private key, and no certificate"),
        (
            "ca.der",
            "it is not text (DER); openssl x509 -inform der -in {path} -out ca.pem converts",
        ),
        ("empty", "it is empty"),
        ("text", "no certificate is in it"),
        ("cut.pem", "a certificate in it cannot be read ("),
        ("request.pem", "it holds a request for a certificate, and no certificate"),
        ("none", "No such file or directory"),
        (".", "it is a folder"),
    ],
)
def test_file_that_holds_no_ca_is_told_why(files, name, said):
    path = files / name
    with pytest.raises(CannotTrust) as caught:
        tls_context(str(path), False)
    message = str(caught.value)
    assert message.startswith(f"ca_file {path}: {said.format(path=path)}")
    assert message.endswith(", expected certificates as PEM") and "\n" not in message


def test_file_that_may_not_be_read_is_told_so(monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gotunnel_agent.common.small_file.read", refuse)
    assert why_no_cas("ca.pem", ssl.SSLError(1, "no")) == "Permission denied"


def test_command_that_is_offered_converts_the_file(files):
    command = str(why_no_cas(str(files / "ca.der"), OSError())).split("; ")[1]
    words = command.removesuffix(" converts it").replace("ca.pem", str(files / "ca.pem")).split()
    subprocess.run([need("openssl"), *words[1:]], check=True)
    assert client_context(str(files / "ca.pem")).get_ca_certs()
