"""A member's copy of what Redis has: without Redis, when it is back, when a gateway joins a cluster
and when it leaves."""

import pytest
from fake_ca import DAY, NOW, Mint, Proofs
from fake_redis import FakeRedis
from issuer_house import House

from gotunnel_server.certs.contexts import Certificates
from gotunnel_server.certs.folder import FolderStorage, open_store
from gotunnel_server.certs.ordered import Ordered
from gotunnel_server.certs.ordering import Ordering
from gotunnel_server.certs.storage import OutOfReach
from gotunnel_server.certs.store import StoreError, ca_id
from gotunnel_server.cluster import local_copy
from gotunnel_server.cluster.certificates import SharedCertificates

URL, CA = "https://ca.example/dir", ca_id("https://ca.example/dir")
APP, OTHER = "app.example.com", "other.example.com"


@pytest.fixture(scope="module")
def mint():
    return Mint()


class Mail:
    """A member's board, which only notes what is sent."""

    def __init__(self):
        self.id, self.sent, self.hear = "a", [], {}

    def members(self):
        return {"a": None}

    def on_members(self, callback):
        pass

    def publish(self, to, message):
        self.sent.append(message)

    def on(self, do, hear):
        self.hear[do] = hear


class Cluster:
    """One Redis, and members with folders of their own."""

    def __init__(self, folder, monkeypatch):
        self.redis, self.now, self._folder = FakeRedis(lambda: self.now), 1000.0, folder
        monkeypatch.setattr(local_copy, "monotonic", lambda: self.now)

    def folder(self, name):
        return self._folder / name

    def member(self, name, key=b"k" * 32):
        """The store of a member that starts."""
        mail = Mail()
        shared = SharedCertificates(self.redis, "gotunnel", [key], self.folder(name), mail)
        store = shared.store(URL)
        store.mail, store.copied = mail, shared._copied
        return store

    def alone(self, name):
        """The store of a gateway without CLUSTER in that folder."""
        return open_store(self.folder(name), URL)

    def later(self):
        """After that, what was out of reach is tried again, and looked at."""
        self.now += local_copy.LOOK + local_copy.AGAIN


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    return Cluster(tmp_path, monkeypatch)


def save(store, mint, hostname, begins_at=NOW):
    return store.save(hostname, *mint.pair(hostname, begins_at))


def test_what_a_gateway_has_alone_is_taken_along_into_a_cluster(cluster, mint):
    alone = cluster.alone("a")
    stored = save(alone, mint, APP)
    alone.save_account({"key": "secret"})
    alone.save_turns({"full_at": {"all": 1}})
    alone.save_pause({"until": 7})
    alone.save_state(APP, {"failures": 3})
    key, chain = mint.pair("go.example.com", NOW)
    (cluster.folder("a") / "go.example.com").write_bytes(key.rstrip() + b"\n" + chain)
    first, second = cluster.member("a"), cluster.member("b")
    for store in (first, second):
        assert store.certificate(APP) == stored
        assert store.account() == {"key": "secret"} and store.pause() == {"until": 7}
        assert store.turns() == {"full_at": {"all": 1}} and store.state(APP) == {"failures": 3}
        assert store.certificate("go.example.com").is_left_by_go
        assert store.known() == [APP, "go.example.com"]
    assert b"secret" not in b"".join(cluster.redis.hashes[f"{{gotunnel}}:files:{CA}"].values())


def test_a_second_gateway_brings_its_certificates_and_no_other_account(cluster, mint):
    for name, hostname in (("a", APP), ("b", OTHER)):
        alone = cluster.alone(name)
        save(alone, mint, hostname)
        alone.save_account({"key": name})
    first, second = cluster.member("a"), cluster.member("b")
    assert first.hostnames() == second.hostnames() == [APP, OTHER]
    assert first.account() == second.account() == {"key": "a"}
    assert sorted(first.changed()) == []
    cluster.later()
    assert first.changed() == [OTHER]


def test_a_gateway_that_leaves_a_cluster_goes_on_with_its_folder(cluster, mint):
    first, second = cluster.member("a"), cluster.member("b")
    save(first, mint, APP)
    first.save_account({"key": "secret"})
    first.save_turns({"full_at": {}})
    second.mail.hear["certificate"]({"from": "a"})
    assert second.changed() == [APP]
    stored = second.certificate(APP)
    cluster.now += local_copy.AGAIN
    cluster.member("b")  # starts once more
    alone = cluster.alone("b")
    assert alone.certificate(APP) == stored
    assert alone.account() == {"key": "secret"} and alone.turns() == {"full_at": {}}
    assert cluster.alone("a").certificate(APP) == stored


def test_a_member_starts_without_redis_and_serves_what_it_had(cluster, mint, caplog):
    save(cluster.member("a"), mint, APP)
    caplog.clear()
    cluster.redis.away = True
    store = cluster.member("a")
    assert store.hostnames() == [APP] and store.certificate(APP) and store.known() == [APP]
    with pytest.raises(StoreError, match="^Redis at fake: Connection refused$"):
        store.save_state(APP, {})
    with pytest.raises(StoreError, match="refused; nothing is ordered until it is back") as raised:
        store.make_sure_of_room()
    assert "make room" not in str(raised.value)
    assert isinstance(raised.value.__cause__, OutOfReach)
    newer = save(other := cluster_back(cluster).member("b"), mint, APP, NOW + DAY)
    cluster.later()
    assert store.changed() == [APP] and store.certificate(APP) == newer
    assert other.certificate(APP) == newer
    told = [each.message for each in caplog.records if each.name == "gotunnel.local_copy"]
    assert told == [
        "Redis at fake: Connection refused: certificates are read from ACME_CACHE, and none is "
        "ordered until it is back",
        "certificates are shared by Redis again",
    ]


def cluster_back(cluster):
    cluster.redis.away = False
    return cluster


def test_redis_that_is_away_is_not_tried_for_each_certificate(cluster, mint):
    store = cluster.member("a")
    for number in range(5):
        save(store, mint, f"{number}.example.com")
    cluster.redis.away, tries = True, []
    cluster.redis.on_call = tries.append
    assert all(map(store.certificate, store.hostnames())) and len(tries) == 1
    cluster.now += local_copy.AGAIN
    assert store.certificate("1.example.com") and len(tries) == 2


def test_a_certificate_that_is_ordered_as_redis_goes_away_is_not_lost(cluster, mint, caplog):
    first, second = cluster.member("a"), cluster.member("b")
    cluster.redis.away = True
    stored = save(first, mint, APP)
    assert first.certificate(APP) == stored and second.certificate(APP) is None
    assert "the other members get it when Redis is back" in caplog.text
    cluster.redis.away = False
    cluster.now += local_copy.AGAIN
    assert first.certificate(APP) == stored  # also before it was sent
    assert first.hostnames() == [APP]
    cluster.later()
    first.changed(), second.changed()
    assert second.certificate(APP) == stored


def test_one_that_was_renewed_meanwhile_is_not_replaced_by_an_older_one(cluster, mint):
    first, second = cluster.member("a"), cluster.member("b")
    cluster.redis.away = True
    save(first, mint, APP)
    cluster.redis.away = False
    newer = save(second, mint, APP, NOW + DAY)
    cluster.later()
    assert first.changed() == [APP] and first.certificate(APP) == newer
    cluster.redis.away = True
    newest = save(first, mint, APP, NOW + 2 * DAY)
    cluster.redis.away = False
    cluster.later()
    first.changed()
    assert second.certificate(APP) == newest


def test_after_redis_has_lost_its_data_the_members_put_back_what_they_have(cluster, mint):
    first, second = cluster.member("a"), cluster.member("b")
    save(first, mint, APP), save(second, mint, OTHER)
    first.save_account({"key": "secret"})
    cluster.later()
    first.changed(), second.changed()
    cluster.redis.flush()
    cluster.later()
    first.changed(), second.changed()
    for store in (first, second, cluster.member("new")):
        assert store.hostnames() == [APP, OTHER] and store.account() == {"key": "secret"}


def test_an_account_that_the_operator_has_removed_stays_removed(cluster):
    store = cluster.member("a")
    store.save_account({"key": "closed"})
    cluster.redis("HDEL", f"{{gotunnel}}:files:{CA}", "account.json")
    cluster.later()
    store.changed()
    assert store.account() == {} == cluster.member("a").account()


def test_a_broken_certificate_is_not_taken_along(cluster, mint):
    alone = cluster.alone("a")
    save(alone, mint, APP)
    file = cluster.folder("a") / CA / "certs" / f"{APP}.pem"
    file.write_bytes(file.read_bytes()[:-80])
    assert cluster.member("a").hostnames() == []
    assert file.exists()


def test_a_member_with_another_key_does_not_start_and_changes_nothing(cluster, mint):
    stored = save(cluster.member("a"), mint, APP)
    before = repr(cluster.redis.hashes)
    alone = cluster.alone("b")
    save(alone, mint, APP, NOW + DAY), save(alone, mint, OTHER)
    with pytest.raises(StoreError, match="give this gateway the CLUSTER_KEY_FILE") as raised:
        cluster.member("b", key=b"x" * 32)
    assert "\n" not in str(raised.value)
    assert repr(cluster.redis.hashes) == before
    assert cluster.member("a").certificate(APP) == stored


def test_another_key_on_redis_is_told_once_and_what_is_served_goes_on(cluster, mint, caplog):
    cluster.redis.away = True
    store = cluster.member("a", key=b"x" * 32)
    stored = save(store, mint, APP)
    cluster.redis.away = False
    other = cluster.member("b")
    theirs = save(other, mint, APP)
    for _ in range(3):
        cluster.later()
        with pytest.raises(StoreError):
            store.changed()
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and "until then certificates are served" in errors[0]
    assert FolderStorage(cluster.folder("a")).read(stored.key) is not None
    assert other.certificate(APP) == theirs


def test_a_new_certificate_is_told_to_the_others_which_then_look_at_once(cluster, mint):
    first, second = cluster.member("a"), cluster.member("b")
    save(first, mint, APP)
    assert first.mail.sent == [{"do": "certificate"}]
    assert second.changed() == []  # it has just looked
    second.mail.hear["certificate"](first.mail.sent[0])
    assert second.changed() == [APP]
    save(first, mint, OTHER)
    cluster.later()  # the message was lost
    assert second.changed() == [OTHER]


def test_a_folder_that_cannot_be_written_is_no_hindrance_once_it_runs(cluster, mint, monkeypatch):
    store = cluster.member("a")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FolderStorage, "write", full)
    stored = save(store, mint, APP)
    assert store.certificate(APP) == stored


def test_what_waits_for_redis_is_ordered_as_soon_as_it_is_back(cluster, tmp_path, caplog):
    with House(tmp_path, open_store=lambda: cluster.member("a")) as house:
        cluster.redis.away = True
        house.issuer.queue.want(APP), house.issuer.queue.want(OTHER)
        for seconds in (0, 10, 30, 70, 150):  # the pause grows
            assert house.at(seconds) == []
        assert house.state().reason.startswith("Redis at fake: Connection refused; nothing is")
        assert {record.levelname for record in caplog.records} <= {"DEBUG", "INFO", "WARNING"}
        cluster.redis.away = False
        cluster.later()
        assert house.at(151) == []
        house.issuer.queue.end_outage()
        assert sorted(order[0] for order in house.look()) == [APP, OTHER]


def test_the_look_that_finds_redis_again_ends_the_outage(cluster, tmp_path):
    store = cluster.member("a")
    ordered = Ordered(Ordering(None, store, Proofs()), Certificates(None, None), print)
    ended = []
    ordered._queue.end_outage = lambda: ended.append(1)
    for away, count in ((False, 0), (True, 0), (True, 0), (False, 1), (False, 1)):
        cluster.redis.away = away
        cluster.later()
        ordered.look()
        assert len(ended) == count
