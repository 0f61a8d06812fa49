"""AGENTS_FILE: what it may say, the one line for what it may not, and how it is changed."""

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from raw_peer import open_files

from gotunnel_server.agents import agents_file
from gotunnel_server.agents.agents_file import AgentsFileError, Entry, Limits, read, read_expires

EXAMPLE = Path(__file__).parent.parent.parent / "conf" / "agents.yaml"
SECRET = "correct-horse-battery-staple-and-more"
SPAWN = multiprocessing.get_context("spawn")  # a fork would take the threads' locks along


@pytest.fixture
def path(tmp_path):
    return tmp_path / "agents.yaml"


def write(path, text):
    path.write_text(text)
    path.chmod(0o600)


def entry(path, keys):
    """The one entry of a file, of these lines."""
    write(path, f"one: {{secret: {SECRET}, {keys}}}\n")
    return read(path).entries["one"]


def refusal(path, act=read):
    """The one line about a bad file."""
    with pytest.raises(AgentsFileError) as caught:
        act(path)
    message = str(caught.value)
    assert message.startswith(f"AGENTS_FILE {path}: ")
    assert "\n" not in message and message.isprintable() and len(message) < 600
    assert SECRET not in message
    return message.removeprefix(f"AGENTS_FILE {path}: ")


# --- Reading ------------------------------------------------------------------------------------


def test_whole_entry(path):
    write(path.parent / "own", f"{SECRET}\n")
    write(
        path,
        """\
# Who may come.
one:
  secret_file: own
  hosts:
    - A.example.com.
    - "*.dev.example.com"   # all of them
  ports: [22, "2200-2299"]
  limits:
    hostnames: 3
    streams: 5
    visits: 7
  expires: 2030-12-31
  disabled: true
012: {secret: 0x10 and more than that, hosts: b.example.com}
""",
    )
    agents = read(path)
    assert agents.entries == {
        "one": Entry(
            SECRET, ("a.example.com", "*.dev.example.com"), (range(22, 23), range(2200, 2300)),
            Limits(3, 5, 7), 1_924_992_000, True,
        ),
        "012": Entry("0x10 and more than that", ("b.example.com",)),
    }  # fmt: skip
    assert agents.files == (path, path.parent / "own") and agents.warnings == ()
    assert SECRET not in repr(agents)


def test_example_is_read_as_it_stands():
    (one,) = read(EXAMPLE).entries.values()
    assert one.disabled and one.hosts == ("app.example.com", "*.dev.example.com")


def test_example_shows_every_key(path):
    """With every commented key read but secret_file, which stands for secret, and the end of the
    second of two secrets."""
    text = EXAMPLE.read_text()
    for line in text.splitlines():
        key = line.strip().removeprefix("#").partition(":")[0].strip()
        if line.startswith("  #") and (key in agents_file.KEYS or key in agents_file.LIMIT_KEYS):
            if key not in ("secret_file", agents_file.UNTIL):
                text = text.replace(line, line.replace("#", "", 1))
    write(path, text)
    (one,) = read(path).entries.values()
    assert one.ports and all(one.limits) and one.expires == 1_924_992_000
    assert all(f"{key}:" in text for key in agents_file.KEYS)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-01-01", 1_767_312_000),  # that day counts
        ("2026-01-01T00:00:00Z", 1_767_225_600),
        ("2026-01-01t00:00:00z", 1_767_225_600),
        ("2026-01-01 00:00", 1_767_225_600),
        ("2026-01-01T02:00:00+02:00", 1_767_225_600),
    ],
)
def test_expires_is_a_date_or_a_time(text, seconds):
    assert read_expires(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "2026", "2026-13-01", "2026-02-30", "20260101", "2026-W01-1",
             "2026-01-01T25:00", "2026-01-01T00:00:00.5", "9999-12-31", "٢٠٢٦-01-01", None],
)  # fmt: skip
def test_other_expires_are_refused(text):
    with pytest.raises(ValueError, match="expected a date such as"):
        read_expires(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty, expected names"),
        ("# nobody\n", "is empty, expected names"),
        ("- one\n", "a list came, expected names with an entry each"),
        ("one\n", "text came, expected names with an entry each"),
        ("one:\n", "one: no value came, expected a mapping"),
        ("one: []\n", "one: a list came, expected a mapping"),
        ('"": {}\n', "name '' came"),
        ('"a\\nb": {}\n', "name 'a\\nb' came"),
        ("x" * 254 + ": {}\n", "name 'xxx"),
        ("one: {secret: S, hosts: a.b}\none: {}\n", "line 2, column 1: key 'one' comes twice"),
        ("one: {hosts: a.b, hosts: c.d}\n", "line 1, column 19: key 'hosts' comes twice"),
        ("? [a]\n: {}\n", "line 1, column 3: a list or mapping as a key"),
        ("one: &x {secret: S, hosts: a.b}\ntwo: *x\n", "line 2, column 6: an alias came"),
        ("one: {secret: !vault S, hosts: a.b}\n", "line 1, column 15: a tag came"),
        ("one: !!python/object:os.system {}\n", "line 1, column 6: a tag came"),
        ("one: {<<: {}, hosts: a.b}\n", "one: unknown key with other characters in it"),
        ("one: [\n", "line 2, column 1: not YAML"),
        ("one: {secret: 'S\n", "line 2, column 1: not YAML"),
        ("one: {}\n---\ntwo: {}\n", "line 2, column 1: not YAML"),
        ("one: \x07\n", "line 1, column 6: not YAML, an unprintable"),
        ('one: "\\UFFFFFFFF"\n', "not YAML"),
        ("[" * 5000, "is nested too deeply"),
        ("one: {secret: S, host: a.b}\n", "one: unknown key 'host', did you mean 'hosts'?"),
        ("one: {sekret: S}\n", "one: unknown key 'sekret', did you mean 'secret'?"),
        ("one: {zzz: S}\n", "one: unknown key 'zzz', expected one of secret, "),
        ("one: {secret: S}\n", "one.hosts: missing, expected hostnames"),
        ("one: {hosts: a.b}\n", "one: neither came, expected exactly one of secret and"),
        ("one: {secret: S, secret_file: f, hosts: a.b}\n", "one: both came"),
        ("one: {secret: , hosts: a.b}\n", "one.secret: no value came"),
        ("one: {secret: ' ', hosts: a.b}\n", "one.secret: no text came"),
        ("one: {secret: [S], hosts: a.b}\n", "one.secret: a list came"),
        ('one: {secret: "\\ud800", hosts: a.b}\n', "one.secret: no text came"),
        ("one: {secret_file: none, hosts: a.b}\n", "one.secret_file: 'none' cannot be read (No"),
        (f"one: {{secret_file: {'0123456789abcdef' * 4}, hosts: a.b}}\n",
         "one.secret_file: (not shown: is this the secret itself?) cannot be read (No"),
        ("one: {secret_file: ., hosts: a.b}\n", "one.secret_file: '.' cannot be read (Is a"),
        ('one: {secret_file: "a\\0", hosts: a.b}\n', "one.secret_file: 'a\\x00' came"),
        ("one: {secret_file: /dev/zero, hosts: a.b}\n", "one.secret_file: '/dev/zero' is too long"),
        ("one: {secret_file: /dev/null, hosts: a.b}\n", "one.secret_file: no text came"),
        ("one: {secret: S, hosts: }\n", "one.hosts: neither text nor a list"),
        ("one: {secret: S, hosts: []}\n", "one.hosts: an empty list came"),
        ("one: {secret: S, hosts: {a.b: c}}\n", "one.hosts: neither text nor a list"),
        ("one: {secret: S, hosts: [[a.b]]}\n", "one.hosts: an item came that is not text"),
        ("one: {secret: S, hosts: '*'}\n", "one.hosts: '*' covers too much"),
        ("one: {secret: S, hosts: '*.'}\n", "one.hosts: '*.' covers too much"),
        ("one: {secret: S, hosts: '*.com'}\n", "one.hosts: '*.com' covers too much"),
        ("one: {secret: S, hosts: '*.com.'}\n", "one.hosts: '*.com.' covers too much"),
        ("one: {secret: S, hosts: 'a.*.com'}\n", "one.hosts: 'a.*.com' has a * in the wrong"),
        ("one: {secret: S, hosts: 'a*.b.com'}\n", "one.hosts: 'a*.b.com' has a * in the wrong"),
        ("one: {secret: S, hosts: '*.*.b.com'}\n", "one.hosts: '*.*.b.com' has a * in the"),
        ("one: {secret: S, hosts: '*a.b.com'}\n", "one.hosts: '*a.b.com' has a * in the"),
        ("one: {secret: S, hosts: 'https://a.b'}\n", "one.hosts: 'https://a.b' came"),
        ("one: {secret: S, hosts: 192.0.2.1}\n", "one.hosts: '192.0.2.1' came"),
        ("one: {secret: S, hosts: '*.0.2.1'}\n", "one.hosts: '*.0.2.1' came"),
        ("one: {secret: S, hosts: faß.de}\n", "one.hosts: 'fa\\xdf.de' came, expected"),
        ("one: {secret: S, hosts: a.b c.d}\n", "one.hosts: 'a.b c.d' came"),
        ("one: {secret: S, hosts: a.b, ports: }\n", "one.ports: neither text nor a list"),
        ("one: {secret: S, hosts: a.b, ports: 0}\n", "one.ports: '0' came"),
        ("one: {secret: S, hosts: a.b, ports: auto}\n", "one.ports: 'auto' came"),
        ("one: {secret: S, hosts: a.b, limits: 5}\n", "one.limits: text came, expected a mapping"),
        ("one: {secret: S, hosts: a.b, limits: {visit: 5}}\n", "one.limits: unknown key 'visit'"),
        ("one: {secret: S, hosts: a.b, limits: {visits: 0}}\n", "one.limits.visits: '0' came"),
        (
            "one: {secret: S, hosts: a.b, limits: {orders_per_week: 0}}\n",
            "one.limits.orders_per_week: '0' came",
        ),
        (
            "one: {secret: S, hosts: a.b, limits: {orders_per_day: 5}}\n",
            "one.limits: unknown key 'orders_per_day'",
        ),
        ("one: {secret: S, hosts: a.b, limits: {visits: -1}}\n", "one.limits.visits: '-1' came"),
        ("one: {secret: S, hosts: a.b, limits: {visits: 1e3}}\n", "one.limits.visits: '1e3' came"),
        ("one: {secret: S, hosts: a.b, limits: {visits: }}\n", "one.limits.visits: no value"),
        ("one: {secret: S, hosts: a.b, expires: soon}\n", "one.expires: 'soon' came, expected a"),
        ("one: {secret: S, hosts: a.b, expires: }\n", "one.expires: no value came"),
        ("one: {secret: S, hosts: a.b, disabled: maybe}\n", "one.disabled: 'maybe' came"),
        ("one: {secret: S, hosts: a.b, disabled: }\n", "one.disabled: no value came"),
        ("#" * (512 * 1024 + 1), "is too long, expected at most 524288 bytes"),
        ("".join(f"n{n}: {{}}\n" for n in range(1001)), "1001 entries came, expected at most 1000"),
    ],
)  # fmt: skip
def test_bad_file_is_refused_in_one_line(path, text, expected):
    write(path, text.replace(": S", f": {SECRET}"))
    assert refusal(path).startswith(expected)


def test_unquoted_secret_that_yaml_takes_for_something_else_does_not_show(path):
    for sign in "*&!@%`|>":
        write(path, f"one:\n  secret: {sign}{SECRET}\n  hosts: a.example.com\n")
        refusal(path)


def test_file_that_cannot_be_read_is_refused(path):
    assert refusal(path).startswith("there is no such file, expected one with agents: make it with")
    # As in a folder that may not be searched, of which root could make no example.
    assert refusal(path.with_name("a" * 300)).startswith("cannot be read (File name too long)")
    path.write_bytes(b"one: \xff\n")
    assert refusal(path).startswith("byte 5 is not UTF-8")
    path.unlink()
    os.mkfifo(path)
    assert refusal(path).startswith("is empty")
    path.unlink()
    path.mkdir()
    assert "Is a directory" in refusal(path)


def test_weak_secrets_and_open_files_are_warnings(path):
    write(path, "one: {secret: short, hosts: a.b}\ntwo: {secret_file: own, hosts: c.d}\n")
    own = path.parent / "own"
    write(own, SECRET)
    own.chmod(0o644)
    weak, open_to_all = read(path).warnings
    assert "the secret of one is shorter than 16 bytes" in weak and "short:" not in weak
    assert str(own) in open_to_all and str(path) not in open_to_all
    path.chmod(0o604)
    assert len(read(path).warnings) == 3


# --- Changing -----------------------------------------------------------------------------------


def block(name):
    return f'{name}:\n  secret: "{SECRET}"\n  hosts: "{name}.example.com"\n'


BY_HAND = f"""\
# Agents of the house.

first:   # the oldest
  secret: {SECRET}
  hosts:
  - a.example.com

# Of the branch office.
second: {{secret: "{SECRET}",
  hosts: b.example.com}}  # one line was too short


third:
  # inside
  hosts: 'c.example.com'
  secret: |
    {SECRET}
# the end
"""


def test_added_entry_stands_at_the_end_and_the_rest_as_it_was(path):
    write(path, BY_HAND)
    assert agents_file.add(path, "new", block("new")) is True
    assert path.read_text() == f"{BY_HAND}\n{block('new')}"
    assert list(read(path).entries) == ["first", "second", "third", "new"]
    assert agents_file.add(path, "new", block("new")) is False
    assert path.read_text() == f"{BY_HAND}\n{block('new')}"


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("first", f"first:   # the oldest\n  secret: {SECRET}\n  hosts:\n  - a.example.com\n\n"),
        ("second", BY_HAND[BY_HAND.index("second") : BY_HAND.index("third")]),
        ("third", BY_HAND[BY_HAND.index("third") : BY_HAND.index("# the end")]),
    ],
)
def test_removed_entry_takes_only_its_own_lines(path, name, gone):
    write(path, BY_HAND)
    assert agents_file.remove(path, name) is True
    assert path.read_text() == BY_HAND.replace(gone, "")
    assert agents_file.remove(path, name) is False
    assert len(read(path).entries) == 2


@pytest.mark.parametrize(
    "before", [None, "", "\n", "# nobody yet\n", "{}\n", "# nobody\n{} # yet", "~"]
)
def test_first_entry_makes_a_file_and_the_last_leaves_nobody(path, before):
    if before is not None:
        write(path, before)
    assert agents_file.add(path, "one", block("one"))
    assert path.read_text().endswith(block("one")) and path.stat().st_mode & 0o777 == 0o600
    assert agents_file.remove(path, "one")
    assert read(path).entries == {}
    assert agents_file.add(path, "one", block("one"))
    assert list(read(path).entries) == ["one"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if before and "#" in before:
        assert "{}" not in path.read_text()


def test_file_of_another_form_is_left_to_be_changed_by_hand(path):
    for text in (f"{{one: {{secret: {SECRET}, hosts: a.b}}}}\n", f"{block('one')}...\n"):
        write(path, text)
        message = refusal(path, lambda path: agents_file.add(path, "new", block("new")))
        assert "change it by hand" in message and path.read_text() == text


def test_bad_file_is_not_changed(path):
    write(path, "one: [\n")
    assert "not YAML" in refusal(path, lambda path: agents_file.add(path, "new", block("new")))
    assert "not YAML" in refusal(path, lambda path: agents_file.remove(path, "one"))
    assert path.read_text() == "one: [\n"


def test_missing_folder_is_refused(tmp_path):
    path = tmp_path / "none" / "agents.yaml"
    message = refusal(path, lambda path: agents_file.add(path, "new", block("new")))
    assert message.startswith("its folder cannot be opened (No such file")


@pytest.mark.parametrize(
    ("before", "after"),
    [(0o600, 0o600), (0o640, 0o640), (0o644, 0o600), (0o666, 0o600), (0o400, 0o400)],
)
def test_changed_file_is_not_open_to_all(path, before, after):
    path.write_text(block("one"))
    path.chmod(before)
    agents_file.add(path, "new", block("new"))
    assert path.stat().st_mode & 0o777 == after


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_changed_file_stays_its_owners(path):
    write(path, block("one"))
    os.chown(path, 12345, 54321)
    agents_file.add(path, "new", block("new"))
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)


def test_file_system_without_locks_is_named(path, monkeypatch):
    """Some network drives. Two commands at once could lose an agent."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(agents_file.fcntl, "flock", refuse)
    message = refusal(path, lambda path: agents_file.add(path, "new", block("new")))
    assert message.startswith("its folder cannot be locked (No locks available)")
    assert not path.exists()


def test_what_a_link_leads_to_is_changed(path):
    real = path.parent / "real.yaml"
    write(real, block("one"))
    path.symlink_to(real.name)
    agents_file.add(path, "new", block("new"))
    assert path.is_symlink() and list(read(real).entries) == ["one", "new"]


def test_file_with_windows_line_ends(path):
    path.write_bytes(block("one").replace("\n", "\r\n").encode() + block("two").encode())
    agents_file.remove(path, "one")
    assert path.read_text() == block("two")


def add_many(path, name):
    """In a process of its own: add some entries, one after the other."""
    for number in range(10):
        agents_file.add(path, f"{name}-{number}", block(f"{name}-{number}"))


@pytest.mark.slow
def test_two_processes_that_add_at_once_lose_nothing(path):
    processes = [SPAWN.Process(target=add_many, args=(path, name)) for name in ("left", "right")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
        process.close()
    assert len(read(path).entries) == 20
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def die_while_writing(path):
    """In a process of its own: be killed when the new file is written and not yet in place."""
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    agents_file.add(path, "new", block("new"))


@pytest.mark.slow
def test_writer_that_is_killed_leaves_the_old_file(path):
    write(path, BY_HAND)
    process = SPAWN.Process(target=die_while_writing, args=(path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    process.close()
    assert path.read_text() == BY_HAND
    assert len(list(path.parent.iterdir())) == 2  # the unfinished one, which has its mode
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in path.parent.iterdir())

    assert agents_file.add(path, "new", block("new"))
    assert "new" in read(path).entries
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_write_that_fails_leaves_the_old_file(path, monkeypatch):
    write(path, BY_HAND)

    def no_room(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    message = refusal(path, lambda path: agents_file.add(path, "new", block("new")))
    assert message.startswith("cannot be written (No space left on device)")
    assert path.read_text() == BY_HAND


def test_a_folder_in_its_place_costs_no_descriptor(tmp_path):
    """It is looked at every few seconds."""
    before = len(open_files())
    for _ in range(5):
        with pytest.raises(AgentsFileError):
            agents_file.read(tmp_path)
    assert len(open_files()) == before


def test_an_entry_that_cannot_be_cut_out_alone_is_left_to_the_operator(tmp_path):
    """What was a comment of it would become a part of another one's secret."""
    path = tmp_path / "agents.yaml"
    text = "a:\n hosts: a.b\n secret: >-\n  s1\n  more\nx:\n  hosts: x.b\n  secret: s2\n  # note\n"
    path.write_text(text)
    with pytest.raises(AgentsFileError, match="change it by hand"):
        agents_file.remove(path, "x")
    assert path.read_text() == text


def test_a_secret_does_not_end_in_a_new_line(tmp_path):
    path = tmp_path / "agents.yaml"
    path.write_text("a:\n  hosts: a.b\n  secret: |\n    to-try-things-out-only\n")
    assert read(path).entries["a"].secret == "to-try-things-out-only"


@pytest.mark.parametrize(
    "text", ["a: {secret:S3CRET-of-agents, hosts: a.b}", "a: {? S3CRET-of-agents x, hosts: a.b}"]
)
def test_a_blank_that_is_missing_shows_no_secret(tmp_path, text):
    path = tmp_path / "agents.yaml"
    path.write_text(text)
    with pytest.raises(AgentsFileError, match="unknown key with other characters in it") as caught:
        read(path)
    assert "S3CRET" not in str(caught.value)


def test_a_weak_secret_of_a_disabled_agent_is_no_warning(tmp_path):
    path = tmp_path / "agents.yaml"
    path.write_text('one: {secret: "short", hosts: a.example.com, disabled: true}\n')
    path.chmod(0o600)
    assert not agents_file.read(path).warnings
