"""Saves pictures of the dashboard and the inspector, with visits in them, for its designers.

    python3 tools/screenshots.py FOLDER                 all scenes
    python3 tools/screenshots.py FOLDER dashboard-full  those whose names begin so
    python3 tools/screenshots.py --list                 the names of the scenes

Each scene is saved as FOLDER/SCENE-WIDTH-SCHEME.png: 360, 800 and 1600 pixels wide, light and dark.
Gateway, agents and visitors run on this machine for as long as it takes, half a minute. Needs
Chromium (Debian: chromium and chromium-driver), and the network once to install packages into
.venv. What is measurably wrong with a page (contrast, width, names of controls) is printed; then
the exit status is 1.
"""

import os
import subprocess

import bootstrap

PATHS = (".", "tests", os.path.join("tests", "browser"))


def main(arguments):
    python = bootstrap.prepare("test")
    paths = [os.path.join(bootstrap.ROOT, path) for path in PATHS]
    photographer = subprocess.Popen(
        [python, os.path.join(paths[-1], "photographer.py")] + arguments,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths)),
    )
    try:
        return photographer.wait()
    except SystemExit:  # a SIGTERM, which came to us alone
        photographer.terminate()
        raise
    finally:  # after Ctrl-C, which it has had too, it ends what it has started
        photographer.wait()


if __name__ == "__main__":
    bootstrap.tool(main)
