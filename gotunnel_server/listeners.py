"""The ports of a gateway: each has a Listener, which is opened here."""

from .net.listener import Listener, PortError, bind


class Listeners:
    """Those that start and stop with the gateway; open() also makes others."""

    def __init__(self, addresses, workers):
        """``addresses``: IP addresses to bind, none for all. ``workers``: FairWorkers,
        which take the connections' steps."""
        self._addresses = addresses
        self._workers = workers
        self._all = []

    def add(self, setting, port, connections, places, first_timeout, addresses=None) -> int:
        """Open a port, and return its number. Arguments as for open(). Raises PortError."""
        listener = self.open(setting, port, connections, places, first_timeout, addresses)
        self._all.append(listener)
        return listener.port

    def open(self, setting, port, connections, places, first_timeout, addresses=None) -> Listener:
        """Open ``port``, 0 for any free one, for ``connections``: what welcomes them, and gets the
        ``listener``. ``places``: the shares.Places of its connections; ``first_timeout`` is in
        seconds; ``addresses`` are other ones than those of all ports. Raises PortError, which
        names ``setting``."""
        sockets = bind(setting, self._addresses if addresses is None else addresses, port)
        name = setting.removesuffix("_PORT").lower() if setting.endswith("_PORT") else str(port)
        try:
            listener = Listener(
                name, sockets, connections.welcome, self._workers, places, first_timeout
            )
        except OSError as error:  # no descriptor is left
            for sock in sockets:
                sock.close()
            raise PortError(f"{setting} {port}: {error.strerror}") from None
        connections.listener = listener
        return listener

    def start(self):
        for listener in self._all:
            listener.start()

    def stop(self):
        """Accept nothing more."""
        for listener in self._all:
            listener.stop()
