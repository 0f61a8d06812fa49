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

import bootstrap


def main(arguments):
    return bootstrap.run_tests_program("browser/photographer.py", arguments)


if __name__ == "__main__":
    bootstrap.tool(main)
