"""The examples of docs/python.md, run as they stand: a comment before a fence names each.

An example that goes on until Ctrl-C runs in a thread here, and ends when the test closes its tunnel
or stops its server. A visitor's side is the test's own.
"""

import json
import os
import re
import socketserver
import subprocess
import sys
import threading

import pytest
from support import ROOT, TICK, TIMEOUT, need_package, request, reserved_port, wait_until
from test_embedded import account, gateway, leaves_at_once, served, site  # noqa: F401

PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")
FENCE = re.compile(r"(?ms)^(?:<!-- example: (.+?) -->\n)?```python\n(.*?)^```$")
EXAMPLES = {name: code for name, code in FENCE.findall(PAGE) if name}


def test_each_fence_is_an_example_with_a_name():
    assert len(re.findall("(?m)^```", PAGE)) == 2 * len(EXAMPLES)


@pytest.fixture(autouse=True)
def servers_end_soon(monkeypatch):
    """shutdown() waits for the server's next look, which is every half second by default."""
    monkeypatch.setattr(socketserver.BaseServer.serve_forever, "__defaults__", (TICK,))


class Running:
    """An example in a thread, and its global names."""

    def __init__(self, code, **names):
        self.names = {"__name__": "example", **names}
        self._code = code
        self._error = None
        self._thread = threading.Thread(target=self._run, name="example")

    def _run(self):
        try:
            exec(compile(self._code, "docs/python.md", "exec"), self.names)
        except BaseException as error:
            self._error = error

    def __enter__(self):
        self._thread.start()
        return self

    def wait_for(self, name):
        """The value that the example gives a name."""
        wait_until(lambda: name in self.names or self._error)
        assert self._error is None, self._error
        return self.names[name]

    def __exit__(self, *exc_info):
        if "server" in self.names:
            self.names["server"].shutdown()
        self._thread.join(TIMEOUT)
        if "server" in self.names:
            self.names["server"].server_close()
        assert self._error is None, self._error


def visit(gateway, hostname, *words, **more):
    """Status line and body of an answer through the tunnel."""
    with gateway.dial(hostname) as visitor:
        visitor.send(request(*words, host=f"{hostname}:{gateway.public_port}", **more))
        head, body = visitor.read_message()
        return head.split(b"\r\n")[0].decode(), body


def test_a_webhook_is_received(gateway, account, capsys):
    with Running(EXAMPLES["webhook"]) as example:
        tunnel = example.wait_for("tunnel")
        assert visit(gateway, tunnel.hostname, "POST", "/events", body=b'{"paid": 7}')[0] == (
            "HTTP/1.1 204 No Content"
        )
    printed = capsys.readouterr().out
    assert f"{tunnel.url}/events" in printed and "received: {'paid': 7}" in printed


def test_a_wsgi_application_is_served(gateway, account):
    with Running(EXAMPLES["wsgi"]) as example:
        tunnel = example.wait_for("tunnel")
        assert visit(gateway, tunnel.hostname)[1] == b"hello 127.0.0.1\n"


def test_a_flask_application_knows_its_public_address(gateway, account):
    with Running(EXAMPLES["flask"]) as example:
        tunnel = example.wait_for("tunnel")
        assert json.loads(visit(gateway, tunnel.hostname)[1]) == {"this page": f"{tunnel.url}/"}


def test_a_fastapi_application_knows_its_public_address(gateway, account, monkeypatch):
    need_package("fastapi")
    uvicorn = need_package("uvicorn")
    names = {"__name__": "example"}
    with reserved_port() as port:
        exec(EXAMPLES["fastapi"].replace("8000", str(port)), names)
        server = uvicorn.Server(uvicorn.Config(names["app"], port=port, log_config=None))
        thread = threading.Thread(target=server.run, name="uvicorn")
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            tunnel = names["app"].state.tunnel
            answer = json.loads(visit(gateway, tunnel.hostname)[1])
        finally:
            server.should_exit = True
            thread.join(TIMEOUT)
    assert answer == {"public": tunnel.url, "this page": f"{tunnel.url}/"}
    assert tunnel.wait(timeout=0)


SHOP = """
def application(environ, start_response):
    assert environ["PATH_INFO"] == "/paid"
    start_response("200 OK", [("Content-Length", "9")])
    return [b"thank you"]
"""
# A provider that calls back, through the gateway's public port.
PROVIDER = """

import http.client, os, socket, ssl, urllib.parse

class Provider:
    def pay(self, callback):
        url = urllib.parse.urlsplit(callback)
        connection = http.client.HTTPConnection(url.netloc)
        sock = socket.create_connection(("127.0.0.1", url.port))
        context = ssl.create_default_context(cafile=os.environ["CA_FILE"])
        connection.sock = context.wrap_socket(sock, server_hostname=url.hostname)
        connection.request("GET", url.path)
        answer = connection.getresponse()
        self.last_answer = answer.status, answer.read().decode()
        connection.close()

@pytest.fixture
def provider():
    return Provider()
"""


@pytest.mark.slow
def test_a_fixture_of_pytest_has_a_public_address(gateway, account, tmp_path):
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "conftest.py").write_text(EXAMPLES["conftest.py"] + PROVIDER)
    (tmp_path / "test_shop.py").write_text(EXAMPLES["test_shop.py"])
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:pytest-timeout"],
        cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "CA_FILE": str(gateway.ca_file)},
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_first_words_are_true(gateway, account, site):
    enter = threading.Event()
    code = EXAMPLES["first"].replace("8080", str(site.port))
    with Running(code, input=lambda prompt: enter.wait(TIMEOUT)) as example:
        try:
            tunnel = example.wait_for("tunnel")
            assert visit(gateway, tunnel.hostname)[1] == b"from the site"
        finally:
            enter.set()
    assert tunnel.wait(timeout=0)


def test_a_whole_agent_serves_the_tunnels_of_its_file(gateway, account, site, monkeypatch):
    tunnels = [{"hostname": "fixed.localhost", "target": f"127.0.0.1:{site.port}"}]
    keys = json.loads(account.read_text()) | {"tunnels": tunnels}
    (account.parent / "agent.yaml").write_text(json.dumps(keys))
    monkeypatch.chdir(account.parent)
    enter = threading.Event()
    with Running(EXAMPLES["agent"], input=lambda prompt: enter.wait(TIMEOUT)):
        try:
            gateway.wait_for_routes("fixed.localhost")
            assert visit(gateway, "fixed.localhost")[1] == b"from the site"
        finally:
            enter.set()


@pytest.mark.slow
def test_a_notebook_opens_a_tunnel_and_closes_it(gateway, account, site, monkeypatch, tmp_path):
    """In a real kernel of Jupyter, in which each cell is run as a user would."""
    need_package("ipykernel")
    manager = need_package("jupyter_client").manager
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    kernel, client = manager.start_new_kernel(kernel_name="python3")
    try:

        def run_cell(name):
            found = []
            reply = client.execute_interactive(
                EXAMPLES[name].replace("8080", str(site.port)), timeout=TIMEOUT,
                output_hook=lambda message: found.append(message["content"]),
            )  # fmt: skip
            assert reply["content"]["status"] == "ok", found
            return [each["data"]["text/plain"] for each in found if "data" in each]

        (url,) = run_cell("cell 1")
        hostname = re.fullmatch(rf"'https://(.+):{gateway.public_port}'", url)[1]
        assert visit(gateway, hostname)[1] == b"from the site"
        run_cell("cell 2")
        assert hostname not in served(gateway)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
