"""The gateway as a whole: what it keeps, and which of its threads wait for each other."""

import gc
import os
import queue
import threading
import weakref

from support import TIMEOUT, gateway_environment, gateway_here

from gotunnel_server.config import load
from gotunnel_server.gateway import Gateway


def test_no_part_keeps_the_configuration(cache):
    """It holds secrets, and a part that has all of it may read any of it."""
    config = load(os.devnull, gateway_environment(cache, DRAIN_TIMEOUT="0", HTTP_PORT="auto"))
    gateway, kept = Gateway(config), weakref.ref(config)
    gateway.start()
    try:
        del config
        gc.collect()
        assert kept() is None
    finally:
        gateway.stop()


def test_credentials_are_looked_at_while_the_folder_of_certificates_hangs(cache, monkeypatch):
    hangs, go_on, looks = threading.Event(), threading.Event(), queue.Queue()

    def hang():
        hangs.set()
        go_on.wait(TIMEOUT)

    with gateway_here(cache) as gateway:
        monkeypatch.setattr(gateway.inner._certificates, "reload", hang)
        monkeypatch.setattr(gateway.inner._credentials, "reload", lambda force: looks.put(force))
        gateway.inner.reload()
        assert hangs.wait(TIMEOUT)
        while not looks.empty():
            looks.get()
        gateway.inner.reload()
        while not looks.get(timeout=TIMEOUT / 2):
            pass
        go_on.set()
