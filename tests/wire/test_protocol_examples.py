"""docs/protocol.md against the code: its byte examples, both ways, its tables and its numbers.

An example is a fenced block whose info string is "text" and the kind of the example. What a line
means is compared with what the code decodes from its bytes, and its bytes with what the code
encodes from the meaning.
"""

import ast
import functools
import importlib
import json
import re
from pathlib import Path

import jwt
import pytest

import gotunnel
from gotunnel import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    INITIAL_WINDOW,
    PING,
    RST,
    START_WINDOW,
    SYN,
    WINDOW_UPDATE,
    Ack,
    Certificate,
    End,
    Ends,
    Free,
    Header,
    Health,
    Members,
    MessageReader,
    Mux,
    Opened,
    Ping,
    Pong,
    Port,
    ProtocolError,
    Received,
    Register,
    decode_message,
    encode_data_header,
    encode_message,
    read_data_header,
    unpack_header,
)
from gotunnel_agent.common.refusals import BY_CODE
from gotunnel_server.agents import credentials
from gotunnel_server.agents.credentials import Credentials
from gotunnel_server.agents.tunnel import ENDED, FEATURES, REVOKED, SILENT
from gotunnel_server.visitors import policy

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")

TYPES = {"DATA": DATA, "WINDOW_UPDATE": WINDOW_UPDATE, "PING": PING, "GO_AWAY": GO_AWAY}
FLAGS = {"SYN": SYN, "ACK": ACK, "FIN": FIN, "RST": RST}
MESSAGES = (Register, Ack, Ping, Pong, Certificate, Port, Health, Free, Members, End)

# Bytes in hex, two spaces or more, what they mean.
LINE = re.compile(r"((?:[0-9a-f]{2,} ?)+) {2,}(\S.*)")
FRAME = re.compile(r"([A-Z_]+)(?: ([A-Z+]+))? stream ([0-9]+) length ([0-9]+)(?:;.*)?")


def examples(kind):
    """The contents of the page's blocks of a kind."""
    found = re.findall(rf"^```text {kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"the page has no block of {kind}"
    return found


def lines(kind):
    """(speaker or "", bytes, meaning) of each line of a kind of block."""
    for line in "".join(examples(kind)).splitlines():
        speaker = re.match("(agent|gateway|) *", line)
        found = LINE.fullmatch(line[speaker.end() :])
        assert found, f"not bytes and their meaning: {line}"
        yield speaker[1], bytes.fromhex(found[1]), found[2]


def header_of(meaning):
    found = FRAME.fullmatch(meaning)
    assert found, f"not the meaning of a frame: {meaning}"
    flags = sum(FLAGS[name] for name in (found[2] or "").split("+") if name)
    return Header(TYPES[found[1]], flags, int(found[3]), int(found[4]))


def joined(kind):
    """As lines(), each with the lines of text behind it, which say themselves what they mean."""
    found = []
    for speaker, data, meaning in lines(kind):
        if meaning.startswith("'"):
            assert ast.literal_eval("b" + meaning) == data
            found[-1][1] += data
        else:
            found.append([speaker, data, meaning])
    return found


def frames(kind):
    """(speaker, Header, bytes of the frame with its payload) of each frame."""
    return [(speaker, header_of(meaning), data) for speaker, data, meaning in joined(kind)]


def test_frames_mean_what_the_page_says():
    for _, header, data in frames("frames") + frames("session"):
        assert Header(*unpack_header(data)) == header
        assert header.encode() == data[: gotunnel.HEADER_SIZE]
        payload = data[gotunnel.HEADER_SIZE :]
        assert len(payload) == (header.length if header.type == DATA else 0)


def act(mux, header, payload):
    """Have one side do what causes a frame."""
    now, stream_id = 0.0, header.stream_id
    if header.type == PING and header.flags == SYN:
        mux.keep_alive(now)
    elif header.type == GO_AWAY:
        mux.go_away(header.length)
    elif header.flags == SYN:
        assert mux.open(now) == stream_id
    elif header.flags == ACK and header.type == WINDOW_UPDATE:
        mux.accept(stream_id)
    elif header.flags == FIN:
        mux.finish(stream_id)
    elif header.type == DATA:
        mux.send(stream_id, payload)


def test_two_muxes_say_the_session_of_the_page():
    """Each frame, caused at one side, has the page's bytes, and the other side understands it."""
    sides = {"agent": Mux(client=True), "gateway": Mux(client=False, max_streams=1)}
    heard = {"agent": {}, "gateway": {}}  # side: stream id: what came
    for speaker, header, data in frames("session"):
        other = "gateway" if speaker == "agent" else "agent"
        act(sides[speaker], header, data[gotunnel.HEADER_SIZE :])
        assert sides[speaker].pull(1 << 20)[0] == data, header
        for event in sides[other].receive(data, 0.0):
            if isinstance(event, Opened):
                heard[other][event.stream_id] = b""
            elif isinstance(event, Received):
                heard[other].setdefault(event.stream_id, b"")
                heard[other][event.stream_id] += event.payload
        if b'"ack"' in data:
            sides["gateway"].widen(START_WINDOW)
    said = MessageReader().feed(heard["gateway"][1])
    answered = MessageReader().feed(heard["agent"][1])
    assert [type(message) for message in said] == [Register, Pong]
    assert [type(message) for message in answered] == [Ack, Ping]
    assert b"".join(map(encode_message, said)) == heard["gateway"][1]
    assert b"".join(map(encode_message, answered)) == heard["agent"][1]
    assert heard["agent"][2].startswith(encode_data_header("app.example.com") + b"GET / ")
    assert heard["gateway"][2].startswith(b"HTTP/1.1 200 OK")


def new_session():
    """The gateway's side of a session in which nothing was said."""
    return Mux(client=False, max_streams=1)


def test_protocol_errors_end_a_session():
    found = list(lines("protocol errors"))
    for _, data, meaning in found:
        with pytest.raises(ProtocolError):
            new_session().receive(data, 0.0)
            pytest.fail(f"tolerated: {meaning}")
    assert len(found) >= 8


def test_what_the_page_calls_tolerated_is():
    for _, data, meaning in lines("ignored"):
        mux = new_session()
        assert (mux.receive(data, 0.0), mux.pull(1000)) == ([], (b"", [])), meaning


@functools.cache
def shown_messages():
    """Each message of the page as the wire has it: one line."""
    found, decoder = [], json.JSONDecoder()
    for block in examples("messages"):
        while block := block.strip():
            fields, end = decoder.raw_decode(block)
            found.append(json.dumps(fields, separators=(",", ":")).encode() + b"\n")
            block = block[end:]
    return found


def test_messages_are_written_as_the_page_shows_them():
    messages = [decode_message(data) for data in shown_messages()]
    assert {type(message) for message in messages} == set(MESSAGES)
    for message, data in zip(messages, shown_messages()):
        assert encode_message(message) == data
        fields = json.loads(data)
        assert fields.pop("type") == type(message).__name__.lower()
        for name, value in fields.items():
            came = getattr(message, name)
            assert (list(came) if isinstance(came, tuple) else came) == value


def section(title):
    """The text between a heading that begins so and the next heading."""
    found = re.search(rf"^#+ {re.escape(title)}.*?\n(.*?)(?=^#+ |\Z)", PAGE, re.M | re.S)
    assert found, f"the page has no section {title}"
    return found[1]


def keys(text):
    """What stands in the first column of a section's tables."""
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))


@pytest.mark.parametrize("message", [Register, Ack])
def test_the_page_explains_every_key(message):
    assert keys(section(f"`{message.__name__.lower()}`")) == set(message._fields)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_page_has_a_section_for_every_message(message):
    assert re.search(rf"^### .*`{message.__name__.lower()}`", PAGE, re.MULTILINE)


def test_the_page_names_every_feature():
    assert keys(section("9. Extensions")) == FEATURES


def test_refusals_begin_as_the_page_says():
    wing = ROOT / "gotunnel_server"
    sources = [*wing.glob("agents/*.py"), wing / "routes.py", ROOT / "gotunnel.py"]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    beginnings = keys(section("Refused registrations"))
    assert len(beginnings) >= 6
    assert [text for text in beginnings if f'"{text}' not in code] == []


def test_the_page_names_every_reason_for_an_end():
    assert keys(section("`end`")) == {gotunnel.REPLACED, gotunnel.MOVE, REVOKED, ENDED, SILENT}


def test_the_page_names_every_code_beside_a_reset():
    rows = re.findall(r"^\| ([0-9]) \| `([A-Z_]+)` \| .* `([a-z-]+)` \|$", PAGE, re.MULTILINE)
    codes = {name: int(code) for code, name, _ in rows}
    assert codes == {name: getattr(gotunnel, name) for name in codes}
    words = {int(code): word for code, _, word in rows}
    assert words == {1: "cut-short", **{code: one.word for code, one in BY_CODE.items()}}


END = r"(\S+) ([0-9]+)"
DATA_HEADER = re.compile(rf"version ([0-9]), hostname ([^, ]+)(?:, visitor {END}, door {END})?")


def test_data_headers_mean_what_the_page_says():
    versions = set()
    for _, data, meaning in joined("data headers"):
        version, hostname, *addresses = DATA_HEADER.fullmatch(meaning).groups()
        versions.add(int(version))
        visitor, visitor_port, door, door_port = addresses
        ends = visitor and Ends((visitor, int(visitor_port)), (door, int(door_port)))
        relayed = version == "3"
        assert encode_data_header(hostname, ends, relayed) == data
        rest = bytearray(data)

        def read_exactly(count, rest=rest):
            taken, rest[:count] = bytes(rest[:count]), b""
            return taken

        assert read_data_header(read_exactly) == (hostname, ends, relayed)
        assert (data[0], rest) == (int(version), b"")
    assert versions == {1, 2, 3}


def test_the_token_is_signed_and_read_as_the_page_shows(monkeypatch):
    [block] = examples("token")
    shown = dict(re.findall(r"^(\w+) +(.+)$", block, re.MULTILINE))
    claims = json.loads(shown["claims"])
    made = jwt.encode(claims, shown["secret"], "HS256", headers=json.loads(shown["header"]))
    assert made == shown["token"]
    monkeypatch.setattr(credentials.time, "time", lambda: claims["iat"] + 1.0)
    assert Credentials(shown["secret"]).identify(made).issuer == claims["iss"]


def test_the_page_names_the_claims_of_a_token():
    assert keys(section("5. The token")) == {"iss", "exp", "iat", "nbf", "hosts", "ports"}


def test_the_policy_of_the_page_can_be_followed():
    [block] = examples("policy")
    rules = json.loads(block)
    assert set(rules) == set(policy.KEYS) == keys(section("Policies"))
    assert policy.read(rules, "http") is not None


def test_the_numbers_of_the_page_are_those_of_the_code():
    rows = re.findall(r"^\| \[`([A-Z_]+)`\]\(\.\./([a-z_/0-9]+)\.py\) \| ([0-9]+) \|", PAGE, re.M)
    assert len(rows) > 30
    for name, path, value in rows:
        module = importlib.import_module(path.replace("/", "."))
        assert getattr(module, name) == int(value), name


@pytest.mark.parametrize("delta", [0, START_WINDOW - INITIAL_WINDOW])
def test_a_first_window_is_written_as_a_difference(delta):
    assert any(header.length == delta for _, header, _ in frames("frames") if header.flags == SYN)
