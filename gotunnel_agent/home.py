"""Where the agent's files are if no option names them, and the account that `join` has made.

    config_file()      $GOTUNNEL_CONFIG, else agent.yaml in the user's folder for configurations
    state_folder()     where the agent may keep what it can do without
    state_folders()    where agents of this machine may have done so
    chosen_config()    the file that an agent reads
    account()          the gateway and the credential, without tunnels
    terminal()         what the variables of a terminal say

The folders are those of the XDG Base Directory Specification, and of Windows there. $GOTUNNEL_JOIN
may hold a join string (common/join_string.py) in the place of a file, as containers like it. No
other module of the agent reads the environment.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .common import atomic_file, join_string, small_file
from .common.join_string import JoinString, JoinStringError
from .config import MAX_FILE, Config, ConfigError, load, of_document
from .pin import CannotPin, fetch_ca, is_pinned

FOLDER = "gotunnel"
NAME = "agent.yaml"
WORKING = "config.yaml"  # the configuration in the working folder
# Variables of ours.
CONFIG = "GOTUNNEL_CONFIG"
JOIN = "GOTUNNEL_JOIN"
STATE = "XDG_STATE_HOME"  # the folder for states
# What it is for a service of systemd with an inspector, by its unit (service.py).
SERVICE_STATE = "/var/lib/gotunnel-agent"

NEXT = (
    "run gotunnel join STRING once; gotunnel-server agents add prints STRING, on the gateway's "
    "machine"
)


class CannotAsk(ConfigError):
    """A join string names a CA, and its gateway cannot be asked for that now."""


def config_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where `join` writes the agent's configuration. It need not exist."""
    if named := environ.get(CONFIG):
        return Path(named).absolute()
    return _folder("XDG_CONFIG_HOME", ".config", "APPDATA", environ) / NAME


def state_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder for what may be lost, such as the random name of a tunnel. It need not exist."""
    return _folder(STATE, ".local/state", "LOCALAPPDATA", environ)


def state_folders() -> list[Path]:
    """Where agents of this machine may have written what others look for: this user's, and a
    service, whose folder root alone can read."""
    return list(dict.fromkeys([state_folder(), Path(SERVICE_STATE) / FOLDER]))


def chosen_config(option: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The configuration that an agent reads: what -c names, else $GOTUNNEL_CONFIG, else config.yaml
    in the working folder if there is one, else config_file() if there is one, else config.yaml."""
    if option is not None:
        return option
    joined = config_file(environ)
    if environ.get(CONFIG) or not os.path.lexists(WORKING) and _may_exist(joined):
        return str(joined)
    return WORKING


def _may_exist(file: Path) -> bool:
    """Whether there is such a file, or a folder on the way to it may not be searched: under `su`
    HOME may still be root's. Reading the file then says why it cannot be read."""
    try:
        os.lstat(file)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def join_string_of_environment(environ: Mapping[str, str] = os.environ) -> JoinString | None:
    """The join string in $GOTUNNEL_JOIN; None if there is none. Raises ConfigError."""
    text = environ.get(JOIN, "")
    return _parsed(text, JOIN) if text.strip() else None


def account(
    path: str | None = None, environ: Mapping[str, str] = os.environ, *, join: str | None = None
) -> Config:
    """The gateway and the credential of this user, without tunnels: of the file ``path`` or the
    join string ``join`` if there is one, else of $GOTUNNEL_JOIN, else of config_file(). Raises
    ConfigError, which says to run `join` if there is none."""
    if join is not None:
        return _joined(_parsed(join, "join"), "join", environ)
    if path is None and (joined := join_string_of_environment(environ)):
        return _joined(joined, JOIN, environ)
    file = config_file(environ) if path is None else Path(path)
    if path is None and not _may_exist(file):
        raise ConfigError(f"this machine has joined no gateway (there is no {file}): {NEXT}")
    return load(file, needs_tunnels=False)._replace(tunnels=())


def _parsed(text: str, where: str) -> JoinString:
    """The join string that stands ``where`` an error then points to. Raises ConfigError."""
    try:
        return join_string.parse(text)
    except JoinStringError as error:
        raise ConfigError(f"{where}: {error}") from None


def _joined(joined: JoinString, where: str, environ: Mapping[str, str]) -> Config:
    document = document_of(joined, ca_file=_pinned(joined, where, environ))
    return of_document(document, needs_tunnels=False)


def document_of(joined: JoinString, *, ca_file: str | None) -> dict[str, object]:
    """The keys of an agent's configuration that a join string stands for."""
    document: dict[str, object] = {"tunnel_addr": joined.address}
    if ca_file is not None:
        document["ca_file"] = ca_file
    if joined.token:
        return document | {"token": joined.token}
    return document | {"jwt_issuer": joined.name, "jwt_secret": joined.secret}


def _pinned(joined: JoinString, where: str, environ: Mapping[str, str]) -> str | None:
    """The file with the CA that the join string names; None if it names none. The gateway is asked
    for it once. Raises ConfigError."""
    if not joined.fingerprint:
        return None
    file = state_folder(environ) / f"ca-{joined.fingerprint}.crt"
    with contextlib.suppress(OSError):
        if is_pinned(small_file.read(file, MAX_FILE), joined.fingerprint):
            return str(file)
    try:
        pem = fetch_ca(joined.host, joined.port, joined.fingerprint)
    except CannotPin as error:
        raise ConfigError(f"{where}: {error}") from None
    except OSError as error:
        raise CannotAsk(
            f"{where}: {joined.address} cannot be asked for its CA ({error.strerror or error})"
        ) from None
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.{os.getpid()}.new")
        atomic_file.write(file, pem, new=new, mode=0o644)
    except OSError as error:
        raise ConfigError(
            f"{where}: {file}: {error.strerror}, expected a folder for the gateway's CA: set "
            "XDG_STATE_HOME to one that can be written"
        ) from None
    return str(file)


class Terminal(NamedTuple):
    """``kind`` is "" if it is not known, and "dumb" if it knows no escape sequences."""

    kind: str
    colours: bool  # unless the user wants none (no-color.org)


def terminal(environ: Mapping[str, str] = os.environ) -> Terminal:
    return Terminal(environ.get("TERM", ""), not environ.get("NO_COLOR"))


def _folder(variable: str, below_home: str, on_windows: str, environ: Mapping[str, str]) -> Path:
    """A folder of the user's. A relative path in the variable does not count, by the XDG
    specification."""
    for name in (variable, on_windows) if os.name == "nt" else (variable,):
        if os.path.isabs(named := environ.get(name, "")):
            return Path(named) / FOLDER
    return Path(user_folder()) / below_home / FOLDER


def user_folder() -> str:
    """The user's home. Without one the root, and never a folder called ~ in the working one."""
    try:
        home = os.path.expanduser("~")
    except ImportError:  # Python 3.10 on a system without the module pwd
        home = ""
    return home if os.path.isabs(home) else os.path.abspath(os.sep)
