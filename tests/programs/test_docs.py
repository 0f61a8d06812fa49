"""The commands in the documentation, run as they stand.

Each page is a story: its fences marked ``sh`` are run from the first to the last, in a copy of the
repository. A comment before a fence says what else there is to know:

    <!-- not run: REASON -->      it needs what is not here: a second machine, root, a server
    <!-- runs online -->          it needs the internet (a package index); done once for all pages
    <!-- runs on: PATTERN -->     it goes on; the story does so when a line of its output fits
    <!-- runs on: port NUMBER --> ... or when that port can be connected to
    <!-- prints: PATTERN -->      a line of its output fits, of standard error too
    <!-- writes: FILE -->         the fence, of any language, is the content of that file

Without a comment a command must end with status 0, and so must those that are marked ``prints``.

A story has a network of its own (a network namespace), in which every hostname of example.com is
this machine. So the ports are those that the page names, and no other program has them.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import pytest
from support import ROOT, TIMEOUT, Program, need

from gotunnel_server.certs.local_ca import Authority

PAGES = ("README.md", "docs/gateway.md", "docs/agent.md", "docs/visits.md")
MARK = re.compile(r"<!-- (not run|runs online|runs on|prints|writes|settings)(?:: (.+))? -->")
FENCE = re.compile(r"(?ms)^(?:(<!--[^\n]*-->)\n)?```([a-z]*)\n(.*?)^```$")
LANGUAGES = {"sh", "yaml", "nginx", "text", "html"}
UNTIL_OPEN = "until (exec 3<>/dev/tcp/127.0.0.1/{}) 2>/dev/null; do sleep 0.05; done"

INSTALL_TIMEOUT = 240  # seconds: packages from the network
NAMES = ("gateway", "tunnel", "app", "db", "ssh")  # of example.com, that pages use
# The gateway's secret where the page of agents has its example.
SECRET = "the secret that the gateway's operator has given you"

# What a copy does not need, or must not have.
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", "*.egg-info", "build", ".*_cache", ".env", "/agent.yaml"
)


class Command(NamedTuple):
    """A fence. ``mark`` is the word of its comment, "" without one; ``text`` what follows it."""

    mark: str
    argument: str
    language: str
    text: str


def commands_of(page) -> list:
    found = []
    for comment, language, text in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        mark = MARK.fullmatch(comment) if comment else None
        assert mark or not comment, f"{page}: {comment} is no mark"
        word, argument = mark.groups(default="") if mark else ("", "")
        found.append(Command(word, argument, language, text))
    return found


# What can be said without running anything ------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_has_a_known_language_and_mark(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(re.findall(r"(?m)^ *```", text)) == 2 * len(commands_of(page))
    for command in commands_of(page):
        assert command.language in LANGUAGES, command
        assert bool(command.argument) == (command.mark not in ("", "runs online")), command
        assert command.language == "sh" or command.mark in ("", "writes"), command


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_commands_that_are_run(page):
    run = [c for c in commands_of(page) if c.language == "sh" and c.mark != "not run"]
    assert len(run) >= 2


# The world of a story ---------------------------------------------------------------------------


class Terminal(Program):
    """A command that goes on. Signals reach all of its processes, as Ctrl-C does."""

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def end(self):
        self.signal(signal.SIGTERM)
        self._reader.join(TIMEOUT)  # until the last of them has closed its output
        self.signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join(TIMEOUT)
        self._process.stdout.close()


class Story:
    """A copy of the repository, in a network of its own, where commands are run."""

    def __init__(self, folder, enter, environment, open_ones):
        self.folder = folder
        self.terminals = []  # what goes on
        self._enter = enter  # the words that bring a command there
        self.environment = environment
        self._open_ones = open_ones

    def tell(self, page):
        """Run the commands of a page."""
        for command in commands_of(page):
            if command.mark == "writes":
                (self.folder / command.argument).write_text(command.text, encoding="utf-8")
            elif command.language == "sh" and command.mark not in ("not run", "runs online"):
                self.run(command)

    def run(self, command):
        text = self._with_secret(command.text)
        shell = (*self._enter, "bash", "-euo", "pipefail", "-c", text)
        if command.mark == "runs on":
            terminal = Terminal(("setsid", *shell), self.folder, self.environment)
            self._open_ones.callback(terminal.end)
            self.terminals.append(terminal)
            if command.argument.startswith("port "):
                self.run(command._replace(mark="", text=UNTIL_OPEN.format(command.argument[5:])))
            else:
                terminal.wait_for(command.argument)
            return
        done = subprocess.run(
            shell, cwd=self.folder, env=self.environment, timeout=TIMEOUT, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{command.text}\n{done.stdout}"
        if command.mark == "prints":
            assert re.search(command.argument, done.stdout, re.M), f"{command.text}\n{done.stdout}"

    def _with_secret(self, text):
        """The text with the secret of the only agent, where the page says SECRET."""
        if "SECRET@" not in text:
            return text
        (secret,) = re.findall('secret: "(.+)"', (self.folder / "agents.yaml").read_text())
        return text.replace("SECRET@", f"{secret}@")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The programs of a virtual environment that README's words for an installation have made."""
    folder = tmp_path_factory.mktemp("installed") / "gotunnel"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    (install,) = (c for c in commands_of("README.md") if c.mark == "runs online")
    # The python3 of the words is the one that runs the tests.
    (folder.parent / "bin").mkdir()
    (folder.parent / "bin" / "python3").symlink_to(sys.executable)
    path = f"{folder.parent / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ("bash", "-euo", "pipefail", "-c", install.text), cwd=folder, text=True,
        env=os.environ | {"PATH": path}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=INSTALL_TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return folder / ".venv" / "bin"


@contextlib.contextmanager
def own_network(folder, hostnames):
    """A network without any other program, in which hostnames are this machine. Yields the words
    that bring a command there."""
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {' '.join(hostnames)}\n::1 localhost\n")
    inside = f"mount --bind {hosts} /etc/hosts && ip link set lo up && echo up && exec sleep 1000"
    for program in ("unshare", "nsenter", "ip", "mount"):
        need(program)
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    command = ("unshare", *user, "--net", "--mount", "sh", "-c", inside)
    keeper = Program(command, folder, {})
    try:
        try:
            keeper.wait_for("^up$")
        except AssertionError:
            if "GOTUNNEL_CI" in os.environ:
                raise
            pytest.skip(f"no network namespace can be made here: {' '.join(keeper.lines)}")
        into = ("--user", "--preserve-credentials") if user else ()
        yield ("nsenter", f"--target={keeper._process.pid}", *into, "--net", "--mount", "--wd=.")
    finally:
        keeper.end()


@pytest.fixture
def story(installed, tmp_path):
    folder = tmp_path / "gotunnel"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    (tmp_path / "home").mkdir()
    environment = {
        "PATH": f"{installed}:{os.environ['PATH']}:/usr/sbin",
        "HOME": str(tmp_path / "home"),
    }
    with contextlib.ExitStack() as open_ones:
        names = [f"{name}.example.com" for name in NAMES]
        enter = open_ones.enter_context(own_network(tmp_path, names))
        yield Story(folder, enter, environment, open_ones)


def with_certificates(story):
    """The certificates that a gateway would have from a CA that everybody trusts."""
    folder = story.folder.parent / "certificates"
    authority = Authority(folder.parent / "authority")
    folder.mkdir()
    for name in ("example.com", "gateway.example.com"):
        certificate, key = authority.issue(f"*.{name}")
        shutil.copy(certificate, folder / f"{name}.crt")
        shutil.copy(key, folder / f"{name}.key")
    story.environment |= {
        "CERT_DIR": str(folder),
        "SSL_CERT_FILE": str(authority.ca_file),
        "CURL_CA_BUNDLE": str(authority.ca_file),
    }


def start_gateway(story):
    """A gateway that has one secret for all its agents."""
    settings = {
        "GATEWAY_HOST": "gateway.example.com",
        "TUNNEL_HOST": "tunnel.example.com",
        "JWT_SECRET": SECRET,
    }
    before = story.environment
    story.environment = before | settings
    story.run(Command("runs on", "is ready", "sh", "gotunnel-server"))
    story.environment = before


# The stories ------------------------------------------------------------------------------------


def is_a_story(test):
    """The first one of a run installs the programs."""
    return pytest.mark.slow(pytest.mark.timeout(INSTALL_TIMEOUT + 60)(test))


@is_a_story
def test_readme_leads_a_newcomer_to_a_first_visit(story):
    with_certificates(story)
    story.tell("README.md")
    told = "\n".join(story.terminals[-1].lines)
    (url,) = re.findall(r"(?m)^https://\S+\.gateway\.example\.com$", told)
    visit = f"curl -fsS --connect-to ::127.0.0.1 {url}/"
    story.run(Command("prints", "hello from a private machine", "sh", visit))


@is_a_story
def test_the_page_for_gateways(story):
    story.tell("docs/gateway.md")


@is_a_story
def test_the_page_for_agents(story):
    with_certificates(story)
    start_gateway(story)
    story.tell("docs/agent.md")


@is_a_story
def test_the_page_about_visits(story):
    with_certificates(story)
    start_gateway(story)
    agent = (
        'tunnel_addr: "tunnel.example.com:9443"\n'
        f'jwt_secret: "{SECRET}"\n'
        'tunnels: [{hostname: "app.example.com", target: "127.0.0.1:8000"}]\n'
    )
    (story.folder / "agent.yaml").write_text(agent)
    story.run(Command("runs on", ": serving ", "sh", "gotunnel-agent -c agent.yaml"))
    story.tell("docs/visits.md")


def test_a_command_that_fails_fails_its_story(tmp_path):
    with contextlib.ExitStack() as open_ones:
        story = Story(tmp_path, (), {"PATH": os.environ["PATH"]}, open_ones)
        story.run(Command("prints", "^b$", "sh", "echo a\necho b\n"))
        with pytest.raises(AssertionError):
            story.run(Command("", "", "sh", "false\necho b\n"))
        with pytest.raises(AssertionError):
            story.run(Command("prints", "^c$", "sh", "echo b\n"))
