"""Which member a restarted gateway was before, and whether that one is dead."""

import json
import os
import socket

import pytest

from gotunnel_server.cluster.former_member import FormerMember


@pytest.fixture
def make(tmp_path):
    """make(number) makes a FormerMember of one folder; all are closed at the end."""
    made = []

    def one(number=0):
        made.append(FormerMember(tmp_path / "cache", number))
        return made[-1]

    yield one
    for each in made:
        each.close()


def die(former):
    """As the system does it for a process that is killed."""
    os.close(former._file)
    former._file = None


def test_a_gateway_that_died_is_named_to_the_next_one(make):
    first, second = make(), make()
    assert first.take("aaaa1111") is None and first.is_taken
    die(first)
    assert second.take("bbbb2222") == "aaaa1111"
    die(second)
    assert make().take("cccc3333") == "bbbb2222"


def test_one_that_still_runs_is_not(make):
    first, successor = make(), make()
    first.take("aaaa1111")
    assert successor.take("bbbb2222") is None and not successor.is_taken
    first.close()  # it has left well
    assert successor.take("bbbb2222") is None and successor.is_taken


def test_processes_have_files_of_their_own(make):
    assert make(1).take("aaaa1111") is None
    two = make(2)
    assert two.take("bbbb2222") is None and two.is_taken


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "9" * 900, "[" * 1000, json.dumps({"member": 5, "machine": "m"}),
     json.dumps({"member": "aaaa1111", "machine": "another"})],
)  # fmt: skip
def test_what_is_not_sure_names_nobody(make, tmp_path, content):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "member.json").write_text(content)
    former = make()
    assert former.take("bbbb2222") is None and former.is_taken
    found = json.loads((tmp_path / "cache" / "member.json").read_text())
    assert found == {"member": "bbbb2222", "machine": socket.gethostname()}


def test_a_folder_that_cannot_be_used_is_no_error(make, tmp_path):
    (tmp_path / "cache").write_text("a file")
    former = make()
    assert former.take("aaaa1111") is None and former.is_taken
