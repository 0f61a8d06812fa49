"""An nginx that reads the PROXY protocol, for tests that show what we write."""

import contextlib
import socket

import pytest
from support import need, reserved_port, running, wait_until

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The port of an nginx that expects a header and answers with what it was told."""
    folder = tmp_path_factory.mktemp("nginx")
    told = "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr"
    with reserved_port() as port:
        config = folder / "nginx.conf"
        config.write_text(
            "daemon off; master_process off; pid nginx.pid; error_log stderr warn;\n"
            "events { worker_connections 64; }\n"
            "http {\n"
            "  access_log off; client_body_temp_path b;\n"
            "  proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;\n"
            f"  server {{ listen 127.0.0.1:{port} proxy_protocol;\n"
            f'    location / {{ return 200 "{told} $proxy_protocol_server_port"; }} }}\n'
            "}\n"
        )
        with running(need("nginx"), "-p", str(folder), "-c", str(config), cwd=folder):
            wait_until(lambda: is_open(port))
            yield port


def is_open(port):
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
