"""`gotunnel-server check` and `certificates` say that a gateway has another key than the others."""

import base64
import io

import pytest
from fake_ca import Mint
from fake_redis import connection_to
from support import gateway_environment

from gotunnel_server.admin import certificates, check
from gotunnel_server.certs.local_ca import CertificateError
from gotunnel_server.certs.store import CertStore, StoreError
from gotunnel_server.cluster.certificates import open_redis
from gotunnel_server.cluster.sealed import new_key
from gotunnel_server.config import load

APP, URL = "app.example.com", "https://ca.example/dir"


@pytest.fixture
def config(tmp_path, redis_server):
    """The configuration of a gateway; ``key()`` makes and gives it a new key."""
    file = tmp_path / "key"

    def made():
        return load(None, gateway_environment(
            tmp_path / "cache", ACME_ENV="production", ACME_DIRECTORY=URL,
            CLUSTER=redis_server.url, CLUSTER_KEY_FILE=str(file)))  # fmt: skip

    made.key = lambda: file.write_text(new_key()) and file.chmod(0o600)
    made.key()
    return made


@pytest.fixture
def shared(config, redis_server):
    """The store of a gateway that runs, with one certificate."""
    call, close = connection_to(redis_server)
    [key] = config().cluster.keys
    store = CertStore(*open_redis(call, "gotunnel", [base64.urlsafe_b64decode(key)]), URL)
    store.save(APP, *Mint().pair(APP))
    yield store
    close()


def findings(config):
    found = check.look_at_cluster(config.cluster)
    return [(each.level, each.text) for each in found if each.subject == "CLUSTER_KEY_FILE"]


def test_certificates_of_a_cluster_are_listed_and_asked_for_on_any_machine(config, shared):
    out = io.StringIO()
    assert certificates.run_certificates(config(), out) == 0
    assert APP in out.getvalue() and "ACME" in out.getvalue()
    assert "one of the running gateways" in certificates.ask_renewal(config(), APP)
    assert shared.renewals() == [APP]
    assert not config().acme_cache.exists()


def test_another_key_is_told_in_one_line_and_nothing_is_changed(config, shared):
    [(level, _)] = findings(config())
    assert level == check.OK
    config.key()
    [(level, text)] = findings(config())
    assert level == check.FAIL and "give this gateway the CLUSTER_KEY_FILE" in text
    for attempt in (
        lambda: certificates.find_rows(config()),
        lambda: certificates.run_certificates(config(), io.StringIO()),
        lambda: certificates.ask_renewal(config(), APP),
    ):
        with pytest.raises((CertificateError, StoreError), match="is encrypted with a key that"):
            attempt()
    assert shared.certificate(APP) is not None


def test_without_redis_the_copy_is_shown_and_nothing_can_be_asked_for(config, redis_server):
    redis_server.kill()
    out = io.StringIO()
    assert certificates.run_certificates(config(), out) == 0
    assert "this is the copy in ACME_CACHE" in out.getvalue()
    with pytest.raises(StoreError, match="there is no certificate of that name"):
        certificates.ask_renewal(config(), APP)
