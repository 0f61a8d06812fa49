"""A gateway on the packages of Debian, which are older than those that pip installs.

GOTUNNEL_DEBIAN_PACKAGES may name another folder that they lie in, such as one that
`apt-get download` and `dpkg -x` have filled.
"""

import os
import subprocess

import pytest
from support import APP, ROOT, agent_here, answer, gateway_environment, gateway_process

PYTHON = "/usr/bin/python3"
FOLDER = os.environ.get("GOTUNNEL_DEBIAN_PACKAGES", "/usr/lib/python3/dist-packages")
NEEDED = ("acme", "cryptography", "dotenv", "josepy", "jwt", "requests", "urllib3", "yaml")
PROGRAM = str(ROOT / "gotunnel_server")

if not all(os.path.isdir(os.path.join(FOLDER, name)) for name in NEEDED):
    if "GOTUNNEL_CI" in os.environ:
        pytest.fail(f"Debian's packages are missing in {FOLDER}", pytrace=False)
    pytest.skip(f"Debian's packages are missing in {FOLDER}", allow_module_level=True)

pytestmark = pytest.mark.slow


def test_a_visit_by_a_gateway_on_the_packages_of_debian(cache, tmp_path, origin):
    origin.serve(lambda target: target.read_head() and target.send(answer(b"on Debian")))
    with gateway_process(cache, command=(PYTHON, PROGRAM), PYTHONPATH=FOLDER) as gateway:
        with agent_here(gateway, tmp_path, http={APP: origin.port}):
            assert gateway.get(APP) == (200, b"on Debian")
        assert not [line for line in gateway.program.lines if "Traceback" in line]


def test_all_that_orders_certificates_is_there_on_debian(tmp_path):
    environment = gateway_environment(tmp_path, ACME_ENV="", ACME_DIRECTORY="https://127.0.0.1:1/")
    done = subprocess.run(
        [PYTHON, PROGRAM, "check"], capture_output=True, text=True, cwd=tmp_path,
        env={**environment, "PYTHONPATH": FOLDER},
    )  # fmt: skip
    assert "packages: all that is needed is there, in fitting versions" in done.stdout
    script = "import gotunnel_server.certs.acme"
    subprocess.run([PYTHON, "-c", script], check=True, cwd=ROOT, env={"PYTHONPATH": FOLDER})
