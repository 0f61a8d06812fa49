"""A credential with two secrets for a while, and what becomes of the sessions of the old one."""

import logging
import time

import jwt
import pytest
from hand_made import registered
from support import APP, RAW, SECRET, Origin, agent_here, gateway_here, routes_of, wait_until

from gotunnel import MOVE, REASONS, End, Ping
from gotunnel_agent import link as link_module
from gotunnel_server.agents import agents_file, credentials
from gotunnel_server.agents.credentials import Credentials, TokenInvalid

OLD, NEW = "the old secret of the office, for tests", "the new secret of the office, for tests"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "agents.yaml"
    path.write_text(f'office: {{secret: "{OLD}", hosts: [{APP}, {RAW}]}}\n')
    path.chmod(0o600)
    return path


@pytest.fixture
def gateway(cache, path):
    with gateway_here(cache, AGENTS_FILE=str(path)) as gateway:
        yield gateway


def token(secret, issuer="office"):
    return jwt.encode({"iss": issuer, "exp": time.time() + 60}, secret)


def look(gateway):
    """What the gateway does within seconds, or on SIGHUP."""
    gateway.inner._look_at_credentials(True)


def test_visits_and_sessions_outlive_a_rotation(gateway, path, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(link_module, "MOVED", 0)
    secret = tmp_path / "secret"
    secret.write_text(OLD)
    keys = {"jwt_secret": None, "jwt_secret_file": str(secret), "jwt_issuer": "office"}
    with Origin() as target, agent_here(gateway, tmp_path, {}, {RAW: target.port}, **keys):
        with gateway.dial(RAW) as visitor, target.accept() as served:
            (first,) = gateway.inner.tunnels.registered()
            assert agents_file.rotate(path, "office", NEW, None)
            look(gateway)
            assert gateway.inner.tunnels.registered() == [first] and not first.moving
            secret.write_text(NEW)
            assert agents_file.finish_rotation(path, "office")
            look(gateway)
            wait_until(lambda: first not in gateway.inner.tunnels.registered())
            gateway.wait_for_routes(RAW)
            look(gateway)
            (second,) = gateway.inner.tunnels.registered()
            assert second.identity.secret == NEW and not second.moving
            visitor.send(b"ping")
            assert served.read_exactly(4) == b"ping"
            served.send(b"pong")
            assert visitor.read_exactly(4) == b"pong"


def test_a_session_of_an_old_secret_that_does_not_come_again_ends(gateway, path, monkeypatch):
    monkeypatch.setattr(credentials, "RETIRED", 0.5)
    with registered(gateway, APP, token=token(OLD), features=(REASONS,)) as agent:
        agents_file.rotate(path, "office", NEW, None)
        look(gateway)
        agents_file.finish_rotation(path, "office")
        look(gateway)
        assert routes_of(gateway.inner) == {APP}
        said = [agent.hear()]
        if isinstance(said[0], Ping):
            said = [agent.hear()]
        assert isinstance(said[0], End) and said[0].code == MOVE
        wait_until(lambda: (look(gateway), not routes_of(gateway.inner))[1])


def test_a_secret_that_is_changed_by_hand_ends_its_sessions_at_once(gateway, path):
    with registered(gateway, APP, token=token(OLD)):
        path.write_text(f'office: {{secret: "{NEW}", hosts: [{APP}, {RAW}]}}\n')
        look(gateway)
        wait_until(lambda: not routes_of(gateway.inner))


def test_the_shared_secret_may_have_one_before_it():
    checked = Credentials(SECRET, None, None, OLD)
    of_old, of_new = (checked.identify(token(secret, "any")) for secret in (OLD, SECRET))
    assert not checked.why_revoked(of_old) and not checked.is_retired(of_old)
    checked.change_shared(SECRET, None, None)
    assert checked.is_retired(of_old) and not checked.is_retired(of_new)
    assert not checked.why_revoked(of_old) and not checked.why_revoked(of_new)
    with pytest.raises(TokenInvalid, match="does not fit"):
        checked.identify(token(OLD, "any"))
    checked.change_shared(NEW, None, None)
    assert checked.why_revoked(of_new) == "JWT_SECRET was changed"


def test_an_old_secret_is_retired_by_its_date(path, monkeypatch):
    agents_file.rotate(path, "office", NEW, "2999-01-01")
    checked = Credentials(None, None, path)
    identity = checked.identify(token(OLD))
    end = identity.entry.old_until
    for moment, taken, retired in ((-1, False, False), (0, False, True), (31, True, False)):
        monkeypatch.setattr(credentials.time, "time", lambda at=end + moment: at)
        assert bool(checked.why_revoked(identity)) == taken
        assert checked.is_retired(identity) == retired


def test_a_refusal_takes_as_long_whether_there_are_two_secrets(path, monkeypatch):
    """Else a stranger learns which issuers there are."""
    tried = []
    decode = credentials._decode
    monkeypatch.setattr(
        credentials, "_decode", lambda token, secret: tried.append(secret) or decode(token, secret)
    )
    checked = Credentials(SECRET, None, path)
    counts = set()
    for rotate in (False, True):
        if rotate:
            agents_file.rotate(path, "office", NEW, None)
            checked.reload(force=True)
        for issuer in ("office", "nobody"):
            tried.clear()
            with pytest.raises(TokenInvalid):
                checked.identify(token("a wrong secret, as long as others", issuer))
            counts.add(len(tried))
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("secret: [a]", "a list came of 1, expected text, or a list of 2"),
        ("secret: [a, b, c]", "a list came of 3"),
        ("secret: [a, a]", "both are the same"),
        ("secret: [a, '']", "no text came"),
        ("secret: [a, [b]]", "a list came, expected text"),
        ("secret: a, old_secret_until: 2030-01-01", "expected two secrets with it"),
        ("secret: [a, b], old_secret_until: soon", "old_secret_until: 'soon' came"),
    ],
)
def test_two_secrets_that_make_no_sense_are_refused(path, keys, said):
    path.write_text(f"office: {{{keys}, hosts: a.b}}\n")
    with pytest.raises(agents_file.AgentsFileError) as refused:
        agents_file.read(path)
    assert said in str(refused.value)


def test_two_secrets_may_stand_in_files(path, tmp_path):
    (tmp_path / "new").write_text(NEW + "\n")
    (tmp_path / "old").write_text(OLD + "\n")
    path.write_text("office: {secret_file: [new, old], hosts: a.b}\n")
    found = agents_file.read(path)
    assert found.entries["office"].accepted(0) == (NEW, OLD)
    assert set(found.files) == {path, tmp_path / "new", tmp_path / "old"}
    assert OLD not in repr(found) and NEW not in repr(found)
