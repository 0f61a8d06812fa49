"""A certificate authority in this process, over plain http. It verifies no signature, and answers
what the test wants, which no well-behaved CA would.

``FakeCa.script[NAME]`` is a list of answers that the endpoint NAME gives before its ordinary one.
Each is (status, headers, body), where a dict is sent as a problem document; or SILENCE for no
answer; or a function, which is called with a file to write an answer to. The names are those of the
paths: dir, nonce, new-account, account, new-order, order, authz, challenge, finalize, cert, ari.
"""

import base64
import contextlib
import http.server
import json
import queue
import secrets
import threading
from datetime import datetime, timedelta, timezone
from email.utils import formatdate

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support import TIMEOUT

SILENCE = object()
NOW = 1_800_000_000.0  # where fake clocks begin: in January 2027
DAY = 86_400.0


def problem(status, code, detail="the CA's own words", **headers):
    """An answer that refuses; in the names of headers ``_`` stands for a hyphen."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, fields, {"type": f"urn:ietf:params:acme:error:{code}", "detail": detail}


class Clock:
    """Seconds since 1970, as the test says."""

    def __init__(self, now=NOW):
        self.now = now

    def __call__(self):
        return self.now


class Proofs:
    """A Publisher that only records: ``published`` now, and ``seen`` ever."""

    def __init__(self, *types):
        self.types = types or ("http-01", "tls-alpn-01")
        self.published = {}  # by token or hostname
        self.seen = []

    @contextlib.contextmanager
    def http(self, hostname, token, body):
        with self._publish("http-01", token, body):
            yield

    @contextlib.contextmanager
    def alpn(self, hostname, digest):
        with self._publish("tls-alpn-01", hostname, digest):
            yield

    @contextlib.contextmanager
    def _publish(self, kind, name, proof):
        self.published[name] = proof
        self.seen.append((kind, name, proof))
        try:
            yield
        finally:
            del self.published[name]


class Mint:
    """A CA's key; makes certificates."""

    def __init__(self, name="fake CA"):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.fromtimestamp(NOW, timezone.utc)
        years = timedelta(days=3650)
        self.certificate = self._sign(self.name, self.key.public_key(), now - years, now + years, [
            (x509.BasicConstraints(ca=True, path_length=None), True)])  # fmt: skip

    def pair(self, hostname, begins_at=NOW, lifetime=90 * DAY):
        """Key and chain as PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption())  # fmt: skip
        return pem, self.chain(hostname, key.public_key(), begins_at, lifetime)

    def chain(self, hostname, public_key, begins_at=NOW, lifetime=90 * DAY):
        begins = datetime.fromtimestamp(begins_at, timezone.utc)
        leaf = self._sign(
            x509.Name([]), public_key, begins, begins + timedelta(seconds=lifetime),
            [(x509.SubjectAlternativeName([x509.DNSName(hostname)]), True),
             (x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False)],
        )  # fmt: skip
        pem = serialization.Encoding.PEM
        return leaf.public_bytes(pem) + self.certificate.public_bytes(pem)

    def _sign(self, subject, public_key, begins, ends, extensions):
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.key, hashes.SHA256())


class FakeCa:
    """A context manager. ``asked`` lists the requests: (endpoint, payload) each."""

    def __init__(self, clock):
        self.clock = clock
        self.mint = Mint()
        self.lifetime = 90 * DAY
        self.script = {}
        self.asked = []
        self.accounts = []  # their keys
        self.verdicts = {}  # by challenge type: the problem document of a failed validation
        self.windows = []  # the answers of renewal information; the last one is repeated
        self.renewal_info = False
        self._hostnames = []  # by order
        self._status = {}  # by "authz/N" and "order/N"
        self._certificates = {}
        self._closing = threading.Event()
        self.silent = queue.Queue()  # the endpoint of each request that gets no answer
        ca = self

        class Endpoint(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self):
                ca._serve(self)

            do_GET = do_POST = do_HEAD = do

            def log_message(self, *_):
                pass

            def date_time_string(self, timestamp=None):
                return formatdate(ca.clock(), usegmt=True)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
        self._server.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), name="fake CA"
        )
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(TIMEOUT)

    @property
    def directory(self):
        return f"{self.url}/dir"

    def count(self, endpoint):
        return sum(name == endpoint for name, _ in self.asked)

    def payloads(self, endpoint):
        return [payload for name, payload in self.asked if name == endpoint]

    def _serve(self, request):
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        envelope = json.loads(body) if body else {}
        header = json.loads(_decode(envelope["protected"])) if envelope else {}
        payload = json.loads(_decode(envelope["payload"]) or b"null") if envelope else None
        _, name, *rest = request.path.split("/")
        self.asked.append((name, payload))
        answers = self.script.get(name)
        answer = answers.pop(0) if answers else self._ordinary(name, rest, header, payload)
        if answer is SILENCE:
            self.silent.put(name)
            self._closing.wait(TIMEOUT)
            request.close_connection = True
            return
        if callable(answer):
            with contextlib.suppress(OSError):  # the client has closed the connection
                answer(request.wfile)
            request.close_connection = True
            return
        status, headers, body = answer
        kind = "application/json"
        if isinstance(body, dict):
            kind = "application/problem+json" if status >= 400 else kind
            body = json.dumps(body).encode()
        request.send_response(status)
        fields = {"Replay-Nonce": secrets.token_urlsafe(12), "Content-Type": kind, **headers}
        for field, value in fields.items():
            if value is not None:
                request.send_header(field, value)
        request.send_header("Content-Length", str(len(body)))
        # One request a connection: nothing is left open when the CA is closed.
        request.send_header("Connection", "close")
        request.end_headers()
        if request.command != "HEAD":
            with contextlib.suppress(OSError):  # the client has gone already
                request.wfile.write(body)

    def _ordinary(self, name, rest, header, payload):
        if name == "dir":
            return 200, {}, self._directory()
        if name == "nonce":
            return 200, {}, b""
        if name == "ari":
            return self.windows.pop(0) if len(self.windows) > 1 else self.windows[0]
        if name == "new-account":
            key = json.dumps(header["jwk"], sort_keys=True)
            known = key in self.accounts
            if not known:
                self.accounts.append(key)
            location = f"{self.url}/account/{self.accounts.index(key)}"
            return (200 if known else 201), {"Location": location}, {"status": "valid"}
        if not self._knows(header):
            return problem(400, "accountDoesNotExist")
        if name == "account":
            return 200, {}, {"status": "valid"}
        if name == "new-order":
            self._hostnames.append(payload["identifiers"][0]["value"])
            number = len(self._hostnames) - 1
            self._status.update({f"order/{number}": "pending", f"authz/{number}": "pending"})
            return 201, {"Location": f"{self.url}/order/{number}"}, self._order(number)
        if not rest:
            return problem(404, "malformed")
        number = int(rest[0])
        if name == "order":
            return 200, {}, self._order(number)
        if name == "authz":
            if payload and payload.get("status") == "deactivated":
                self._status[f"authz/{number}"] = "deactivated"
            return 200, {}, self._authorization(number)
        if name == "challenge":
            bad = self.verdicts.get(rest[1])
            self._status[f"authz/{number}"] = "invalid" if bad else "valid"
            self._status[f"order/{number}"] = "invalid" if bad else "ready"
            return 200, {}, {"type": rest[1], "status": "processing"}
        if name == "finalize":
            request = x509.load_der_x509_csr(_decode(payload["csr"]))
            self._certificates[number] = self.mint.chain(
                self._hostnames[number], request.public_key(), self.clock(), self.lifetime
            )
            self._status[f"order/{number}"] = "valid"
            return 200, {}, self._order(number)
        return 200, {"Content-Type": "application/pem-certificate-chain"}, (
            self._certificates[number])  # fmt: skip

    def _knows(self, header):
        number = header.get("kid", "").rpartition("/")[2]
        return number.isdigit() and int(number) < len(self.accounts)

    def _directory(self):
        names = {"newNonce": "nonce", "newAccount": "new-account", "newOrder": "new-order"}
        if self.renewal_info:
            names["renewalInfo"] = "ari"
        return {key: f"{self.url}/{name}" for key, name in names.items()}

    def _order(self, number):
        return {
            "status": self._status[f"order/{number}"],
            "authorizations": [f"{self.url}/authz/{number}"],
            "finalize": f"{self.url}/finalize/{number}",
            "certificate": f"{self.url}/cert/{number}",
        }

    def _authorization(self, number):
        return {
            "status": self._status[f"authz/{number}"],
            "identifier": {"type": "dns", "value": self._hostnames[number]},
            "challenges": [
                {
                    "type": kind,
                    "token": f"token-of-{kind}-{number:06}",
                    "url": f"{self.url}/challenge/{number}/{kind}",
                    "error": self.verdicts.get(kind),
                }
                for kind in ("http-01", "tls-alpn-01", "dns-01")
            ],
        }


def _decode(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
