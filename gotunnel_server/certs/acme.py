"""Orders one certificate by ACME (RFC 8555): one method for each step, in the RFC's order.

    directory       where everything is                    §7.1.1
    account         our key, known to the CA; made once    §7.3
    order           the hostname that we want              §7.4
    authorization   what has to be proved                  §7.5
    challenge       the proof, which the CA validates      §8
    finalize        we send our key's CSR                  §7.4
    download        the certificate and its chain          §7.4.2

The `acme` library signs requests and keeps nonces. The payloads are written here as the RFC shows
them, and the polling loops are ours: those of the library wait at least a second a round, repeat a
bad nonce only once, and hide the CA's Retry-After.

One thread runs one order, with requests of its own; several orders may run at once. Whatever a CA
answers, an order ends with a certificate, a CaError (acme_errors.py), or Abandoned.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

import josepy.errors
import requests
from acme import client, errors, messages
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from josepy.interfaces import JSONDeSerializable
from josepy.jwa import ES256, RS256
from josepy.jwk import JWK, JWKEC

from ..net.certificate import ends, load_certificates
from ..net.safe_read import MALFORMED
from .acme_errors import (
    ACCOUNT,
    CONFIG,
    HOST,
    LIMITED,
    TRANSPORT,
    Abandoned,
    CaError,
    judge,
    parse_retry_after,
    refusal,
)
from .bounded_http import Session
from .cancel import Stop
from .challenges import HTTP_01, Publisher
from .schedule import CLOCK_OFF, CLOCK_WRONG, Window, ask_delay

log = logging.getLogger("gotunnel.acme")

# Seconds of silence in one request. Let's Encrypt answers within one, and within ten on bad days.
NETWORK_TIMEOUT = 30
# Seconds for the request that deactivates an authorization. Short, as the gateway may be stopping.
LAST_WORDS_TIMEOUT = 5.0
# Tries of a request whose nonce is refused. The library repeats each once: six requests at most.
NONCE_ROUNDS = 3
# Polling interval of an authorization or an order, in seconds: the first one, doubled each time up
# to the longest one. If the CA gives an interval (Retry-After), that one is used.
FIRST_LOOK, LONGEST_LOOK = 0.1, 3.0
# Seconds of polling in all. A CA that connects to a silent address gives up after 15 or so.
PROOF_PATIENCE, FINALIZE_PATIENCE = 90.0, 180.0
CLOCK_PAUSE = 3600.0  # seconds: the operator has to set the clock first
SHOWN = 200  # characters that are shown of an answer that is not ACME

# What the library raises for an answer that refuses, or that it cannot parse.
NOT_ACME = (
    errors.Error, josepy.errors.Error, ValueError, TypeError, LookupError, AttributeError,
    OverflowError, RecursionError,
)  # fmt: skip

# At DEBUG the library logs whole payloads, with tokens.
logging.getLogger("acme").setLevel(logging.INFO)

_Object = dict[str, Any]  # JSON that a CA sent: any value may be missing or wrong
_Certified = ec.EllipticCurvePrivateKey  # a certificate's key


class AccountStore(Protocol):
    """Where a Ca keeps its account; CertStore is one, and explains the methods."""

    def account(self) -> dict[str, Any]: ...

    def save_account(self, account: dict[str, Any]) -> None: ...

    def drop_account(self, why: str) -> None: ...

    def where_account(self) -> str: ...

    def account_lock(self) -> AbstractContextManager[None]: ...


class _Payload(JSONDeSerializable):
    """The body of a request, for the library to sign."""

    def __init__(self, **fields: object) -> None:
        self._fields = fields

    def to_partial_json(self) -> dict[str, object]:
        return self._fields

    @classmethod
    def from_json(cls, jobj: Any) -> _Payload:
        return cls(**jobj)


class Ca:
    """A certificate authority, by its directory's URL. Any thread."""

    def __init__(self, directory_url: str, store: AccountStore, *,
                 ca_file: str | os.PathLike[str] | None = None,
                 email: str | None = None, eab: tuple[str, str] | None = None,
                 user_agent: str = "gotunnel", clock: Callable[[], float] = time.time,
                 ) -> None:  # fmt: skip
        """``store`` keeps the account.

        ``ca_file``: PEM with the roots to trust in requests to the CA; None for the public CAs.
        ``eab``: key identifier and HMAC key (base64url) of an external account binding (§7.3.4).
        ``clock`` gives seconds since 1970.
        """
        self.directory_url = directory_url
        self._store = store
        self._ca_file = ca_file
        self._email = email
        self._eab = eab
        self._user_agent = user_agent
        self._clock = clock

    def order(self, hostname: str, challenge: str, challenges: Publisher, stop: Stop, *,
              replaces: x509.Certificate | None = None) -> tuple[bytes, bytes]:  # fmt: skip
        """Private key and chain of a new certificate, both PEM.

        ``challenge`` is the type to use; ``challenges`` publishes its proof. ``stop`` ends the
        order soon. ``replaces`` is the certificate that this one follows (RFC 9773 §5). Raises
        CaError, Abandoned, and StoreError if the account cannot be kept.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        with self._conversation(stop, hostname) as ca:
            self._sign_in(ca)
            try:
                chain = self._order(ca, hostname, challenge, challenges, key, replaces)
            except CaError as error:
                # "unauthorized" of a challenge means its proof; else the account may be closed.
                if error.code != "unauthorized" or error.challenge or not self._is_closed(ca):
                    raise
                raise CaError(
                    CONFIG, error.url, f"{error.words}; the CA has closed the account: "
                    f"{self._how_to_get_another()}", code=error.code, status=error.status,
                    account_wide=True) from error  # fmt: skip
        return (
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            chain,
        )

    def _order(
        self,
        ca: _Conversation,
        hostname: str,
        challenge: str,
        challenges: Publisher,
        key: _Certified,
        replaces: x509.Certificate | None,
    ) -> bytes:
        """The chain of a certificate for ``key``."""
        try:
            url, order = self._new_order(ca, hostname, replaces)
        except CaError as error:
            # The CA has lost our account; or account.json has the key of one account and the URL
            # of another ("malformed"). Signing in finds our key's account, or makes one.
            if error.code not in ("accountDoesNotExist", "malformed"):
                raise
            self._sign_in(ca, forgotten=ca.account)
            url, order = self._new_order(ca, hostname, replaces)
        for authorization in _texts(url, order, "authorizations"):
            self._prove(ca, authorization, hostname, challenge, challenges)
        order = self._finalize(ca, url, order, _request(hostname, key), hostname)
        url = _text(url, order, "certificate")
        chain = ca.post(url, None).content
        self._refuse_expired(url, chain)
        return chain

    def renewal_info(self, leaf: x509.Certificate, stop: Stop) -> tuple[Window | None, float]:
        """When the CA wants ``leaf`` renewed (ARI, RFC 9773 §4), and in how many seconds to ask
        again.

        The window is None if the CA has none, or an invalid one. Raises Abandoned only.
        """
        try:
            with self._conversation(stop) as ca:
                if "renewalInfo" not in ca.directory:
                    return None, ask_delay(None)
                url = f"{_text(self.directory_url, ca.directory, 'renewalInfo')}/{ari_id(leaf)}"
                answer = ca.get(url)
                suggested = _json(url, answer)["suggestedWindow"]
                start, end = (_instant(suggested[key]) for key in ("start", "end"))
        except (CaError, KeyError, *MALFORMED) as error:
            log.debug("no renewal information: %s", error)
            return None, ask_delay(getattr(error, "retry_after", None))
        window = Window(start, end) if start <= end else None
        return window, ask_delay(self._retry_after(answer))

    def _refuse_expired(self, url: str, chain: bytes) -> None:
        """Refuse a new certificate that has already expired: it must not replace a valid one. The
        store checks the rest."""
        try:
            end = ends(load_certificates(chain)[0])
        except (ValueError, x509.InvalidVersion):
            raise CaError(
                TRANSPORT, url, f"the CA sent {chain[:SHOWN]!r}, expected a certificate as PEM"
            ) from None
        if end.timestamp() <= self._clock():
            raise CaError(
                HOST, url, f"the CA sent a certificate that expired on {end:%Y-%m-%d %H:%M} UTC, "
                "expected a new one")  # fmt: skip

    # §7.1.1

    @contextlib.contextmanager
    def _conversation(self, stop: Stop, hostname: str = "") -> Iterator[_Conversation]:
        verify = True if self._ca_file is None else str(self._ca_file)
        session = Session(self.directory_url, stop)
        ca = _Conversation(session, verify, self._user_agent, stop, hostname, self._clock)
        with contextlib.closing(ca):
            answer = ca.get(self.directory_url)
            ca.directory = _json(self.directory_url, answer)
            self._compare_clocks(answer)
            yield ca

    def _compare_clocks(self, answer: requests.Response) -> None:
        try:
            off = self._clock() - parsedate_to_datetime(answer.headers["Date"]).timestamp()
        except (KeyError, ValueError, TypeError):
            return  # the CA does not say
        words = f"this machine's clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'}"
        if abs(off) > CLOCK_WRONG:
            raise CaError(
                ACCOUNT, self.directory_url, f"{words} the CA's: set it, nothing is "
                "ordered until then", code="clock", retry_after=CLOCK_PAUSE)  # fmt: skip
        if abs(off) > CLOCK_OFF:
            log.warning("%s that of %s: set it", words, self.directory_url)

    def _retry_after(self, answer: requests.Response) -> float | None:
        return parse_retry_after(answer.headers.get("Retry-After"), self._clock())

    # §7.3

    def _sign_in(self, ca: _Conversation, forgotten: str = "") -> None:
        """Use our account; make one if there is none, or if the CA has ``forgotten`` its URL.

        The key is kept before it is used, so that no account is lost with its key.
        """
        with self._store.account_lock():
            kept = self._store.account()
            try:
                ca.sign_with(_account_key(kept["key"]))
            except (KeyError, ValueError, TypeError, AttributeError, josepy.errors.Error):
                if kept:
                    self._store.drop_account("expected a private key, EC P-256 or RSA")
                ca.sign_with(JWKEC(key=ec.generate_private_key(ec.SECP256R1())))
                kept = {"directory": self.directory_url, "key": ca.key.to_json()}
                self._store.save_account(kept)
            url = kept.get("url")
            if not isinstance(url, str) or url == forgotten:
                url = self._new_account(ca)
                self._store.save_account({**kept, "url": url})
            ca.account = url

    def _is_closed(self, ca: _Conversation) -> bool:
        """Whether the CA has closed our account (§7.3.6). It is asked."""
        try:
            account = _json(ca.account, ca.post(ca.account, None))
        except CaError as error:
            return error.code == "unauthorized"
        return account.get("status") in ("deactivated", "revoked")

    def _how_to_get_another(self) -> str:
        return (
            f"remove {self._store.where_account()} and order a certificate (gotunnel-server "
            "certificates --renew NAME), which makes another account"
        )

    def _new_account(self, ca: _Conversation) -> str:
        fields: dict[str, object] = {"termsOfServiceAgreed": True}
        url = _text(self.directory_url, ca.directory, "newAccount")
        if self._email:
            fields["contact"] = [f"mailto:{self._email}"]
        if self._eab:
            fields["externalAccountBinding"] = self._binding(ca, url, *self._eab)
        ca.account = ""
        try:
            answer = ca.post(url, _Payload(**fields), signing_in=True)
        except CaError as error:
            if error.kind != CONFIG:
                raise
            binding = (
                "check ACME_EAB_KID and ACME_EAB_HMAC_KEY"
                if self._eab
                else "set ACME_EAB_KID and ACME_EAB_HMAC_KEY to what the CA has given you"
            )
            if error.code == "unauthorized":  # a wrong binding, or the key's account is closed
                hint = f"if the CA has closed it: {self._how_to_get_another()}; else {binding}"
            elif error.code == "externalAccountRequired" or self._eab:
                hint = binding
            else:
                hint = "check ACME_EMAIL" if self._email else ""
            words = "; ".join(filter(None, (error.words, hint)))
            raise CaError(CONFIG, url, words, code=error.code,
                          status=error.status, account_wide=True) from error  # fmt: skip
        return _location(url, answer)

    def _binding(self, ca: _Conversation, url: str, kid: str, hmac_key: str) -> dict[str, Any]:
        try:
            binding: dict[str, Any] = messages.ExternalAccountBinding.from_data(
                ca.key.public_key(), kid, hmac_key.rstrip("="),
                messages.Directory({"newAccount": url}))  # fmt: skip
            return binding
        except (ValueError, TypeError, josepy.errors.Error) as error:
            raise CaError(
                CONFIG, url, "ACME_EAB_HMAC_KEY is not base64url, expected the key as the CA "
                "has given it", account_wide=True) from error  # fmt: skip

    # §7.4

    def _new_order(
        self, ca: _Conversation, hostname: str, replaces: x509.Certificate | None
    ) -> tuple[str, _Object]:
        url = _text(self.directory_url, ca.directory, "newOrder")
        fields: dict[str, object] = {"identifiers": [{"type": "dns", "value": hostname}]}
        if replaces is not None and "renewalInfo" in ca.directory:
            try:
                answer = ca.post(url, _Payload(**fields, replaces=ari_id(replaces)))
                return _location(url, answer), _json(url, answer)
            except (CaError, x509.ExtensionNotFound) as error:
                # The CA has a successor already, perhaps from an order whose answer we did not get.
                if isinstance(error, CaError) and error.kind in (ACCOUNT, LIMITED, TRANSPORT):
                    raise
        answer = ca.post(url, _Payload(**fields))
        return _location(url, answer), _json(url, answer)

    # §7.5

    def _prove(
        self, ca: _Conversation, url: str, hostname: str, challenge: str, challenges: Publisher
    ) -> None:
        """Prove to the CA that we control the hostname, unless an earlier proof is still valid."""
        authorization = _json(url, ca.post(url, None))
        if authorization.get("status") == "valid":
            return
        try:
            offered = {
                item.get("type"): item
                for item in authorization.get("challenges") or ()
                if isinstance(item, dict)
            }
            if challenge not in offered or authorization.get("status") != "pending":
                raise CaError(
                    HOST, url, f"the authorization of {hostname} is {authorization.get('status')} "
                    f"with challenges {', '.join(map(str, offered))}, expected a pending "
                    f"{challenge}")  # fmt: skip
            # The key authorization (§8.1) names the account's key: no other account can use it.
            chosen = offered[challenge]
            token = _text(url, chosen, "token")
            key_authorization = f"{token}.{_base64url(ca.key.thumbprint())}"
            if challenge == HTTP_01:  # §8.3
                published = challenges.http(hostname, token, key_authorization.encode())
            else:  # RFC 8737
                digest = hashlib.sha256(key_authorization.encode()).digest()
                published = challenges.alpn(hostname, digest)
            with published:
                ca.post(_text(url, chosen, "url"), _Payload())
                authorization = ca.wait_while(url, ("pending",), PROOF_PATIENCE)
            if authorization.get("status") != "valid":
                raise self._not_proved(url, authorization, hostname, challenge)
        except (CaError, Abandoned):
            # Deactivate it. Otherwise it stays pending for days, and a CA limits pending ones.
            if authorization.get("status") == "pending":
                ca.last_words(url, _Payload(status="deactivated"))
            raise

    # §7.4 again, §7.4.2

    def _finalize(
        self, ca: _Conversation, url: str, order: _Object, request: bytes, hostname: str
    ) -> _Object:
        order = ca.wait_while(url, ("pending",), FINALIZE_PATIENCE)
        if order.get("status") == "ready":
            ca.post(_text(url, order, "finalize"), _Payload(csr=_base64url(request)))
            order = ca.wait_while(url, ("ready", "processing"), FINALIZE_PATIENCE)
        if order.get("status") != "valid":
            status = f"the order is {order.get('status')}, expected valid"
            raise judge(
                url, order.get("error"), now=self._clock(), hostname=hostname, otherwise=status
            )
        return order

    def _not_proved(
        self, url: str, authorization: _Object, hostname: str, challenge: str
    ) -> CaError:
        """Why the validation failed: the error of the challenge."""
        status = authorization.get("status")
        if status == "pending":
            return CaError(HOST, url, f"{challenge}: no result within {PROOF_PATIENCE:g} s")
        for item in authorization.get("challenges") or ():
            if isinstance(item, dict) and item.get("error"):
                return judge(url, item["error"], now=self._clock(), hostname=hostname,
                             challenge=challenge)  # fmt: skip
        return CaError(HOST, url, f"{challenge}: the authorization is {status}, expected valid",
                       challenge=challenge)  # fmt: skip


class _Conversation:
    """Requests to the CA, signed for ``account`` (its URL, "" before there is one).

    ``directory`` is the CA's. Answers are those of the requests library. Any failure of a request
    is raised as CaError.
    """

    key: JWK  # the account's; sign_with() sets it before the first post()

    def __init__(
        self,
        session: Session,
        verify: bool | str,
        user_agent: str,
        stop: Stop,
        hostname: str,
        clock: Callable[[], float],
    ) -> None:
        self.directory: _Object = {}
        self._stop = stop
        self._hostname = hostname
        self._clock = clock
        self._answers: list[requests.Response] = []  # of one call; the library's errors lack them
        self._net = client.ClientNetwork(
            None, alg=ES256, user_agent=user_agent,
            verify_ssl=verify,  # type: ignore[arg-type]  # requests takes a file, too
            timeout=NETWORK_TIMEOUT)  # fmt: skip
        self._net.session.close()
        self._net.session = self._session = session
        session.hooks["response"].append(self._keep)

    def close(self) -> None:
        self._session.close()

    def sign_with(self, key: JWK) -> None:
        self.key = self._net.key = key
        self._net.alg = ES256 if isinstance(key, JWKEC) else RS256

    @property
    def account(self) -> str:
        account = self._net.account
        return "" if account is None else account.uri

    @account.setter
    def account(self, url: str) -> None:
        body = messages.Registration()
        self._net.account = messages.RegistrationResource(body=body, uri=url) if url else None

    def get(self, url: str) -> requests.Response:
        return self._request(url, lambda: self._net.get(url))

    def post(
        self, url: str, payload: _Payload | None, *, signing_in: bool = False
    ) -> requests.Response:
        """A signed request; without payload it only reads (POST-as-GET, §6.3)."""
        nonces = _text(url, self.directory, "newNonce")
        rounds_left = NONCE_ROUNDS
        while True:
            rounds_left -= 1
            try:
                return self._request(
                    url, lambda: self._net.post(url, payload, new_nonce_url=nonces), signing_in
                )
            except CaError as error:
                if error.code != "badNonce" or not rounds_left:
                    raise

    def last_words(self, url: str, payload: _Payload) -> None:
        """Send the last request of an order, even after stop, with a short timeout. A failure is
        ignored."""
        self._stop = self._session.stop = Stop()
        self._session.timeout = LAST_WORDS_TIMEOUT
        with contextlib.suppress(CaError, Abandoned):
            self.post(url, payload)

    def wait_while(self, url: str, statuses: Collection[str], patience: float) -> _Object:
        """Poll the object at ``url``, as often as the CA says, until its status is not among
        ``statuses``; after ``patience`` seconds return it as it is.
        """
        waited, look = 0.0, FIRST_LOOK
        while True:
            answer = self.post(url, None)
            found = _json(url, answer)
            if found.get("status") not in statuses or waited >= patience:
                return found
            header = answer.headers.get("Retry-After")
            pause = parse_retry_after(header, self._clock(), least=FIRST_LOOK)
            pause = min(pause or look, patience - waited)
            if self._stop.wait(pause):
                raise Abandoned(url)
            waited, look = waited + pause, min(2 * look, LONGEST_LOOK)

    def _request(
        self, url: str, ask: Callable[[], requests.Response], signing_in: bool = False
    ) -> requests.Response:
        if self._stop.is_set():
            raise Abandoned(url)
        self._answers.clear()
        try:
            return ask()
        except OSError as error:  # requests' errors are OSErrors; so is an unreadable CA file
            if self._stop.is_set():
                raise Abandoned(url) from None
            raise CaError(TRANSPORT, url, _reason(error)) from error
        except NOT_ACME as error:
            answer = self._answers[-1] if self._answers else None
            if answer is None or answer.ok:
                came = "" if answer is None else f"the CA sent {_shown(answer)!r}, "
                words = f"{came}expected an answer of ACME: {error}"
                raise CaError(TRANSPORT, url, words) from error
            try:
                problem = answer.json()
            except (ValueError, RecursionError):
                problem = _shown(answer)
            raise refusal(
                url, answer.status_code, answer.headers, problem, now=self._clock(),
                hostname=self._hostname, signing_in=signing_in) from error  # fmt: skip

    def _keep(self, answer: requests.Response, **_: object) -> None:
        self._answers.append(answer)


def ari_id(leaf: x509.Certificate) -> str:
    """A certificate's identifier in renewal information (RFC 9773 §4.1)."""
    authority = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    serial = leaf.serial_number
    serial_bytes = serial.to_bytes(serial.bit_length() // 8 + 1, "big", signed=True)
    return f"{_base64url(authority.key_identifier or b'')}.{_base64url(serial_bytes)}"


def _account_key(fields: Any) -> JWK:
    """A key that we can sign with. Raises ValueError, or an error of josepy, if there is none."""
    key = JWK.from_json(fields)
    if not isinstance(key, JWK) or "d" not in fields or fields.get("crv", "P-256") != "P-256":
        # RFC 7518 §6
        raise ValueError("a public key, or one for another signature than ES256 and RS256")
    return key


def _request(hostname: str, key: _Certified) -> bytes:
    """The CSR, DER. The subject stays empty, because a common name is limited to 64 characters."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(hostname)]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


def _json(url: str, answer: requests.Response) -> _Object:
    try:
        found = answer.json()
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CaError(TRANSPORT, url, f"the CA sent {_shown(answer)!r}, expected a JSON object")
    return found


def _shown(answer: requests.Response) -> str:
    """The beginning of a body that is not ACME, for a message."""
    return answer.content[:SHOWN].decode("utf-8", "replace")


def _text(url: str, found: _Object, name: str) -> str:
    text = found.get(name)
    if not isinstance(text, str):
        raise CaError(TRANSPORT, url, f"{name} is {text!r:.100}, expected a text")
    return text


def _texts(url: str, found: _Object, name: str) -> list[str]:
    texts = found.get(name)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise CaError(TRANSPORT, url, f"{name} is {texts!r:.100}, expected a list of texts")
    return texts


def _location(url: str, answer: requests.Response) -> str:
    return _text(url, {"Location": answer.headers.get("Location")}, "Location")


def _instant(text: object) -> float:
    """Seconds since 1970 of an RFC 3339 date. Python 3.10 reads no "Z" and no nanoseconds."""
    date = re.sub(r"\.[0-9]+", "", str(text).upper()).replace("Z", "+00:00")
    instant = datetime.fromisoformat(date)
    if instant.tzinfo is None:
        raise ValueError(f"{text!r} names no zone, expected a date such as 2026-01-31T12:00:00Z")
    return instant.timestamp()


def _reason(error: BaseException) -> str:
    """Why the CA could not be reached: the innermost OSError of a failed request, as the texts of
    outer ones name Python objects. CaError puts the CA's URL before it."""
    reason, cause = error, error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError):
            reason = cause
        cause = cause.__cause__ or cause.__context__
    return f"cannot be asked: {reason}"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
