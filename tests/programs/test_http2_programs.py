"""Programs that others wrote, as HTTP/2 visitors: curl, httpx, nghttp2's load, h2spec, Chromium."""

import hashlib
import os
import re
import subprocess

import httpx
import pytest
from support import (
    APP,
    MIB,
    TIMEOUT,
    agent_here,
    gateway_here,
    need,
    nginx,
)
from test_real_programs import CHROMIUM

H2SPEC = "github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible"
GO_TIMEOUT = 240  # seconds for Go to fetch and build it
PARTS = 100

# Loads many parts at once, and writes by which protocol each came.
PAGE = f"""<!doctype html><title>parts</title><p id=out>waiting</p><script>
Promise.all([...Array({PARTS}).keys()].map(n => fetch("/part" + n).then(a => a.text())))
  .then(texts => {{
    const parts = performance.getEntriesByType("resource").filter(e => e.name.includes("/part"));
    const right = texts.filter((text, n) => text == "part " + n).length;
    const byHttp2 = parts.filter(e => e.nextHopProtocol == "h2").length;
    document.getElementById("out").textContent = right + " right, " + byHttp2 + " by h2";
  }});
</script>"""


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    (folder / "small").write_bytes(b"small " * 100)
    (folder / "large").write_bytes(os.urandom(MIB) * 8)
    (folder / "index.html").write_text(PAGE)
    for number in range(PARTS):
        (folder / f"part{number}").write_text(f"part {number}")
    with nginx(folder) as port:
        yield folder, port


@pytest.fixture
def gateway(cache, tmp_path, web):
    with gateway_here(cache, WORKERS="1024") as gateway:
        with agent_here(gateway, tmp_path, http={APP: web[1]}):
            yield gateway


def run(*command, timeout=TIMEOUT):
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_curl_loads_and_sends_files(gateway, web):
    folder, _ = web
    url = f"https://{APP}:{gateway.public_port}"
    curl = (need("curl"), "-sS", "--http2", "--cacert", str(gateway.ca_file))
    content = (folder / "large").read_bytes()
    assert run(*curl, f"{url}/large") == content
    found = run(*curl, "-T", str(folder / "large"), "-w", "%{http_version} %{http_code}",
                "-o", os.devnull, f"{url}/sent")  # fmt: skip
    assert found == b"2 201"
    assert hashlib.sha256((folder / "sent").read_bytes()).digest() == (
        hashlib.sha256(content).digest()
    )


def test_httpx_has_many_requests_on_one_connection(gateway):
    url = f"https://127.0.0.1:{gateway.public_port}"
    named = {"headers": {"Host": APP}, "extensions": {"sni_hostname": APP}}
    with httpx.Client(http2=True, verify=gateway.context, trust_env=False) as client:
        for number in range(PARTS):
            answer = client.get(f"{url}/part{number}", **named)
            assert (answer.http_version, answer.text) == ("HTTP/2", f"part {number}")
        sent = client.put(f"{url}/by-httpx", content=b"x" * 300_000, **named)
        assert sent.status_code == 201


@pytest.mark.parametrize(("connections", "streams"), [(1, 32), (8, 4)])
def test_load_of_nghttp2_is_served_without_a_failure(gateway, connections, streams):
    said = run(
        need("h2load"), f"-c{connections}", f"-m{streams}", "-n400",
        f"--connect-to=127.0.0.1:{gateway.public_port}",
        f"https://{APP}:{gateway.public_port}/small",
    )  # fmt: skip
    assert b"400 succeeded, 0 failed, 0 errored, 0 timeout" in said


def test_nghttp_loads_a_page_and_its_parts(gateway):
    names = [f"https://127.0.0.1:{gateway.public_port}/part{n}" for n in range(5)]
    said = run(
        need("nghttp"), "-n", "-s", "--no-verify-peer", "-H", f":authority: {APP}", *names
    ).decode()
    assert len(re.findall(r" 200 .*/part[0-4]$", said, re.MULTILINE)) == 5


@pytest.mark.slow
def test_chromium_loads_a_page_of_a_hundred_parts_by_http2(gateway, tmp_path):
    found = run(
        need("chromium"), *CHROMIUM, f"--user-data-dir={tmp_path}/profile", "--dump-dom",
        "--virtual-time-budget=10000", f"https://{APP}:{gateway.public_port}/",
        timeout=60,
    )  # fmt: skip
    assert f"{PARTS} right, {PARTS} by h2" in found.decode()


@pytest.mark.slow
def test_h2spec_finds_no_fault(cache, tmp_path, web):
    """All its cases, the strict ones too. It connects to localhost, so that is the tunnel's name
    here, and the gateway has another one."""
    folder = tmp_path / "go"
    built = subprocess.run(
        [need("go"), "install", H2SPEC],
        env={**os.environ, "GOBIN": str(folder), "GOFLAGS": "-buildvcs=false"},
        capture_output=True, text=True, timeout=GO_TIMEOUT,
    )  # fmt: skip
    if re.search("dial tcp|lookup|connection refused", built.stderr):
        pytest.skip("Go's module proxy cannot be reached")
    assert built.returncode == 0, built.stderr
    with gateway_here(cache, TUNNEL_HOST="127.0.0.1") as gateway:
        keys = {
            "tunnel_addr": f"127.0.0.1:{gateway.tunnel_port}",
            "ca_file": None,
            "skip_tls_verify": True,
        }
        with agent_here(gateway, tmp_path, http={"localhost": web[1]}, **keys):
            done = subprocess.run(
                [str(folder / "h2spec"), "--strict", "-t", "-k", "-h", "localhost",
                 "-p", str(gateway.public_port), "-P", "/small", "-o", "5"],
                capture_output=True, text=True, timeout=180,
            )  # fmt: skip
    assert "146 tests, 146 passed, 0 skipped, 0 failed" in done.stdout, done.stdout[-4000:]
