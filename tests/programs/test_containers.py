"""docker, at the API of podman's containers behind a tunnel: requests that change the protocol."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from support import APP, MIB, TIMEOUT, agent_here, gateway_here, need, running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

STORE = ("--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--runtime", "runc")
# A container that needs no network, no control groups and no higher limits than its maker has.
CONFINED = (
    "--network", "none", "--cgroups", "no-conmon",
    "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000",
)  # fmt: skip
NAME = "tunnelled"


@contextlib.contextmanager
def podman():
    """podman's API, with a running container NAME that has busybox; yields its socket."""
    program, busybox = need("podman"), need("busybox")
    need("runc")
    if os.geteuid() != 0:
        pytest.skip("containers are made as root here")
    # Not in pytest's folder: a socket's path may be no longer than 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="gotunnel-"))
    command = (program, "--root", f"{folder}/store", "--runroot", f"{folder}/run", *STORE)

    def run(*arguments):
        done = subprocess.run(
            [*command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    try:
        system = folder / "rootfs" / "bin"
        system.mkdir(parents=True)
        shutil.copy(busybox, system / "busybox")
        for name in ("cat", "sh", "sleep", "wc"):
            (system / name).symlink_to("busybox")
        image = shutil.make_archive(f"{folder}/image", "tar", folder / "rootfs")
        run("import", image, "tiny")
        run("run", "-d", "--name", NAME, *CONFINED, "tiny", "/bin/sleep", "1000")
        try:
            api = folder / "podman.sock"
            service = ("system", "service", "--time", "0", f"unix://{api}")
            with running(*command, *service, cwd=folder):
                wait_until(api.exists)
                yield api
        finally:
            run("rm", "-f", "-t", "0", NAME)
    finally:
        # The monitor of each `exec` runs a podman five minutes later, which would make the folder
        # again.
        end_processes_of(folder)
        shutil.rmtree(folder)


def end_processes_of(folder):
    """Kill the processes in whose arguments the folder is, and wait for their end."""

    def found():
        for arguments in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                if os.fsencode(folder) in arguments.read_bytes():
                    yield int(arguments.parent.name)

    for pid in found():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not [*found()])


@pytest.fixture
def docker(cache, tmp_path):
    """A function that runs docker, through gateway and agent; returns what it prints."""
    program, unshare = need("docker"), need("unshare")
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {APP}\n")
    with podman() as api, gateway_here(cache) as gateway:
        tunnels = [{"hostname": APP, "target": f"unix:{api}"}]
        with agent_here(gateway, tmp_path, tunnels=tunnels, ready=False):
            gateway.wait_for_routes(APP)

            def run(*arguments, given=b""):
                command = [
                    # Go programs ask only a DNS server and /etc/hosts for names.
                    unshare, "-m", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"',
                    str(hosts), program, "--tlsverify", "--tlscacert", str(gateway.ca_file),
                    "-H", f"tcp://{APP}:{gateway.public_port}", *arguments,
                ]  # fmt: skip
                done = subprocess.run(
                    command, input=given, capture_output=True, timeout=TIMEOUT,
                    env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
                return done.stdout

            yield run


def test_docker_exec_reads_to_the_end_and_answers_whole(docker):
    assert docker("ps", "--format", "{{.Names}}") == f"{NAME}\n".encode()
    data = random.Random(1).randbytes(3 * MIB)
    for given in (b"x\n", b"", data):
        assert docker("exec", "-i", NAME, "cat", given=given) == given
    # The program answers only when its input has ended.
    late = docker("exec", "-i", NAME, "sh", "-c", "wc -c; sleep 1; echo done", given=data)
    assert late.split() == [b"%d" % len(data), b"done"]
    assert docker("exec", NAME, "sh", "-c", "echo without input") == b"without input\n"
