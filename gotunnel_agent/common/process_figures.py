"""What the process uses of the machine, as metrics. Names and meanings are those that Prometheus'
own clients have. Figures that the system does not tell are left out."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from time import process_time, time

from .exposition import Metric, Sample, counter, gauge

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]  # mypy knows no module that may be missing

_BEGAN = time()  # about when the process began: this module is loaded at its start


def process_figures() -> Iterator[Metric]:
    yield counter(
        "process_cpu_seconds_total", "CPU time of the process, user and system.",
        Sample(process_time()),
    )  # fmt: skip
    yield gauge(
        "process_start_time_seconds", "When the process began, in seconds since 1970.",
        Sample(_BEGAN),
    )  # fmt: skip
    yield gauge("process_threads", "Threads of the process.", Sample(threading.active_count()))
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not Linux
        with open("/proc/self/statm", encoding="ascii") as file:
            virtual, resident = (int(word) for word in file.read().split()[:2])
        page = os.sysconf("SC_PAGE_SIZE")
        yield gauge(
            "process_resident_memory_bytes", "Memory that the process has in RAM.",
            Sample(resident * page),
        )  # fmt: skip
        yield gauge(
            "process_virtual_memory_bytes", "Addresses that the process has.",
            Sample(virtual * page),
        )  # fmt: skip
    with contextlib.suppress(OSError):
        yield gauge(
            "process_open_fds", "Open file descriptors.", Sample(len(os.listdir("/proc/self/fd")))
        )
    if resource is not None:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        yield gauge("process_max_fds", "Most open file descriptors.", Sample(most))
