"""The agent counts each stream that does not reach its target."""

from types import SimpleNamespace

import pytest

from gotunnel import NoThread, ProtocolError, encode_data_header
from gotunnel_agent import target
from gotunnel_agent.target import Route, Targets, serve

HOSTNAME = "app.localhost"


class FakeStream:
    """The gateway's side has sent these bytes."""

    id, session = 2, SimpleNamespace(stall_timeout=1)

    def __init__(self, came):
        self._came = came
        self.was_reset = False

    def read_exactly(self, count, timeout):
        if len(self._came) < count:
            raise ProtocolError("the stream ended in the data header")
        came, self._came = self._came[:count], self._came[count:]
        return came

    def reset(self, code=0):
        self.was_reset = True

    def close(self):
        pass


def counted(came, route=None):
    stream, targets = FakeStream(came), Targets()
    serve(stream, {HOSTNAME: route}.get, targets)
    assert stream.was_reset
    return targets.failed()


TUNNEL = SimpleNamespace(hostname=HOSTNAME, mode="tcp", target="127.0.0.1:1", proxy_protocol="",
                         protocol="",
                         idle_timeout=None)  # fmt: skip


@pytest.mark.parametrize(
    "came, route, key",
    [
        (b"\x02", None, ("other", "no-header")),
        (encode_data_header("else.localhost"), None, ("other", "no-tunnel")),
        (encode_data_header(HOSTNAME), Route(TUNNEL, problem="no policies"),
         (HOSTNAME, "target-misconfigured")),
    ],
)  # fmt: skip
def test_a_stream_that_is_refused_is_counted(came, route, key):
    assert counted(came, route) == {key: 1}


def test_a_visit_without_a_thread_is_counted(monkeypatch):
    def refuse(*arguments):
        raise NoThread("no further thread")

    class Connection:
        def cut_unless_finished(self):
            pass

        close = cut_unless_finished

    connection = Connection()
    monkeypatch.setattr(target, "dial", lambda *arguments: connection)
    monkeypatch.setattr(target, "relay", refuse)
    assert counted(encode_data_header(HOSTNAME), Route(TUNNEL)) == {(HOSTNAME, "no-thread"): 1}
