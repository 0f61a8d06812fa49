"""Random names, and the file that remembers them."""

import json
import logging
import re
import threading

import pytest

from gotunnel_agent.common.hostnames import valid_open_name
from gotunnel_agent.quick import names
from gotunnel_agent.quick.names import Labels, Memory, key_of, random_label

KEY, OTHER = key_of("one"), key_of("other")


@pytest.fixture
def memory(tmp_path):
    return Memory(tmp_path / "state")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "state" / names.FILE


def test_there_are_more_than_a_million_names_of_short_words():
    assert len(names.ADJECTIVES) * len(names.NOUNS) * len(names.NUMBERS) > 1_000_000
    words = names.ADJECTIVES + names.NOUNS
    assert len(set(words)) == len(words)
    assert all(re.fullmatch("[a-z]{2,8}", word) for word in words)
    label = random_label()
    assert names.LABEL.fullmatch(label) and valid_open_name(f"{label}.*")


def test_tunnel_asks_for_the_name_that_it_had(memory):
    labels = Labels(memory, KEY)
    label = labels.another()
    labels.granted(label)
    assert Labels(memory, KEY).another() == label
    assert Labels(memory, OTHER).another() != label


def test_new_name_replaces_the_old_ones(memory):
    for label in ("old-one-10", "old-one-11"):
        memory.note(KEY, label)
    labels = Labels(memory, KEY, anew=True)
    label = labels.another()
    labels.granted(label)
    assert memory.recall(KEY) == [label]


def test_two_commands_of_one_kind_keep_their_names(memory):
    """The second one finds the first name taken."""
    for label in ("first-one-10", "second-one-11"):
        memory.note(KEY, label)
    memory.note(KEY, "first-one-10")
    labels = Labels(memory, KEY)
    assert [labels.another(), labels.another()] == ["first-one-10", "second-one-11"]
    tried = [labels.another() for _ in range(names.MOST_TRIES - 2)]
    assert all(map(names.LABEL.fullmatch, tried)) and labels.another() is None


def test_file_is_private_and_bounded(memory, file, monkeypatch):
    monkeypatch.setattr(names, "MOST_TUNNELS", 3)
    keys = [key_of(str(number)) for number in range(5)]
    for number, key in enumerate(keys):
        memory.note(key, f"some-name-{10 + number}")
        memory.note(keys[0], "some-name-10")  # in use all the time
    assert list(json.loads(file.read_text())["names"]) == [keys[3], keys[4], keys[0]]
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    for number in range(10, 20):
        memory.note(KEY, f"some-name-{number}")
    assert len(memory.recall(KEY)) == names.MOST_LABELS


def test_largest_file_can_be_read_again(memory, caplog):
    longest = [f"{'a' * 10}-{'b' * 10}-{number}" for number in range(10, 10 + names.MOST_LABELS)]
    found = {key_of(str(number)): longest for number in range(names.MOST_TUNNELS)}
    memory._folder.mkdir()
    memory._path.write_text(json.dumps({"names": found}, indent=1))
    memory.note(KEY, "some-name-10")
    assert memory.recall(KEY) == ["some-name-10"] and not caplog.records


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff", b"[]", b"{}", b'{"names": 1}', b'{"names": {"x": ["a-b-10"]}}',
        b'{"names": {"' + KEY.encode() + b'": ["a-b-10", "EVIL.com"]}}',
        b'{"names": {"' + KEY.encode() + b'": []}}',
        b'{"names": {"' + KEY.encode() + b'": {}}}',
        b"[" * 60_000, b" " * 100_000,
    ],
)  # fmt: skip
def test_broken_file_means_to_start_anew(memory, file, content, caplog):
    file.parent.mkdir()
    file.write_bytes(content)
    assert memory.recall(KEY) == []
    assert [record.getMessage() for record in caplog.records] == [
        f"{file} is broken; names start anew"
    ]
    memory.note(KEY, "some-name-10")
    assert memory.recall(KEY) == ["some-name-10"]


def test_folder_that_cannot_be_written_costs_the_name_alone(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    memory = Memory(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        memory.note(KEY, "some-name-10")
        assert memory.recall(KEY) == []
    assert "the name some-name-10 cannot be remembered" in caplog.text


def test_processes_that_write_at_once_lose_no_name(memory):
    """Each opens the lock's file for itself, as processes do."""
    keys = [key_of(str(number)) for number in range(40)]
    writers = [
        threading.Thread(target=memory.note, args=(key, f"some-name-{10 + number}"))
        for number, key in enumerate(keys)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [memory.recall(key) for key in keys] == [
        [f"some-name-{10 + number}"] for number in range(len(keys))
    ]


def test_lock_that_another_process_holds_is_not_waited_for_long(memory, monkeypatch, caplog):
    monkeypatch.setattr(names, "LOCK_TIMEOUT", 0.05)
    memory.note(KEY, "some-name-10")
    with names._locked(memory._folder / f"{names.FILE}.lock"):
        memory.note(KEY, "some-name-11")
    assert memory.recall(KEY) == ["some-name-10"] and "cannot be remembered" in caplog.text
