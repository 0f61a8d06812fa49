"""The observer of a Session: it sees all bytes of the wire, in their order."""

import pytest
from raw_peer import (  # noqa: F401 (leaves_nothing: a fixture)
    BARRIER,
    MIB,
    PATIENCE,
    accepted,
    close_all,
    duplex_pair,
    frame,
    leaves_nothing,
    noise,
    raw_pair,
    read_all,
    send_all,
    spawn,
    split_frames,
    stream_pair,
)

from gotunnel import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    INITIAL_WINDOW,
    PING,
    PROTOCOL_ERROR,
    SYN,
    WINDOW_UPDATE,
    Session,
)


class Notes:
    """An observer. ``sent`` and ``received`` are the frames so far, as raw_peer writes them."""

    def __init__(self):
        self._sent, self._received = bytearray(), bytearray()

    def __call__(self, sent, data):
        (self._sent if sent else self._received).extend(data)

    @property
    def sent(self):
        return split_frames(bytes(self._sent))

    @property
    def received(self):
        return split_frames(bytes(self._received))


def test_a_session_without_an_observer_uses_its_connection_as_it_is():
    """Nothing is called in between, so it costs nothing on the path of every byte."""
    with raw_pair() as (_, session):
        assert not {"send", "receive_into"} & set(vars(session._duplex))
    with raw_pair(observer=Notes()) as (_, session):
        assert {"send", "receive_into"} <= set(vars(session._duplex))


def test_the_observer_sees_what_the_peer_sent_and_saw():
    notes = Notes()
    with raw_pair(observer=notes) as (peer, session):
        stream = accepted(peer, session)
        peer.send(frame(DATA, 0, 1, payload=b"ask"), frame(DATA, FIN, 1, payload=b"ed"))
        assert read_all(stream) == b"asked"
        stream.write(b"answered")
        stream.finish()
        seen = [(WINDOW_UPDATE, ACK, 1, 0, b""), peer.read(), peer.read(), *peer.barrier()]
        assert seen == notes.sent[:3] == [
            (WINDOW_UPDATE, ACK, 1, 0, b""),
            (DATA, 0, 1, 8, b"answered"),
            (WINDOW_UPDATE, FIN, 1, 0, b""),
        ]  # fmt: skip
        assert notes.sent[3:] == [(PING, ACK, 0, BARRIER, b""), (PING, ACK, 0, BARRIER + 1, b"")]
        assert notes.received == [
            (WINDOW_UPDATE, SYN, 1, 0, b""),
            (DATA, 0, 1, 3, b"ask"),
            (DATA, FIN, 1, 2, b"ed"),
            (PING, SYN, 0, BARRIER, b""),
            (PING, SYN, 0, BARRIER + 1, b""),
        ]


@pytest.mark.parametrize("bad", [(DATA, SYN, 2, 0), (DATA, 0, 1, 2 * INITIAL_WINDOW)])
def test_the_frame_that_breaks_a_rule_is_seen_and_so_is_the_last_word(bad):
    notes = Notes()
    with raw_pair(observer=notes) as (peer, session):
        accepted(peer, session)
        peer.send(frame(*bad))
        assert peer.read_to_end() == [(GO_AWAY, 0, 0, PROTOCOL_ERROR, b"")]
        peer.close()
        session.join(PATIENCE)
    assert bytes(notes._received).endswith(frame(*bad))
    assert notes.sent[-1] == (GO_AWAY, 0, 0, PROTOCOL_ERROR, b"")


@pytest.mark.parametrize("transport", ["socketpair", "tls"])
def test_two_observers_agree_on_a_long_transfer(transport):
    """Also while the line is full, and frames leave in the threads that find it free."""
    left, right = Notes(), Notes()
    data = noise(4 * MIB)
    with duplex_pair(transport) as (ours, theirs):
        client = Session(ours, client=True, name="client", observer=left)
        server = Session(theirs, client=False, name="server", observer=right)
        client.start()
        server.start()
        here, there = stream_pair(client, server)
        sending = spawn(send_all, here, data)
        assert read_all(there) == data
        sending.result(PATIENCE)
        there.finish()
        assert read_all(here) == b""
        close_all(client, server)
    whole = b"".join(payload for *_, payload in left.sent) == data
    assert whole
    for sender, receiver in ((left, right), (right, left)):
        count = len(receiver._received)
        same = sender._sent[:count] == receiver._received  # bytes in an assertion fill the screen
        assert same
        # Both ends close at once, and the one that is first does not read the other's farewell.
        assert bytes(sender._sent[count:]) in (b"", frame(GO_AWAY, 0, 0, 0))
