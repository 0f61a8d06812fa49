"""Checks format, lint and types, as .ci/run does, on a machine that has nothing but Python.

    python3 tools/check.py           says what is wrong; the status is 1 then
    python3 tools/check.py --fix     formats, and mends what the linter can mend, first

The settings stand in pyproject.toml.
"""

import os
import subprocess
import sys

import bootstrap

CHECKS = (
    ("format", "ruff", "format", "--check"),
    ("lint", "ruff", "check"),
    ("types", "mypy"),
)
FIXES = (
    ("lint", "ruff", "check", "--fix-only"),
    ("format", "ruff", "format"),
)


def main(arguments):
    if arguments not in ([], ["--fix"]):
        print(f"check.py: arguments {' '.join(arguments)}, expected none or --fix", file=sys.stderr)
        return 2
    folder = os.path.dirname(bootstrap.prepare("check"))
    failed = []
    for name, program, *words in (FIXES if arguments else ()) + CHECKS:
        print(f"{name}: ", end="", flush=True)
        command = [os.path.join(folder, program), *words]
        if subprocess.run(command, cwd=bootstrap.ROOT).returncode != 0:
            failed.append(name)
    if failed:
        print(f"check.py: faults in {' and '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    bootstrap.tool(main)
