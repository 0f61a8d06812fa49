"""A proxy of the operator's in front of the gateway: nginx, which ends the visitors' TLS."""

import contextlib
import os
import subprocess

import pytest
from support import (
    APP,
    GATEWAY_HOST,
    TIMEOUT,
    agent_here,
    answer,
    ca_of,
    fields_of,
    gateway_here,
    need,
    reserved_port,
    running,
    wait_until,
)

TLS = """
  server {{
    listen 127.0.0.1:{port} ssl;
    server_name {app} {gateway};
    ssl_certificate {folder}/{app}.crt; ssl_certificate_key {folder}/{app}.key;
    location / {{
      proxy_pass {scheme}://127.0.0.1:{behind};
      proxy_http_version 1.1;
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_set_header X-Forwarded-Proto {said};
      proxy_set_header X-Forwarded-Host $host;
      proxy_ssl_server_name on; proxy_ssl_name $host;
    }}
  }}
"""


@contextlib.contextmanager
def nginx(folder, scheme, behind, ca_folder, said="$scheme"):
    """A port of nginx with TLS, which asks the gateway's port ``behind``."""
    with reserved_port() as port:
        server = TLS.format(
            port=port, scheme=scheme, behind=behind, folder=ca_folder, said=said,
            app=APP, gateway=GATEWAY_HOST,
        )  # fmt: skip
        (folder / "nginx.conf").write_text(
            "daemon off; master_process off; pid nginx.pid; error_log stderr warn; events {}\n"
            "http { access_log off; client_body_temp_path b; proxy_temp_path t;\n"
            f"fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s; {server} }}\n"
        )
        command = (need("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf"))
        with running(*command, cwd=folder):
            yield port


def curl(ca_file, port, path, *arguments):
    """Status, where it was sent on to, and body; as soon as nginx listens."""
    done = wait_until(lambda: _curl(ca_file, port, path, *arguments))
    status, location, body = done.split("\n", 2)
    return int(status), location, body


def _curl(ca_file, port, path, *arguments):
    command = [
        need("curl"), "--silent", "--cacert", str(ca_file), "--max-time", str(TIMEOUT),
        "--write-out", "%{stderr}%{http_code}\n%{redirect_url}\n", *arguments,
        f"https://{APP}:{port}{path}",
    ]  # fmt: skip
    done = subprocess.run(command, env={}, capture_output=True, text=True)
    return None if done.returncode == 7 else done.stderr + done.stdout


@pytest.fixture
def proxied(cache, tmp_path, origin):
    """A gateway that trusts a proxy, and its agent."""

    def script(target):
        while True:
            head, body = target.read_message()
            told = [field for field in fields_of(head) if field.startswith("x-forwarded-proto")]
            target.send(answer(f"{told} {body.decode()}".encode()))

    origin.serve(script)
    changes = {"TRUSTED_PROXIES": "127.0.0.1", "HTTP_PORT": "auto"}
    with gateway_here(cache, **changes) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            wait_until(lambda: os.path.exists(ca_of(cache).parent / f"{APP}.crt"))
            yield gateway


@pytest.mark.parametrize("door", ["public port", "http port"])
def test_proxy_that_ends_tls_may_come_by_either_port(proxied, tmp_path, door):
    inner, ca_file = proxied.inner, proxied.ca_file
    way = ("http", inner.http_port) if door == "http port" else ("https", inner.public_port)
    with nginx(tmp_path, *way, ca_file.parent) as port:
        expected = (200, "", "['x-forwarded-proto: https'] ")
        assert curl(ca_file, port, "/") == expected
        status, _, body = curl(ca_file, port, "/", "--data", "whole")
        assert (status, body) == (200, "['x-forwarded-proto: https'] whole")


@pytest.mark.parametrize("said", ["http", "'https, http'", "''"])
def test_proxy_that_has_ended_no_tls_is_sent_on(proxied, tmp_path, said):
    ca_file = proxied.ca_file
    with nginx(tmp_path, "http", proxied.inner.http_port, ca_file.parent, said) as port:
        status, location, _ = curl(ca_file, port, "/größe?q=größe")
        assert status == 301
        path = "/gr%C3%B6%C3%9Fe?q=gr%C3%B6%C3%9Fe"
        # curl, or nginx, may write them in lower case.
        assert location.lower() == f"https://{APP}:{proxied.public_port}{path}".lower()


def test_stranger_that_claims_to_have_ended_tls_is_sent_on(cache, tmp_path, origin):
    with gateway_here(cache, HTTP_PORT="auto") as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            port = gateway.inner.http_port
            done = subprocess.run(
                [
                    need("curl"), "--silent", "--write-out", "%{http_code}",
                    "--output", "/dev/null", "-H", "X-Forwarded-Proto: https",
                    f"http://{APP}:{port}/",
                ],
                env={}, capture_output=True, text=True,
            )  # fmt: skip
            assert done.stdout == "301" and origin.was_left_alone()
