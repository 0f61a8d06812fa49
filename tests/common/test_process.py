"""The process of each program: its signals, workers, log, standard output and CPUs."""

import io
import logging
import os
import queue
import subprocess
import sys
import threading
import weakref

import pytest
from support import ROOT, wait_until

from gotunnel import NoThread
from gotunnel_agent.common import process
from gotunnel_agent.common.process import Stopped, Workers, print_answer, stay_on_one_cpu


def no_more_threads(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_second_signal_ends_a_process_at_once_though_nobody_reads_its_standard_error():
    program = (
        "import os, signal, sys; from gotunnel_agent.common.process import Signals\n"
        "signals = Signals(); os.set_blocking(2, False)\n"
        "try:\n    while True: os.write(2, bytes(65536))\n"
        "except BlockingIOError: os.set_blocking(2, True)\n"
        "for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    read, write = os.pipe()
    try:
        command = [sys.executable, "-c", program]
        assert subprocess.run(command, cwd=ROOT, timeout=30, stderr=write).returncode == 1
    finally:
        os.close(read)
        os.close(write)


def test_a_stop_is_not_lost_behind_a_storm_of_other_signals():
    """The socket that they come by holds a few hundred."""
    code = (
        "import os, signal; from gotunnel_agent.common.process import Signals\n"
        "signals = Signals(hang_up=True)\n"
        "for _ in range(2000): os.kill(os.getpid(), signal.SIGHUP)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "signal.alarm(5)\n"
        "while signals.wait() != signal.SIGTERM: pass\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_workers_take_up_what_came_while_there_was_no_thread_and_complain_once(monkeypatch, caplog):
    called = threading.Semaphore(0)
    workers = Workers(2, "worker")
    with monkeypatch.context() as shortage:
        no_more_threads(shortage)
        for _ in range(3):
            workers.submit(called.release)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    workers.submit(called.release)
    for _ in range(4):
        assert called.acquire(timeout=10)
    assert workers.shutdown(10)


def test_workers_refuse_a_job_after_shutdown_so_that_its_caller_can_clean_up(caplog):
    workers = Workers(1, "worker")
    assert workers.shutdown(10)
    with pytest.raises(Stopped, match="shut down"):
        workers.submit(print, "never")
    assert caplog.text == ""


def test_workers_log_what_a_job_raises_and_go_on(caplog):
    called = threading.Event()
    workers = Workers(1, "worker")
    workers.submit(lambda: 1 / 0)
    workers.submit(called.set)
    assert called.wait(10)
    assert workers.shutdown(10)
    assert "thread worker_0: " in caplog.text and "ZeroDivisionError" in caplog.text


def test_workers_start_a_thread_only_if_none_is_spare():
    workers, names, go_on = Workers(3, "worker"), queue.SimpleQueue(), threading.Event()

    def job(wait):
        names.put(threading.current_thread().name)
        wait(10)

    for _ in range(5):
        workers.submit(job, lambda timeout: None)
        assert names.get(timeout=10) == "worker_0"
        wait_until(lambda: workers._spare == 1)
    for _ in range(5):
        workers.submit(job, go_on.wait)
    assert {names.get(timeout=10) for _ in range(3)} == {"worker_0", "worker_1", "worker_2"}
    assert names.empty()  # two wait for a thread
    go_on.set()
    assert workers.shutdown(10)
    assert names.qsize() == 2  # what was taken is done


def test_workers_that_were_not_needed_for_a_while_end_although_jobs_come_now_and_then(monkeypatch):
    monkeypatch.setattr(process, "IDLE_TIME", 0.05)
    workers, together = Workers(20, "worker"), threading.Barrier(20)
    for _ in range(20):
        workers.submit(together.wait, 10)
    wait_until(lambda: workers._spare == 20)

    def a_job_is_done_and_few_are_left():
        done = threading.Event()
        workers.submit(done.set)
        assert done.wait(10)
        return len(workers._threads) == process.KEPT_THREADS

    wait_until(a_job_is_done_and_few_are_left)
    assert len([t for t in threading.enumerate() if t.name.startswith("worker_")]) <= 3
    again = threading.Barrier(20)
    for _ in range(20):  # they come back when they are needed
        workers.submit(again.wait, 10)
    assert workers.shutdown(10) and not again.broken


def test_workers_that_are_prepared_have_a_thread_or_say_that_there_is_none(monkeypatch):
    workers = Workers(4, "worker")
    with monkeypatch.context() as shortage:
        no_more_threads(shortage)
        with pytest.raises(NoThread, match="ulimit -u"):
            workers.prepare()
    for _ in range(2):
        workers.prepare()
    assert len(workers._threads) == 1
    assert workers.shutdown(10)


def test_workers_keep_nothing_of_a_job_that_is_done():
    class Connection:
        pass

    workers, connection = Workers(1, "worker"), Connection()
    gone = weakref.ref(connection)
    workers.submit(id, connection)
    del connection
    wait_until(lambda: gone() is None)
    assert workers.shutdown(10)


def test_workers_that_many_threads_ask_do_each_job_once():
    workers, done = Workers(4, "worker"), queue.SimpleQueue()
    askers = [
        threading.Thread(target=lambda: [workers.submit(done.put, 1) for _ in range(1000)])
        for _ in range(4)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(10)
    assert workers.shutdown(10)
    assert done.qsize() == 4000
    assert workers._spare == len(workers._threads)


def test_shutdown_waits_no_longer_than_it_was_told():
    workers, go_on = Workers(1, "worker"), threading.Event()
    workers.submit(go_on.wait, 10)
    assert not workers.shutdown(0.01)
    go_on.set()
    assert workers.shutdown(10)


def test_job_that_hangs_keeps_no_process_alive():
    program = (
        "import threading, time\n"
        "from gotunnel_agent.common.process import Workers\n"
        "begun, workers = threading.Event(), Workers(2, 'worker')\n"
        "workers.submit(lambda: begun.set() or time.sleep(600))\n"
        "begun.wait()\n"
        "workers.shutdown(0.01)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=30).returncode == 0


def test_bug_is_logged_before_the_end_of_its_thread_counts_as_a_signal():
    program = (
        "import threading\n"
        "from gotunnel_agent.common.process import Signals, set_up_process\n"
        "set_up_process('info')\n"
        "signals = Signals()\n"
        "threading.Thread(target=signals.after, args=(lambda: 1 / 0,), daemon=True).start()\n"
        "raise SystemExit(signals.wait())\n"
    )
    for _ in range(5):
        ended = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, timeout=30, capture_output=True, text=True
        )
        assert ended.returncode == 0 and "ZeroDivisionError" in ended.stderr


def test_process_without_a_gil_keeps_all_cpus(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda pid, chosen: asked.append(chosen), raising=False
    )
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    stay_on_one_cpu(min)
    assert asked == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
@pytest.mark.parametrize(("cpus", "chosen"), [({0, 1}, {0}), ({3}, {3}), ({0, 1, 2}, None)])
def test_process_stays_on_one_cpu_of_a_small_machine_only(monkeypatch, cpus, chosen):
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, chosen: asked.append(chosen))
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, param: asked.append(policy))
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
    stay_on_one_cpu(min)
    assert asked == ([chosen, os.SCHED_BATCH] if chosen else [])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_process_may_be_forbidden_to_choose_how_it_is_scheduled(monkeypatch):
    def forbid(*arguments):
        raise PermissionError

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, chosen: None)
    monkeypatch.setattr(os, "sched_setscheduler", forbid)
    stay_on_one_cpu(min)


def test_a_line_that_comes_too_often_is_dropped_and_counted(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(process, "monotonic", lambda: clock[0])
    said = []
    handler = logging.Handler()
    handler.addFilter(process.LogLimit())
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.Logger("test")
    log.addHandler(handler)

    def complain(number):
        log.warning("visitor %d is 100%% wrong", number)

    for number in range(3 * process.LOG_LINES):
        complain(number)
    log.warning("another kind")
    assert len(said) == process.LOG_LINES + 1 and said[-1] == "another kind"
    clock[0] = process.LOG_PERIOD
    for number in range(2):
        complain(number)
    assert said[-2:] == [
        f"visitor 0 is 100% wrong ({2 * process.LOG_LINES} more like it were dropped)",
        "visitor 1 is 100% wrong",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_an_answer_may_name_files_that_are_no_text(monkeypatch, encoding):
    """File names may be invalid text, which a strict standard output cannot encode."""
    written = io.BytesIO()
    output = io.TextIOWrapper(written, encoding, errors="strict", newline="\n")
    monkeypatch.setattr(sys, "stdout", output)
    assert print_answer("program", lambda: print("b\udcfc.crt") or 7) == 7
    assert written.getvalue() == b"b\\udcfc.crt\n"


def test_an_error_of_a_file_is_not_taken_for_one_of_the_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(FileNotFoundError):
        print_answer("program", lambda: os.stat("/no/such/file"))
