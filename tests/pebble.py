"""Pebble, Let's Encrypt's CA for tests, and the ports that it validates at.

Pebble brings no certificate for its own pages: the local CA makes one here. The CA that Pebble
signs with is another one, new at each start.
"""

import contextlib
import http.server
import json
import socket
import ssl
import threading
import urllib.request

from support import TIMEOUT, need, reserved_port, running, tls_context, wait_until

from gotunnel_server.certs.challenges import HTTP_01, TLS_ALPN_01, Challenges
from gotunnel_server.certs.local_ca import Authority


class Pebble:
    """A running Pebble: ``directory`` is its URL, ``ca_file`` the root to trust in requests."""

    def __init__(self, port, management, ca_file):
        self.directory = f"https://localhost:{port}/dir"
        self.ca_file = ca_file
        self._management = management

    def root(self) -> str:
        """The root of the certificates that it issues, PEM."""
        return self._get(f"https://localhost:{self._management}/roots/0").decode()

    def is_up(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self._get(self.directory))

    def _get(self, url):
        context = tls_context(self.ca_file)
        with urllib.request.urlopen(url, timeout=TIMEOUT, context=context) as page:
            return page.read()


@contextlib.contextmanager
def pebble(folder, http_port, tls_port, *, port=None, eab=None, lifetime=None,
           **environment):  # fmt: skip
    """A running Pebble, which validates every hostname at these ports of this machine.

    ``port``: its own, by default any free one. ``eab``: key identifier and HMAC key of the external
    account binding that it requires. ``lifetime``: of certificates, seconds.
    """
    program, names = need("pebble"), need("pebble-challtestsrv")
    folder.mkdir(parents=True, exist_ok=True)
    authority = Authority(folder / "pebble-ca")
    certificate, key = authority.issue("localhost")
    with contextlib.ExitStack() as stack:
        management, dns, dns_management, free = (
            stack.enter_context(reserved_port()) for _ in range(4)
        )
        port = port or free
        config = {
            "listenAddress": f"127.0.0.1:{port}",
            "managementListenAddress": f"127.0.0.1:{management}",
            "certificate": str(certificate), "privateKey": str(key),
            "httpPort": http_port, "tlsPort": tls_port,
            "externalAccountBindingRequired": eab is not None,
            "externalAccountMACKeys": dict([eab]) if eab else {},
        }  # fmt: skip
        if lifetime is not None:
            config["certificateValidityPeriod"] = lifetime
        file = folder / "pebble.json"
        file.write_text(json.dumps({"pebble": config}))
        stack.enter_context(running(
            names, "-dns01", f"127.0.0.1:{dns}", "-management", f"127.0.0.1:{dns_management}",
            "-http01", "", "-https01", "", "-tlsalpn01", "", "-defaultIPv4", "127.0.0.1",
            "-defaultIPv6", "", cwd=folder))  # fmt: skip
        wait_until(lambda: is_listening(dns))  # or the first validation resolves no name
        environment = {
            "PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0", "PEBBLE_AUTHZREUSE": "0",
            **environment,
        }  # fmt: skip
        stack.enter_context(running(
            program, "-config", str(file), "-dnsserver", f"127.0.0.1:{dns}",
            cwd=folder, **environment))  # fmt: skip
        found = Pebble(port, management, authority.ca_file)
        wait_until(found.is_up)
        yield found


def is_listening(port) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), TIMEOUT):
        return True
    return False


class Answers(Challenges):
    """Challenges, and both ports at which a CA validates them, without a gateway. A context
    manager.

    ``asked`` lists the validations: ("http-01", hostname, path, status) or ("tls-alpn-01",
    hostname, protocol, bytes after the handshake).
    """

    def __init__(self):
        super().__init__((HTTP_01, TLS_ALPN_01))
        self.asked = []
        answers = self

        class Page(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hostname = self.headers["Host"].partition(":")[0]
                body = answers.body(hostname, self.path)
                status = 200 if body else 404
                answers.asked.append((HTTP_01, hostname, self.path, status))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
        self._http.daemon_threads = False
        self.http_port = self._http.server_port
        self._tls = socket.create_server(("127.0.0.1", 0))
        self.tls_port = self._tls.getsockname()[1]
        self._threads = [
            threading.Thread(target=self._http.serve_forever, args=(0.01,), name=HTTP_01),
            threading.Thread(target=self._serve_tls, name=TLS_ALPN_01),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._http.shutdown()
        self._http.server_close()
        self._tls.shutdown(socket.SHUT_RDWR)
        self._tls.close()
        for thread in self._threads:
            thread.join(TIMEOUT)

    def _serve_tls(self):
        with contextlib.suppress(OSError):  # closed: the test is over
            while True:
                self._answer_hello(self._tls.accept()[0])

    def _answer_hello(self, sock):
        def choose(connection, sni, _):
            context = self.context(sni)
            if context is None:
                return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
            connection.context = context
            names.append(sni)

        names = []
        front = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        front.set_alpn_protocols(["acme-tls/1"])
        front.sni_callback = choose
        sock.settimeout(TIMEOUT)
        with sock, contextlib.suppress(OSError):
            with front.wrap_socket(sock, server_side=True) as tls:
                protocol = tls.selected_alpn_protocol()
                self.asked.append((TLS_ALPN_01, names[0], protocol, tls.recv(100)))
