"""An agent that says what a test tells it to say."""

import contextlib
import socket
import threading

from support import SECRET, TIMEOUT, TUNNEL_HOST, tls_context

from gotunnel import MessageReader, Ping, Pong, Register, Session, SessionClosed, encode_message
from gotunnel_agent.common.duplex import Duplex
from gotunnel_agent.registering import make_token

HOUR = 3600  # seconds


class HandMade:
    """An agent that says what it is told to. ``with`` closes it."""

    def __init__(
        self, gateway, first=b"", *, sni=TUNNEL_HOST, introduction=(), address="127.0.0.1"
    ):
        """``introduction``: pieces of a PROXY header. ``address`` of this machine: the agent's."""
        sock = socket.create_connection(("127.0.0.1", gateway.tunnel_port), TIMEOUT, (address, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in introduction:
            sock.sendall(piece)
        duplex = Duplex(sock)
        context = tls_context(gateway.ca_file)
        context.check_hostname = sni is not None
        duplex.start_tls(context, server_side=False, server_hostname=sni)
        try:
            duplex.handshake_within(TIMEOUT)
        except BaseException:
            duplex.close()
            raise
        self.session = Session(duplex, client=True, name="hand-made")
        self.session.start()
        self.control = self.session.open(first)
        self._messages = self._read()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.session.close()
        self.session.join()

    def _read(self):
        reader = MessageReader()
        while data := self.control.read(timeout=TIMEOUT):
            yield from reader.feed(data)

    def hear(self):
        """The gateway's next message, None at its end."""
        return next(self._messages, None)

    def say(self, message):
        self.control.write(encode_message(message))


def registration(*hostnames, token=None, modes=(), **more):
    """A register message, signed unless there is a ``token``; ``more`` are fields of Register."""
    token = make_token(SECRET, "test", HOUR) if token is None else token
    routes = {hostname: "127.0.0.1:1" for hostname in hostnames}
    return encode_message(Register(token, routes, dict(modes), **more))


def reply_to(gateway, message, **how):
    """What the gateway says to a first message; nothing else may be left of that agent then."""
    with HandMade(gateway, message, **how) as agent:
        return agent.hear()


@contextlib.contextmanager
def registered(gateway, *hostnames, **more):
    """An agent that is; it answers no pings."""
    with HandMade(gateway, registration(*hostnames, **more)) as agent:
        assert agent.hear().ok
        yield agent


@contextlib.contextmanager
def answering(agent):
    """Meanwhile, an agent answers pings; its session is over afterwards."""

    def answer():
        with contextlib.suppress(SessionClosed):
            while isinstance(agent.hear(), Ping):
                agent.say(Pong(1))

    thread = threading.Thread(target=answer)
    thread.start()
    yield
    agent.session.close()
    thread.join()
