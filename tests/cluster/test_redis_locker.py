"""Locks on Redis: leases that are renewed, tokens that are compared, and what a loss means. What
every Locker does is in tests/certs/test_storage.py."""

import threading

import pytest
from fake_redis import FakeRedis
from support import TIMEOUT, wait_until

from gotunnel_server.cluster import locker as locker_module
from gotunnel_server.cluster.locker import RedisLocker

KEY = "{gotunnel}:lock:ca/locks/app"
NAME = "ca/locks/app"


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def redis(clock):
    return FakeRedis(clock)


def quick(redis):
    """A locker that renews every few milliseconds, by its own clock."""
    return RedisLocker(redis, "gotunnel", lease=0.02)


def test_a_lock_is_free_once_its_holders_lease_is_over(redis, clock):
    held = RedisLocker(redis, "gotunnel").lock(NAME, wait=False)
    assert held.__enter__() is True
    with RedisLocker(redis, "gotunnel").lock(NAME, wait=False) as ours:
        assert ours is False
    clock.now += locker_module.LEASE
    with RedisLocker(redis, "gotunnel").lock(NAME, wait=False) as ours:
        assert ours is True
        token = redis.texts[KEY]
        held.__exit__(None, None, None)  # late: it is another's by now
        assert redis.texts[KEY] == token
    assert KEY not in redis.texts


def test_a_lock_is_renewed_while_it_is_held(redis, clock):
    with quick(redis).lock(NAME, wait=False):
        for _ in range(3):
            clock.now += 0.01
            wait_until(lambda: redis.ends[KEY] > clock.now + 0.015)
    assert KEY not in redis.texts and "RELEASE" in redis.calls


def test_a_lock_that_redis_forgot_is_taken_again_unless_it_guards_a_change(redis, caplog):
    locker = quick(redis)
    with locker.lock(NAME, wait=False):
        redis.flush()
        wait_until(lambda: KEY in redis.texts)
        assert not caplog.records
    with locker.lock(NAME, wait=True):
        redis.flush()
        wait_until(lambda: caplog.records)
        assert KEY not in redis.texts
    [record] = caplog.records
    assert record.message.startswith(f"the lock {NAME} was lost")


def test_a_lock_that_another_member_has_by_now_is_lost(redis, caplog):
    with quick(redis).lock(NAME, wait=False):
        redis.texts[KEY] = b"another's"
        wait_until(lambda: caplog.records)
        count = redis.calls.count("KEEP")
        wait_until(lambda: redis.calls.count("KEEP") > count + 2)
    assert redis.texts[KEY] == b"another's" and len(caplog.records) == 1


def test_a_lock_survives_redis_being_away_for_a_while(redis, caplog):
    with quick(redis).lock(NAME, wait=False):
        asked = threading.Semaphore(0)
        redis.away, redis.on_call = True, lambda name: name == "KEEP" and asked.release()
        assert asked.acquire(timeout=TIMEOUT) and asked.acquire(timeout=TIMEOUT)
        redis.away = False
        count = redis.calls.count("KEEP")
        wait_until(lambda: redis.calls.count("KEEP") > count)
    assert not [each for each in caplog.records if each.levelname == "WARNING"]


def test_without_redis_there_is_no_lock_and_its_end_is_no_error(redis):
    redis.away = True
    with pytest.raises(OSError, match="Connection refused"):
        with RedisLocker(redis, "gotunnel").lock(NAME, wait=True):
            pass
    redis.away = False
    with RedisLocker(redis, "gotunnel").lock(NAME, wait=True):
        redis.away = True


def test_a_member_that_waits_gives_up_at_last(redis, monkeypatch):
    monkeypatch.setattr(locker_module, "PATIENCE", 0.0)
    with RedisLocker(redis, "gotunnel").lock(NAME, wait=True):
        with pytest.raises(OSError, match="was held for 0 s by another member"):
            with RedisLocker(redis, "gotunnel").lock(NAME, wait=True):
                pass


def test_fences_are_the_locks_that_this_thread_waits_for(redis):
    locker = RedisLocker(redis, "gotunnel")
    assert locker.fences() == []
    with locker.lock("a", wait=True), locker.lock("b", wait=True), locker.lock("c", wait=False):
        assert [key for key, _ in locker.fences()] == ["{gotunnel}:lock:a", "{gotunnel}:lock:b"]
        other = []
        thread = threading.Thread(target=lambda: other.append(locker.fences()))
        thread.start()
        thread.join(TIMEOUT)
        assert other == [[]]
    assert locker.fences() == []
