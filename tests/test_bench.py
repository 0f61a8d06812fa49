"""The bench: its arithmetic by values, and each of its rows once, as short as can be."""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import socket
import sys
from types import SimpleNamespace

import bench
import bench_multiplexer
import bench_rows
import bench_subjects
import bootstrap
import pytest
from bench_programs import Program, reserve_ports, version
from bench_table import BEGIN, END, Table, cell, number, percentile, put_between
from demo import Failed
from support import ROOT, TIMEOUT, Origin, at_length, need

pytestmark = pytest.mark.usefixtures("temporary_folder")

# Arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [(None, "–"), (37980.4, "37980"), (99.96, "100"), (99.94, "99.9"), (9.996, "10.0"),
     (1.444, "1.44"), (0.0766, "0.077"), (0, "0.000"), (-12.34, "-12.3")],
)  # fmt: skip
def test_a_number_shows_three_digits_or_all_in_front_of_the_point(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    "values, text",
    [([], "–"), ([7], "7.00"), ([3, 1, 2], "2.00 (1.00 to 3.00)"), ([200.1, 200.2], "200"),
     ([(255, 174), (250, 180), (270, 160)], "255 + 174 (429 to 430)")],
)  # fmt: skip
def test_a_cell_holds_the_median_and_the_spread(values, text):
    assert cell(values) == text


@pytest.mark.parametrize(
    "share, expected", [(0, 1), (0.5, 50), (0.505, 51), (0.99, 99), (0.991, 100), (1, 100)]
)
def test_a_percentile_is_one_of_the_values(share, expected):
    assert percentile(range(100, 0, -1), share) == expected


def table(**values):
    """A table of one figure: subject to its values, one a round."""
    made = Table(list(values))
    for subject, rounds in values.items():
        for value in rounds:
            made.add(subject, {"MB/s": value})
    return made


def test_a_ratio_is_taken_within_each_round():
    """Not of the medians, which would be 20 / 100: the machine was slower in the second round."""
    figure = table(direct=[100, 10, 200], ours=[30, 5, 20]).figures["MB/s"]
    assert figure.ratio("direct") == 0.3


def test_the_ratio_of_gateway_and_agent_is_that_of_their_sums():
    figure = table(ours=[(3.0, 1.0)], go=[(1.0, 7.0)]).figures["MB/s"]
    assert figure.ratio("go") == 0.5


def test_there_is_no_ratio_to_what_was_not_measured_or_is_nothing():
    figure = table(ours=[(3.0, 1.0), -1.0], go=[(0.0, 0.0), 2.0]).figures["MB/s"]
    assert (figure.ratio("go"), figure.ratio("frp")) == (None, None)


def test_the_table_in_markdown():
    measured = table(direct=[100, 120], ours=[10, 30], go=[5, 5])
    measured.add("ours", {"CPU a GB, s": (1.5, 0.5)})
    assert measured.markdown(["two rounds", "two CPUs"]) == (
        "|  | direct | ours | go | ours / direct | ours / go |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| MB/s | 110 (100 to 120) | 20.0 (10.0 to 30.0) | 5.00 | 0.175 | 4.00 |\n"
        "| CPU a GB, s | – | 1.50 + 0.500 | – | – | – |\n"
        "\n- two rounds\n- two CPUs\n"
    )


def test_json_has_all_values_the_medians_and_the_ratios():
    measured = table(direct=[100, 120], ours=[10, 30]).as_json()
    assert json.loads(json.dumps(measured)) == [
        {
            "title": "MB/s",
            "values": {"direct": [100, 120], "ours": [10, 30]},
            "medians": {"direct": 110, "ours": 20},
            "ratios": {"direct": 0.175},
        }
    ]


def test_the_table_takes_the_place_of_the_last_one():
    page = f"# Speed\n{BEGIN}\n\n| old |\n\n{END}\nend\n"
    assert put_between(page, "| new |\n") == f"# Speed\n{BEGIN}\n\n| new |\n\n{END}\nend\n"
    assert put_between(put_between(page, "| a |\n"), "| new |\n") == put_between(page, "| new |\n")


def test_a_page_without_a_place_is_refused_before_anything_is_measured(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(bench, "need", str)
    page = tmp_path / "page.md"
    page.write_text("# Speed\n")
    assert bench.main(["--row", "http", "--markdown", str(page)]) == 1
    assert capsys.readouterr().err.startswith("bench.py: expected a line <!-- bench: begin -->")
    assert page.read_text() == "# Speed\n"


@pytest.mark.parametrize("page", ["", BEGIN, f"{END} {BEGIN}"])
def test_a_page_without_a_place_for_the_table_is_left_alone(page):
    with pytest.raises(ValueError, match="expected a line <!-- bench: begin -->"):
        put_between(page, "| new |\n")


def test_our_page_about_speed_has_a_place_for_the_table():
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert "| new |" in put_between(page, "| new |\n")


WRK = """\
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.39ms    2.66ms  38.85ms   96.43%
  Latency Distribution
     50%  749.00us
     99%  {late}
Requests/sec:  28561.41
"""


@pytest.mark.parametrize("late, ms", [("813.00us", 0.813), ("17.10ms", 17.1), ("1.02s", 1020)])
def test_what_wrk_prints_becomes_a_rate_and_milliseconds(late, ms):
    rate, measured = bench_rows.read_wrk(WRK.format(late=late))
    assert (rate, round(measured, 6)) == (28561.41, ms)


def test_several_downloads_add_up():
    moved = [{"bytes": 4_000_000, "seconds": 2.0}, {"bytes": 9_000_000, "seconds": 3.0}]
    assert bench_rows.speed(moved) == 5.0


def test_cpu_time_is_told_for_a_unit_and_not_where_there_is_no_tunnel():
    tunnel = SimpleNamespace(cpu_seconds=lambda: [3.0, 1.5])
    assert bench_rows.cost(tunnel, [1.0, 1.0], 4, "CPU a GB", "s") == {"CPU a GB, s": (0.5, 0.125)}
    assert bench_rows.cost(SimpleNamespace(cpu_seconds=list), [], 4, "CPU a GB", "s") == {}


def test_no_cpu_time_is_told_for_what_was_not_done():
    tunnel = SimpleNamespace(cpu_seconds=lambda: [3.0, 1.5])
    assert bench_rows.cost(tunnel, [1.0, 1.0], 0, "CPU a GB", "s") == {}


# The run ------------------------------------------------------------------------------------------


def test_subjects_take_turns_and_every_second_round_goes_the_other_way(capsys):
    asked = []

    def measure(row, subject, running):
        asked.append(running.name)
        return {"MB/s": len(asked)}

    contenders = [(None, SimpleNamespace(name=name)) for name in ("direct", "ours", "go")]
    result = Table(["direct", "ours", "go"])
    bench.measure(SimpleNamespace(measure=measure), "download", contenders, result, 3)
    assert asked == ["direct", "ours", "go", "go", "ours", "direct", "direct", "ours", "go"]
    assert result.figures["MB/s"].values == {
        "direct": [1, 6, 7],
        "ours": [2, 5, 8],
        "go": [3, 4, 9],
    }
    assert "    ours     5.00 (2.00 to 8.00)\n" in capsys.readouterr().out


def test_a_peer_that_is_not_there_is_named_and_left_out(monkeypatch):
    here = {"chisel": "/usr/bin/chisel"}
    monkeypatch.setattr(bench_subjects, "find", here.get)
    found, missing = bench_subjects.present(["frp", "chisel", "chisel", "rathole"])
    assert found == [bench_subjects.Chisel]
    assert missing == [
        "frp is left out: no frps on the PATH", "rathole is left out: no rathole on the PATH",
    ]  # fmt: skip


def test_an_interpreter_gets_an_environment_and_says_what_it_is(monkeypatch):
    code = "import os, sys; print(sys.executable, os.environ['GOTUNNEL_VENV'])"
    monkeypatch.setattr(bench_subjects, "PREPARE", code)
    monkeypatch.setattr(bench_subjects, "ABOUT", "print('with a GIL, OpenSSL 3')")
    monkeypatch.setattr(bench_subjects, "ask", asked := Asked())
    name = f"Python {platform.python_version()}"
    folder = os.path.join(".venvs", platform.python_version())
    python = f"{sys.executable} {folder}"
    found = bench_subjects.environment_of(sys.executable)
    assert found == (name, python, f"{name}: with a GIL, OpenSSL 3")
    assert asked.programs == [sys.executable, sys.executable, python]


class Asked:
    """Asks this Python, whichever is to be asked."""

    def __init__(self):
        self.programs = []
        self._ask = bench_subjects.ask

    def __call__(self, python, *words, **settings):
        self.programs.append(python)
        return self._ask(sys.executable, *words, **settings)


def test_what_our_programs_run_on_is_told():
    told = bench_subjects.ask(
        sys.executable, "-c", bench_subjects.ABOUT, PYTHONPATH=bootstrap.ROOT
    )  # fmt: skip
    assert re.fullmatch(r"with(out)? a GIL, OpenSSL 3.*", told)


def test_an_interpreter_that_fails_is_named():
    with pytest.raises(Failed, match=f"^{sys.executable} ended with status 3, expected 0$"):
        bench_subjects.ask(sys.executable, "-c", "raise SystemExit(3)")


def test_the_cpus_of_each_process_are_told(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    places = {
        "direct": {}, "ours": {"gateway": [0], "agent": [1]}, "go": {"gateway": [0, 1]},
    }  # fmt: skip
    assert list(bench.told(places))[:2] == [
        "ours: gateway on CPU 0, agent on CPU 1", "go: gateway on any CPU",
    ]  # fmt: skip


def test_what_was_measured_before_a_row_failed_is_kept(capsys, monkeypatch, tmp_path):
    def fail(python, rows, options, kept):
        kept["figures"] = ["one"]
        raise Failed("the agent of go ended by itself")

    monkeypatch.setattr(bench, "need", str)
    monkeypatch.setattr(bench, "show", fail)
    monkeypatch.setattr(bootstrap, "prepare", str)
    path = tmp_path / "figures.json"
    assert bench.main(["--row", "http", "--json", str(path)]) == 1
    assert json.loads(path.read_text()) == {"figures": ["one"]}
    assert capsys.readouterr().err == "bench.py: the agent of go ended by itself\n"


def test_a_reserved_port_is_for_a_program_that_asks_for_it_by_number():
    with contextlib.ExitStack() as stack:
        (port,) = reserve_ports(stack, 1)
        with pytest.raises(OSError), socket.socket() as another:
            another.bind(("127.0.0.1", port))
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    "says, expected",
    [("echo nginx version: nginx/1.22.1 >&2", "1.22.1"),
     ("echo 23:43:26.839Z; echo Build 0.5.0", "0.5.0"), ("exit 2", "?")],
)  # fmt: skip
def test_the_version_of_a_program_is_what_it_says(monkeypatch, tmp_path, says, expected):
    program = tmp_path / "peer"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert version("peer") == expected


def test_a_program_that_does_not_start_is_a_sentence_and_its_last_lines(tmp_path):
    script = "print('the reason'); raise SystemExit(3)"
    with Program("gateway of go", sys.executable, "-c", script, folder=tmp_path) as program:
        with pytest.raises(Failed, match="the gateway of go did not say 'ready'.*\n    the reason"):
            program.wait_for("ready")


def test_a_long_line_delivers_bytes_and_the_end_later(tmp_path):
    """At least so much later: how much more depends on the machine."""
    one_way = 0.02  # seconds
    script = ROOT / "tools" / "bench_line.py"
    with Origin() as origin:
        origin.serve(lambda wire: wire.send(wire.read_to_end()))
        command = (sys.executable, "-u", script, origin.port, one_way * 1000)
        with Program("line", *command, folder=tmp_path) as line:
            port = int(line.wait_for(r"^\d+$")[0])
            with socket.create_connection(("127.0.0.1", port), TIMEOUT) as visitor:
                began = bench_rows.time.monotonic()
                visitor.sendall(b"echo")
                visitor.shutdown(socket.SHUT_WR)
                assert visitor.recv(100) == b"echo"
                assert bench_rows.time.monotonic() - began >= 2 * one_way
                assert visitor.recv(100) == b""


def measured(monkeypatch, folder, *arguments):
    """The figures of a run that is as short as can be: title to medians; and the table's file."""
    monkeypatch.setattr(bootstrap, "prepare", lambda need: sys.executable)
    page, path = folder / "page.md", folder / "figures.json"
    page.write_text(f"{BEGIN}\n{END}\n")
    options = ["--seconds", "0.2", "--json", str(path), "--markdown", str(page)]
    assert bench.main([*options, *arguments]) == 0
    figures = json.loads(path.read_text())["figures"]
    assert all(f"| {figure['title']} |" in page.read_text() for figure in figures)
    return {figure["title"]: figure["medians"] for figure in figures}


def need_all(*programs):
    for program in ("nginx", *programs):
        need(program)


SHOWN = ("http", "tcp", "memory")  # the rows of one run, in CI
DIRECT_TOO = {"http", "http2", "visitors", "download", "upload", "beside", "tcp", "scp"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [SHOWN, *(at_length((name,)) for name in bench_rows.Rows.NAMES if name not in SHOWN)],
    ids=" ".join,
)
def test_each_row_measures_ours(monkeypatch, tmp_path, rows):
    need_all("wrk", *(program for row in rows for program in bench_rows.Rows.NEEDS.get(row, ())))
    monkeypatch.setattr(bench_rows, "SETTLE", 0.1)
    figures = measured(monkeypatch, tmp_path, *(word for row in rows for word in ("--row", row)))
    assert figures
    for title, medians in figures.items():
        assert "ours" in medians, title
        if re.search("/s|p99|^CPU", title):
            assert all(total > 0 for total in map(sum_of, medians.values())), title
    if DIRECT_TOO.issuperset(rows[:1]):
        assert "direct" in next(iter(figures.values()))
    if rows == SHOWN:
        titles = ("requests/s, 32 visitors", "mode tcp: ", "memory at start, MB")
        assert all(any(title.startswith(words) for title in figures) for words in titles)


def sum_of(value):
    return sum(value) if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("peer", sorted(bench_subjects.PEERS))
def test_each_peer_is_measured_near_and_far(capsys, monkeypatch, tmp_path, peer):
    need_all("wrk")
    program = bench_subjects.PEERS[peer].program
    if bench_subjects.find(program) is None:  # another project's, which no package of Debian has
        pytest.skip(f"no {program} on the PATH")
    rows = ("--row", "visitors", "--row", "far", "--row", "memory")
    figures = measured(monkeypatch, tmp_path, *rows, "--peer", peer, "--rounds", "2")
    medians = figures["one download at 50 ms, MB/s"]
    assert medians["ours"] > 0 and medians[peer] > 0
    assert figures["memory at start, MB"][peer][1] > 0
    assert ("memory of an idle agent (gateway), kB" in figures) and "Non-2xx" not in (
        capsys.readouterr().out
    )


@pytest.mark.slow
@pytest.mark.long
def test_ours_is_measured_by_another_interpreter_too(monkeypatch, tmp_path):
    need_all("wrk")
    monkeypatch.setattr(bench_subjects, "PREPARE", "import sys; print(sys.executable)")
    rows = ("--row", "visitors", "--python", sys.executable)
    figures = measured(monkeypatch, tmp_path, *rows)
    for title, medians in figures.items():
        assert sum_of(medians["ours"]) > 0, title
        assert sum_of(medians[f"Python {platform.python_version()}"]) > 0, title


# The row yamux ------------------------------------------------------------------------------------


def measure_yamux(monkeypatch, folder):
    """The figures of the row yamux by their names, the shortest that they can be."""
    monkeypatch.setattr(bootstrap, "prepare", lambda need: sys.executable)
    path = folder / "figures.json"
    assert bench.main(["--row", "yamux", "--seconds", "0.01", "--json", str(path)]) == 0
    return {figures["what"]: figures for figures in json.loads(path.read_text())["yamux"]}


def test_the_bench_of_the_multiplexer_does_without_go(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda *arguments, **settings: None)
    figures = measure_yamux(monkeypatch, tmp_path)
    assert all(figure["ours"] > 0 for name, figure in figures.items() if "/s" in name)
    assert figures["one stream, MB/s"]["ratio"] > 0
    assert figures["echo, us"]["beside"] is None
    shown = capsys.readouterr().out
    assert shown.startswith("Go is not installed: left out are ")
    assert "one stream, MB/s" in shown and "round trip" not in shown


@pytest.mark.slow
def test_the_bench_of_the_multiplexer_shows_long_lines_and_go(capsys, monkeypatch, tmp_path):
    need("go")
    figures = measure_yamux(monkeypatch, tmp_path)
    assert figures["echo, us"]["ratio"] > 0
    assert figures["one stream, 200 ms round trip, MB/s"]["ratio"] > 0


def test_an_end_that_fails_ends_the_bench_in_a_sentence(capfd, monkeypatch):
    monkeypatch.setattr(bench_multiplexer, "ENDS", os.path.join(bootstrap.ROOT, "no such file"))
    monkeypatch.setattr(shutil, "which", lambda *arguments, **settings: None)
    monkeypatch.setattr(bootstrap, "prepare", lambda need: sys.executable)
    assert bench.main(["--row", "yamux"]) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("bench.py: tls: ")


@pytest.mark.parametrize("text", ["", "ACCESS_LOG", "=x", "A=1 B"])
def test_settings_that_are_none_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=VALUE"):
        bench.settings(text)


def test_settings_are_read_by_name_and_reach_the_gateway(monkeypatch):
    assert bench.settings("A=1 B=x=y") == {"A": "1", "B": "x=y"}
    started = {}
    monkeypatch.setattr(bench_subjects, "ask", lambda *command: "")
    monkeypatch.setattr(
        bench_subjects.Ours, "_start", lambda self, stack, role, *command, **s: started.update(s)
    )
    with contextlib.ExitStack() as stack:
        site = SimpleNamespace(python="python", folder="folder")
        bench_subjects.Ours(site, settings={"ACCESS_LOG": "-"})._gateway(stack)
    assert started["ACCESS_LOG"] == "-"
