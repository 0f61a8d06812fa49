"""The bench's row yamux: the multiplexer alone, over TLS, beside one TLS socket and beside Go's.

bench_yamux.py is its two ends; this starts them, puts a long line between them, and compares.
"""

import contextlib
import json
import os
import subprocess
import tempfile

import bootstrap
from bench_programs import build_gopeer, find, say
from demo import LOOPBACK, Failed

ENDS = os.path.join(bootstrap.ROOT, "tools", "bench_yamux.py")
ROUND_TRIPS = (50, 200)  # ms
LONG = 4  # times as long on a long line, where a stream needs seconds to get up to speed
GO_SECONDS = 1  # at most, for each figure of Go's: they come to rest sooner
PATIENCE = 120  # seconds more than a figure takes, before it is given up


class Yamux:
    """The multiplexer alone: a gateway end and an agent end (bench_yamux.py), new ones a figure."""

    def __init__(self, python, seconds):
        self._python = python
        self._seconds = seconds
        self._gopeer = None  # the program with the long line and the yardstick, if there is Go

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="gotunnel-bench-")
        return self

    def __exit__(self, *exception):
        self._folder.cleanup()

    def build_gopeer(self):
        if find("go") is None:
            say("Go is not installed: left out are the long lines, and what Go's yamux does")
        else:
            self._gopeer = build_gopeer(self._folder.name)

    # Measuring

    def ends(self, figure, *, round_trip=0, times=1):
        """Join two ends and return what the gateway end measures, ``times`` as long as usual.
        ``round_trip`` is in ms."""
        seconds = self._seconds * times
        common = (figure, self._folder.name, str(seconds))
        with contextlib.ExitStack() as running:
            gateway = self._start(running, self._python, ENDS, "gateway", *common)
            port = self._said(gateway, figure)
            if round_trip:
                line = self._start(
                    running, self._gopeer, "line", "-listen", f"{LOOPBACK}:0",
                    "-to", f"{LOOPBACK}:{port}", "-oneway", f"{round_trip / 2}ms",
                )  # fmt: skip
                port = self._said(line, figure).rpartition(":")[2]
            self._start(running, self._python, ENDS, "agent", *common, port)
            try:
                measured, _ = gateway.communicate(timeout=seconds + PATIENCE)
            except subprocess.TimeoutExpired:
                raise Failed(f"{figure}: measured nothing in {seconds + PATIENCE} s") from None
            if gateway.returncode != 0:
                raise Failed(f"{figure}: the gateway end has failed")
            return json.loads(measured)

    def _start(self, running, *command):
        child = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": bootstrap.ROOT}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        running.enter_context(child)  # closes the pipe, and waits
        running.callback(child.terminate)
        return child

    def _said(self, child, figure):
        line = child.stdout.readline().strip()
        if not line:
            raise Failed(f"{figure}: an end, or the line, did not start")
        return line

    def go(self):
        """What yamux in Go does; empty without Go."""
        if self._gopeer is None:
            return {}
        command = [self._gopeer, "yardstick", "-seconds", str(min(GO_SECONDS, self._seconds))]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    # The row; yields dicts

    def row(self):
        tls = self.ends("tls")["rate"]
        yield self.figures("one TLS socket, MB/s", tls)
        near = self.ends("download")["rate"]
        yield self.figures("one stream, MB/s", near, tls, "the TLS socket")
        upload = self.ends("upload")["rate"]
        yield self.figures("one stream to the agent, MB/s", upload, tls, "the TLS socket")
        for size, rate in self.ends("small").items():
            yield self.figures(f"{size} bytes a write, MB/s", rate, near, "one stream")
        for round_trip in ROUND_TRIPS if self._gopeer else ():
            near = self.ends("download")["rate"]  # anew: the machine may not be what it was
            far = self.ends("download", round_trip=round_trip, times=LONG)
            note = f"window {far['window'] / 1024:.0f} KiB"
            what = f"one stream, {round_trip} ms round trip, MB/s"
            yield self.figures(what, far["rate"], near, "one stream", note)
        yield from self._echoes()
        yield from self._sizes()

    def _echoes(self):
        go = self.go()
        here, ours, beside = self.ends("here"), self.ends("echo"), self.ends("beside")
        as_go = "both ends in one process, without TLS, as Go's"
        for what, value, name, note in (
            ("echo, us", here["echo"], "echo_us", as_go),
            ("open, echo, close, us", here["alone"], "open_echo_close_us", as_go),
            ("echo, us, two processes, TLS", ours["echo"], "echo_us", ""),
            ("open, echo, close, us, the same", ours["alone"], "open_echo_close_us", ""),
            ("echo beside 4 of bulk, us", beside["echo"], "echo_beside_bulk_us",
             "p99 {:.1f} ms, bulk {:.0f} MB/s".format(beside["late"] / 1000, beside["rate"])),
        ):  # fmt: skip
            yield self.figures(what, value, go.get(name), "Go", note)

    def _sizes(self):
        idle = self.ends("idle")
        note = "{threads:.1f} threads, {descriptors:.1f} descriptors, {sessions} held".format(
            **idle
        )
        yield self.figures("an idle session, kB", idle["kb"], note=note)
        left = self.ends("leak")
        for end in ("gateway", "agent"):
            early, late = left["early"][end], left["late"][end]
            note = "threads {} then {}, descriptors {} then {}".format(
                *(size[name] for name in ("threads", "descriptors") for size in (early, late))
            )
            what = f"{end} after {left['streams']} streams, kB"
            yield self.figures(what, late["kb"], early["kb"], "a tenth of them", note)

    def figures(self, what, ours, beside=None, than="", note=""):
        ratio = None if beside is None else ours / beside
        return dict(what=what, ours=ours, beside=beside, ratio=ratio, than=than, note=note)


def show(python, seconds):
    """Print the figures as they come, and return them."""
    kept = []
    with Yamux(python, seconds) as yamux:
        yamux.build_gopeer()
        say(f"\n{'':40} ours    beside   ratio")
        for figures in yamux.row():
            kept.append(figures)
            beside = f"{'-':>9}   {'-':5}"
            if figures["beside"] is not None:
                beside = "{beside:9.1f}   {ratio:.3f} of {than}".format(**figures)
            say("{what:36}{ours:9.1f} {:30} {note}".format(beside, **figures).rstrip())
    return kept
