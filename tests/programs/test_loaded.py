"""What a running gateway and a running agent have not loaded, because nothing of it is used while
they run: with plain settings, after their first answer. A module here would take its memory for as
long as the program runs, see docs/performance.md, "Where the memory goes"."""

import signal
import sys

from support import (
    APP,
    GATEWAY_HOST,
    ROOT,
    SECRET,
    Gateway,
    agent_process,
    answer,
    ca_of,
    gateway_environment,
    running,
)

from gotunnel_agent.registering import make_token

# Ends as the program does, and says which modules it has loaded beside those of a bare Python.
SCRIPT = """
import sys
bare = set(sys.modules)
sys.path.insert(0, {root!r})
from {package}.__main__ import main
status = main()
print("loaded:", *set(sys.modules) - bare, file=sys.stderr)
sys.exit(status)
"""

# Each takes 0.2 MB or more, some with what they load.
EITHER = {
    "argparse", "asyncio", "concurrent.futures.process", "ctypes.util", "encodings.idna", "getpass",
    "gotunnel_agent.arguments", "gotunnel_agent.cli", "gotunnel_agent.common.arguments",
    "gotunnel_agent.common.examples", "gotunnel_agent.common.service",
    "gotunnel_agent.common.show_status", "gotunnel_agent.common.systemd_unit",
    "gotunnel_agent.forward", "gotunnel_agent.join", "multiprocessing", "pkgutil", "pydoc",
    "statistics", "unittest",
}  # fmt: skip
GATEWAY = EITHER | {
    "acme", "gotunnel_agent.config", "gotunnel_agent.run", "gotunnel_server.admin",
    "gotunnel_server.certs.acme", "gotunnel_server.cli", "gotunnel_server.cluster.engine",
    "gotunnel_server.dashboard.build", "gotunnel_server.dashboard.page",
    "gotunnel_server.no_option", "gotunnel_server.processes", "gotunnel_server.visitors.pooled",
    "h2", "josepy", "redis", "requests", "urllib3",
}  # fmt: skip
# Of one that holds a token. One that signs its tokens has all that PyJWT loads.
AGENT = EITHER | {
    "calendar", "cryptography", "csv", "dataclasses", "difflib", "email",
    "gotunnel_agent.embedded", "gotunnel_agent.health", "gotunnel_agent.home",
    "gotunnel_agent.inspector.recorder", "gotunnel_agent.inspector.start",
    "gotunnel_agent.metrics", "gotunnel_agent.quick", "gotunnel_agent.service",
    "gotunnel_server", "html", "http", "importlib.metadata", "inspect", "jwt", "locale", "lzma",
    "pathlib", "shutil", "socketserver", "subprocess", "tempfile", "urllib", "zipfile",
}  # fmt: skip


def command(package):
    return sys.executable, "-c", SCRIPT.format(root=str(ROOT), package=package)


def loaded(program):
    """The modules that a program has loaded, once it has ended."""
    program.signal(signal.SIGTERM)
    return set(program.wait_for("^loaded: ").string.split()[1:])


def test_a_running_program_has_not_loaded_what_it_does_not_use(cache, tmp_path, origin):
    origin.serve(lambda target: target.read_head() and target.send(answer(b"well")))
    environment = gateway_environment(cache, DASHBOARD_PORT="0")
    with running(*command("gotunnel_server"), cwd=cache, **environment) as program:
        gateway = Gateway(
            int(program.wait_for(rf"visitors: https://{GATEWAY_HOST}:(\d+)/$")[1]),
            int(program.wait_for(r"agents: tunnel_addr \S+:(\d+)$")[1]),
            ca_of(cache),
            lambda *hostnames: [program.wait_for(f" registered .*{name}") for name in hostnames],
            program=program,
        )
        token = make_token(SECRET, "", 3600)
        with agent_process(
            gateway, tmp_path, http={APP: origin.port}, command=command("gotunnel_agent"),
            jwt_secret=None, token=token,
        ) as agent:  # fmt: skip
            assert gateway.get(APP) == (200, b"well")
            of_agent = loaded(agent)
        of_gateway = loaded(program)
    assert {"gotunnel_agent.link", "yaml", "ssl"} <= of_agent
    assert {"gotunnel_server.gateway", "gotunnel_server.visitors.http2_server"} <= of_gateway
    assert of_agent & AGENT == set()
    assert of_gateway & GATEWAY == set()
