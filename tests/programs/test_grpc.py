"""gRPC from end to end: grpcio's client, the gateway, an agent, grpcio's server.

Both speak HTTP/2 and nothing else. No protoc: messages are plain bytes.
"""

import contextlib
import os
import struct
import threading
from concurrent import futures

import pytest
from support import APP, TIMEOUT, agent_here, gateway_here, go_agent, request, wait_until

grpc = pytest.importorskip("grpc", reason="the Python package grpcio is missing")
pytest.importorskip("h2", reason="the Python package h2 is missing")
pytest.importorskip("gotunnel_server.visitors.http2", reason="visitors with HTTP/2 are missing")

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
WAIT = {"timeout": TIMEOUT}


class Methods(grpc.GenericRpcHandler):
    """Methods by their last name."""

    def __init__(self):
        self.cancelled = threading.Event()
        self.called = threading.Event()

    def service(self, call):
        return getattr(self, call.method.rpartition("/")[2].lower(), lambda: None)()

    def shout(self):
        def shout(message, context):
            given = dict(context.invocation_metadata())
            context.send_initial_metadata([("x-given", given.get("x-ask", ""))])
            context.set_trailing_metadata([("x-sum", "7"), ("x-raw-bin", b"\0\xff")])
            return message.upper()

        return grpc.unary_unary_rpc_method_handler(shout)

    def count(self):
        return grpc.unary_stream_rpc_method_handler(
            lambda message, _: (b"%d" % number for number in range(int(message)))
        )

    def add(self):
        return grpc.stream_unary_rpc_method_handler(
            lambda messages, _: b"%d" % sum(map(int, messages))
        )

    def talk(self):
        def talk(messages, _):
            for message in messages:
                yield message[::-1]

        return grpc.stream_stream_rpc_method_handler(talk)

    def refuse(self):
        def refuse(message, context):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now")

        return grpc.unary_unary_rpc_method_handler(refuse)

    def wait(self):
        def wait(message, context):
            context.add_callback(self.cancelled.set)
            self.called.set()
            self.cancelled.wait(TIMEOUT)
            return b""

        return grpc.unary_unary_rpc_method_handler(wait)


class Service:
    """A server of gRPC."""

    def __init__(self):
        self.methods = Methods()
        self._pool = futures.ThreadPoolExecutor(16)
        self._server = grpc.server(self._pool, [self.methods], options=UNLIMITED)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._server.stop(0).wait(TIMEOUT)  # running calls are cancelled
        self._pool.shutdown()


@pytest.fixture
def service():
    with Service() as service:
        yield service


@pytest.fixture
def gateway(cache):
    with gateway_here(cache) as gateway:
        yield gateway


def serving(gateway, folder, service):
    tunnel = {"hostname": APP, "target": f"127.0.0.1:{service.port}", "protocol": "h2c"}
    return agent_here(gateway, folder, http={APP: 0}, tunnels=[tunnel])


@contextlib.contextmanager
def channel_to(gateway, *options):
    credentials = grpc.ssl_channel_credentials(gateway.ca_file.read_bytes())
    names = [("grpc.ssl_target_name_override", APP), ("grpc.default_authority", APP)]
    address = f"127.0.0.1:{gateway.public_port}"
    with grpc.secure_channel(address, credentials, [*names, *UNLIMITED, *options]) as channel:
        yield channel


@pytest.fixture
def channel(gateway, tmp_path, service):
    with serving(gateway, tmp_path, service), channel_to(gateway) as channel:
        yield channel


def calls(channel):
    """All four kinds, by their methods."""
    return (
        channel.unary_unary("/test/Shout"), channel.unary_stream("/test/Count"),
        channel.stream_unary("/test/Add"), channel.stream_stream("/test/Talk"),
    )  # fmt: skip


def check_all_kinds(channel):
    shout, count, add, talk = calls(channel)
    answer, call = shout.with_call(b"hi", metadata=[("x-ask", "a b")], **WAIT)
    assert answer == b"HI" and call.code() is grpc.StatusCode.OK
    assert ("x-given", "a b") in call.initial_metadata()
    assert {("x-sum", "7"), ("x-raw-bin", b"\0\xff")} <= set(call.trailing_metadata())
    assert list(count(b"300", **WAIT)) == [b"%d" % number for number in range(300)]
    assert add((b"%d" % number for number in range(300)), **WAIT) == b"44850"
    assert list(talk((b"a%d" % number for number in range(50)), **WAIT)) == [
        (b"a%d" % number)[::-1] for number in range(50)
    ]
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/test/Refuse")(b"", **WAIT)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.value.details() == "not now"
    with pytest.raises(grpc.RpcError) as unknown:  # trailers alone: no answer before them
        channel.unary_unary("/test/Nothing")(b"", **WAIT)
    assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_all_four_kinds_of_calls_with_metadata_and_errors(channel):
    check_all_kinds(channel)


def test_messages_go_both_ways_in_turns(channel):
    """The answer to each message comes before the next message is sent."""
    may_send = threading.Semaphore(1)

    def messages():
        for number in range(20):
            assert may_send.acquire(timeout=TIMEOUT)
            yield b"%d" % number

    came = []
    for answer in calls(channel)[3](messages(), **WAIT):
        came.append(int(answer[::-1]))
        may_send.release()
    assert came == list(range(20))


def test_message_of_many_windows_passes_both_ways(channel):
    message = os.urandom(3 * 1024 * 1024).lower()
    assert calls(channel)[0](message, **WAIT) == message.upper()


@pytest.mark.slow
@pytest.mark.long
def test_message_of_64_mib_passes_both_ways(channel):
    message = bytes(64 * 1024 * 1024)
    assert calls(channel)[0](message, timeout=10 * TIMEOUT) == message


def test_deadline_and_cancellation_reach_the_server(channel, service):
    wait = channel.unary_unary("/test/Wait")
    with pytest.raises(grpc.RpcError) as late:
        wait(b"", timeout=0.3)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert service.methods.cancelled.wait(TIMEOUT)
    service.methods.cancelled.clear()
    service.methods.called.clear()
    call = wait.future(b"")
    assert service.methods.called.wait(TIMEOUT)
    call.cancel()
    assert service.methods.cancelled.wait(TIMEOUT)


def test_server_that_stops_is_an_error_at_its_clients(gateway, tmp_path):
    with Service() as service, serving(gateway, tmp_path, service):
        with channel_to(gateway) as channel:
            call = channel.unary_unary("/test/Wait").future(b"")
            assert service.methods.called.wait(TIMEOUT)
            service.__exit__()
            with pytest.raises(grpc.RpcError):
                call.result(TIMEOUT)
            with pytest.raises(grpc.RpcError) as down:
                calls(channel)[0](b"", **WAIT)
            assert down.value.code() is grpc.StatusCode.UNAVAILABLE


def test_keep_alive_pings_of_a_client_disturb_no_call(gateway, tmp_path, service):
    pings = [("grpc.keepalive_time_ms", 200), ("grpc.keepalive_permit_without_calls", 1),
             ("grpc.http2.max_pings_without_data", 0)]  # fmt: skip
    with serving(gateway, tmp_path, service), channel_to(gateway, *pings) as channel:
        call = channel.unary_unary("/test/Wait").future(b"")
        assert service.methods.called.wait(TIMEOUT)
        assert not service.methods.cancelled.wait(0.7)  # three pings
        service.methods.cancelled.set()
        assert call.result(TIMEOUT) == b""


def test_many_calls_at_once_are_not_mixed_up(channel):
    shout, _, _, talk = calls(channel)
    asked = [b"call %d" % number for number in range(100)]
    answers = [shout.future(message, **WAIT) for message in asked]
    talks = [talk(iter([message] * 3), **WAIT) for message in asked[:20]]
    assert [answer.result() for answer in answers] == [message.upper() for message in asked]
    assert [list(each) for each in talks] == [[message[::-1]] * 3 for message in asked[:20]]


def test_visitor_with_http1_uses_the_same_hostname(gateway, channel):
    """As a client of REST or gRPC-web would; the server's answer is what it is."""
    body = b"\0" + struct.pack("!L", 2) + b"hi"
    fields = ("Content-Type: application/grpc", "TE: trailers")
    with gateway.dial(APP) as wire:
        wire.send(request("POST", "/test/Shout", *fields, body=body))
        assert wire.read_head().startswith(b"HTTP/1.1 200 ")
        assert b"HI" in wire.read_until(b"\r\n0\r\n")
        assert b"grpc-status: 0\r\n" in wire.read_until(b"\r\n\r\n")
    assert calls(channel)[0](b"yes", **WAIT) == b"YES"


def test_agent_in_go_carries_it_as_well(cache, gopeer, service):
    with gateway_here(cache, H2C_HOSTS=APP) as gateway:
        with go_agent(gopeer, gateway, http={APP: service.port}):
            with channel_to(gateway) as channel:
                check_all_kinds(channel)
            wait_until(lambda: not gateway.inner.tunnels.registered()[0].usage().visits)
