"""tools/trace.py: the ladder shows each frame, in its order, with its stream's windows."""

import html
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from xml.etree import ElementTree

import bootstrap
import pytest
import trace_page
import trace_text
import trace_visit
from raw_peer import (
    MIB,
    PATIENCE,
    close_all,
    duplex_pair,
    noise,
    spawn,
    stream_pair,
)
from support import ROOT, need, wait_until
from trace_ladder import (
    BYTES,
    CREDIT,
    FOLDED,
    LONG,
    PAYLOAD,
    VISIT_OVER,
    Event,
    FrameCutter,
    Ladder,
    Row,
    fold,
    shorten,
)

from gotunnel import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    INITIAL_WINDOW,
    SYN,
    WINDOW_UPDATE,
    Header,
    Session,
    encode_data_header,
)

KINDS = {"http": 0, "upload": 300_000, "tcp": 0, "websocket": 0}  # of visits: bytes of an upload
VISIT = ROOT / "tools" / "trace_visit.py"
A_TO_G, G_TO_A = ("agent", "gateway"), ("gateway", "agent")
REGISTERED = [
    (*A_TO_G, WINDOW_UPDATE, SYN, 1),
    (*A_TO_G, DATA, 0, 1),  # register
    (*G_TO_A, WINDOW_UPDATE, ACK, 1),
    (*G_TO_A, DATA, 0, 1),  # ack
    (*G_TO_A, DATA, 0, 1),  # certificate
]


@pytest.fixture(autouse=True, scope="module")
def temporary_folder(tmp_path_factory):
    """Where the tool makes its folder, which must be gone again at the end."""
    folder, before = tmp_path_factory.mktemp("temporary"), tempfile.tempdir
    tempfile.tempdir = str(folder)
    yield folder
    tempfile.tempdir = before
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def tapes(temporary_folder):
    return {kind: trace_visit.record(kind, size) for kind, size in KINDS.items()}


@pytest.fixture(scope="module")
def ladders(tapes):
    return {kind: Ladder(kind).rows(tape.events) for kind, tape in tapes.items()}


def frames(tape):
    """The tunnel's frames until the visit was over: (source, sink, type, flags, stream id)."""
    events = sorted(tape.events, key=lambda event: event.at)
    end = [event.note for event in events].index(VISIT_OVER)
    return [(event.source, event.sink, *event.header[:3]) for event in events[:end] if event.header]


def titles(rows):
    return [row.title for row in rows]


def lines(rows):
    return [line for row in rows for line in row.lines]


# What is recorded --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_end_sent_is_what_the_other_end_saw(tapes, kind):
    tape = tapes[kind]
    for here, there in (A_TO_G, G_TO_A):
        sent = [
            (event.header, event.data, event.size)
            for event in tape.events
            if event.header and event.source == here
        ]
        received = tape.received[there]
        assert (
            received == sent[: len(received)] and len(sent) - len(received) <= 2
        )  # the last words


def test_the_frames_of_a_get_come_in_this_order(tapes):
    assert frames(tapes["http"]) == REGISTERED + [
        (*G_TO_A, WINDOW_UPDATE, SYN, 2),
        (*G_TO_A, DATA, 0, 2),  # data header and request
        (*A_TO_G, WINDOW_UPDATE, ACK, 2),
        (*A_TO_G, DATA, 0, 2),  # answer
    ]


def test_the_frames_of_a_tcp_visit_come_in_this_order(tapes):
    assert frames(tapes["tcp"]) == REGISTERED + [
        (*G_TO_A, WINDOW_UPDATE, SYN, 2),
        (*G_TO_A, DATA, 0, 2),  # data header
        (*A_TO_G, WINDOW_UPDATE, ACK, 2),
        (*A_TO_G, DATA, 0, 2),  # greeting
        (*G_TO_A, DATA, 0, 2),  # question
        (*A_TO_G, DATA, 0, 2),  # answer
        (*G_TO_A, WINDOW_UPDATE, FIN, 2),  # half-close
        (*A_TO_G, DATA, 0, 2),  # goodbye
        (*A_TO_G, WINDOW_UPDATE, FIN, 2),
    ]


def test_the_frames_of_a_websocket_come_in_this_order(tapes):
    seen = frames(tapes["websocket"])
    assert seen[: len(REGISTERED) + 9] == REGISTERED + [
        (*G_TO_A, WINDOW_UPDATE, SYN, 2),
        (*G_TO_A, DATA, 0, 2),  # data header and upgrade
        (*A_TO_G, WINDOW_UPDATE, ACK, 2),
        (*A_TO_G, DATA, 0, 2),  # 101
        (*G_TO_A, DATA, 0, 2),  # a message each way
        (*A_TO_G, DATA, 0, 2),
        (*G_TO_A, DATA, 0, 2),  # close, each way
        (*A_TO_G, DATA, 0, 2),
        (*A_TO_G, WINDOW_UPDATE, FIN, 2),
    ]
    assert (*G_TO_A, WINDOW_UPDATE, FIN, 2) in seen


def test_the_whole_upload_goes_through_the_tunnel(tapes):
    carried = sum(
        event.size
        for event in tapes["upload"].events
        if event.header and event.source == "gateway" and event.header[:3] == (DATA, 0, 2)
    )
    assert KINDS["upload"] < carried < KINDS["upload"] + 1000  # and a head


# What the rows say -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_ladder_shows_every_frame_once(tapes, ladders, kind):
    rows = ladders[kind]
    shown = 0
    for row in rows:
        if row.header:
            folded = re.match(r"(\d+) DATA frames", row.title)
            shown += int(folded[1]) if folded else 1
    assert shown == sum(event.header is not None for event in tapes[kind].events)
    assert [row.at for row in rows] == sorted(row.at for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ladder_shows_the_control_messages_and_no_secret(ladders, kind):
    said = lines(ladders[kind])
    assert '{"type": "register",' in said and '{"type": "ack",' in said
    assert not any(re.search(r"eyJ[\w-]{6,}", line) for line in said)
    assert any(re.fullmatch(r' "token": "eyJhbGci\.\.\." \(a JWT of \d+ bytes.*', s) for s in said)


def test_a_ladder_shows_data_header_and_heads(ladders):
    (row,) = [row for row in ladders["http"] if "the data header" in row.title]
    assert row.title == "189 bytes on stream 2: the data header, then the head of an HTTP request"
    assert row.hex[0] == (
        "01 000f 6170702e 6578616d 706c652e 636f6d",
        "data header: version 1, 15 bytes of hostname: app.example.com",
    )
    assert row.hex[1][0] == b"GET / HTTP/1.1\r\n".hex(" ", 4)
    assert row.lines[0] == "GET / HTTP/1.1" and "X-Forwarded-Proto: https" in row.lines
    assert row.windows == {"gateway": INITIAL_WINDOW - 189, "agent": 1_048_576}
    assert "HTTP/1.1 200 OK" in lines(ladders["http"])
    assert "the visit is over; stream 2 stays open, for another visit" in titles(ladders["http"])


def test_a_ladder_shows_a_half_close_and_websocket_frames(ladders):
    tcp = titles(ladders["tcp"])
    assert "the gateway sends no more on stream 2 (half-close)" in tcp
    assert "the agent sends no more on stream 2 (half-close); both have, so it is over" in tcp
    websocket = " ".join(titles(ladders["websocket"]))
    assert "a WebSocket frame, masked: a text, 'can you hear me?'" in websocket
    assert "a WebSocket frame, not masked: close, code 1000" in websocket


def test_the_windows_are_those_of_the_mux():
    """They are computed from the frames alone; here both ends have come to rest."""
    tape = trace_visit.Tape()
    with duplex_pair("tls") as (ours, theirs):
        agent = Session(ours, client=True, name="a", observer=tape.observer(*A_TO_G), window=MIB)
        gateway = Session(theirs, client=False, name="g", observer=tape.observer(*G_TO_A))
        agent.start()
        gateway.start()
        here, there = stream_pair(gateway, agent)
        data = encode_data_header("app.example.com") + noise(3 * MIB)
        sending = spawn(here.write, data, PATIENCE)
        there.read_exactly(len(data), PATIENCE)
        sending.result(PATIENCE)
        there.write(b"answer")
        here.read_exactly(6, PATIENCE)
        rows = Ladder("tcp").rows(tape.events)
        windows = [row.windows for row in rows if row.windows][-1]
        flows = {"gateway": gateway._mux._flows[2], "agent": agent._mux._flows[2]}
        wait_until(lambda: {side: flows[side].may_send for side in flows} == windows)
        close_all(gateway, agent)


def test_credit_that_exceeds_all_before_has_let_the_window_grow():
    frames = [
        ("gateway", "agent", Header(WINDOW_UPDATE, SYN, 2, 0)),
        ("gateway", "agent", Header(DATA, 0, 2, 1000)),
        ("agent", "gateway", Header(WINDOW_UPDATE, 0, 2, 1000)),
        ("agent", "gateway", Header(WINDOW_UPDATE, 0, 2, 1)),
    ]
    events = [
        Event(at, source, sink, header, bytes(5), 1000 if header.type == DATA else 0, "")
        for at, (source, sink, header) in enumerate(frames)
    ]
    before, after = Ladder("tcp").rows(events)[2:]
    assert before.title == "credit: the gateway may send 1000 bytes more on stream 2"
    assert before.windows["gateway"] == INITIAL_WINDOW
    assert after.title.endswith("may send 1 byte more on stream 2; the window has grown")


# Cutting and folding -----------------------------------------------------------------------------


def test_frames_are_cut_from_any_pieces():
    sent = [
        (Header(WINDOW_UPDATE, SYN, 2, 5), b""),
        (Header(DATA, 0, 2, 3), b"abc"),
        (Header(GO_AWAY, 0, 0, 0), b""),
    ]
    data = b"".join(header.encode() + payload for header, payload in sent)
    assert FrameCutter().cut(data) == sent
    cutter = FrameCutter()
    assert [frame for byte in data for frame in cutter.cut(bytes([byte]))] == sent


def body(at, size, source="gateway", sink="agent", kind=PAYLOAD):
    return Row(
        at, source, sink, kind, f"{size}", header=Header(DATA, 0, 2, size), stream_id=2, size=size,
        windows={"gateway": 1000 - at, "agent": 0}, until=at,
    )  # fmt: skip


def credit(at):
    return Row(at, "agent", "gateway", CREDIT, "credit", header=Header(WINDOW_UPDATE, 0, 2, 9))


def test_equal_frames_in_a_row_are_one_row():
    (row,) = fold([body(at, 100) for at in range(5)])
    assert row.title == "5 DATA frames: 500 bytes on stream 2"
    assert row.lines == ["(100 bytes of payload each; the header is the first one's)"]
    assert (row.at, row.until, row.windows["gateway"]) == (0, 4, 996)


def test_few_frames_and_those_with_others_in_between_stay_as_they_are():
    few = [body(at, 100) for at in range(FOLDED - 1)]
    assert fold(few) == few
    parted = [body(0, 1), body(1, 1), credit(2), body(3, 1), body(4, 1)]
    assert fold(parted) == parted


def test_a_row_of_another_lane_parts_no_run():
    rows = [body(0, 1), body(0.5, 7, "agent", "target", BYTES), body(1, 1), body(2, 1)]
    assert titles(fold(rows)) == ["3 DATA frames: 3 bytes on stream 2", "7"]


def test_the_middle_of_a_long_exchange_is_left_out():
    rows = [credit(at) if at % 2 else body(at, 100) for at in range(LONG + 16)]
    short = shorten(rows)
    assert len(short) == 11
    assert short[8].title == "... and so on: 1000 bytes more in DATA frames, and 10 times credit"
    assert short[:8] + short[9:] == rows[:8] + rows[-2:]
    assert shorten(rows[:LONG]) == rows[:LONG]


# Text and page -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_plain_and_fits(ladders, kind):
    text = trace_text.text(ladders[kind], 100, colours=False)
    assert text.isascii() and "\33" not in text
    assert max(map(len, text.splitlines())) <= 100
    narrow = trace_text.text(ladders[kind], 80, colours=False)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "\33[0m" in trace_text.text(ladders[kind], 100, colours=True)


def test_an_arrow_goes_from_its_sender_to_its_receiver():
    assert trace_text.lane_line() == "   |       |       |       |   "
    assert trace_text.lane_line("visitor", "gateway") == "   |------>|       |       |   "
    assert trace_text.lane_line("target", "agent") == "   |       |       |<------|   "
    assert trace_text.lane_line("agent", "agent") == "   |       |       *       |   "


def drawn(text):
    """The lines of a ladder, without what differs from run to run: times, ports."""
    lines = (line[trace_text.TIME :] for line in text.splitlines())
    return [re.sub(r"port \d+", "port N", line) for line in lines if "|" in line]


def test_the_documentation_shows_what_the_tool_prints(ladders):
    """If this fails, put a part of today's output of tools/trace.py into docs/trace.md."""
    (block,) = re.findall(
        r"(?ms)^```text\n(.*?)^```", (ROOT / "docs" / "trace.md").read_text("utf-8")
    )
    printed = trace_text.text(ladders["http"], trace_visit.PLAIN_WIDTH, colours=False)
    assert len(drawn(block)) > 40
    assert set(drawn(block)) <= set(drawn(printed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(ladders, kind):
    page = trace_page.page(kind, ladders[kind])
    root = ElementTree.fromstring(page)  # stricter than HTML asks for
    assert not {"script", "link", "img", "iframe"} & {element.tag for element in root.iter()}
    assert not any({"src", "href"} & set(element.attrib) for element in root.iter())
    # The words may hold an address, such as that of a hostname; nothing loads it.
    active = [element.text or "" for element in root.iter("style")]
    active += [value for element in root.iter() for value in element.attrib.values()]
    assert "--" in "".join(active) and not re.search(r"url\(|@import|//", "".join(active))
    rows = [element for element in root.iter("div") if element.get("class", "").startswith("row ")]
    assert len(rows) == len(ladders[kind])
    assert all(row.find("time") is not None for row in rows)


def test_what_was_sent_is_only_text_in_the_page():
    event = Event(0.0, "visitor", "gateway", None, b"<b>&amp;", 8, "")
    page = trace_page.page("tcp", Ladder("tcp").rows([event]))
    assert "&lt;b&gt;&amp;amp;" in page and "<b>" not in page


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    """Of two colours (WCAG 2.2, 1.4.3)."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_colours_of_the_page_have_enough_contrast():
    light, dark = re.findall(r":root \{(.*?)\}", trace_page.STYLE, re.DOTALL)[:2]
    for theme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for ground in (colours["ground"], colours["box"]):
            for name in set(colours) - {"ground", "box", "line"}:
                assert contrast(colours[name], ground) >= 4.5, (name, ground)


@pytest.mark.slow
def test_the_page_needs_no_sideways_scrolling_on_a_phone(ladders, tmp_path):
    page = html.escape(trace_page.page("websocket", ladders["websocket"]))
    path = tmp_path / "phone.html"
    path.write_text(
        f'<iframe id="phone" style="width: 390px; height: 800px; border: 0" srcdoc="{page}">'
        "</iframe><p id=width></p><script>phone.onload = () => { width.textContent = "
        "`${phone.contentDocument.documentElement.scrollWidth} wide` }</script>"
    )
    command = (
        need("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--dump-dom", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}",
        path.as_uri(),
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert '<p id="width">390 wide</p>' in done.stdout


# The program -------------------------------------------------------------------------------------


def tool():
    """tools/trace.py as a module; its bare name is that of one of Python's."""
    spec = importlib.util.spec_from_file_location("trace_tool", ROOT / "tools" / "trace.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(folder, **more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), **more}


def run(folder, *arguments, shell="", **more):
    command = [sys.executable, str(VISIT), *arguments]
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=50, env=environment(folder, **more)
    )


def test_the_program_prints_the_ladder(temporary_folder):
    done = run(temporary_folder, "http", "0", "")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\33" not in done.stdout
    assert "the agent opens stream 1, the control stream" in done.stdout
    assert "00 01 0001 00000001 000c0000  WINDOW_UPDATE SYN" in done.stdout


def test_colours_are_for_a_terminal_that_wants_them(temporary_folder):
    command = f"{sys.executable} {VISIT} http 0 ''"
    for more, coloured in (({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)):
        done = subprocess.run(
            [need("script"), "-qec", command, os.devnull], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=50,
            env=environment(temporary_folder, TERM="xterm", **more),
        )  # fmt: skip
        assert ("\33[" in done.stdout) == coloured


def test_the_program_writes_the_page(temporary_folder, tmp_path):
    path = tmp_path / "visit.html"
    done = run(temporary_folder, "tcp", "0", str(path))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"trace.py: {path} is written\n"
    ElementTree.fromstring(path.read_text("utf-8"))


@pytest.mark.parametrize(
    ("file", "shell", "status", "said"),
    [
        ("", "> /dev/full", 1, "trace.py: the answer cannot be written: No space left on device\n"),
        ("", "| head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", 0, ""),
        ("/dev/full", "", 1, "trace.py: /dev/full cannot be written: No space left on device\n"),
        (
            "/no/such/x",
            "",
            1,
            "trace.py: /no/such/x cannot be written: No such file or directory\n",
        ),
    ],
)
def test_an_output_that_cannot_be_written_is_told_in_a_line(
    temporary_folder, file, shell, status, said
):
    done = run(temporary_folder, "http", "0", file, shell=shell)
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_it_cleanly(temporary_folder, number, status):
    """Although the visit is a process of its own."""
    prepared = (
        f"import bootstrap, runpy, sys; bootstrap.prepare = lambda need: {sys.executable!r}; "
        f"runpy.run_path({str(ROOT / 'tools' / 'trace.py')!r}, run_name='__main__')"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", prepared, "--upload", "64M"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(temporary_folder, PYTHONPATH=str(ROOT / "tools")),
    )  # fmt: skip
    wait_until(lambda: list(temporary_folder.iterdir()), timeout=30)
    program.send_signal(number)
    _, said = program.communicate(timeout=30)
    assert (program.returncode, said) == (status, b"")
    assert not list(temporary_folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--upload", "lots"], "argument --upload: 'lots' is no size, expected a number of bytes"),
        (["--upload", "0"], "argument --upload: '0' is no size"),
        (["--upload", "65M"], "argument --upload: '65M' is no size"),
        (["--tcp", "--websocket"], "argument --websocket: not allowed with argument --tcp"),
        (["visit.html"], "unrecognized arguments: visit.html"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_installed(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(bootstrap, "prepare", None)
    with pytest.raises(SystemExit) as ended:
        tool().main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_tool_explains_itself_and_how_to_read_a_ladder(capsys):
    with pytest.raises(SystemExit) as ended:
        tool().main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--upload SIZE" in said and "How to read a ladder" in said


def test_sizes_may_have_a_unit():
    size_of = tool().size_of
    assert [size_of(text) for text in ("7", "2k", "1M", "64M")] == [7, 2048, MIB, 64 * MIB]


def test_the_tool_runs_the_visit_and_returns_its_status(monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "prepare", lambda need: sys.executable)
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    path = tmp_path / "visit.html"
    assert tool().main(["--tcp", "--html", str(path)]) == 0
    assert "lines both ways in tcp mode" in path.read_text("utf-8")
    assert tool().main(["--html", str(tmp_path)]) == 1
