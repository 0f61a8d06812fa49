"""The server of a folder, asked directly."""

import contextlib
import errno
import http.client
import os
import re
import socket
import threading
from email.utils import formatdate
from http import HTTPStatus

import pytest
from support import MIB, TIMEOUT, Wire, wait_until

from gotunnel_agent.common import arrivals
from gotunnel_agent.quick import folder as folder_module
from gotunnel_agent.quick.folder import (
    COSTLY,
    KEPT_FACTOR,
    KEPT_PAGES,
    FolderServer,
    Listings,
    NotServed,
    byte_range,
    listing,
    parts_of,
    type_of,
)

TEXT = b"0123456789"


@pytest.fixture
def folder(tmp_path):
    """A folder, and a secret beside it."""
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "shared-not").mkdir()
    (tmp_path / "shared-not" / "secret").write_bytes(b"secret")
    shared = tmp_path / "shared"
    (shared / "sub").mkdir(parents=True)
    (shared / "text.txt").write_bytes(TEXT)
    (shared / "sub" / "inner.html").write_bytes(b"<p>inner")
    return shared


@contextlib.contextmanager
def serving(folder, **options):
    server = FolderServer(str(folder), **options)
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server(folder):
    with serving(folder) as server:
        yield server


def ask(server, path, method="GET", body=None, **fields):
    """Status, fields and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
    with contextlib.closing(connection):
        fields = {"Host": server.host} | {n.replace("_", "-"): v for n, v in fields.items()}
        connection.request(method, path, body, fields)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def status(server, path, **fields):
    return ask(server, path, **fields)[0]


# Files -------------------------------------------------------------------------------------------


def test_file_comes_with_type_length_and_validators(server):
    code, fields, body = ask(server, "/text.txt?v=1")
    assert (code, body) == (200, TEXT)
    assert fields["Content-Type"] == "text/plain; charset=utf-8"
    assert fields["Content-Length"] == "10" and fields["Accept-Ranges"] == "bytes"
    assert fields["ETag"] and fields["Last-Modified"] and fields["Connection"] == "close"
    assert fields["Cache-Control"] == "no-cache" and fields["X-Content-Type-Options"] == "nosniff"
    code, head, body = ask(server, "/text.txt", "HEAD")
    assert (code, body) == (200, b"") and head["Content-Length"] == "10"
    assert head["ETag"] == fields["ETag"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.html", "text/html; charset=utf-8"),
        ("a.JS", "text/javascript; charset=utf-8"),
        ("a.mjs", "text/javascript; charset=utf-8"),
        ("a.css", "text/css; charset=utf-8"),
        ("a.json", "application/json"),
        ("a.wasm", "application/wasm"),
        ("a.svg", "image/svg+xml"),
        ("a.png", "image/png"),
        ("a.webp", "image/webp"),
        ("a.woff2", "font/woff2"),
        ("a.pdf", "application/pdf"),
        ("a.mp4", "video/mp4"),
        ("a.md", "text/markdown; charset=utf-8"),
        ("a.tar.gz", "application/gzip"),
        ("a.tar.bz2", "application/x-bzip2"),
        ("a.zip", "application/zip"),
        ("a.unheard-of", ""),
        ("README", ""),
    ],
)
def test_types_are_pythons_and_ours_never_the_systems(name, kind):
    assert type_of(name) == kind


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"all: x\n", "text/plain; charset=utf-8"),
        ("ä".encode() * 2000, "text/plain; charset=utf-8"),
        (b"x" + "ä".encode() * 2000, "text/plain; charset=utf-8"),
        (b"\x7fELF\0", "application/octet-stream"),
        (b"\xff\xfe", "application/octet-stream"),
        (b"", "application/octet-stream"),
    ],
)
def test_file_without_a_known_ending_is_text_if_it_looks_so(server, folder, content, kind):
    (folder / "Makefile").write_bytes(content)
    code, fields, body = ask(server, "/Makefile")
    assert (code, fields["Content-Type"], body) == (200, kind, content)


def test_names_in_every_script_are_found(server, folder):
    for name in ("ä ö.txt", "100%.txt", "a?b#c.txt", "a&b;c.txt", "日本.txt", "a:b.txt"):
        (folder / name).write_bytes(name.encode())
    links = re.findall(r'href="\./([^"]+)"', ask(server, "/")[2].decode())
    found = {ask(server, f"/{link}")[2].decode() for link in links if not link.endswith("/")}
    assert found == {*os.listdir(folder), TEXT.decode()} - {"sub", "text.txt"}


def test_name_that_is_no_text_is_found(server, folder):
    try:
        (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"odd")
    except OSError:
        pytest.skip("this system has no such names")
    assert '"./%FF.txt"' in ask(server, "/")[2].decode()
    assert ask(server, "/%ff.txt")[2] == b"odd"


def test_large_file_is_streamed_to_many_at_once(server, folder):
    content = os.urandom(MIB) * 8
    (folder / "large").write_bytes(content)
    found = []
    readers = [
        threading.Thread(target=lambda: found.append(ask(server, "/large")[2] == content))
        for _ in range(16)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(TIMEOUT)
    assert found == [True] * 16


def test_file_that_gets_shorter_is_cut_and_never_looks_whole(server, folder):
    (folder / "large").write_bytes(bytes(32 * MIB))
    with Wire(socket.create_connection(("127.0.0.1", server.port))) as wire:
        wire.send(f"GET /large HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode())
        wire.read_head()
        os.truncate(folder / "large", MIB)
        assert len(wire.read_to_end()) < 32 * MIB


# Conditions and ranges ---------------------------------------------------------------------------


def test_conditions(server, folder):
    os.utime(folder / "text.txt", (1e9, 1e9))
    fields = ask(server, "/text.txt")[1]
    tag, changed = fields["ETag"], fields["Last-Modified"]
    assert changed == formatdate(1e9, usegmt=True)
    earlier = formatdate(1e9 - 1, usegmt=True)
    table = [
        ({"If_None_Match": tag}, 304),
        ({"If_None_Match": f'"x", W/{tag}'}, 304),
        ({"If_None_Match": "*"}, 304),
        ({"If_None_Match": '"x"'}, 200),
        ({"If_None_Match": '"x"', "If_Modified_Since": changed}, 200),
        ({"If_Modified_Since": changed}, 304),
        ({"If_Modified_Since": earlier}, 200),
        ({"If_Modified_Since": "yesterday"}, 200),
        ({"If_Match": tag}, 200),
        ({"If_Match": f"W/{tag}"}, 412),
        ({"If_Match": '"x"'}, 412),
        ({"If_Unmodified_Since": changed}, 200),
        ({"If_Unmodified_Since": earlier}, 412),
    ]
    for conditions, code in table:
        assert status(server, "/text.txt", **conditions) == code, conditions
    code, fields, body = ask(server, "/text.txt", If_None_Match=tag)
    assert (fields["ETag"], fields["Content-Length"], body) == (tag, None, b"")
    (folder / "text.txt").write_bytes(b"other")
    assert ask(server, "/text.txt", If_None_Match=tag)[2] == b"other"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("bytes=0-3", (0, 4)),
        ("bytes=9-", (9, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-30", (0, 10)),
        ("bytes=4-400", (4, 10)),
        (" Bytes = 0 - 0 ", (0, 1)),
        ("bytes=10-", (10, 10)),
        ("bytes=-0", (10, 10)),
        ("bytes=99-100", (99, 10)),
        ("bytes=3-2", None),
        ("bytes=-", None),
        ("bytes=0-1,3-4", None),
        ("bytes=a-b", None),
        ("bytes=٣-", None),
        ("bytes=" + "9" * 5000 + "-", None),
        ("lines=0-1", None),
        ("", None),
    ],
)
def test_range_fields(text, answer):
    found = byte_range(text, len(TEXT))
    assert found == answer or (answer and found[0] >= found[1] and answer[0] >= answer[1])


def test_ranges_by_http(server, folder):
    code, fields, body = ask(server, "/text.txt", Range="bytes=2-4")
    assert (code, body, fields["Content-Range"]) == (206, b"234", "bytes 2-4/10")
    assert fields["Content-Length"] == "3" and fields["Content-Type"].startswith("text/plain")
    code, fields, body = ask(server, "/text.txt", Range="bytes=10-")
    assert (code, body, fields["Content-Range"]) == (416, b"", "bytes */10")
    assert status(server, "/text.txt", method="HEAD", Range="bytes=2-4") == 200
    tag, changed = fields["ETag"], fields["Last-Modified"]
    assert status(server, "/text.txt", Range="bytes=2-4", If_Range=tag) == 206
    assert status(server, "/text.txt", Range="bytes=2-4", If_Range='"x"') == 200
    assert status(server, "/text.txt", Range="bytes=2-4", If_Range=f"W/{tag}") == 200
    # It was changed in this second, so its date names no certain content.
    assert status(server, "/text.txt", Range="bytes=2-4", If_Range=changed) == 200
    os.utime(folder / "text.txt", (1e9, 1e9))
    old = formatdate(1e9, usegmt=True)
    assert status(server, "/text.txt", Range="bytes=2-4", If_Range=old) == 206
    (folder / "empty").write_bytes(b"")
    assert status(server, "/empty", Range="bytes=0-") == 416
    assert ask(server, "/empty")[2] == b""


# Folders -----------------------------------------------------------------------------------------


def test_folder_is_listed(server, folder):
    (folder / "<b>&.txt").write_bytes(b"x" * 1500)
    code, fields, body = ask(server, "/")
    page = body.decode()
    assert code == 200 and fields["Content-Type"] == "text/html; charset=utf-8"
    assert page.index('"./sub/"') < page.index('"./text.txt"')
    assert "&lt;b&gt;&amp;.txt" in page and "<b>" not in page and "1.5 kB" in page
    assert '"./../"' not in page and '"./../"' in ask(server, "/sub/")[2].decode()
    assert ask(server, "/", "HEAD")[1]["Content-Length"] == str(len(body))


def test_folder_with_an_index_shows_that(server, folder):
    (folder / "sub" / "index.html").write_bytes(b"<h1>index")
    code, fields, body = ask(server, "/sub/")
    assert (code, body, fields["Content-Type"]) == (200, b"<h1>index", "text/html; charset=utf-8")
    assert status(server, "/sub/", If_None_Match=fields["ETag"]) == 304


def test_folder_without_a_slash_is_sent_to_the_one_with_it(server, folder):
    (folder / "ä b").mkdir()
    code, fields, _ = ask(server, "/%C3%A4%20b?x=1")
    assert (code, fields["Location"]) == (307, "/%C3%A4%20b/?x=1")
    assert status(server, "/text.txt/") == 404


def test_no_redirect_leads_to_another_host(server, folder):
    (folder / "evil.example").mkdir()
    for path in ("//evil.example", "//evil.example/..", "/%2Fevil.example", "/\\evil.example"):
        code, fields, _ = ask(server, path)
        assert code == 404 or fields["Location"] == "/evil.example/"


def test_page_that_is_costly_is_made_once_for_many(monkeypatch):
    now = 0.0
    monkeypatch.setattr(folder_module, "monotonic", lambda: now)
    made = []

    def make(seconds):
        def make_it():
            nonlocal now
            now += seconds
            made.append(now)
            return str(now).encode()

        return make_it

    listings = Listings()
    for parts in (["a"], ["a"]):  # what costs little is always made anew
        listings.get(parts, make(COSTLY / 2))
    assert len(made) == 2
    page = listings.get(["a"], make(0.1))
    assert listings.get(["a"], make(0.1)) == page and len(made) == 3
    assert listings.get(["b"], make(0.1)) != page and len(made) == 4
    now += 0.1 * KEPT_FACTOR
    assert listings.get(["a"], make(0.1)) != page and len(made) == 5
    with pytest.raises(ZeroDivisionError):
        listings.get(["c"], lambda: 1 // 0)
    for number in range(100):
        listings.get([str(number)], make(0.1))
    assert len(listings._kept) == KEPT_PAGES


def test_page_of_a_folder_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(folder_module, "MOST_LISTED", 5)
    for number in range(9):
        (folder / f"{number}.txt").write_bytes(b"")
    with serving(folder) as server:
        page = ask(server, "/")[2].decode()
    assert page.count("<tr>") == 5 and "Only 5 entries are shown" in page
    assert "This folder is empty" in listing([], [])


# What is not served ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/../secret", "/..%2fsecret", "/%2e%2e/secret", "/sub/../../secret", "/sub/%2e%2e/text.txt",
        "/./text.txt", "//text.txt/", "/sub//inner.html", "/..\\secret", "/%2e%2e%5csecret",
        "/../shared-not/secret", "/..%2fshared-not/secret", "/text.txt%00", "/%00", "/no-such",
        "/" + "x" * 300, "/" + "x/" * 2000, "/text.txt/x", "/%2fetc/passwd", "/sub%2finner.html",
    ],
)  # fmt: skip
def test_path_that_is_not_below_the_folder_leads_nowhere(server, path):
    code, _, body = ask(server, path)
    assert code == 404 and b"secret" not in body and TEXT not in body
    assert b"There is no such file or folder here." in body


def test_links_are_followed_inside_and_never_out(server, folder, tmp_path):
    (folder / "in").symlink_to(folder / "text.txt")
    (folder / "in-folder").symlink_to("sub")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "out-folder").symlink_to("..")
    (folder / "beside").symlink_to("../shared-not")
    (folder / "circle").symlink_to("circle")
    (folder / "nothing").symlink_to("no-such")
    assert ask(server, "/in")[2] == TEXT
    assert ask(server, "/in-folder/inner.html")[2] == b"<p>inner"
    for path in ("/out", "/out-folder/", "/out-folder/secret", "/beside/secret", "/circle",
                 "/nothing"):  # fmt: skip
        assert status(server, path) == 404, path
    page = ask(server, "/")[2].decode()
    listed = re.findall(r'href="\./([^"]+)"', page)
    assert listed == ["in-folder/", "sub/", "in", "text.txt"]


def test_link_that_comes_between_check_and_open_is_not_followed(folder, tmp_path, monkeypatch):
    root = folder_module.Root(str(folder), hidden=False)
    real_parts = root._real_parts

    def exchanged(top, parts):
        found = real_parts(top, parts)
        (folder / "text.txt").unlink()
        (folder / "text.txt").symlink_to(tmp_path / "secret")
        return found

    monkeypatch.setattr(root, "_real_parts", exchanged)
    with pytest.raises(NotServed):
        root.find(["text.txt"])


def test_hidden_files_are_served_only_if_wanted(folder):
    (folder / ".env").write_bytes(b"secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_bytes(b"secret")
    (folder / "shown").symlink_to(".env")
    with serving(folder) as server:
        for path in ("/.env", "/%2eenv", "/.git/", "/.git/config", "/shown"):
            code, _, body = ask(server, path)
            assert code == 404 and b"secret" not in body, path
        assert b"env" not in ask(server, "/")[2] and b"shown" not in ask(server, "/")[2]
    with serving(folder, hidden=True) as server:
        assert ask(server, "/.env")[2] == b"secret" and ask(server, "/shown")[2] == b"secret"
        assert b".git/" in ask(server, "/")[2]


def test_no_pipe_or_socket_is_opened(server, folder):
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "sock"))
        assert (status(server, "/pipe"), status(server, "/sock")) == (404, 404)
    page = ask(server, "/")[2]
    assert b"pipe" not in page and b"sock" not in page


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, 403), (errno.ENOENT, 404), (errno.ELOOP, 404), (errno.EMFILE, 503)],
)
def test_file_that_cannot_be_opened_is_answered_with_why(server, monkeypatch, number, code):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(server.root, "_open", refuse)
    assert status(server, "/text.txt") == code


def test_folder_that_is_exchanged_for_a_link_meanwhile_is_not_listed(server, folder, monkeypatch):
    root, real_parts = server.root, server.root._real_parts

    def exchange(top, parts):
        found = real_parts(top, parts)
        (folder / "sub").rename(folder / "was")
        (folder / "sub").symlink_to("../shared-not")
        return found

    assert [entry.name for entry in root.entries(["sub"])] == ["inner.html"]
    monkeypatch.setattr(root, "_real_parts", exchange)
    with pytest.raises((OSError, NotServed)):
        list(root.entries(["sub"]))


def test_writer_of_a_pipe_does_not_notice_visitors(server, folder):
    """Opening a FIFO wakes the program that waits for a reader, whose bytes are then lost."""
    os.mkfifo(folder / "pipe")
    (folder / "sub" / "index.html").symlink_to("../pipe")
    opened = threading.Event()

    def write():
        with contextlib.suppress(OSError), open(folder / "pipe", "wb"):
            opened.set()

    writer = threading.Thread(target=write)
    writer.start()
    for path in ("/pipe", "/pipe/", "/pipe/inner", "/sub/"):
        assert status(server, path) == (200 if path == "/sub/" else 404), path
    assert not opened.is_set()
    with open(folder / "pipe", "rb"):
        writer.join(TIMEOUT)
    assert opened.is_set()


def test_folder_that_is_made_anew_is_served_on(server, folder):
    """As a build does with its result."""
    folder.rename(folder.with_name("old"))
    assert status(server, "/text.txt") == 404
    folder.mkdir()
    (folder / "text.txt").write_bytes(b"new")
    assert ask(server, "/text.txt")[2] == b"new"


def test_folder_may_be_a_link_that_is_changed(folder, tmp_path):
    """As a deployment does: current -> release-2."""
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / "text.txt").write_bytes(b"next")
    link = tmp_path / "current"
    link.symlink_to(folder)
    with serving(link) as server:
        assert ask(server, "/text.txt")[2] == TEXT
        link.unlink()
        link.symlink_to("next")
        assert ask(server, "/text.txt")[2] == b"next"


@pytest.mark.parametrize("system", ["unix", "windows"])
def test_rules_of_names(folder, monkeypatch, system):
    monkeypatch.setattr(folder_module, "_ON_WINDOWS", system == "windows")
    (folder / "a:b").write_bytes(b"")
    root = folder_module.Root(str(folder), hidden=False)
    for name in ("a:b", "text.txt.", "text.txt ", "C:"):
        (folder / name).write_bytes(b"")
        if system == "windows":
            with pytest.raises(NotServed):
                root.find([name])
        else:
            root.find([name]).file.close()


def test_system_that_cannot_open_by_parts_is_served_as_well(folder, tmp_path, monkeypatch):
    """Windows."""
    monkeypatch.setattr(folder_module, "_BY_PARTS", False)
    (folder / "out").symlink_to(tmp_path / "secret")
    with serving(folder) as server:
        assert ask(server, "/text.txt")[2] == TEXT
        assert ask(server, "/sub/inner.html")[2] == b"<p>inner"
        assert b"text.txt" in ask(server, "/")[2] and status(server, "/out") == 404


# Requests ----------------------------------------------------------------------------------------


def test_only_the_tunnel_is_answered(server):
    """Not a browser of this machine that a web page sends here, nor another user."""
    for host in ("localhost", f"127.0.0.1:{server.port}", server.host + "x", ""):
        code, _, body = ask(server, "/text.txt", Host=host)
        assert code == 421 and TEXT not in body
    other = FolderServer(".")
    assert other.host != server.host
    other.close()


def test_method_that_changes_something_is_refused_and_its_body_read(server):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        code, fields, _ = ask(server, "/text.txt", method, body=bytes(MIB // 2))
        assert (code, fields["Allow"]) == (405, "GET, HEAD")
    assert status(server, "/text.txt", method="BREW") == 501
    code, _, body = ask(server, "/text.txt", body=b"x" * 1000, Expect="100-continue")
    assert (code, body) == (200, TEXT)


@pytest.mark.parametrize(
    "head",
    [
        "GET\r\n\r\n", "GET  HTTP/1.1\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "\x00\xff\r\n\r\n",
        "GET /text.txt HTTP/1.1\r\nHost: HOST\r\nHost: HOST\r\n\r\n",
        "GET http://HOST/text.txt HTTP/1.1\r\nHost: HOST\r\n\r\n",
        "GET /text.txt HTTP/1.1\r\n\r\n", "GET /" + "x" * 70000 + " HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\n" + "".join(f"X-{n}: y\r\n" for n in range(200)) + "\r\n",
    ],
)  # fmt: skip
def test_bad_request_gets_no_file_and_costs_nothing(server, head):
    with Wire(socket.create_connection(("127.0.0.1", server.port))) as wire:
        wire.send(head.replace("HOST", server.host).encode("latin-1"))
        with contextlib.suppress(ConnectionResetError):
            assert TEXT not in wire.read_to_end()
    assert ask(server, "/text.txt")[2] == TEXT


def test_head_may_come_in_pieces(server):
    with Wire(socket.create_connection(("127.0.0.1", server.port))) as wire:
        for byte in f"GET /text.txt HTTP/1.1\r\nHost: {server.host}\r\n\r\n":
            wire.send(byte.encode())
        assert wire.read_to_end().endswith(TEXT)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n"])
def test_connections_whose_head_does_not_come_end(folder, monkeypatch, sent):
    monkeypatch.setattr(folder_module, "HEAD_TIMEOUT", 0.1)
    with serving(folder) as server:
        with Wire(socket.create_connection(("127.0.0.1", server.port))) as wire:
            wire.send(sent)
            assert wire.read_to_end() == b""


def test_endless_head_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(folder_module, "HEAD_TIMEOUT", 10 * TIMEOUT)
    monkeypatch.setattr(folder_module, "MOST_HEAD", 1000)
    with serving(folder) as server:
        with Wire(socket.create_connection(("127.0.0.1", server.port))) as wire:
            wire.send(b"GET / HTTP/1.1\r\nA: " + b"b" * 1000)
            with contextlib.suppress(ConnectionResetError):
                assert wire.read_to_end() == b""


def test_connections_without_a_request_hold_up_no_request(folder, monkeypatch):
    """Any program of this machine may open some, and send a byte now and then."""
    monkeypatch.setattr(folder_module, "MOST_SENT", 2)
    monkeypatch.setattr(arrivals, "MOST", 4)
    with serving(folder) as server, contextlib.ExitStack() as stack:
        others = []
        for _ in range(6):
            sock = socket.create_connection(("127.0.0.1", server.port))
            others.append(stack.enter_context(Wire(sock)))
            others[-1].send(b"GET /")
            assert ask(server, "/text.txt")[2] == TEXT
        for oldest in others[:2]:
            with contextlib.suppress(ConnectionResetError):
                assert oldest.read_to_end() == b""
        assert ask(server, "/text.txt")[2] == TEXT


def test_body_of_another_program_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(folder_module, "DRAIN_TIME", 10 * TIMEOUT)
    with Wire(socket.create_connection(("127.0.0.1", server.port))) as wire:
        wire.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        assert wire.read_to_end().startswith(b"HTTP/1.1 421 ")


def test_threads_are_bounded_and_requests_that_waited_too_long_are_told(folder, monkeypatch):
    monkeypatch.setattr(folder_module, "MOST_SENT", 2)
    with open(folder / "large", "wb") as file:
        file.truncate(256 * MIB)  # more than the system's buffers take
    with serving(folder) as server:
        holders = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        for holder in holders:
            holder.sendall(f"GET /large HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode())
        wait_until(lambda: server._workers._spare == 0 and len(server._workers._threads) == 2)
        monkeypatch.setattr(folder_module, "MOST_WAITED", 0)
        late = []
        asking = threading.Thread(target=lambda: late.append(status(server, "/text.txt")))
        asking.start()
        wait_until(lambda: server._workers.waiting)
        for holder in holders:
            holder.close()
        asking.join(TIMEOUT)
        assert late == [HTTPStatus.SERVICE_UNAVAILABLE]
        monkeypatch.setattr(folder_module, "MOST_WAITED", TIMEOUT)
        assert status(server, "/text.txt") == 200


def test_paths_are_taken_apart():
    assert parts_of("/") == ([], True)
    assert parts_of("/a/b%20c") == (["a", "b c"], False)
    assert parts_of("/a/") == (["a"], True)
