"""How gotunnel is installed:

    pip install .              the agent
    pip install '.[server]'    the agent and the gateway
    pip install '.[http2]'     ... and HTTP/2 at the gateway
    pip install '.[test]'      what the tests need, too
    pip install '.[check]'     what tools/check.py needs: formatter, linter, types

The five lists below are also read, as text, by tools/bootstrap.py: keep them plain.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

AGENT = [
    # 2.4 refuses what CVE-2022-29217 let through; 2.10.0 takes a part of an issuer for the whole
    # of it (CVE-2024-53861).
    "PyJWT>=2.4,!=2.10.0",
    # The first with wheels for Python 3.10.
    "PyYAML>=6.0",
]

SERVER = [
    # The first that knows not_valid_after_utc.
    "cryptography>=42.0.0",
    # The first that was made for Python 3.10, and the parser that we use is in its package.
    "python-dotenv>=0.19.1",
    # The first without pyOpenSSL's types in its interface; the next may change it again. Its own
    # needs are loaded by a gateway that orders certificates, and by no other.
    "acme>=5,<6",
    "josepy>=2,<3",
    # By which acme asks; bounded_http.py puts bounds on it. Older ones were not tried.
    "requests>=2.32",
    "urllib3>=2.2",
]

HTTP2 = [
    # Brings hpack. Older ones do not refuse all that RFC 9113 forbids.
    "h2>=4.3,<5",
    # Reads the header lists of visitors.
    "hpack>=4.1,<5",
]

TEST = [
    # A program that speaks HTTP/2. Older ones were not tried.
    "httpx[http2]>=0.27",
    # The first that also hears of a thread that dies late, after the test that started it.
    "pytest>=8.4",
    # Older ones were not tried with that pytest.
    "pytest-timeout>=2.3.1",
    # A program to be tunnelled. The first whose blocking client can be told to use no proxy.
    "websockets>=15.0",
    # Another one. Older ones were not tried.
    "flask>=3.0",
    # Its parser reads our metrics. Older ones were not tried.
    "prometheus_client>=0.20",
    # A program that speaks HTTP/2. Older ones were not tried.
    "grpcio>=1.60",
]

CHECK = [
    # One version each: another would format other lines, or find other faults. Raise them by hand.
    "ruff==0.17.6",
    "mypy==2.4.1",
    "types-PyYAML==6.0.12.20261122",
    "types-requests==2.33.0.20261030",
]

ROOT = Path(__file__).parent


class FreshBuild(build_py):
    """Builds from nothing: setuptools would install all that lies in build/lib, and so modules of
    an earlier version that are gone from the source."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "gotunnel.py").read_text("utf-8"), re.M)

setup(
    name="gotunnel",
    version=VERSION[1],
    description="A reverse tunnel: services behind NAT, on hostnames of your own, over HTTPS",
    author="the gotunnel authors",
    license="MIT",
    python_requires=">=3.10",
    py_modules=["gotunnel"],
    packages=[
        "gotunnel_agent",
        "gotunnel_agent.common",
        "gotunnel_agent.quick",
        "gotunnel_server",
        "gotunnel_server.admin",
        "gotunnel_server.agents",
        "gotunnel_server.certs",
        "gotunnel_server.net",
        "gotunnel_server.visitors",
    ],
    package_data={
        "gotunnel_agent": ["py.typed"],
        "gotunnel_server": ["py.typed"],
        "gotunnel_server.visitors": ["dashboard.html"],
    },
    cmdclass={"build_py": FreshBuild},
    install_requires=AGENT,
    extras_require={
        "server": SERVER,
        "http2": SERVER + HTTP2,
        "test": SERVER + HTTP2 + TEST,
        "check": SERVER + HTTP2 + CHECK,
    },
    entry_points={
        "console_scripts": [
            "gotunnel = gotunnel_agent.__main__:main",
            "gotunnel-agent = gotunnel_agent.__main__:main",
            "gotunnel-server = gotunnel_server.__main__:main",
        ]
    },
)
