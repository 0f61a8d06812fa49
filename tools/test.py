"""Runs the tests, on a machine that has nothing but Python.

    python3 tools/test.py [ARGUMENT OF PYTEST]...
    python3 tools/test.py tests/common/test_http1.py -k chunked
    python3 tools/test.py -m "slow or not slow"       all of them; slow ones are left out otherwise

Paths are relative to the repository. The exit status is pytest's, 1 if there is no way to run it.
"""

import os
import signal
import subprocess

import bootstrap

SETTINGS = os.path.join("tests", "pytest.ini")


def main(arguments):
    python = bootstrap.prepare("apps" if os.environ.get("GOTUNNEL_CI") == "1" else "test")
    # The last -m counts, so one among the arguments wins.
    command = [python, "-m", "pytest", "-c", SETTINGS, "-m", "not slow"] + arguments
    pytest = subprocess.Popen(command, cwd=bootstrap.ROOT)
    try:
        status = pytest.wait()
    except SystemExit:  # a SIGTERM, which came to us alone; this one lets it clean up
        pytest.send_signal(signal.SIGINT)
        raise
    finally:  # after Ctrl-C, which it has had too, it tells what it has seen so far
        pytest.wait()
    return status if status >= 0 else 128 - status  # negative: a signal's number


if __name__ == "__main__":
    bootstrap.tool(main)
