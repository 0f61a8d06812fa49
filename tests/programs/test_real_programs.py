"""Programs that others wrote, as targets and as visitors, through a real gateway and agent.

Targets: websockets, nginx, Python's http.server, Node, Flask, Vite. Visitors: websockets, curl,
Chromium, which is spoken to by the DevTools protocol where it must do more than print a page.
What we wrote for them to serve is in sites/.
"""

import contextlib
import gzip
import hashlib
import http.client
import http.server
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import (
    APP,
    CUT,
    MIB,
    NPM_TIMEOUT,
    ROOT,
    TIMEOUT,
    agent_here,
    agent_process,
    answer,
    at_length,
    gateway_here,
    gateway_process,
    need,
    nginx,
    npm_packages,
    reserved_port,
    running,
    wait_until,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.sync.client import connect
from websockets.sync.server import serve

from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.common.relay import relay

PROGRAMS = ROOT / "tests" / "programs" / "sites"

# Bytes. The library's own limit is 1 MiB, which noise does not keep to when it is compressed.
LARGEST_FRAME = 2 * MIB

# An exact version, so that a new one breaks no test; of the last line that runs on Node 18, which
# Debian 12 has.
VITE = "vite@6.4.6"

# Nothing but the test's own names is looked up, so a browser cannot call home. Root, as which
# tests may run, needs --no-sandbox; a container with a small /dev/shm the flag behind it. Zygotes
# and the crash reporter would outlive the browser for a moment.
CHROMIUM = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
    "--no-zygote", "--disable-breakpad", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--no-proxy-server", "--ignore-certificate-errors",
    "--host-resolver-rules=MAP *.localhost 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


@pytest.fixture
def served(gateway, tmp_path):
    """A function that has an agent serve APP from a port until the test is over."""
    with contextlib.ExitStack() as stack:
        yield lambda port: stack.enter_context(agent_here(gateway, tmp_path, http={APP: port}))


def curl(gateway, path, *arguments):
    """What curl prints."""
    with curling(gateway, path, *arguments) as process:
        out, error = process.communicate()
        assert process.returncode == 0, error
        return out


@contextlib.contextmanager
def curling(gateway, path, *arguments):
    """A curl that runs; its output comes as it arrives only with -N."""
    command = [
        need("curl"), "--silent", "--show-error", "--cacert", str(gateway.ca_file),
        "--max-time", str(TIMEOUT), *arguments, f"https://{APP}:{gateway.public_port}{path}",
    ]  # fmt: skip
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={}) as process:
        try:
            yield process
        finally:
            process.kill()  # if the test has failed


def digest(data):
    return hashlib.sha256(data).hexdigest().encode()


# WebSocket ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def websocket_target(converse, **options):
    """A WebSocket server on a free port, which it yields; ``converse(peer)`` for each."""
    with serve(converse, "127.0.0.1", 0, max_size=LARGEST_FRAME, **options) as server:
        life = threading.Thread(target=server.serve_forever, name="websocket target")
        life.start()
        yield server.socket.getsockname()[1]
    life.join(TIMEOUT)


def echo(peer):
    for message in peer:
        peer.send(message)


@contextlib.contextmanager
def websocket(gateway, **options):
    """A visitor by WebSocket. It pings only when it is told to.

    TLS is beside it: the library's blocking client would use one SSLSocket in two threads, so that
    some of many openings hang, with any server (seen with 17.4).
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:  # 15.0 takes TCP only
        near = socket.create_connection(listening.getsockname(), TIMEOUT)
        inside = Duplex(listening.accept()[0])
    outside = Duplex(socket.create_connection(("127.0.0.1", gateway.public_port), TIMEOUT))
    with contextlib.closing(inside), contextlib.closing(outside):
        outside.start_tls(gateway.context, server_side=False, server_hostname=APP)
        outside.handshake_within(TIMEOUT)
        beside = threading.Thread(target=relay, args=(inside, outside), name="visitor's TLS")
        beside.start()
        try:
            with connect(
                f"ws://{APP}/", sock=near, proxy=None, ping_interval=None,
                **{"max_size": LARGEST_FRAME, **options},
            ) as visitor:  # fmt: skip
                yield visitor
        finally:
            near.close()  # if it was not opened
            beside.join(TIMEOUT)


@pytest.mark.parametrize("compression", ["deflate", None])
def test_websocket_messages_come_back_as_they_were(gateway, served, compression):
    messages = ["text", "\N{SNOWMAN}", "", b"\x00\xff binary", b"", random.Random(1).randbytes(MIB)]
    with websocket_target(echo, compression=compression) as port:
        served(port)
        with websocket(gateway, compression=compression) as visitor:
            for message in messages:
                visitor.send(message)
                assert visitor.recv(TIMEOUT) == message


def test_websocket_pings_are_answered_both_ways(gateway, served):
    answered = threading.Event()

    def ping_first(peer):
        if peer.ping().wait(TIMEOUT):
            answered.set()
        echo(peer)

    with websocket_target(ping_first, ping_interval=None) as port:
        served(port)
        with websocket(gateway) as visitor:
            assert visitor.ping().wait(TIMEOUT)
            assert answered.wait(TIMEOUT)


def test_websocket_close_codes_arrive_both_ways(gateway, served):
    heard = []

    def converse(peer):
        try:
            if peer.recv(TIMEOUT) == "close":
                peer.close(4001, "as you wish")
            else:
                peer.recv(TIMEOUT)
        except ConnectionClosed as closed:
            heard.append((closed.rcvd.code, closed.rcvd.reason))

    with websocket_target(converse) as port:
        served(port)
        with websocket(gateway) as visitor:
            visitor.send("close")
            with pytest.raises(ConnectionClosed) as caught:
                visitor.recv(TIMEOUT)
            assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4001, "as you wish")
        with websocket(gateway) as visitor:
            visitor.send("stay")
            visitor.close(4002, "enough")
    assert heard == [(4002, "enough")]


def test_twenty_websockets_talk_at_once_and_hear_only_themselves(gateway, served):
    clients, rounds = 20, 25

    def talk(number, visitor):
        for turn in range(rounds):
            visitor.send(f"{number}: {turn}")
            assert visitor.recv(TIMEOUT) == f"{number}: {turn}"

    with websocket_target(echo) as port, ThreadPoolExecutor(clients) as pool:
        served(port)
        with contextlib.ExitStack() as stack:
            opened = pool.map(lambda _: stack.enter_context(websocket(gateway)), range(clients))
            list(pool.map(talk, range(clients), list(opened)))  # once all are open


def test_refused_websocket_is_an_ordinary_answer(gateway, served):
    def refuse(peer, request):
        return peer.respond(403, "not you")

    with websocket_target(echo, process_request=refuse) as port:
        served(port)
        with pytest.raises(InvalidStatus) as caught, websocket(gateway):
            pass
        response = caught.value.response
        assert (response.status_code, bytes(response.body)) == (403, b"not you")


def test_websocket_message_behind_the_101_in_one_segment_arrives(gateway, served, origin):
    def script(target):
        protocol = ServerProtocol()
        protocol.receive_data(target.read_head())
        (request,) = protocol.events_received()
        assert isinstance(request, Request)
        protocol.send_response(protocol.accept(request))
        protocol.send_text(b"at once")
        target.send(b"".join(protocol.data_to_send()))
        target.read_to_end()

    origin.serve(script)
    served(origin.port)
    with websocket(gateway, close_timeout=0) as visitor:
        assert visitor.recv(TIMEOUT) == "at once"


# nginx -------------------------------------------------------------------------------------------


def test_nginx_ranges_and_conditional_requests(gateway, served, tmp_path):
    content = random.Random(2).randbytes(MIB)
    (tmp_path / "file").write_bytes(content)
    with nginx(tmp_path) as port, gateway.visitor(APP) as visitor:
        served(port)

        def get(**fields):
            visitor.request("GET", "/file", headers=fields)  # all of them over one connection
            response = visitor.getresponse()
            return response.status, response.read(), response

        status, body, response = get()
        assert (status, body) == (200, content)
        tag, date = response.getheader("ETag"), response.getheader("Last-Modified")
        assert get(**{"If-None-Match": tag})[:2] == (304, b"")
        assert get(**{"If-Modified-Since": date})[:2] == (304, b"")
        assert get(Range="bytes=1000-1999")[:2] == (206, content[1000:2000])
        assert get(Range="bytes=-10", **{"If-Range": tag})[:2] == (206, content[-10:])
        status, body, response = get(Range="bytes=0-3, 100-109")
        assert status == 206 and body.count(b"Content-Range: bytes ") == 2
        assert get(Range=f"bytes={MIB}-")[0] == 416


@contextlib.contextmanager
def compressing_nginx(folder):
    """An nginx that compresses as it sends: the length is not known, so it comes in chunks."""
    with reserved_port() as port:
        (folder / "gzip.conf").write_text(
            "daemon off; master_process off; pid nginx.pid; error_log stderr warn; events {}\n"
            "http {\n"
            "  access_log off; gzip on; gzip_types text/plain; client_body_temp_path bodies;\n"
            "  proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;\n"
            f"  server {{ listen 127.0.0.1:{port}; root {folder}; }}\n"
            "}\n"
        )
        command = (need("nginx"), "-p", str(folder), "-c", str(folder / "gzip.conf"))
        with running(*command, cwd=folder):
            yield port


def test_nginx_compresses_in_chunks(gateway, served, tmp_path):
    content = b"".join(b"%d\n" % number for number in range(200_000))
    (tmp_path / "numbers").write_bytes(content)
    with compressing_nginx(tmp_path) as port, gateway.visitor(APP) as visitor:
        served(port)
        wait_until(lambda: gateway.get(APP, "/")[0] != 502)  # nginx listens
        visitor.request("GET", "/numbers", headers={"Accept-Encoding": "gzip"})
        response = visitor.getresponse()
        assert response.getheader("Content-Encoding") == "gzip"
        assert response.getheader("Transfer-Encoding") == "chunked"
        assert gzip.decompress(response.read()) == content
        assert curl(gateway, "/numbers", "--compressed") == content


# Python's http.server ----------------------------------------------------------------------------


class OldServer(http.server.BaseHTTPRequestHandler):
    """Speaks HTTP/1.0, as this class does unasked, where the end of the connection ends a body."""

    content = random.Random(3).randbytes(3 * MIB)

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(digest(self.rfile.read(int(self.headers["Content-Length"]))))

    def log_message(self, *arguments):
        pass


@pytest.fixture
def old_server(served):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OldServer) as server:
        life = threading.Thread(target=server.serve_forever, args=[0.01], name="http.server")
        served(server.server_port)
        life.start()
        yield
        server.shutdown()
        life.join(TIMEOUT)


def test_answers_that_end_with_their_connection_leave_the_visitors_open(gateway, old_server):
    with gateway.visitor(APP) as visitor:
        for _ in range(3):
            visitor.request("GET", "/")
            assert visitor.getresponse().read() == OldServer.content
        visitor.request("POST", "/", b"x" * MIB)
        assert visitor.getresponse().read() == digest(b"x" * MIB)


def test_http_1_0_on_both_sides(gateway, old_server):
    assert curl(gateway, "/", "--http1.0") == OldServer.content


# CGI programs, whose servers pass on the LF that ends their lines -------------------------------

CGI_PROGRAM = """#!/bin/sh
echo "Content-Type: text/plain"
echo "X-Method: $REQUEST_METHOD"
echo
echo "hello from $SCRIPT_NAME"
"""


@pytest.fixture
def cgi_folder(tmp_path):
    program = tmp_path / "web" / "cgi-bin" / "hello"
    program.parent.mkdir(parents=True)
    program.write_text(CGI_PROGRAM)
    program.chmod(0o755)
    # Python's server runs them as nobody, if it is root's.
    for folder in (program.parent, program.parent.parent, tmp_path, *tmp_path.parents[:3]):
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o055)
    return tmp_path / "web"


def cgi_server(name, folder, port):
    if name == "busybox":
        program = need("busybox")
        if b"httpd" not in subprocess.run([program, "--list"], stdout=subprocess.PIPE).stdout:
            pytest.skip("this busybox has no httpd")
        return program, "httpd", "-f", "-p", f"127.0.0.1:{port}", "-h", str(folder)
    if sys.version_info >= (3, 15):
        pytest.skip("this Python has no CGI server")
    return sys.executable, "-m", "http.server", "--cgi", "--bind", "127.0.0.1", str(port)


@pytest.mark.parametrize("server", ["busybox", "python"])
def test_pages_of_cgi_programs_arrive(gateway, served, cgi_folder, server):
    with reserved_port() as port:
        command = cgi_server(server, cgi_folder, port)
        served(port)
        with running(*command, cwd=cgi_folder), gateway.visitor(APP) as visitor:
            wait_until(lambda: gateway.get(APP, "/")[0] != 502)  # it listens
            for method in ("GET", "POST"):
                visitor.request(method, "/cgi-bin/hello", b"" if method == "POST" else None)
                response = visitor.getresponse()
                assert (response.status, response.getheader("X-Method")) == (200, method)
                assert response.read() == b"hello from /cgi-bin/hello\n"


# What CGI programs and PHP are told of a visitor, whatever it says -------------------------------

TOLD_SH = """printf 'Content-Type: text/plain\\n\\n'
env
"""
TOLD_PHP = """<?php
foreach ($_SERVER as $name => $value)
    if (is_string($value)) echo "$name=$value\\n";
"""
FORGED = {
    f"X{odd}{name}": "203.0.113.9"
    for odd in "!#$%&'*+.^_`|~"
    for name in ("Forwarded-For", "Real-IP", f"Forwarded{odd}Proto", "Forwarded-Port")
}


def lighttpd(folder, port):
    (folder / "told.sh").write_text(TOLD_SH)
    config = folder / "lighttpd.conf"
    config.write_text(
        f'server.document-root = "{folder}"\nserver.bind = "127.0.0.1"\nserver.port = {port}\n'
        'server.modules = ("mod_cgi")\ncgi.assign = (".sh" => "/bin/sh")\n'
    )
    return need("lighttpd"), "-D", "-f", str(config)


def php(folder, port):
    (folder / "told.php").write_text(TOLD_PHP)
    return need("php"), "-S", f"127.0.0.1:{port}", "-t", str(folder)


@pytest.mark.parametrize(("server", "path"), [(lighttpd, "/told.sh"), (php, "/told.php")])
def test_no_spelling_forges_who_visits(gateway, served, tmp_path, server, path):
    with reserved_port() as port:
        command = server(tmp_path, port)
        served(port)
        with running(*command, cwd=tmp_path), gateway.visitor(APP) as visitor:
            wait_until(lambda: gateway.get(APP, path)[0] == 200)
            visitor.request("GET", path, headers={**FORGED, "X-Own": "mine"})
            told = visitor.getresponse().read().decode()
            assert "HTTP_X_OWN=mine\n" in told and "HTTP_X_REAL_IP=127.0.0.1\n" in told
            assert "203.0.113.9" not in told


# Node, and curl ----------------------------------------------------------------------------------


class PathServer(http.server.BaseHTTPRequestHandler):
    """Answers with the request's target, as it was read."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode("latin-1"))

    def log_message(self, *arguments):
        """Nothing: the test reads the answers."""


@pytest.mark.parametrize("path", ["/größe?q=größe", "/日本?ж=€", "/voilà?q=Å…"])
def test_http_server_reads_utf8_as_curl_sends_it(gateway, served, path):
    """Also where it would find white space in it (0x85, 0xA0), and refuse the request."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), PathServer) as server:
        life = threading.Thread(target=server.serve_forever, args=[0.01], name="http.server")
        served(server.server_port)
        life.start()
        try:
            assert urllib.parse.unquote_to_bytes(curl(gateway, path)) == path.encode()
        finally:
            server.shutdown()
            life.join(TIMEOUT)


def test_nginx_finds_a_file_whose_name_curl_sends_in_utf8(gateway, served, tmp_path):
    for name in ("größe", "voilà"):
        (tmp_path / name).write_text(name)
    with nginx(tmp_path) as port:
        served(port)
        for name in ("größe", "voilà"):
            assert curl(gateway, f"/{name}?{name}").decode() == name


class OneAtATime(http.server.BaseHTTPRequestHandler):
    """For an HTTPServer, which serves one connection to its end before it accepts the next."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + 3))
        self.end_headers()
        self.wfile.write(b"ok " + body)

    do_POST = do_GET

    def log_message(self, *arguments):
        """Nothing: the test reads the answers."""


@pytest.fixture
def one_at_a_time(served):
    with http.server.HTTPServer(("127.0.0.1", 0), OneAtATime) as server:
        life = threading.Thread(target=server.serve_forever, args=[0.01], name="http.server")
        agent = served(server.server_port)
        life.start()
        yield
        agent.stop()  # the server would wait for the end of a connection that is kept
        server.shutdown()
        life.join(TIMEOUT)


@pytest.mark.timeout(30)  # our kept connections would hold such a server up for 30 s each
def test_server_of_one_connection_at_a_time_is_not_held_up(gateway, one_at_a_time):
    with gateway.visitor(APP) as visitor:
        for number in range(5):
            for method, body in (("GET", None), ("POST", b"%d" % number)):
                visitor.request(method, "/", body)
                assert visitor.getresponse().read() == b"ok " + (body or b"")


@pytest.mark.timeout(30)
def test_visitors_of_such_a_server_take_turns(gateway, one_at_a_time):
    def visit(number):
        with gateway.visitor(APP) as visitor:
            for turn in range(5):
                method, body = ("POST", b"%d" % number) if turn == 3 else ("GET", None)
                visitor.request(method, "/", body)
                assert visitor.getresponse().read() == b"ok " + (body or b"")
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(visit, range(16)))


@pytest.fixture
def node(served, tmp_path):
    with running(need("node"), str(PROGRAMS / "site.js"), cwd=tmp_path) as program:
        served(int(program.wait_for(r"^listening on (\d+)$")[1]))
        yield


def test_node_connections_are_kept_from_request_to_request(gateway, node):
    with gateway.visitor(APP) as visitor:
        for count in range(1, 21):
            visitor.request("GET", "/counter")
            assert visitor.getresponse().read() == b"%d" % count
    # And from visitor to visitor.
    assert gateway.get(APP, "/counter") == (200, b"21")


@pytest.mark.parametrize("version", ["--http1.1", "--http1.0"])
def test_node_chunks(gateway, node, version):
    said = curl(gateway, "/chunks", version, "--include")
    head, _, body = said.partition(b"\r\n\r\n")
    assert body == b"".join(b"%d," % number for number in range(1000))
    assert (b"\r\ntransfer-encoding: chunked" in head.lower()) == (version == "--http1.1")


def test_an_event_arrives_before_the_next_one_is_sent(gateway, node):
    with curling(gateway, "/events", "-N") as process:
        assert process.stdout.read(len(b": open\n\n")) == b": open\n\n"
        for number in range(5):
            assert curl(gateway, "/events", "--data", f"event {number}") == b"1"
            event = b"data: event %d\n\n" % number
            assert process.stdout.read(len(event)) == event


@pytest.mark.parametrize("framing", [(), ("-H", "Transfer-Encoding: chunked"), ("--http1.0",)])
def test_upload_arrives_whole(gateway, node, tmp_path, framing):
    content = random.Random(4).randbytes(5 * MIB)
    (tmp_path / "up").write_bytes(content)
    said = curl(gateway, "/digest", "-X", "POST", "-T", str(tmp_path / "up"), *framing)
    assert said == digest(content)


@pytest.mark.parametrize("version, status", [("1.1", b"http/1.1 200 ok"), ("2", b"http/2 200 ")])
def test_head_has_the_fields_of_get_and_no_body(gateway, node, version, status):
    with gateway.visitor(APP) as visitor:
        visitor.request("GET", "/counter")
        visitor.getresponse().read()
    said = curl(gateway, "/counter", "--head", f"--http{version}").lower()
    assert said.startswith(status + b"\r\n") and said.endswith(b"\r\n\r\n")
    assert b"\r\ncontent-length: 1\r\n" in said


def test_trailers_reach_curl(gateway, node, tmp_path):
    fields = tmp_path / "fields"
    assert curl(gateway, "/trailers", "--dump-header", str(fields)) == b"body"
    head, _, trailers = fields.read_bytes().partition(b"\r\n\r\n")
    assert b"\r\ntrailer: x-count" in head.lower()
    assert trailers.lower().startswith(b"x-count: 4\r\n")


# curl waits so long for "100 Continue" that it is out of time before it sends unasked.
EXPECTING = ("-H", "Expect: 100-continue", "--expect100-timeout", str(2 * TIMEOUT))


def test_continue_of_the_target_lets_curl_send(gateway, node, tmp_path):
    content = random.Random(5).randbytes(2 * MIB)
    (tmp_path / "up").write_bytes(content)
    body = ("--data-binary", f"@{tmp_path}/up")
    assert curl(gateway, "/digest", *body, *EXPECTING) == digest(content)


def test_refusal_reaches_curl_before_it_sends(gateway, node, tmp_path):
    (tmp_path / "up").write_bytes(bytes(2 * MIB))
    report = ("--write-out", " %{http_code} %{size_upload}")
    body = ("--data-binary", f"@{tmp_path}/up")
    assert curl(gateway, "/refused", *body, *EXPECTING, *report) == b"too large 413 0"


# Flask -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def flask(folder):
    """The port of a running flask_site.py."""
    command = (sys.executable, "-u", str(PROGRAMS / "flask_site.py"))
    with running(*command, cwd=folder) as program:
        yield int(program.wait_for(r"Running on http://127\.0\.0\.1:(\d+)")[1])


def test_flask_sessions_and_chunks(gateway, served, tmp_path):
    jar = ("--cookie", str(tmp_path / "jar"), "--cookie-jar", str(tmp_path / "jar"))
    with flask(tmp_path) as port:
        served(port)
        assert curl(gateway, "/name", *jar) == b"nobody"
        assert curl(gateway, "/login", *jar, "--location", "--data", "name=ada") == b"ada"
        assert curl(gateway, "/name", *jar) == b"ada"
        assert curl(gateway, "/name") == b"nobody"
        for version in ("1.1", "2"):  # HTTP/2 has no chunks: its frames are enough
            said = curl(gateway, "/numbers", "--include", f"--http{version}")
            head, _, body = said.partition(b"\r\n\r\n")
            assert (b"\r\ntransfer-encoding: chunked" in head.lower()) is (version == "1.1")
            assert body == b"".join(b"%d\n" % number for number in range(1000))


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("mebibytes", [64, at_length(1024)])
def test_flask_takes_a_large_upload(cache, tmp_path, mebibytes):
    """Gateway and agent are processes here: it is what an operator's machine would do."""
    piece = random.Random(6).randbytes(MIB)
    whole = hashlib.sha256()
    for _ in range(mebibytes):
        whole.update(piece)
    with gateway_process(cache) as gateway, flask(tmp_path) as port:
        with agent_process(gateway, tmp_path, http={APP: port}), gateway.visitor(APP) as visitor:
            length = {"Content-Length": str(mebibytes * MIB)}
            visitor.request("POST", "/digest", itertools.repeat(piece, mebibytes), length)
            assert visitor.getresponse().read() == whole.hexdigest().encode()


# Chromium ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chromium_loads_a_page_of_a_hundred_parts(gateway, node, tmp_path):
    done = subprocess.run(
        [need("chromium"), *CHROMIUM, f"--user-data-dir={tmp_path}/profile", "--dump-dom",
         f"https://{APP}:{gateway.public_port}/parts"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, timeout=2 * TIMEOUT,
        stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip
    assert b'<p id="count">100</p>' in done.stdout, done.stderr


class Tab:
    """A tab of a browser, over the DevTools protocol: commands, answers, events as they come."""

    def __init__(self, browser):
        self._browser = browser
        self._ids = itertools.count(1)
        self.events = []  # (method, parameters)

    def start(self, method, **parameters) -> int:
        """Send a command; what it answers is for finish()."""
        number = next(self._ids)
        self._browser.send(json.dumps({"id": number, "method": method, "params": parameters}))
        return number

    def finish(self, number):
        while (message := self._read()).get("id") != number:
            pass
        assert "error" not in message, message["error"]
        return message["result"]

    def command(self, method, **parameters):
        return self.finish(self.start(method, **parameters))

    def evaluate(self, expression):
        """The value of an expression in the page; of a promise, what it comes to."""
        return value_of(self.finish(self.start_evaluating(expression)))

    def start_evaluating(self, expression) -> int:
        options = {"awaitPromise": True, "returnByValue": True}
        return self.start("Runtime.evaluate", expression=expression, **options)

    def wait_for(self, wanted):
        """Read until an event came for which ``wanted(method, parameters)`` is true."""
        while not any(itertools.starmap(wanted, self.events)):
            self._read()

    def _read(self):
        message = json.loads(self._browser.recv(TIMEOUT))
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message


def value_of(result):
    assert "exceptionDetails" not in result, result
    return result["result"].get("value")


@contextlib.contextmanager
def chromium_tab(folder):
    command = (
        need("chromium"), *CHROMIUM, f"--user-data-dir={folder}/profile",
        "--remote-debugging-port=0",
    )  # fmt: skip
    with running(*command, cwd=folder, HOME=str(folder)) as program:
        port = int(program.wait_for(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/")[1])
        devtools = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        with contextlib.closing(devtools):
            devtools.request("PUT", "/json/new?about:blank")
            url = json.load(devtools.getresponse())["webSocketDebuggerUrl"]
        with connect(url, proxy=None, max_size=None, close_timeout=0) as browser:
            yield Tab(browser)
            browser.send(json.dumps({"id": 0, "method": "Browser.close"}))
        program.wait()  # a signal would leave more of its helpers behind


@pytest.fixture(scope="session")
def vite(pytestconfig):
    """The program VITE."""
    return npm_packages(pytestconfig, "vite", VITE) / "vite" / "bin" / "vite.js"


@contextlib.contextmanager
def vite_server(vite, folder):
    """The port of Vite's dev server for the project in ``folder``."""
    with reserved_port() as port:
        options = ("--host", "127.0.0.1", "--port", str(port), "--strictPort")
        command = (need("node"), str(vite), *options)
        with running(*command, cwd=folder, HOME=str(folder), NO_COLOR="1") as program:
            program.wait_for(r"ready in ")
            yield port


@pytest.mark.slow
@pytest.mark.timeout(NPM_TIMEOUT + 60)
def test_hot_reload_of_vite_changes_the_open_page(gateway, served, vite, tmp_path):
    project = tmp_path / "hot"
    shutil.copytree(PROGRAMS / "hot", project)
    with vite_server(vite, project) as port, chromium_tab(tmp_path) as tab:
        served(port)
        for domain in ("Network", "Page", "Runtime"):
            tab.command(f"{domain}.enable")
        tab.command("Page.navigate", url=f"https://{APP}:{gateway.public_port}/")
        tab.wait_for(says("[vite] connected."))
        assert tab.evaluate(becomes("before")) == "before"

        tab.evaluate("window.mark = 'not loaded again'")
        change = tab.start_evaluating(becomes("after"))
        (project / "text.js").write_text('export const text = "after";\n')
        assert value_of(tab.finish(change)) == "after"
        assert tab.evaluate("window.mark") == "not loaded again"

        # It came through the tunnel: Vite's page would try the target itself if that failed.
        sockets = [event["url"] for name, event in tab.events if name == "Network.webSocketCreated"]
        assert len(sockets) == 1
        assert sockets[0].startswith(f"wss://{APP}:{gateway.public_port}/")


def says(text):
    """Whether an event is a line of the page's console with ``text`` in it."""
    return lambda method, event: (
        method == "Runtime.consoleAPICalled"
        and any(text in str(argument.get("value")) for argument in event["args"])
    )


def becomes(text):
    """An expression: a promise that comes to ``text`` once the page shows it."""
    return f"""new Promise((resolve) => {{
        const look = () => {{
            const field = document.getElementById("text");
            if (field && field.textContent === "{text}") resolve(field.textContent);
        }};
        new MutationObserver(look).observe(
            document, {{ childList: true, subtree: true, characterData: true }}
        );
        look();
    }})"""


# A target that cannot be relied on ---------------------------------------------------------------


def test_targets_that_close_at_random_mix_up_no_answers(gateway, served, origin):
    """Ten visitors; each gets its own answer whole, a page that says why not, or a cut."""
    visitors, visits = 10, 20
    seeds = itertools.count()
    lock = threading.Lock()

    def script(target):
        with lock:
            chance = random.Random(next(seeds))
        while True:
            path = target.read_head().split(b" ", 2)[1]
            whole = answer(path * 1000)
            fate = chance.random()
            if fate < 0.1:
                return
            if fate < 0.3:
                target.send(whole[: chance.randrange(len(whole))])
                return
            target.send(whole)
            if fate < 0.5:
                return

    def visit(number):
        seen = {"whole": 0, "told": 0, "cut": 0}
        for turn in range(visits):
            path = f"/{number}-{turn}/"
            try:
                status, body = gateway.get(APP, path)
            except (*CUT, http.client.IncompleteRead):
                seen["cut"] += 1
                continue
            if status == 200:
                assert body == path.encode() * 1000
                seen["whole"] += 1
            else:
                assert status == 502
                seen["told"] += 1
        return seen

    origin.serve(script)
    served(origin.port)
    with ThreadPoolExecutor(visitors) as pool:
        seen = list(pool.map(visit, range(visitors)))
    for outcome in ("whole", "told", "cut"):
        assert sum(counts[outcome] for counts in seen) > 0, outcome
