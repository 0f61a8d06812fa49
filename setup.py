"""How gotunnel is installed:

    pip install .              the agent
    pip install '.[qr]'        the agent, and QR codes of `gotunnel http --qr`
    pip install '.[server]'    the agent and the gateway
    pip install '.[http2]'     ... and HTTP/2 at the gateway
    pip install '.[redis]'     the agent, and the gateway as one of several
    pip install '.[test]'      what the tests need, too
    pip install '.[apps]'      what some examples of docs/python.md need
    pip install '.[check]'     what tools/check.py needs: formatter, linter, types

The eight lists below are also read, as text, by tools/bootstrap.py: keep them plain.
"""

import gzip
import os
import re
import shutil
import tarfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1: the package wheel has it, where a wheel is built
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        bdist_wheel = None

AGENT = [
    # 2.4 refuses what CVE-2022-29217 let through; 2.10.0 takes a part of an issuer for the whole
    # of it (CVE-2024-53861).
    "PyJWT>=2.4,!=2.10.0",
    # The first with wheels for Python 3.10.
    "PyYAML>=6.0",
]

SERVER = [
    # Debian 12's; net/certificate.py asks it what older ones cannot answer. Older ones were not
    # tried.
    "cryptography>=38",
    # The first that was made for Python 3.10, and the parser that we use is in its package.
    "python-dotenv>=0.19.1",
    # Debian 12's, too: we use its signed requests, which have not changed since. The next may
    # change them. Its own needs are loaded by a gateway that orders certificates, and by no other.
    "acme>=2.1,<6",
    "josepy>=1.13,<3",
    # By which acme asks; bounded_http.py puts bounds on it. Older ones were not tried.
    "requests>=2.28",
    "urllib3>=1.26",
]

HTTP2 = [
    # Brings hpack. Older ones do not refuse all that RFC 9113 forbids.
    "h2>=4.3,<5",
    # Reads the header lists of visitors.
    "hpack>=4.1,<5",
]

REDIS = [
    # Several gateways as one. Pure Python. 6 is Debian 13's; tried with 6.1 and 8.1. The next may
    # change what we use.
    "redis>=6,<9",
]

QR = [
    # Pure Python without dependencies of its own, typed, and in Debian. `--qr` draws an address as
    # a QR code by it; writing an encoder of our own would be as long as the agent. Older ones were
    # not tried.
    "segno>=1.6",
]

INSPECT = [
    # Decode br and zstd for show: bodies of gzip need nothing. Both are C with wheels for most
    # systems, so the agent does without them. Python 3.14 has zstd itself. Older ones were not
    # tried.
    "brotli>=1.1",
    'zstandard>=0.22; python_version < "3.14"',
]

TEST = [
    # A program that speaks HTTP/2. Older ones were not tried.
    "httpx[http2]>=0.27",
    # The first that also hears of a thread that dies late, after the test that started it.
    "pytest>=8.4",
    # Older ones were not tried with that pytest.
    "pytest-timeout>=2.3.1",
    # Shares the tests out among processes: most wait for something most of the time. Older ones
    # were not tried.
    "pytest-xdist>=3.6",
    # A program to be tunnelled. The first whose blocking client can be told to use no proxy.
    "websockets>=15.0",
    # Another one. Older ones were not tried.
    "flask>=3.0",
    # Its parser reads our metrics. Older ones were not tried.
    "prometheus_client>=0.20",
    # A program that speaks HTTP/2. Older ones were not tried.
    "grpcio>=1.60",
    # Drives Chromium by the driver of the browser's makers: waits, clicks, types. Older ones were
    # not tried.
    "selenium>=4.51",
]

# What a reader's own program may be. .ci/run tests with them; elsewhere their tests are skipped, as
# the packages are many. Older ones were not tried.
APPS = [
    "fastapi>=0.110",
    # The server for it.
    "uvicorn>=0.30",
    # A kernel of Jupyter, and what talks to it.
    "ipykernel>=6.29",
]

CHECK = [
    # One version each: another would format other lines, or find other faults. Raise them by hand.
    "ruff==0.17.6",
    "mypy==2.4.1",
    "types-PyYAML==6.0.12.20261122",
    "types-requests==2.33.0.20261030",
]

ROOT = Path(__file__).parent

# What an archive of the sources holds besides the packages: all that a checkout has.
SOURCES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Dockerfile", "compose.yaml",
           ".gitignore")  # fmt: skip
SOURCE_FOLDERS = (".ci", "conf", "docs", "tests", "tools")

# Builds are reproducible: the same sources and the same setuptools give the same bytes. So the
# files in an archive have one time and one mode, whatever those of the checkout are. The wheel's
# writer reads the variable (https://reproducible-builds.org/specs/source-date-epoch/). Its default
# is the earliest time that a zip archive can say.
EPOCH = int(os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800"))  # 1980-01-01
MODE, PROGRAM_MODE = 0o644, 0o755


# The example configurations that a package needs for --print-example. A build copies them from
# conf into the package's folder "examples" (gotunnel_agent/common/examples.py).
EXAMPLES = {"gotunnel_agent": ["agent.yaml"], "gotunnel_server": ["server.env", "agents.yaml"]}


class FreshBuild(build_py):
    """Builds from nothing: setuptools would install all that lies in build/lib, and so modules of
    an earlier version that are gone from the source. Adds the examples."""

    def run(self):
        if self.editable_mode:
            return super().run()
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        for package, names in EXAMPLES.items():
            for name in names:
                copy = os.path.join(self.build_lib, package, "examples", name)
                self.mkpath(os.path.dirname(copy))
                self.copy_file(str(ROOT / "conf" / name), copy)
        self._write_stub()

    def _write_stub(self):
        """Let type checkers see the types in gotunnel.py. They read none of an installed module
        that is no package (PEP 561), except in a package of stubs: so it is its own stub. There
        stand, too, the names that it has by __getattr__()."""
        folder = Path(self.build_lib) / "gotunnel-stubs"
        folder.mkdir(parents=True)
        source = (ROOT / "gotunnel.py").read_text("utf-8")
        names = "from gotunnel_agent.embedded import *\n"
        (folder / "__init__.pyi").write_text(f"{source}\n{names}", "utf-8", newline="\n")


class PlainSources(sdist):
    """The archive of the sources: a checkout, without what is not of the project."""

    def make_distribution(self):
        for folder in SOURCE_FOLDERS:
            self.filelist.graft(folder)
        self.filelist.extend(name for name in SOURCES if (ROOT / name).exists())
        self.filelist.exclude_pattern(r"(^|/)__pycache__(/|$)", is_regex=True)
        super().make_distribution()

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, **_):
        """Distutils would write the time of the build and the builder's name."""
        path = f"{base_name}.tar.gz"
        with (
            open(path, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=EPOCH) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for each in sorted(Path(base_dir).rglob("*")):
                if each.is_file():
                    tar.add(each, each.as_posix(), filter=self._plain)
        return path

    @staticmethod
    def _plain(member):
        member.mtime, member.uid, member.gid, member.uname, member.gname = EPOCH, 0, 0, "", ""
        member.mode = PROGRAM_MODE if member.mode & 0o100 else MODE
        return member


if bdist_wheel is not None:

    class PlainWheel(bdist_wheel):
        """A wheel whose files have one mode: else a builder's umask would show in it."""

        def write_wheelfile(self, *arguments, **keywords):
            super().write_wheelfile(*arguments, **keywords)  # the last file before all are packed
            for path in Path(self.bdist_dir).rglob("*"):
                if path.is_file():
                    path.chmod(MODE)


VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "gotunnel.py").read_text("utf-8"), re.M)

setup(
    name="gotunnel",
    version=VERSION[1],
    description="A reverse tunnel: services behind NAT, on hostnames of your own, over HTTPS",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="the gotunnel authors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["tunnel", "reverse proxy", "NAT", "HTTPS", "TLS", "ACME", "yamux"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: No Input/Output (Daemon)",
        "Intended Audience :: Developers",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Internet :: Proxy Servers",
        "Topic :: Internet :: WWW/HTTP",
        "Topic :: System :: Networking",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    py_modules=["gotunnel"],
    packages=find_packages(str(ROOT), include=["gotunnel_agent*", "gotunnel_server*"]),
    package_data={"": ["py.typed", "*.html", "*.yaml", "*.env"]},
    cmdclass={
        "build_py": FreshBuild,
        "sdist": PlainSources,
        **({} if bdist_wheel is None else {"bdist_wheel": PlainWheel}),
    },
    install_requires=AGENT,
    extras_require={
        "server": SERVER,
        "http2": SERVER + HTTP2,
        "redis": SERVER + HTTP2 + REDIS,
        "qr": QR,
        "inspect": INSPECT,
        "test": SERVER + HTTP2 + REDIS + QR + INSPECT + TEST,
        "apps": APPS,
        "check": SERVER + HTTP2 + REDIS + CHECK,
    },
    entry_points={
        "console_scripts": [
            "gotunnel = gotunnel_agent.__main__:main",
            "gotunnel-agent = gotunnel_agent.__main__:main",
            "gotunnel-server = gotunnel_server.__main__:main",
        ]
    },
)
