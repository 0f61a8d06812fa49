"""ACME_ENV=local: the members of a cluster have one CA."""

import pytest
from fake_redis import FakeRedis
from test_local_copy import Mail

from gotunnel_server.certs.local_ca import Authority, CertificateError, put_ca
from gotunnel_server.cluster.certificates import SharedCertificates

APP = "app.localhost"


@pytest.fixture
def redis():
    return FakeRedis()


@pytest.fixture
def member(redis, tmp_path):
    """Makes the CA of a member that starts, by the name of its folder."""

    def start(name, key=b"k" * 32):
        folder = tmp_path / name
        SharedCertificates(redis, "gotunnel", [key], folder, Mail()).share_local_ca()
        return Authority(folder / "local")

    return start


def test_all_members_have_the_ca_that_the_first_one_has_made(member, redis):
    first, second = member("a"), member("b")
    assert first.ca_file.read_bytes() == second.ca_file.read_bytes()
    leaf, _ = second.issue(APP)
    assert leaf.read_bytes().endswith(first.ca_file.read_bytes())
    assert second._key_file.stat().st_mode & 0o777 == 0o600
    assert all(b"PRIVATE" not in content for files in redis.hashes.values()
               for content in files.values() if isinstance(content, bytes))  # fmt: skip
    assert member("a").ca_file.read_bytes() == first.ca_file.read_bytes()


def test_the_ca_that_a_gateway_alone_has_becomes_that_of_the_cluster(member, tmp_path):
    alone = Authority(tmp_path / "a" / "local")
    assert member("a").ca_file.read_bytes() == alone.ca_file.read_bytes()
    assert member("b").ca_file.read_bytes() == alone.ca_file.read_bytes()


def test_another_ca_gives_way_and_is_kept_beside(member, tmp_path, caplog):
    first = member("a")
    other = Authority(tmp_path / "b" / "local")
    before = other.ca_file.read_bytes()
    other.issue(APP)
    second = member("b")
    assert second.ca_file.read_bytes() == first.ca_file.read_bytes()
    assert (tmp_path / "b/local/ca.crt.bad").read_bytes() == before
    assert (tmp_path / "b/local/ca.key.bad").exists()
    assert second.issue(APP)[0].read_bytes().endswith(first.ca_file.read_bytes())
    assert "have to trust" in caplog.text


def test_without_redis_a_member_goes_on_with_its_copy_but_never_makes_a_ca(
    member, redis, tmp_path, caplog
):
    first = member("a")
    redis.away = True
    assert member("a").ca_file.read_bytes() == first.ca_file.read_bytes()
    assert "Redis at fake: Connection refused: the local CA is the copy" in caplog.text
    with pytest.raises(
        CertificateError, match="needs Redis when it starts for the first time: start the server"
    ):
        member("b")
    assert not (tmp_path / "b/local").exists()


def test_a_member_with_another_key_does_not_start(member, tmp_path):
    first = member("a")
    before = first.ca_file.read_bytes()
    for name in ("a", "b"):
        with pytest.raises(CertificateError, match="give this gateway the CLUSTER_KEY_FILE"):
            member(name, key=b"x" * 32)
    assert first.ca_file.read_bytes() == before


@pytest.mark.parametrize("end", [-80, 100, 0])
def test_a_broken_ca_never_replaces_a_good_one(member, tmp_path, end):
    first = member("a")
    with pytest.raises(CertificateError, match="is broken"):
        put_ca(tmp_path / "a/local", first.as_pem()[:end])
    assert member("a").ca_file.read_bytes() == first.ca_file.read_bytes()
