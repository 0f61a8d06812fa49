"""FTP's control connection through a tcp hostname, with vsftpd: ABOR is urgent data (RFC 959)."""

import contextlib
import ftplib
import os
import socket
import tempfile

import pytest
from support import (
    MIB,
    RAW,
    TIMEOUT,
    agent_here,
    gateway_here,
    need,
    reserved_port,
    running,
    wait_until,
)


@contextlib.contextmanager
def vsftpd():
    """An FTP server on a free port, which it yields: anonymous readers find 64 MiB in "large"."""
    program = need("vsftpd")
    if os.geteuid() != 0:
        pytest.skip("vsftpd wants root")
    os.makedirs("/run/vsftpd/empty", 0o755, exist_ok=True)  # as its service does
    with tempfile.TemporaryDirectory() as folder, reserved_port() as port:
        os.chmod(folder, 0o555)  # its user "ftp" reads here, and nobody may write
        with open(os.path.join(folder, "large"), "wb") as file:
            file.truncate(64 * MIB)
        with tempfile.NamedTemporaryFile("w") as config:
            config.write(
                f"listen=YES\nlisten_address=127.0.0.1\nlisten_port={port}\nbackground=NO\n"
                f"anonymous_enable=YES\nanon_root={folder}\nlocal_enable=NO\n"
                "seccomp_sandbox=NO\nvsftpd_log_file=/dev/null\n"
            )
            config.flush()
            with running(program, config.name, cwd=folder):
                wait_until(lambda: is_open(port))
                yield port


def is_open(port):
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), TIMEOUT).close()
        return True
    return False


def test_a_download_is_broken_off_by_abor(cache, tmp_path):
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(vsftpd())
        gateway = stack.enter_context(gateway_here(cache, RAW_TCP_HOST=RAW))
        stack.enter_context(agent_here(gateway, tmp_path, tcp={RAW: port}))
        client = stack.enter_context(ftplib.FTP(timeout=TIMEOUT))
        client.connect("127.0.0.1", gateway.public_port)
        client.login()
        with client.transfercmd("RETR large") as data:  # this connection is made without us
            data.recv(1000)
            client.sock.sendall(b"ABOR\r\n", socket.MSG_OOB)
        answers = [client.getmultiline()[:3] for _ in range(2)]
        assert answers == ["426", "225"]  # the second to ABOR, of which no byte is lost
        assert client.voidcmd("NOOP").startswith("200")
