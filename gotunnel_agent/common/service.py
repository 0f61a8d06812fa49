"""The command `service` of both programs: writes, removes and shows a systemd unit.

The programs say what their unit needs (Service, Needs); this module finds out what the machine has,
and runs systemctl. It starts and stops nothing but by `uninstall`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import atomic_file
from .systemd_unit import (
    NAME,
    Credential,
    Service,
    is_ours,
    service_unit,
    socket_unit,
    why_not_quotable,
)

try:
    import grp
    import pwd
except ImportError:  # not a Unix
    pwd = None  # type: ignore[assignment]  # mypy knows no module that may be missing

SYSTEM_UNITS = Path("/etc/systemd/system")
RUNS = Path("/run/systemd/system")  # is there where systemd is the init system (sd_booted(3))
HOMES = ("/home/", "/root/", "/run/user/")  # what ProtectHome= hides
TMP = ("/tmp/", "/var/tmp/")  # what PrivateTmp= hides
SYSTEMCTL_TIMEOUT = 120  # seconds; a service that drains may take most of it to stop
READ, WRITE, ENTER = 4, 2, 1  # bits of a mode
MOST_UNIT = 65536  # bytes of a unit that are read, to see whose it is


class ServiceError(Exception):
    """The command cannot be done; the text is one line, or several, for the operator."""


class Needs(NamedTuple):
    """The files that the program's user must be able to use, with what to do if it is not: a
    setting's name, or "the program"."""

    readable: Sequence[tuple[str, str]]  # (what, path)
    writable: Sequence[tuple[str, str]] = ()


class Plan(NamedTuple):
    """What `install` does: the unit, what it needs, and lines for the operator."""

    service: Service
    needs: Needs
    notes: Sequence[str] = ()


class Options(NamedTuple):
    """The options that a program makes its Plan of."""

    name: str
    per_user: bool
    run_as: str | None
    socket: bool


def add_arguments(parser: argparse.ArgumentParser, name: str, *, with_socket: bool) -> None:
    """Add the arguments of `service` to a parser. ``name``: the unit's, by default."""
    parser.add_argument("action", choices=("install", "uninstall", "status"), metavar="ACTION",
                        help="install, uninstall or status")  # fmt: skip
    parser.add_argument(
        "--user", action="store_true", dest="per_user",
        help="a unit of your own, without root (default: the system's)",
    )  # fmt: skip
    parser.add_argument("--name", type=_name, default=name, metavar="NAME",
                        help=f"the unit's name (default: {name})")  # fmt: skip
    parser.add_argument("--run-as", metavar="USER", help="run the program as this user (default: "
                        "a dynamic one, which exists only while the program runs)")  # fmt: skip
    if with_socket:
        parser.add_argument("--socket", action="store_true",
                            help="have systemd listen on the ports (a socket unit)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the unit, and do nothing")


def _name(text: str) -> str:
    text = text.removesuffix(".service")
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} came, expected letters, digits, '-', '_' and '.'"
        )
    return text


def run_service(
    options: argparse.Namespace, program: str, make_plan: Callable[[Options], Plan]
) -> int:
    """Do what the arguments say; returns the exit status. ``make_plan`` may raise ServiceError."""
    if pwd is None:
        raise ServiceError("systemd is of Linux, and this is another system: start the program by "
                           "what starts services here")  # fmt: skip
    if options.run_as is not None and options.per_user:
        raise ServiceError(
            "--user and --run-as came, expected one: a user's unit runs as that user"
        )
    if options.action == "install":
        chosen = Options(options.name, options.per_user, options.run_as,
                         getattr(options, "socket", False))  # fmt: skip
        _check_user(options.run_as)
        plan = make_plan(chosen)
        _check_paths(plan)
        files = _files(plan.service)
        if options.dry_run:
            for path, text in files:
                print(f"# {path}\n{text}")
            return 0
        return _install(plan, files, program)
    if options.dry_run:
        raise ServiceError("--dry-run is for install alone")
    if options.action == "uninstall":
        return _uninstall(options.name, options.per_user, program)
    return _status(options.name, options.per_user, program)


# What the machine has ----------------------------------------------------------------------------


def this_program(argv0: str) -> tuple[str, ...]:
    """The command that starts this program again: its script, or Python and its folder, or Python
    and its archive (gotunnel.pyz). An archive may lack the right to be executed, and its first line
    may lead to another Python."""
    path = os.path.abspath(argv0)
    if path.endswith("__main__.py"):
        path = os.path.dirname(path)
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        return sys.executable, path
    return (path,)


def program_files(command: Sequence[str]) -> list[tuple[str, str]]:
    """What the service's user must be able to read to start the program, for Needs."""
    files = [*command, sys.executable, os.path.realpath(sys.executable)]
    if os.path.isfile(__file__):  # else it is in an archive, which the command names
        files.append(__file__)
    return [("the program", path) for path in dict.fromkeys(files)]


def any_in(folders: tuple[str, ...], paths: Iterable[str]) -> bool:
    """Whether one of ``paths`` lies in one of ``folders``, or leads there."""
    return any(os.path.join(each, "").startswith(folders)
               for path in paths for each in (path, os.path.realpath(path)))  # fmt: skip


def _units(per_user: bool) -> Path:
    if not per_user:
        return SYSTEM_UNITS
    return Path(os.path.expanduser("~/.config/systemd/user"))


def _files(service: Service) -> list[tuple[Path, str]]:
    folder = _units(service.per_user)
    files = [(folder / f"{service.name}.service", service_unit(service))]
    if service.sockets:
        files.append((folder / f"{service.name}.socket", socket_unit(service)))
    return files


def _systemctl(per_user: bool, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Raises ServiceError if there is no systemd."""
    program = shutil.which("systemctl")
    if program is None or not RUNS.is_dir():
        raise ServiceError(
            "systemd does not run on this machine, and other init systems get no unit from here: "
            "start the program by yours; install --dry-run shows what systemd would run"
        )
    command = [program, *(["--user"] if per_user else []), *arguments]
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=SYSTEMCTL_TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ServiceError(f"{' '.join(command)} took more than {SYSTEMCTL_TIMEOUT} s") from None


def _expect(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        why = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise ServiceError(f"{' '.join(map(str, done.args))}: {why}")


def _check_user(name: str | None) -> None:
    if name is None:
        return
    try:
        pwd.getpwnam(name)
    except (KeyError, ValueError):
        raise ServiceError(
            f"--run-as: there is no user {name!r}; make it: useradd --system --user-group NAME"
        ) from None


def _check_paths(plan: Plan) -> None:
    """Raises ServiceError with a line for each path that cannot stand in a unit, or that the
    service's user may not use."""
    service = plan.service
    paths = [("the working folder", service.folder), *plan.needs.readable, *plan.needs.writable]
    paths += [(part.name, part.path) for part in service.command if isinstance(part, Credential)]
    problems = [f"{what}: {path!r} {problem}: move it" for what, path in paths
                if (problem := why_not_quotable(path))]  # fmt: skip
    if not problems and not service.per_user:
        who = _Person(service.run_as)
        advice = (
            "name a user that may with --run-as"
            if service.run_as is None else "give it the right, or move the file"
        )  # fmt: skip
        for needed, wanted in ((plan.needs.readable, READ), (plan.needs.writable, WRITE)):
            for what, path in needed:
                if barrier := who.barrier(path, wanted):
                    verb = "read" if wanted == READ else "write"
                    problems.append(f"{what}: {who} cannot {verb} {path}, because of {barrier}: "
                                    f"{advice}")  # fmt: skip
        if barrier := who.barrier(service.folder, ENTER):
            problems.append(f"the working folder: {who} cannot enter {service.folder}, because of "
                            f"{barrier}: {advice}, or run this in another folder")  # fmt: skip
    if problems:
        raise ServiceError("\n".join(dict.fromkeys(problems)))


class _Person:
    """A user, and the files that it may use by their modes. The name None is a dynamic user, which
    owns no file."""

    def __init__(self, name: str | None):
        self._name = name
        self._uid, self._groups = -1, frozenset[int]()
        if name is not None:
            entry = pwd.getpwnam(name)
            self._uid = entry.pw_uid
            self._groups = frozenset(os.getgrouplist(name, entry.pw_gid))

    def __str__(self) -> str:
        return "a dynamic user" if self._name is None else f"user {self._name}"

    def barrier(self, path: str, wanted: int) -> str | None:
        """The first of a file and the folders above it that does not let the user in; None if there
        is none. A missing file is left to the program."""
        real = Path(os.path.realpath(path))
        for each in (*reversed(real.parents), real):
            try:
                status = os.stat(each)
            except OSError:
                return None
            bits = wanted if each == real else ENTER
            if each == real and stat.S_ISDIR(status.st_mode) and wanted != ENTER:
                bits |= ENTER
            if not self._may(status, bits) and not _has_acl(each):
                return f"{each} (mode {stat.S_IMODE(status.st_mode):04o}, {_owner(status)})"
        return None

    def _may(self, status: os.stat_result, bits: int) -> bool:
        if self._uid == 0:
            return True
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid == self._uid:
            mode >>= 6
        elif status.st_gid in self._groups:
            mode >>= 3
        return mode & bits == bits


def _has_acl(path: Path) -> bool:
    """Whether an access control list may permit more than the mode says."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except (OSError, AttributeError):
        return False


def _owner(status: os.stat_result) -> str:
    try:
        user = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        user = str(status.st_uid)
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    return f"{user}:{group}"


# The three actions -------------------------------------------------------------------------------


def _install(plan: Plan, files: Sequence[tuple[Path, str]], program: str) -> int:
    service = plan.service
    systemctl = "systemctl --user" if service.per_user else "systemctl"
    for path, _ in files:
        _expect_ours(path, program)
    stale = _units(service.per_user) / f"{service.name}.socket"
    if not service.sockets and os.path.lexists(stale):
        _expect_ours(stale, program)
        raise ServiceError(f"{stale} is there, of an install with --socket: uninstall first")
    _systemctl(service.per_user, "--version")  # before anything is written
    try:
        for path, text in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_file.write(
                path, text.encode(), new=path.with_name(f".{path.name}.new"), mode=0o644
            )
            print(f"wrote {path}")
    except OSError as error:
        hint = " (become root, or use --user)" if isinstance(error, PermissionError) else ""
        raise ServiceError(f"{error.filename}: {error.strerror}{hint}") from None
    _expect(_systemctl(service.per_user, "daemon-reload"))
    for note in plan.notes:
        print(f"note: {note}")
    unit = f"{service.name}.socket {service.name}" if service.sockets else service.name
    print(f"start it now, and with each boot: {systemctl} enable --now {unit}")
    print(f"after a change of the unit:       {systemctl} restart {service.name}")
    journal = "--user-unit" if service.per_user else "--unit"
    print(f"its log:                          journalctl {journal} {service.name}")
    return 0


def _expect_ours(path: Path, program: str) -> None:
    """Raises ServiceError if there is a unit that this program did not write."""
    if os.path.lexists(path) and not _is_ours(path, program):
        raise ServiceError(
            f"{path} was not written by {program} service install, so it stays as it is: remove "
            "it, or choose another name with --name"
        )


def _is_ours(path: Path, program: str) -> bool:
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):  # a link: an alias, or a unit that is masked
            return False
        with open(path, "rb") as file:
            return is_ours(file.read(MOST_UNIT).decode("utf-8", "replace"), program)
    except OSError:
        return False


def _uninstall(name: str, per_user: bool, program: str) -> int:
    folder = _units(per_user)
    found = [path for end in ("socket", "service")
             if os.path.lexists(path := folder / f"{name}.{end}")]  # fmt: skip
    if not found:
        raise ServiceError(f"there is no unit {folder / name}.service: nothing to uninstall")
    for path in found:
        _expect_ours(path, program)
    _expect(_systemctl(per_user, "disable", "--now", *(path.name for path in found)))
    for path in found:
        try:
            path.unlink()
        except OSError as error:
            raise ServiceError(f"{path}: {error.strerror}") from None
        print(f"removed {path}")
    _expect(_systemctl(per_user, "daemon-reload"))
    if not per_user and os.path.exists(f"/var/lib/{name}"):
        print(f"kept: /var/lib/{name}, with what the program has stored there")
    return 0


def _status(name: str, per_user: bool, program: str) -> int:
    """Returns 0 if it runs, 1 if it does not."""
    path = _units(per_user) / f"{name}.service"
    whose = "no unit" if not os.path.lexists(path) else (
        "written by this program" if _is_ours(path, program) else "written by another one"
    )  # fmt: skip
    wanted = ("LoadState", "ActiveState", "SubState", "UnitFileState", "MainPID", "Result")
    done = _systemctl(per_user, "show", f"{name}.service", f"--property={','.join(wanted)}")
    _expect(done)
    shown = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    print(f"unit     {path} ({whose})")
    print(f"state    {shown.get('ActiveState')} ({shown.get('SubState')}), "
          f"{shown.get('UnitFileState') or 'not installed'}")  # fmt: skip
    if shown.get("MainPID", "0") != "0":
        print(f"process  {shown['MainPID']}; ask it: {program} status")
    elif shown.get("Result") not in (None, "", "success"):
        print(f"ended    {shown['Result']}; see journalctl --unit {name}")
    return 0 if shown.get("ActiveState") in ("active", "reloading") else 1
