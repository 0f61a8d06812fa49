"""Saves pictures of the pages in all widths and colour schemes: see tools/screenshots.py."""

import argparse
import sys
import tempfile
from pathlib import Path

import looks
from chromium import Browser
from scenes import SCENES, Stage


def main():
    names = {scene.__name__.replace("_", "-"): scene for scene in SCENES}
    parser = argparse.ArgumentParser(description="Saves pictures of dashboard and inspector.")
    parser.add_argument("folder", nargs="?", type=Path, help="where the pictures are saved")
    parser.add_argument("scene", nargs="*", help="only scenes whose names begin so")
    parser.add_argument("--list", action="store_true", help="print the names of the scenes")
    options = parser.parse_args()
    if options.list:
        print("\n".join(names))
        return 0
    if options.folder is None:
        parser.error("no FOLDER for the pictures")
    wanted = [name for name in names if name.startswith(tuple(options.scene or [""]))]
    if not wanted:
        parser.error(f"no scene begins with {' or '.join(options.scene)}; --list prints all")
    options.folder.mkdir(parents=True, exist_ok=True)
    found = False
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder)) as browser:
        with Stage(browser) as stage:
            for name in wanted:
                for fault in photograph(browser, stage, names[name], options.folder / name):
                    found = True
                    print(f"{name}: {fault}")
    print(f"{len(wanted)} scenes are in {options.folder}")
    return int(found)


def photograph(browser, stage, scene, path):
    """Save a scene in all looks; returns what is wrong with it."""
    faults = []
    try:
        page = scene(stage)
        for width, scheme in looks.in_each_look(page):
            page.screenshot(path.with_name(f"{path.name}-{width}-{scheme}.png"))
            faults += [f"{width} {scheme}: {fault}" for fault in looks.faults(page)]
    except AssertionError as error:  # the page does not come to what the scene waits for
        faults.append(str(error))
    return faults + browser.clear()


if __name__ == "__main__":
    sys.exit(main())
