"""Makes gotunnel.pyz: the agent in one file, which runs where there is Python and nothing else.

    python3 tools/pyz.py [FILE]        FILE is dist/gotunnel.pyz by default
    python3 dist/gotunnel.pyz --help

The file is a zip archive that Python runs (zipapp in Python's documentation). It holds the agent,
and the packages in PINNED, of which only what is written in Python. It is reproducible: the same
commit gives the same bytes, on any machine and with any Python. So what is in it has one order, one
time (SOURCE_DATE_EPOCH, or 1980) and one mode, and is not compressed, because the same bytes look
different after another version of zlib.
"""

import os
import tempfile
import time
import zipfile

import bootstrap

OUTPUT = os.path.join("dist", "gotunnel.pyz")

# What the agent needs besides Python: setup.py's lists AGENT and QR, and what those need. pip
# compares the wheels with these sums (--require-hashes). Raise them by hand, with `pip download`
# and `sha256sum`; PyYAML's is the one for PLATFORM, of which the compiled part is left out.
PINNED = (
    ("PyJWT", "2.15.1", "42d59d631f7768a1028a64c7ff581a9bf7519804daf91fc5b6c56e30eec5e193"),
    ("PyYAML", "6.0.4", "88a089e6424a8a256321270620d5a4328ad5227fb2061b07d33f596894336914"),
    ("segno", "1.6.6", "28c7d081ed0cf935e0411293a465efd4d500704072cdb039778a2ab8736190c7"),
    # PyJWT's, on Python 3.10.
    (
        "typing_extensions",
        "4.16.0",
        "481caa481374e813c1b176ada14e97f1f67a4539ce9cfeb3f350d78d6370c2e8",
    ),
)
PLATFORM = ("--python-version=3.10", "--implementation=cp", "--platform=manylinux2014_x86_64")

SHEBANG = b"#!/usr/bin/env python3\n"

# What Python runs first. An old Python must be able to parse it. Packages of the machine are taken
# off the path: the agent is then the same on each, and PyJWT does not import a cryptography that it
# has no use for.
MAIN = b"""\
import os
import sys

if sys.version_info < (3, 10):
    sys.exit(
        "gotunnel.pyz: this is Python {}.{}, expected 3.10 or newer: run it with a newer one, "
        "such as python3.12 {}".format(sys.version_info[0], sys.version_info[1], sys.argv[0])
    )
sys.path[1:] = [
    path for path in sys.path[1:]
    if os.path.basename(path) not in ("site-packages", "dist-packages")
]

from gotunnel_agent.__main__ import main

sys.exit(main())
"""

FIRST_TIME = 315532800  # 1980-01-01, the earliest that a zip archive can say
MODE = 0o100644  # a file that all may read
PROGRAM_MODE = 0o755
UNIX = 3  # the system that a zip entry's mode belongs to


def main(arguments):
    if len(arguments) > 1 or arguments[:1] and arguments[0].startswith("-"):
        bootstrap.say("pyz.py: arguments {}, expected one file".format(" ".join(arguments)))
        return 2
    file = arguments[0] if arguments else os.path.join(bootstrap.ROOT, OUTPUT)
    make(bootstrap.prepare("agent"), file)
    bootstrap.say(f"made {file}, {os.path.getsize(file) // 1024} KiB")
    return 0


def make(python, file):
    """Write the archive to ``file``. ``python`` is one that has pip. Raises CannotPrepare."""
    with tempfile.TemporaryDirectory() as folder:
        content = ours()
        for wheel in download(python, folder):
            content.update(from_wheel(wheel))
    if os.path.dirname(file):
        os.makedirs(os.path.dirname(file), exist_ok=True)
    write(file, content, int(os.environ.get("SOURCE_DATE_EPOCH") or FIRST_TIME))


def ours():
    """The agent's own files: a dictionary of names in the archive and contents."""
    content = {"__main__.py": MAIN}
    names = ["LICENSE", "gotunnel.py"]
    top = os.path.join(bootstrap.ROOT, "gotunnel_agent")
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if name != "__pycache__"]
        names += [os.path.relpath(os.path.join(folder, name), bootstrap.ROOT) for name in files]
    for name in names:
        with open(os.path.join(bootstrap.ROOT, name), "rb") as file:
            content[name.replace(os.sep, "/")] = file.read()
    with open(os.path.join(bootstrap.ROOT, "conf", "agent.yaml"), "rb") as file:
        content["gotunnel_agent/examples/agent.yaml"] = file.read()  # as setup.py has it
    return content


def download(python, folder):
    """Have pip fetch the wheels in PINNED. Returns their paths."""
    wanted = os.path.join(folder, "wanted.txt")
    with open(wanted, "w", encoding="utf-8") as file:
        for name, version, digest in PINNED:
            file.write(f"{name}=={version} --hash=sha256:{digest}\n")
    command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", *PLATFORM]
    command += ["--require-hashes", "--requirement", wanted, "--dest", folder]
    bootstrap.run(command, "pip could not fetch what goes into the file", bootstrap.IN_REACH)
    return sorted(
        os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".whl")
    )


def from_wheel(wheel):
    """What the archive takes from a wheel: modules, metadata and licences."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: archive.read(name)
            for name in archive.namelist()
            if name.endswith(".py")
            and not name.startswith("_yaml/")
            or ".dist-info/licenses/" in name
            or name.endswith((".dist-info/METADATA", ".dist-info/LICENSE"))
        }


def write(file, content, seconds):
    """Write a program that Python runs. ``seconds`` since 1970 is the time of all in it."""
    date = time.gmtime(max(seconds, FIRST_TIME))[:6]
    with open(file, "wb") as out:
        out.write(SHEBANG)
        with zipfile.ZipFile(out, "w") as archive:
            for name in sorted(content):
                entry = zipfile.ZipInfo(name, date)
                entry.create_system = UNIX
                entry.external_attr = MODE << 16
                archive.writestr(entry, content[name])
    os.chmod(file, PROGRAM_MODE)


if __name__ == "__main__":
    bootstrap.tool(main)
