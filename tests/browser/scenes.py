"""Pages with something in them, for pictures: see photographer.py.

A scene is a function with a name; it gets a Stage, and returns the tab that is to be photographed.
"""

import contextlib
import http.client
import json
import os
import random
import socket
import tempfile
from pathlib import Path
from unittest import mock

from inspector_samples import samples
from support import TIMEOUT, Origin, agent_here, answer, gateway_here

from gotunnel_agent.config import Inspect
from gotunnel_agent.inspector import start_inspector

PASSWORD = "only for pictures"
# Hostnames as people have them, with one that is as long as it may be.
SHOPS = [
    "shop.localhost", "api.shop.localhost", "www.example.localhost", "grafana.localhost",
    "app1.localhost", "app2.localhost", "app10.localhost", "webhooks.ci.localhost",
    "a-hostname-of-a-branch-that-is-longer-than-people-would-type.preview.localhost",
]  # fmt: skip
DESK = ["dev.localhost", "storybook.localhost"]
PATHS = [
    "/", "/orders?page=2", "/static/app.7f3a9c.js", "/api/v1/orders/4711", "/login",
    "/fail/checkout",
    "/search?q=" + "a+very+long+query+" * 12, "/missing", "/webhook/github",
]  # fmt: skip
JSON = "Content-Type: application/json"


def serve(wire):
    """A target of many kinds of answers."""
    while True:
        head = wire.read_head()
        length = next(
            (
                int(line[15:])
                for line in head.lower().split(b"\r\n")
                if line[:15] == b"content-length:"
            ),
            0,
        )
        wire.read_exactly(length)
        path = head.split(b" ")[1]
        if path.startswith(b"/fail"):
            body = json.dumps({"error": "no stock", "order": 4711, "retry": True}).encode()
            wire.send(answer(body, JSON, status="500 Internal Server Error"))
        elif path.startswith(b"/missing"):
            wire.send(answer(b"nothing here", "Content-Type: text/plain", status="404 Not Found"))
        elif path.startswith(b"/api"):
            orders = [{"id": number, "items": number % 5, "paid": True} for number in range(40)]
            body = json.dumps({"orders": orders, "next": None}).encode()
            wire.send(answer(body, JSON, "Set-Cookie: session=0123456789abcdef; HttpOnly"))
        else:
            wire.send(answer(b"<!doctype html><h1>Orders</h1>", "Content-Type: text/html"))


class Stage:
    """A gateway, two agents, their visitors, and a browser; each is made when a scene first needs
    it, and all end with the ``with``."""

    def __init__(self, browser):
        self.browser = browser
        self._stack = contextlib.ExitStack()
        self._gateways = {}
        self._inspectors = {}

    def __enter__(self):
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.origin = self._stack.enter_context(Origin())
        self.origin.serve(serve)
        return self

    def __exit__(self, *exc_info):
        self._stack.close()

    def gateway(self, agents=True, **settings):
        """A gateway with these settings. With agents, it has seen visits, too."""
        key = (agents, *sorted(settings.items()))
        if key not in self._gateways:
            cache = self.folder / f"cache{len(self._gateways)}"
            cache.mkdir()
            gateway = self._gateways[key] = self._stack.enter_context(
                gateway_here(cache, **settings)
            )
            if agents:
                self._start_agents(gateway)
                self.visits(gateway)
        return self._gateways[key]

    def _start_agents(self, gateway):
        for name, hostnames in (("shop-server-1", SHOPS), ("anna's laptop", DESK)):
            folder = self.folder / f"agent{len(list(self.folder.iterdir()))}"
            folder.mkdir()
            ports = dict.fromkeys(hostnames, self.origin.port)
            tcp = {"ssh.localhost": self.origin.port} if hostnames is SHOPS else {}
            self._stack.enter_context(
                agent_here(gateway, folder, http=ports, tcp=tcp, jwt_issuer=name)
            )

    def inspector(self, filled=True):
        """The URL of an agent's inspector, with records of all kinds unless it is to be empty."""
        name = "inspected" if filled else "empty"
        folder = self.folder / name
        if folder not in self._inspectors:
            folder.mkdir()
            gateway = self.gateway(agents=False)
            enter = self._stack.enter_context
            agent = enter(agent_here(gateway, folder, http={f"{name}.localhost": self.origin.port}))
            enter(mock.patch.dict(os.environ, {"XDG_STATE_HOME": str(folder)}))
            inspector = start_inspector(agent, Inspect(port=0))
            self._stack.callback(inspector.close)
            self._inspectors[folder] = inspector.url
            if filled:
                for record in samples():
                    inspector._ring.add(record)
                for number in range(40):
                    visit(gateway, "inspected.localhost", PATHS[number % len(PATHS)])
                visit(
                    gateway, "inspected.localhost", "/api/v1/orders?token=0123456789abcdef",
                    method="POST", body=json.dumps({"id": 7, "password": "secret", "tags": ["a"]}),
                    Content_Type="application/json", Authorization="Bearer 0123456789abcdef",
                )  # fmt: skip
        return self._inspectors[folder]

    def visits(self, gateway, count=120):
        chance = random.Random(1)
        for _ in range(count):
            hostname = chance.choice(SHOPS[:6] + DESK)
            visit(gateway, hostname, chance.choice(PATHS), f"127.0.0.{chance.randrange(1, 9)}")


def visit(gateway, hostname, path, source="127.0.0.1", method="GET", body=None, **fields):
    raw = socket.create_connection(("127.0.0.1", gateway.public_port), TIMEOUT, (source, 0))
    connection = http.client.HTTPConnection(hostname)
    with contextlib.closing(raw), contextlib.closing(connection):
        connection.sock = gateway.context.wrap_socket(raw, server_hostname=hostname)
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in fields.items()})
        connection.getresponse().read()


# The dashboard ----------------------------------------------------------------------------------


def url_of(gateway):
    return f"http://localhost:{gateway.dashboard_port}/"


def log_in(page, gateway, password=PASSWORD):
    page.open(url_of(gateway))
    page.type("input[type=password]", password, enter=True)
    return page


def dashboard_login(stage):
    return stage.browser.page(url_of(stage.gateway(DASHBOARD_PASSWORD=PASSWORD)))


def dashboard_wrong_password(stage):
    stage.browser.expect("status of 401")
    page = log_in(stage.browser.page(), stage.gateway(DASHBOARD_PASSWORD=PASSWORD), "a guess")
    page.until_it_says("wrong")
    return page


def dashboard_full(stage):
    page = log_in(stage.browser.page(), stage.gateway(DASHBOARD_PASSWORD=PASSWORD))
    page.until_it_says("Live", SHOPS[0], "/orders")
    return page


def dashboard_block(stage):
    page = dashboard_full(stage)
    page.click("#block")
    page.type("#block-address", "192.0.2.7")
    return page


def dashboard_public(stage):
    page = stage.browser.page(url_of(stage.gateway()))
    page.until_it_says("Live", SHOPS[0])
    return page


def dashboard_empty(stage):
    page = log_in(stage.browser.page(), stage.gateway(agents=False, DASHBOARD_PASSWORD=PASSWORD))
    page.until_it_says("Live")
    return page


def dashboard_without_javascript(stage):
    page = stage.browser.page().without_javascript()
    log_in(page, stage.gateway(DASHBOARD_PASSWORD=PASSWORD)).until_it_says(SHOPS[0])
    return page


# The inspector ----------------------------------------------------------------------------------


def inspector_list(stage):
    page = stage.browser.page(stage.inspector())
    page.until_it_says("Live", "/api/v1/orders")
    return page


def chosen(stage, text, tab):
    page = inspector_list(stage)
    page.click("#list .row", text)
    page.click("#tabs button", tab)
    return page


def inspector_overview(stage):
    return chosen(stage, "token=", "Overview")


def inspector_request(stage):
    return chosen(stage, "token=", "Request")


def inspector_response(stage):
    return chosen(stage, "token=", "Response")


def inspector_messages(stage):
    page = inspector_list(stage)
    page.type("#search", "is:websocket")
    page.click("#list .row", "/ws")
    page.click("#tabs button", "Messages")
    return page


def inspector_edit(stage):
    page = chosen(stage, "token=", "Replay")
    page.type("#replay-path", "/fail/edited")
    return page


def inspector_replayed(stage):
    page = inspector_edit(stage)
    page.click("#replay-send")
    page.until_it_says("The responses differ in:")
    return page


def inspector_many(stage):
    page = chosen(stage, "token=", "Replay")
    page.type("#replay-times", "30")
    page.click("#replay-send")
    page.until_it_says("30 ×")
    return page


def inspector_failed(stage):
    page = inspector_list(stage)
    page.type("#search", "status:5xx")
    page.click("#list .row", "/fail/checkout")
    return page


def inspector_empty(stage):
    page = stage.browser.page(stage.inspector(filled=False))
    page.until_it_says("Live")
    return page


def inspector_help(stage):
    page = inspector_list(stage)
    page.click("#help")
    return page


def inspector_without_the_token(stage):
    stage.browser.expect("status of 401")
    return stage.browser.page(stage.inspector().partition("?")[0])


SCENES = [
    dashboard_login, dashboard_wrong_password, dashboard_full, dashboard_block, dashboard_public,
    dashboard_empty, dashboard_without_javascript, inspector_list, inspector_overview,
    inspector_request, inspector_response, inspector_messages, inspector_edit, inspector_replayed,
    inspector_many, inspector_failed, inspector_empty, inspector_help, inspector_without_the_token,
]  # fmt: skip
