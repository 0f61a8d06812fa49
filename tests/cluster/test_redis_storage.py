"""What Redis adds to a Storage: content sealed by kind, news, fences, and nothing read that is too
long. What every Storage does is in tests/certs/test_storage.py."""

import contextlib
import errno
import logging

import pytest
from fake_redis import FakeRedis, connection_to

from gotunnel_server.certs.storage import Unreadable
from gotunnel_server.cluster import storage as storage_module
from gotunnel_server.cluster.locker import RedisLocker
from gotunnel_server.cluster.sealed import Sealer, WrongKey
from gotunnel_server.cluster.storage import MOST_VALUE, RedisStorage, Serial, is_sealed

OLD, NEW = b"o" * 32, b"n" * 32
PEM, OTHER = "ca/certs/app.example.com.pem", "ca/certs/other.example.com.pem"
FILES = "{gotunnel}:files:ca/certs"


class Place:
    """One Redis, and members of a cluster on it."""

    def __init__(self, call):
        self.call = call

    def member(self, *keys):
        storage, locker = self._parts(keys or (OLD,))
        storage.locker = locker
        return storage

    def _parts(self, keys):
        locker = RedisLocker(self.call, "gotunnel")
        return RedisStorage(self.call, "gotunnel", Sealer(keys), locker), locker


@pytest.fixture(params=["fake", "redis"])
def place(request):
    if request.param == "fake":
        yield Place(FakeRedis())
        return
    call, close = connection_to(request.getfixturevalue("redis_server"))
    yield Place(call)
    close()


@pytest.mark.parametrize(
    ("key", "expected"),
    [("ca/certs/a.example.com.pem", True), ("ca/account.json", True), ("a.example.com", True),
     ("a.example.com+rsa", True), ("local/ca.pem", True), ("local/ca.key", True),
     ("ca/certs/a.pem.bad", True), ("ca/certs/a.json", False), ("ca/turns.json", False),
     ("ca/pause.json", False), ("ca/certs/a.renew", False), ("ca/certs/writable", False),
     ("local/ca.crt", False)],
)  # fmt: skip
def test_what_may_hold_a_private_key_is_sealed(key, expected):
    assert is_sealed(key) is expected
    redis = FakeRedis()
    Place(redis).member().write(key, b"the content")
    [[content]] = [files.values() for name, files in redis.hashes.items() if ":files:" in name]
    assert (b"the content" not in content) is expected


def test_a_member_with_another_key_neither_reads_nor_writes_and_changes_nothing(place):
    ours, stranger = place.member(OLD), place.member(NEW)
    ours.write(PEM, b"secret")
    for attempt in (
        lambda: stranger.read(PEM),
        lambda: stranger.write(PEM, b"theirs"),
        lambda: stranger.write(OTHER, b"theirs"),
        lambda: stranger.write_new(PEM, b"theirs"),
    ):
        with pytest.raises(WrongKey, match="give this gateway the CLUSTER_KEY_FILE") as raised:
            attempt()
        assert not isinstance(raised.value, Unreadable)  # or it would be set aside
        assert FILES in raised.value.strerror
    assert ours.read(PEM) == b"secret" and ours.keys("ca/certs/") == [PEM]
    stranger.write("ca/pause.json", b"{}")  # not sealed: every member reads it
    assert ours.read("ca/pause.json") == b"{}"


def test_what_is_read_with_the_old_key_is_written_with_the_new_one(place):
    place.member(OLD).write(PEM, b"secret")
    assert place.member(NEW, OLD).read(PEM) == b"secret"
    assert place.member(NEW).read(PEM) == b"secret"
    with pytest.raises(WrongKey):
        place.member(OLD).write(OTHER, b"x")


def test_a_member_that_starts_with_two_keys_seals_everything_with_the_first(place, caplog):
    caplog.set_level(logging.INFO)
    keys = [PEM, OTHER, "ca/account.json", "local/ca.pem", "go.example.com"]
    old = place.member(OLD)
    for key in keys:
        old.write(key, key.encode())
    old.seal_anew()
    both = place.member(NEW, OLD)
    both.seal_anew()
    both.seal_anew()
    assert "the old one can be removed" in caplog.text and len(caplog.records) == 1
    new = place.member(NEW)
    assert [new.read(key) for key in keys] == [key.encode() for key in keys]


def test_sealing_anew_does_not_undo_another_members_write():
    redis = FakeRedis()
    old, both = Place(redis).member(OLD), Place(redis).member(NEW, OLD)
    old.write(PEM, b"first")
    redis.on_call = lambda name: (
        name == "RESEAL" and redis.hashes[FILES].update({PEM.rpartition("/")[2].encode(): b"new"})
    )
    assert both.read(PEM) == b"first"
    assert list(redis.hashes[FILES].values()) == [b"new"]


def test_what_was_changed_in_redis_or_is_too_long_can_never_be_read(place):
    member = place.member()
    member.write(PEM, b"secret")
    file = PEM.rpartition("/")[2]
    for content in (b"plain", b"x" * (MOST_VALUE + 1), b""):
        place.call("HSET", FILES, file, content) if not isinstance(
            place.call, FakeRedis
        ) else place.call.hashes[FILES].update({file.encode(): content})
        with pytest.raises(Unreadable):
            member.read(PEM)
    with pytest.raises(OSError, match="longer than"):
        member.write(PEM, b"x" * (MOST_VALUE + 1))


def test_new_content_is_only_written_where_there_is_none(place):
    member = place.member()
    assert member.write_new(PEM, b"first") is True
    assert member.write_new(PEM, b"second") is False
    assert member.read(PEM) == b"first"


def test_a_write_under_a_lock_that_was_lost_is_refused(place):
    first, second = place.member(), place.member()
    with first.locker.lock("ca/turns.lock", wait=True):
        first.write("ca/turns.json", b"1")
        lose(place, "ca/turns.lock")
        with second.locker.lock("ca/turns.lock", wait=True):
            second.write("ca/turns.json", b"2")
            with pytest.raises(OSError, match="the lock for it was lost") as raised:
                first.write("ca/turns.json", b"1 and more")
            assert raised.value.errno == errno.ENOLCK
    assert first.read("ca/turns.json") == b"2"
    first.write("ca/turns.json", b"3")  # without the lock, as an order's state is
    with first.locker.lock("ca/locks/app", wait=False):  # it may do its work to the end
        lose(place, "ca/locks/app")
        first.write(PEM, b"ordered")


def lose(place, lock):
    key = "{gotunnel}:lock:" + lock
    if isinstance(place.call, FakeRedis):
        del place.call.texts[key]
    else:
        place.call("DEL", key)


def test_news_are_the_certificates_written_since_the_last_time(place):
    writer, reader = place.member(), place.member()
    keys, since = reader.news(Serial())
    assert keys in (None, [])
    writer.write(PEM, b"1")
    writer.write("ca/certs/app.example.com.json", b"{}")
    assert reader.news(since).keys is None  # the first write begins an epoch
    keys, since = reader.news(reader.news(since).serial)
    assert keys == []
    writer.write(OTHER, b"1")
    writer.write(PEM, b"2")
    writer.write(PEM, b"3")
    keys, since = reader.news(since)
    assert keys == [OTHER, PEM]
    assert reader.news(since).keys == []


def test_a_reader_that_missed_news_looks_at_all(place, monkeypatch):
    monkeypatch.setattr(storage_module, "MOST_NEWS", 2)
    writer, reader = place.member(), place.member()
    writer.write(PEM, b"1")
    since = reader.news(Serial()).serial
    for number in range(2):
        writer.write(f"ca/certs/{number}.pem", b"1")
    assert reader.news(since).keys == ["ca/certs/0.pem", "ca/certs/1.pem"]
    writer.write("ca/certs/2.pem", b"1")
    found = reader.news(since)
    assert found.keys is None and reader.news(found.serial).keys == []


def test_after_redis_lost_its_data_a_reader_looks_at_all():
    redis = FakeRedis()
    member = Place(redis).member()
    member.write(PEM, b"1")
    since = member.news(Serial()).serial
    redis.flush()
    for number in range(3):
        member.write(f"ca/certs/{number}.pem", b"1")
    assert member.news(since).keys is None


def test_a_name_that_leads_out_of_the_folder_is_left_out(place):
    """Whoever can write to Redis must not choose the paths of files on the members' disks."""
    member = place.member()
    member.write(PEM, b"pem")
    for name in ("../x.pem", "../../../tmp/x.json", "/etc/x.pem", ".", "..", "a/b.pem", "x\0.pem",
                 "x\n.pem"):  # fmt: skip
        place.call("HSET", FILES, name, b"x")
    for key in ("ca/certs/../../x.renew", "/etc/x.renew", "ca/certs/x\0.renew", "ca//x.pem"):
        member.write(key, b"x")
    assert member.keys("ca/certs/") == [PEM]
    assert member.news(Serial()).keys is None
    assert member.news(member.news(Serial()).serial._replace(number=0)).keys == [PEM]
    assert member.folders() == ["ca/certs"]


@pytest.mark.parametrize(
    "answer", [[], [1], {}, True, b"x", [b"", b"", 1, []], [b"", 1, 1, 7], [5]]
)
def test_an_answer_that_no_gateway_has_written_is_an_error_in_words(answer):
    member = Place(lambda *command: answer).member()
    for call in (lambda: member.keys("ca/"), member.folders, lambda: member.news(Serial()),
                 member.check_key, lambda: member.read(PEM),
                 lambda: member.read("ca/turns.json")):  # fmt: skip
        with contextlib.suppress(OSError):  # none other
            call()


def test_names_say_where_to_find_what_they_name(place):
    assert place.member().where(PEM) == f"app.example.com.pem in {FILES} of Redis"
